"""Which decoder is chosen; and with GStreamer the pipelines themselves, with software in the place of the hardware."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duallora_edge.errors import SourceError
from duallora_edge.runtime.sources import decoding, open_source, video
from duallora_edge.runtime.sources.capture import Capture, Picture
from duallora_edge.runtime.sources.gstreamer import to_frames

pytest.importorskip("cv2")

PYTHON = "/usr/bin/python3"  # the system's, for which distributions package GStreamer's bindings
ENCODERS = {
    "h264": ("x264enc tune=zerolatency speed-preset=ultrafast key-int-max=15", "rtph264pay"),
    "h265": ("x265enc tune=zerolatency speed-preset=ultrafast key-int-max=15", "rtph265pay"),
}
NEEDED = ("x264enc", "x265enc", "avdec_h264", "avdec_h265", "h264parse", "h265parse", "qtmux", "rtspsrc", "videoflip")
MISSING = [element for element in NEEDED if not decoding.exists(element)]
needs_codecs = pytest.mark.skipif(bool(MISSING), reason=f"GStreamer lacks {', '.join(MISSING)}")


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Software elements in the place of those of a Jetson."""
    monkeypatch.setattr(decoding, "DECODER", "avdec_h264")
    monkeypatch.setattr(decoding, "CONVERTER", "videoconvert")


@pytest.fixture
def rtsp_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a real RTSP server with the codec of the parameter."""
    check = "import gi; gi.require_version('GstRtspServer', '1.0')"
    if not Path(PYTHON).exists() or subprocess.run([PYTHON, "-c", check], capture_output=True).returncode:
        pytest.skip("gir1.2-gst-rtsp-server-1.0 or python3-gi is not installed")
    command = [PYTHON, str(Path(__file__).with_name("rtsp_server.py")), *ENCODERS[request.param]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"rtsp://user:secret@127.0.0.1:{server.stdout.readline().strip()}/live"
        server.kill()


def encode(path: Path, encoder: str, *more: str) -> Path:
    source = "videotestsrc num-buffers=20 pattern=ball ! video/x-raw,format=I420,width=160,height=120,framerate=10/1"
    words = [*source.split(), "!", *encoder.split(), *more, "!", "qtmux", "!", "filesink", f"location={path}"]
    subprocess.run(["gst-launch-1.0", "-q", *words], check=True, timeout=60)
    return path


def test_the_pipeline_of_a_stream() -> None:
    assert decoding.stream_pipeline('rtsp://u:a"b\\c@h/live?x=1 2') == [
        *("rtspsrc", 'location="rtsp://u:a\\"b\\\\c@h/live?x=1 2"', "latency=0", "protocols=tcp", "!"),
        *("application/x-rtp,media=video", "!", "decodebin", "!", "nvvidconv", "!", "video/x-raw,format=BGRx"),
    ]


def test_the_pipeline_of_a_video() -> None:
    assert decoding.video_pipeline(Path("/films/my film.mp4")) == [
        *("filesrc", 'location="/films/my film.mp4"', "!", "decodebin", "!", "nvvidconv", "!"),
        *("video/x-raw,format=BGRx", "!", "videoflip", "video-direction=auto"),
    ]


@pytest.mark.parametrize(
    ("script", "answers"),
    [
        ('echo "$@" >> "$0.log"; [ "$2" = there ]', {"there": True, "missing": False}),
        (None, {"there": False}),
    ],
)
def test_an_element_is_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, answers: dict[str, bool]
) -> None:
    program = tmp_path / "gst-inspect-1.0"
    if script:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    decoding.exists.cache_clear()
    try:
        for _ in range(2):
            assert {element: decoding.exists(element) for element in answers} == answers
    finally:
        decoding.exists.cache_clear()
    if script:
        assert Path(f"{program}.log").read_text().splitlines() == [f"--exists {element}" for element in answers]


class Fake(Capture):
    """Remembers how it was made."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def read(self) -> Picture | None:
        return Picture(np.zeros((2, 2, 3), np.uint8))


class Broken(Fake):
    def __init__(self, *arguments: Any) -> None:
        raise SourceError("No such decoder.")


class Software(Fake):
    pass


@pytest.mark.parametrize(
    ("address", "there", "hardware", "expected", "note"),
    [
        ("rtsp://h/", {"nvv4l2decoder", "nvvidconv"}, Fake, Fake, None),
        ("RTSPS://h/", {"nvv4l2decoder", "nvvidconv"}, Fake, Fake, None),
        ("film.mp4", {"nvv4l2decoder", "nvvidconv"}, Fake, Fake, None),
        ("http://h/", {"nvv4l2decoder", "nvvidconv"}, Fake, Software, None),
        ("rtsp://h/", {"nvv4l2decoder"}, Fake, Software, None),
        ("film.mp4", {"nvvidconv"}, Fake, Software, None),
        ("rtsp://h/", {"nvv4l2decoder", "nvvidconv"}, Broken, Software, "the hardware did not: No such decoder."),
        ("film.mp4", {"nvv4l2decoder", "nvvidconv"}, Broken, Software, "the hardware did not: No such decoder."),
    ],
)
def test_who_decodes(
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    there: set[str],
    hardware: type[Fake],
    expected: type[Fake],
    note: str | None,
) -> None:
    monkeypatch.setattr(decoding, "exists", lambda element: element in there)
    monkeypatch.setattr(decoding, "_Decoded", hardware)
    monkeypatch.setattr(video, "Stream", Software)
    monkeypatch.setattr(video, "Video", Software)
    stop = threading.Event()
    if "://" in address:
        capture = decoding.open_stream(address, 5.0, True, stop)
    else:
        capture = decoding.open_video(Path(address), stop)
    assert type(capture) is expected
    assert note in capture.note if note and capture.note else capture.note is note


