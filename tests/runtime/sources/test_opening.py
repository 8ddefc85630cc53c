"""What may be given to `open_source`, and what is said about the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import duallora_edge.runtime
from duallora_edge.errors import SourceError
from duallora_edge.runtime.sources import Frame, Source, decoding, gstreamer, open_source, opening, video
from duallora_edge.runtime.sources.capture import Capture, Picture

GREY = [np.zeros((2, 2), np.uint8)]


def test_the_names_of_the_package() -> None:
    assert (duallora_edge.runtime.open_source, duallora_edge.runtime.Source) == (open_source, Source)
    assert duallora_edge.runtime.Frame is Frame


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments with which cameras, pipelines and streams are opened, instead of opening them."""
    calls: list[tuple[Any, ...]] = []

    class Fake(Capture):
        def __init__(self, *arguments: Any) -> None:
            calls.append(arguments)

        def read(self) -> Picture:
            return Picture(np.zeros((2, 2, 3), np.uint8))

    for module, name in ((gstreamer, "Pipeline"), (video, "Camera"), (video, "Stream"), (video, "Video")):
        monkeypatch.setattr(module, name, Fake)
    monkeypatch.setattr(decoding, "exists", lambda element: False)
    return calls


def csi(sensor: int, mode: tuple[int, int, int], size: tuple[int, int], flip: int = 0) -> tuple[list[str]]:
    return gst(gstreamer.csi_pipeline(sensor, mode, size, flip), size)


def gst(pipeline: str, size: tuple[int, int]) -> tuple[list[str]]:
    return (gstreamer.to_frames(pipeline.split(), size, True),)


@pytest.mark.parametrize(
    ("uri", "size", "arguments"),
    [
        ("/dev/video0", None, ("/dev/video0", {})),
        (Path("/dev/video1"), None, ("/dev/video1", {})),
        ("v4l2://2", (640, 480), ("/dev/video2", {"width": 640, "height": 480})),
        (
            "v4l2:///dev/v4l/by-id/cam?width=320&height=240&fps=15&fourcc=MJPG",
            None,
            ("/dev/v4l/by-id/cam", {"width": 320, "height": 240, "fps": 15, "fourcc": "MJPG"}),
        ),
        ("csi://0", None, csi(0, (1280, 720, 30), (1280, 720))),
        ("csi://1", (640, 480), csi(1, (640, 480, 30), (640, 480))),
        ("CSI://0?width=1920&height=1080&fps=60&flip=2", None, csi(0, (1920, 1080, 60), (1920, 1080), 2)),
        ("csi://0?mode=1920x1080@60", None, csi(0, (1920, 1080, 60), (1920, 1080))),
        ("csi://0?mode=1920x1080@60", (640, 360), csi(0, (1920, 1080, 60), (640, 360))),
        ("csi://0?mode=1920x1080@60&width=640&height=360", None, csi(0, (1920, 1080, 60), (640, 360))),
        ("csi://0?flip=1", None, csi(0, (1280, 720, 30), (720, 1280), 1)),
        ("csi://0?flip=4", None, csi(0, (1280, 720, 30), (1280, 720), 4)),
        ("csi://0?flip=3", (360, 640), csi(0, (640, 360, 30), (360, 640), 3)),
        ("csi://0?mode=1920x1080@30&flip=5", None, csi(0, (1920, 1080, 30), (1080, 1920), 5)),
        ("csi://0?mode=1920x1080@30&flip=7", (360, 640), csi(0, (1920, 1080, 30), (360, 640), 7)),
        ("gst://a ! b?width=64&height=48", None, gst("a ! b", (64, 48))),
        ("gst://a location=http://h/?x=1", (64, 48), gst("a location=http://h/?x=1", (64, 48))),
        ("rtsp://h/live?width=5", None, ("rtsp://h/live?width=5", 5.0)),
        ("https://h/live", None, ("https://h/live", 5.0)),
    ],
)
def test_cameras_and_streams(
    opened: list[tuple[Any, ...]], uri: Any, size: tuple[int, int] | None, arguments: tuple[Any, ...]
) -> None:
    with open_source(uri, size=size) as source:
        assert source.live
    assert opened[0][: len(arguments)] == arguments


@pytest.mark.parametrize("live", [None, True, False])
def test_only_a_live_pipeline_drops_frames(opened: list[tuple[Any, ...]], live: bool | None) -> None:
    with open_source("csi://0", live=live):
        assert ("drop=true" in opened[0][0]) is ("leaky=downstream" in opened[0][0]) is (live is not False)


