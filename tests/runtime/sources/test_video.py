"""Videos written here and then cut, streams that stall and come back, and what is said about a camera."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duallora_edge.errors import SourceError
from duallora_edge.runtime.sources import open_source, video
from duallora_edge.runtime.sources.video import Camera

cv2 = pytest.importorskip("cv2")


def until_connected(source: Any, connected: bool) -> Callable[[], bool]:
    def look() -> bool:
        source.read(timeout=0.05)
        return source.stats.connected is connected

    return look


@pytest.mark.parametrize(("name", "fourcc"), [("film.avi", "MJPG"), ("film.mp4", "mp4v")])
def test_every_frame_of_a_video_in_order(make_video: Callable[..., Path], name: str, fourcc: str) -> None:
    path = make_video(name, 20, fourcc)
    with open_source(path) as source:
        assert not source.live
        frames = list(source)
        assert [frame.sequence for frame in frames] == list(range(20))
        assert {frame.name for frame in frames} == {str(path)}
        for number, frame in enumerate(frames):
            assert frame.pixels.shape == (48, 64, 3) and frame.pixels.dtype == np.uint8
            assert abs(float(frame.pixels.mean()) - 8 * number) < 5
        assert (source.stats.captured, source.stats.note) == (20, None)


def test_colours_are_in_rgb_order(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "red.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    writer.write(np.full((48, 64, 3), (0, 0, 250), np.uint8))  # OpenCV's red
    writer.release()
    with open_source(tmp_path / "red.avi") as source:
        red, green, blue = next(iter(source)).pixels[20, 30]
    assert red > 200 and green < 50 and blue < 50


def test_a_video_starts_over(make_video: Callable[..., Path]) -> None:
    with open_source(make_video(frames=3), loop=True) as source:
        frames = [frame for frame, _ in zip(source, range(8), strict=False)]
    assert [round(float(frame.pixels.mean()) / 8) for frame in frames] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [frame.sequence for frame in frames] == list(range(8))


def cut(data: bytes) -> bytes:
    return data[: len(data) * 6 // 10]


def blank(data: bytes) -> bytes:
    start, end = len(data) // 2, len(data) * 7 // 10
    return data[:start] + bytes(end - start) + data[end:]


@pytest.mark.parametrize(
    ("name", "fourcc", "damage"),
    [("film.avi", "MJPG", cut), ("film.mkv", "mp4v", cut), ("film.avi", "MJPG", blank), ("film.mp4", "mp4v", blank)],
)
def test_a_damaged_video_gives_its_good_frames_and_a_note(
    make_video: Callable[..., Path], name: str, fourcc: str, damage: Callable[[bytes], bytes]
) -> None:
    path = make_video(name, 30, fourcc, noise=True)
    path.write_bytes(damage(path.read_bytes()))
    with open_source(path) as source:
        count = len(list(source))
        assert 3 <= count <= 28
        assert source.stats.note == f"only {count} of 30 frames of {path} could be read; it may be damaged"


@pytest.mark.parametrize(
    ("name", "fourcc", "damage"),
    [
        ("film.mp4", "mp4v", cut),
        ("film.avi", "MJPG", lambda data: data[:40]),
        ("film.avi", "MJPG", lambda data: b""),
        ("film.mp4", "mp4v", lambda data: b"no video" * 100),
    ],
)
def test_a_video_without_one_frame_is_an_error(
    make_video: Callable[..., Path], name: str, fourcc: str, damage: Callable[[bytes], bytes]
) -> None:
    path = make_video(name, 20, fourcc)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceError, match="No frame"):
        open_source(path)


@pytest.mark.parametrize("kind", ["http_stream", "rtsp_stream"])
def test_a_stream_that_stalls_comes_back(
    kind: str, request: pytest.FixtureRequest, until: Callable[[Callable[[], object]], None]
) -> None:
    stream = request.getfixturevalue(kind)
    with open_source(stream.url, stall=0.5) as source:
        assert source.live
        frame = next(iter(source))
        assert frame.pixels.shape == (48, 64, 3) and abs(float(frame.pixels.mean()) - 100) < 3
        stream.stalled.set()
        until(until_connected(source, False))
        stream.stalled.clear()
        until(until_connected(source, True))
        stats = source.stats
        assert stats.reconnects == 1 and stats.timeouts > 0 and stats.last_error is not None
        assert "secret" not in source.description + repr(stats)
        next(iter(source))


def test_rtsp_goes_over_tcp(rtsp_stream: Any) -> None:
    with open_source(rtsp_stream.url):
        setups = [request for request in rtsp_stream.requests if request.startswith("SETUP")]
        assert setups and "RTP/AVP/TCP" in setups[-1]


@pytest.mark.parametrize("address", ["rtsp://user:secret@127.0.0.1:9/", "http://127.0.0.1:9/?token=secret"])
def test_an_address_without_a_server_is_an_error(address: str) -> None:
    with pytest.raises(SourceError, match="check the address") as caught:
        open_source(address)
    assert "secret" not in str(caught.value)


def test_a_wrong_password_is_an_error_that_does_not_show_it(rtsp_stream: Any) -> None:
    with pytest.raises(SourceError, match="password") as caught:
        open_source(rtsp_stream.url.replace("secret", "hidden"))
    assert "hidden" not in str(caught.value)


def test_a_stream_is_waited_for(
    http_stream: Any, until: Callable[[Callable[[], object]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "OPEN_TIMEOUT_S", 0.3)
    http_stream.stalled.set()
    with open_source(http_stream.url, stall=0.5, wait=True) as source:
        until(lambda: source.read(timeout=0.05) is None and source.stats.last_error)
        http_stream.stalled.clear()
        until(until_connected(source, True))
        assert source.stats.reconnects == 0


def test_a_camera_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="/dev/video77 does not exist; connect the camera"):
        open_source("/dev/video77")
    (tmp_path / "video0").write_bytes(b"")
    with pytest.raises(SourceError, match="is not a camera"):
        Camera(str(tmp_path / "video0"), {})


def test_the_options_of_a_camera(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format is set before the size, and frames come out as RGB."""
    calls: list[tuple[int, float]] = []

    class Device:
        def __init__(self, name: str, backend: int) -> None:
            assert (name, backend) == (str(tmp_path / "video0"), cv2.CAP_V4L2)

        def isOpened(self) -> bool:  # noqa: N802
            return True

        def set(self, key: int, value: float) -> None:
            calls.append((key, value))

        def read(self) -> tuple[bool, np.ndarray]:
            return True, np.full((4, 6, 3), (1, 2, 3), np.uint8)

    (tmp_path / "video0").touch()
    monkeypatch.setattr(cv2, "VideoCapture", Device)
    camera = Camera(str(tmp_path / "video0"), {"width": 1280, "height": 720, "fps": 30, "fourcc": "MJPG"})
    assert calls[0] == (cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG"))
    assert dict(calls[1:]) == {
        cv2.CAP_PROP_FRAME_WIDTH: 1280,
        cv2.CAP_PROP_FRAME_HEIGHT: 720,
        cv2.CAP_PROP_FPS: 30,
    }
    picture = camera.read()
    assert picture is not None and picture.pixels[0, 0].tolist() == [3, 2, 1]


def test_without_opencv_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "film.mp4").touch()
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(SourceError, match="pip install 'opencv-python-headless>="):
        open_source(tmp_path / "film.mp4")