@needs_codecs
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("rtsp_server", list(ENCODERS), indirect=True)
def test_a_stream_of_a_real_server(
    rtsp_server: str, hard: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hard:
        request.getfixturevalue("hardware")
        monkeypatch.setattr(video, "Stream", Broken)
    with open_source(rtsp_server) as source:
        frames = [frame for frame, _ in zip(source, range(5), strict=False)]
        assert all(0 <= time.monotonic() - frame.captured < 5 for frame in frames)
    for frame in frames:
        assert frame.pixels.shape == (240, 320, 3) and frame.name is None
        assert np.abs(frame.pixels[120, 160].astype(int) - (255, 0, 0)).max() < 8
    assert "secret" not in source.description + repr(source.stats)


@needs_codecs
@pytest.mark.usefixtures("hardware")
@pytest.mark.parametrize("rtsp_server", ["h264"], indirect=True)
def test_a_wrong_password_is_an_error_that_does_not_show_it(rtsp_server: str) -> None:
    with pytest.raises(SourceError, match="check the address, the password") as caught:
        open_source(rtsp_server.replace("secret", "hidden"))
    assert "hidden" not in str(caught.value)


@needs_codecs
@pytest.mark.parametrize(
    ("name", "encoder", "more"),
    [
        ("film.mp4", "x264enc", ()),
        ("film.mov", "x265enc speed-preset=ultrafast", ("!", "h265parse")),
        ("a \"film\" of 'mine' ! \\ b=c.mp4", "x264enc", ()),
        ("turned.mp4", "x264enc", ("!", "taginject", "tags=image-orientation=rotate-90")),
        ("film.mp4", "avenc_mpeg4", ()),
    ],
)
def test_both_ways_give_the_same_frames(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    encoder: str,
    more: tuple[str, ...],
) -> None:
    path = encode(tmp_path / "film", encoder, *more).rename(tmp_path / name)
    with open_source(path) as source:
        soft = list(source)
    request.getfixturevalue("hardware")
    monkeypatch.setattr(video, "Video", Broken)
    with open_source(path) as source:
        assert not source.live
        hard = list(source)
        assert source.stats.note is None
    assert len(hard) == len(soft) == 20 and {frame.name for frame in hard} == {str(path)}
    for one, other in zip(hard, soft, strict=True):
        assert one.pixels.shape == other.pixels.shape
        assert np.abs(one.pixels.astype(int) - other.pixels).mean() < 3


@needs_codecs
@pytest.mark.parametrize(
    ("converter", "patience", "reason"),
    [
        ("nosuchconverter", 60.0, 'ended with code 1 (ERROR: no element "nosuchconverter")'),
        ("videoconvert ! identity sleep-time=100000000", 0.5, "was killed by signal 9"),  # hangs
    ],
)
def test_hardware_that_does_not_work(
    make_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, converter: str, patience: float, reason: str
) -> None:
    monkeypatch.setattr(decoding, "exists", lambda element: True)
    monkeypatch.setattr(decoding, "CONVERTER", converter)
    monkeypatch.setattr(decoding, "FIRST_FRAME_S", patience)
    with open_source(make_video(frames=5)) as source:
        assert len(list(source)) == 5
        note = source.stats.note or ""
    assert note.startswith("decoded by OpenCV, because the hardware did not: The GStreamer pipeline") and reason in note


@needs_codecs
def test_a_video_that_breaks_gives_its_good_frames_and_a_note() -> None:
    pipeline = "videotestsrc num-buffers=50 ! identity error-after=20"
    capture = decoding._Decoded(to_frames(pipeline.split(), None, False), "film.mp4", threading.Event())
    try:
        count = len(list(iter(capture.read, None)))
        assert 1 <= count < 20
        assert (capture.note or "").startswith(f"only {count} frames of film.mp4 could be read: The GStreamer pipeline")
    finally:
        capture.close()


@needs_codecs
@pytest.mark.usefixtures("hardware")
def test_a_stream_that_stalls_comes_back(rtsp_stream: Any, until: Callable[[Callable[[], object]], None]) -> None:
    with open_source(rtsp_stream.url, stall=0.5) as source:
        frame = next(iter(source))
        assert frame.pixels.shape == (48, 64, 3) and abs(float(frame.pixels.mean()) - 100) < 3
        rtsp_stream.stalled.set()
        until(lambda: source.read(timeout=0.05) is None and not source.stats.connected)
        rtsp_stream.stalled.clear()
        until(lambda: source.read(timeout=0.05) is not None and source.stats.connected)
        assert source.stats.reconnects == 1 and "secret" not in repr(source.stats)
    assert "RTP/AVP/TCP" in [request for request in rtsp_stream.requests if request.startswith("SETUP")][-1]