def test_a_file_as_a_camera_and_a_camera_as_a_file(opened: list[tuple[Any, ...]], tmp_path: Path) -> None:
    (tmp_path / "film.mp4").touch()
    for uri, live in ((tmp_path / "film.mp4", False), ("rtsp://h/", True)):
        with open_source(uri) as source:
            assert source.live is live
        with open_source(uri, live=not live) as source:
            assert source.live is not live


@pytest.mark.parametrize(
    ("uri", "arguments", "message"),
    [
        ("rstp://h/", {}, "'rstp://' is not a source. Did you mean 'rtsp'?"),
        ("ftp://h/", {}, "A source is /dev/video0, "),
        ("nothing.mp4", {}, "'nothing.mp4' does not exist. A source is"),
        ("v4l2://camera", {}, "write v4l2:///dev/video0 or v4l2://0"),
        ("csi://", {}, "write csi://0 for the first camera"),
        ("csi://0?widht=640", {}, "'widht' is not an option of this source. Did you mean 'width'? Options: width,"),
        ("csi://0?flip=9", {}, "flip must be a number from 0 to 7, not '9'"),
        ("csi://0?fps=", {}, "fps must be a number from 1 to 1000, not ''"),
        ("csi://0?mode=1920x1080", {}, "mode must be a mode of the sensor such as 1920x1080@30, not '1920x1080'"),
        ("csi://0?mode=1920x1080@30&fps=60", {}, "mode has the frame rate; leave out fps"),
        ("csi://0?mode=16384x16384@30&width=4&height=4", {}, "not 16384x16384"),
        ("csi://0?mode=640x480@30", {"rate": 5}, "csi://0?mode=640x480@30 sets its own pace"),
        ("csi://0?width=-5", {}, "width must be a number from 1 to 16384"),
        ("v4l2://0?fourcc=MJPEG", {}, "fourcc must be four characters such as MJPG"),
        ("gst://videotestsrc", {}, "gst:// needs a pipeline and the size of its frames"),
        ("gst://?width=4&height=4", {}, "gst:// needs a pipeline"),
        ("gst://videotestsrc?width=16384&height=16384", {}, "A size must have sides from 1 to 16384"),
        ("csi://0?width=16384&height=16384", {}, "not 16384x16384"),
        ("-", {"size": (0, 4)}, "not 0x4"),
        ("-", {}, "need a size"),
        ("-", {"size": (4, 4), "color": "yuv"}, "color must be one of rgb, bgr, gray"),
        ("-", {"size": (4, 4), "loop": True}, "can be read only once"),
        (iter(GREY), {"loop": True}, "can be read only once"),
        ("/dev/video0", {"rate": 5}, "sets its own pace"),
        ("rtsp://u:secret@h/", {"loop": True}, r"rtsp://***@h/ sets its own pace"),
        ("rtsp://h/", {"size": (4, 4)}, "size is only for cameras, pipelines and raw frames"),
        (".", {"size": (4, 4)}, "size is only for"),
        (GREY, {"size": (4, 4)}, "size is only for"),
        (".", {"color": "bgr"}, "color is only for raw frames and arrays"),
        (GREY, {"color": "gray"}, "leave it out for grey arrays"),
        (5, {}, "type int is not a source; give an iterable"),
        (b"data", {}, "is not a source"),
        (np.zeros((4, 4, 3), np.uint8), {}, "put a single frame into a list"),
    ],
)
def test_what_cannot_be_opened(uri: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(uri, **arguments)
    assert message in str(caught.value)


def test_a_path_that_is_nearly_right(tmp_path: Path) -> None:
    (tmp_path / "kitchen.mp4").touch()
    with pytest.raises(SourceError, match=f"Did you mean '{tmp_path / 'kitchen.mp4'}'"):
        open_source(tmp_path / "kitchn.mp4")


@pytest.mark.parametrize(
    "arguments",
    [
        {"buffer": 0},
        {"stall": 0},
        {"max_backoff": -1},
        {"rate": 0},
        {"rate": float("nan")},
        {"rate": float("inf")},
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        open_source(GREY, **arguments)


def test_every_form_is_named() -> None:
    assert all(f"{scheme}://" in opening.FORMS for scheme in opening.SCHEMES if scheme not in ("rtsps", "https"))
