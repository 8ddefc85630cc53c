"""Video files and RTSP streams: decoded by the hardware of a Jetson where GStreamer has it, by OpenCV elsewhere."""

from __future__ import annotations

import functools
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from duallora_edge.errors import SourceError
from duallora_edge.runtime.device.probes import first_line
from duallora_edge.runtime.sources import video
from duallora_edge.runtime.sources.capture import Capture, Picture
from duallora_edge.runtime.sources.gstreamer import DECODER, Pipeline, to_frames

INSPECT = "gst-inspect-1.0"
INSPECT_S = 30.0  # the first call after an installation looks through all plugins
FIRST_FRAME_S = 8.0  # a decoder that hangs must leave time for the other one
CONVERTER = "nvvidconv"  # from the memory of the decoder to BGRx in ordinary memory


@functools.cache
def exists(element: str) -> bool:
    """Whether GStreamer has an element; asked once."""
    program = shutil.which(INSPECT)
    if program is None:
        return False
    command = [program, "--exists", element]
    try:
        return subprocess.run(command, capture_output=True, timeout=INSPECT_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def quoted(name: str, value: str) -> str:
    """A property of an element as a word of a pipeline, with a value of any characters."""
    value = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{value}"'


def decode() -> str:
    """Whatever the codec: decodebin takes the decoder of the highest rank that accepts it."""
    return f"decodebin ! {CONVERTER} ! video/x-raw,format=BGRx"


def stream_pipeline(address: str) -> list[str]:
    """The words of a pipeline that decodes the video of an RTSP stream."""
    tail = f"latency=0 protocols=tcp ! application/x-rtp,media=video ! {decode()}"
    return ["rtspsrc", quoted("location", address), *tail.split()]


def video_pipeline(path: Path) -> list[str]:
    """The words of a pipeline that decodes a video file, turned as the file says."""
    tail = f"! {decode()} ! videoflip video-direction=auto"
    return ["filesrc", quoted("location", str(path.absolute())), *tail.split()]


def open_stream(address: str, stall: float, newest: bool, stop: threading.Event) -> Capture:
    """Open a stream; see `video.Stream`. ``newest``: a frame that waits gives way to a newer one."""

    def software() -> Capture:
        return video.Stream(address, stall)

    if not address.lower().startswith(("rtsp://", "rtsps://")):
        return software()
    return _open(to_frames(stream_pipeline(address), None, newest), None, stop, software)


def open_video(path: Path, stop: threading.Event) -> Capture:
    """Open a video file; see `video.Video`."""
    return _open(to_frames(video_pipeline(path), None, False), str(path), stop, lambda: video.Video(path))


def _open(words: Sequence[str], name: str | None, stop: threading.Event, software: Callable[[], Capture]) -> Capture:
    if not (exists(DECODER) and exists(CONVERTER)):
        return software()
    try:
        return _Decoded(words, name, stop)
    except SourceError as error:
        if stop.is_set():
            raise
        capture = software()
        capture.note = f"decoded by OpenCV, because the hardware did not: {first_line(error)}"
        return capture


class _Decoded(Pipeline):
    """A pipeline that has given its first frame. Raises `SourceError` when none comes."""

    def __init__(self, words: Sequence[str], name: str | None, stop: threading.Event) -> None:
        super().__init__(words, stop)
        self._name, self._count = name, 0
        timer = threading.Timer(FIRST_FRAME_S, self._process.kill)
        timer.start()
        try:
            self._first = super().read()
            if self._first is None:
                raise SourceError("The pipeline gave no frame.")
        except BaseException:
            self.close()
            raise
        finally:
            timer.cancel()

    def read(self) -> Picture | None:
        picture, self._first = self._first, None
        try:
            picture = picture or super().read()
        except SourceError as error:
            if self._name is None:
                raise
            self.note = f"only {self._count} frames of {self._name} could be read: {first_line(error)}"
            return None
        if picture is None:
            return None
        self._count += 1
        return picture._replace(name=self._name)
