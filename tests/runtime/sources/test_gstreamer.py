"""Pipelines: their text, and with GStreamer what happens to their frames, their times and their process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from duallora_edge.errors import SourceError
from duallora_edge.runtime.sources import gstreamer, gstreamer_child, open_source
from duallora_edge.runtime.sources.decoding import exists

Until = Callable[[Callable[[], object]], None]

needs_gstreamer = pytest.mark.skipif(
    not (exists("videotestsrc") and exists("valve")), reason="gst-inspect-1.0 does not find GStreamer's plugins"
)
LIVE = "videotestsrc is-live=true ! video/x-raw,framerate=30/1"
STALLS = f"{LIVE} ! queue ! valve drop=true"


def children(parent: int | None = None) -> list[int]:
    """The processes that a process has started; not the fork server and the browser of other tests."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if re.search(rb"multiprocessing|playwright", (entry / "cmdline").read_bytes()):
                continue
        except OSError:
            continue
        if fields[1] == str(parent or os.getpid()) and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def test_the_pipeline_of_a_csi_camera() -> None:
    assert gstreamer.csi_pipeline(1, (1920, 1080, 60), (360, 640), 3) == (
        "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM),format=NV12,width=1920,height=1080,framerate=60/1 "
        "! nvvidconv flip-method=3 interpolation-method=5 ! video/x-raw,format=BGRx,width=360,height=640"
    )


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("videotestsrc", ["videotestsrc"]),
        ("a b=c ! d", ["a", "b=c", "!", "d"]),
        (
            "filesrc location='/my files/a; rm b' ! decodebin",
            ["filesrc", "location=/my files/a; rm b", "!", "decodebin"],
        ),
    ],
)
def test_the_words_of_a_pipeline(pipeline: str, words: list[str]) -> None:
    assert gstreamer.split(pipeline) == words


@pytest.mark.parametrize(
    ("size", "newest", "tail"),
    [
        (
            (64, 48),
            True,
            "! queue leaky=downstream max-size-buffers=1 ! videoconvert ! videoscale "
            "! video/x-raw,format=RGB,width=64,height=48 ! appsink name=frames sync=false max-buffers=1 drop=true",
        ),
        (
            None,
            False,
            "! videoconvert ! video/x-raw,format=RGB ! appsink name=frames sync=false max-buffers=1 drop=false",
        ),
    ],
)
def test_the_end_of_a_pipeline(size: tuple[int, int] | None, newest: bool, tail: str) -> None:
    assert gstreamer.to_frames(["a", "!", "b"], size, newest) == ["a", "!", "b", *tail.split()]


def test_quotes_that_do_not_match() -> None:
    with pytest.raises(SourceError, match=r"cannot be parsed \(No closing quotation\)"):
        open_source("gst://filesrc location='a?width=4&height=4")


def test_without_gstreamer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = Path(gstreamer_child.__file__).read_text().replace("libgstreamer-1.0.so.0", "libnowhere.so.0")
    (tmp_path / "child.py").write_text(child)
    monkeypatch.setattr(gstreamer_child, "__file__", str(tmp_path / "child.py"))
    with pytest.raises(SourceError, match=r"not installed \(libnowhere.*apt install gstreamer"):
        open_source("csi://0")


@needs_gstreamer
@pytest.mark.parametrize("width", [64, 61, 62, 63])
def test_rows_of_every_width_stay_straight(width: int) -> None:
    """GStreamer pads rows to four bytes; the bars of a test card would lean if that were not known."""
    pipeline = f"videotestsrc num-buffers=3 pattern=smpte ! videoscale method=nearest-neighbour?width={width}&height=35"
    with open_source(f"gst://{pipeline}", live=False) as source:
        frames = list(source)
    assert [frame.pixels.shape for frame in frames] == [(35, width, 3)] * 3
    bars = frames[0].pixels[:20]  # the upper part of the test card: bars from top to bottom
    assert np.abs(bars[:, 2].astype(int) - bars[0, 2]).max() <= 1
    assert np.ptp(bars[0].astype(int), axis=0).min() > 150
    assert np.abs(bars[0].astype(int) - bars[19]).max() <= 1


@needs_gstreamer
def test_colours_are_in_rgb_order() -> None:
    with open_source("gst://videotestsrc num-buffers=1 pattern=red", size=(33, 17), live=False) as source:
        (frame,) = source
    assert frame.pixels.reshape(-1, 3).min(0).tolist() == [255, 0, 0]


@needs_gstreamer
def test_messages_of_the_driver_do_not_get_between_the_frames() -> None:
    """As the camera stack of a Jetson prints to standard output; more than a pipe holds must not stop it either."""
    noisy = "videotestsrc num-buffers=3 pattern=red ! tee name=t t. ! queue ! fdsink fd=1 t. ! queue"
    with open_source(f"gst://{noisy}?width=8&height=8", live=False) as source:
        assert [frame.pixels.mean() for frame in source] == [85, 85, 85]


@needs_gstreamer
def test_frames_have_the_time_of_their_capture() -> None:
    """Not of their arrival, which here is 0.4 s later."""
    delayed = f"{LIVE} ! queue max-size-buffers=0 max-size-bytes=0 min-threshold-time=400000000"
    with open_source(f"gst://{delayed}?width=16&height=16") as source:
        for frame, _ in zip(source, range(3), strict=False):
            assert 0.35 < time.monotonic() - frame.captured < 5
            assert abs((time.time() - frame.timestamp) - (time.monotonic() - frame.captured)) < 0.1


@needs_gstreamer
def test_frames_that_were_not_captured_live_have_the_time_of_their_arrival() -> None:
    before = time.monotonic()
    with open_source("gst://videotestsrc num-buffers=2", size=(16, 16), live=False) as source:
        assert all(before <= frame.captured <= time.monotonic() for frame in source)


@needs_gstreamer
@pytest.mark.parametrize("newest", [True, False])
def test_a_slow_reader_gets_the_newest_frame(newest: bool) -> None:
    """After a second at ten frames per second the next ones are not those that followed, except one on its way."""
    pipeline = "videotestsrc is-live=true ! video/x-raw,width=1280,height=720,framerate=10/1"  # more than a pipe holds
    words = gstreamer.to_frames(gstreamer.split(pipeline), (1280, 720), newest)
    capture = gstreamer.Pipeline(words, threading.Event())
    try:
        times = [getattr(capture.read(), "captured", 0.0)]
        time.sleep(1.5)
        times += [getattr(capture.read(), "captured", 0.0) for _ in range(3)]
        assert (times[-1] - times[0] > 0.7) is newest
    finally:
        capture.close()


@needs_gstreamer
@pytest.mark.parametrize(("asked", "given"), [(None, "nvv4l2decoder:MAX"), ("nvv4l2decoder:NONE",) * 2])
def test_the_hardware_decoder_comes_first(monkeypatch: pytest.MonkeyPatch, asked: str | None, given: str) -> None:
    """Unless the user says otherwise."""
    name = "GST_PLUGIN_FEATURE_RANK"
    monkeypatch.setenv(name, asked) if asked else monkeypatch.delenv(name, raising=False)
    with open_source(f"gst://{LIVE}?width=16&height=16"):
        (child,) = children()
        assert f"{name}={given}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")


@needs_gstreamer
def test_a_password_in_a_pipeline_is_not_among_the_processes() -> None:
    with open_source(f"gst://{LIVE} ! identity name=secret?width=16&height=16") as source:
        source.read()
        (child,) = children()
        for name in ("cmdline", "environ"):
            assert b"secret" not in Path(f"/proc/{child}/{name}").read_bytes()


@needs_gstreamer
def test_a_process_that_is_killed_is_started_again(until: Until) -> None:
    with open_source(f"gst://{LIVE}?width=64&height=48") as source:
        assert source.live and next(iter(source)).pixels.shape == (48, 64, 3)
        (child,) = children()
        os.kill(child, signal.SIGKILL)
        until(lambda: source.read(timeout=0.05) is None or source.stats.reconnects == 1)
        until(lambda: source.read(timeout=0.05) is not None and source.stats.reconnects == 1)
        assert source.stats.last_error == (
            "The GStreamer pipeline was killed by signal 9; check it with gst-launch-1.0."
        )
        assert children() != [child]
    assert children() == []


@needs_gstreamer
@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("nosuchelement", 'no element "nosuchelement"'),
        ("filesrc location=/nonexistent ! decodebin", "Resource not found"),
        ("videotestsrc num-buffers=0", "stopped sending frames"),
    ],
)
def test_a_pipeline_that_does_not_work_tells_why(pipeline: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        open_source(f"gst://{pipeline}?width=64&height=48")
    assert children() == []


@needs_gstreamer
def test_a_pipeline_that_sends_nothing_is_ended_on_close() -> None:
    with open_source(f"gst://{STALLS}?width=64&height=48", wait=True) as source:
        assert source.read(timeout=0.3) is None
        assert len(children()) == 1
    assert children() == []


@needs_gstreamer
@pytest.mark.parametrize("pipeline", [LIVE, STALLS])
def test_the_process_dies_with_its_parent(pipeline: str, until: Until) -> None:
    program = (
        "import time; from duallora_edge.runtime import open_source; "
        f"source = open_source('gst://{pipeline}?width=64&height=48', wait=True); print(flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        until(lambda: children(parent.pid))
        (child,) = children(parent.pid)
        parent.kill()
    until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split())


@needs_gstreamer
def test_many_pipelines_leave_nothing_behind(until: Until) -> None:
    def threads() -> int:
        return sum(thread.name.startswith("duallora-edge") for thread in threading.enumerate())

    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def once() -> None:
        with open_source(f"gst://{LIVE}?width=16&height=16") as source:
            source.read()

    once()
    until(lambda: threads() == 0)
    before = files()
    for _ in range(20):
        once()
    until(lambda: threads() == 0 and not children() and files() <= before)
