"""Opens a source from its address."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from duallora_edge.device_profiles.reader import did_you_mean
from duallora_edge.errors import SourceError
from duallora_edge.runtime.preprocess import MAX_PIXELS
from duallora_edge.runtime.sources.capture import Opener, mask
from duallora_edge.runtime.sources.files import SUFFIXES, Arrays, Images, OneImage
from duallora_edge.runtime.sources.policy import Policy
from duallora_edge.runtime.sources.source import Source

FORMS = (
    "/dev/video0, v4l2:///dev/video0, csi://0, gst://PIPELINE, rtsp://..., http://..., "
    "a video file, an image, a folder of images, or - for raw frames on standard input"
)
SCHEMES = ("v4l2", "csi", "gst", "rtsp", "rtsps", "http", "https")
MAX_SIDE = 16384
CSI_MODE = "1280x720@30"
_SIDES = {"width": (1, MAX_SIDE), "height": (1, MAX_SIDE)}
_CSI = {**_SIDES, "fps": (1, 1000), "flip": (0, 7), "mode": None}
_V4L2 = {**_SIDES, "fps": (1, 1000), "fourcc": None}
_PATTERNS = {
    "fourcc": (r"[ -~]{4}", "four characters such as MJPG"),
    "mode": (r"[1-9]\d{0,4}x[1-9]\d{0,4}@[1-9]\d{0,2}", "a mode of the sensor such as 1920x1080@30"),
}


def open_source(
    uri: str | Path | Iterable[Any],
    *,
    size: tuple[int, int] | None = None,
    color: str = "rgb",
    live: bool | None = None,
    rate: float | None = None,
    loop: bool = False,
    buffer: int = 1,
    stall: float = 5.0,
    max_backoff: float = 30.0,
    wait: bool = False,
) -> Source:
    """Open a camera, stream, video, folder, or anything that yields arrays, as a source of RGB frames.

    ``uri`` is one of

    - ``/dev/video0`` or ``v4l2:///dev/video0?width=1280&height=720&fps=30&fourcc=MJPG``: a V4L2 camera
    - ``csi://0?mode=1920x1080@30&width=640&height=360&flip=0``: a CSI camera of a Jetson: the number of the sensor, its
      mode, the size of the frames (by default that of the mode, after the flip), and the flip-method of nvvidconv
    - ``gst://PIPELINE?width=640&height=480``: a GStreamer pipeline that ends in raw video of that size
    - ``rtsp://``, ``rtsps://``, ``http://``, ``https://``: a video stream
    - a video file, an image, or a folder (its images, and those below, sorted by path)
    - ``-``: raw frames ``uint8 [H, W, 3]`` (or ``[H, W]``, see ``color``) on standard input
    - an iterable of arrays: uint8 or uint16, ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` or ``[H, W, 4]``

    Cameras and streams are live: if the reader is slow, the oldest waiting frame is dropped. A lost one is opened
    again, after 0.5 s and then after pauses that double up to ``max_backoff`` seconds; meanwhile reads time out. From
    all other sources every frame is delivered. A damaged picture is counted and left out.

    Args:
        uri: Where frames come from, as above.
        size: (width, height) of the frames, needed for ``-``, and for ``gst://`` without width and height.
        color: Channel order: ``"rgb"``, ``"bgr"`` or ``"gray"`` for ``-``, ``"rgb"`` or ``"bgr"`` for an iterable.
        live: Overrides what is live: with True, frames of a file are dropped like those of a camera; with False, no
            frame of a camera or stream is dropped, and its end is the end of the source.
        rate: Deliver this many frames per second; not for cameras and streams.
        loop: Start over at the end; not for cameras and streams.
        buffer: How many frames may wait for the reader.
        stall: Seconds without a frame after which a camera or stream counts as lost.
        max_backoff: The longest pause before a lost camera or stream is opened again, in seconds.
        wait: Keep trying if a camera or stream cannot be opened, instead of raising.

    Returns:
        The open source.

    Raises:
        SourceError: The source cannot be opened as asked.
        ValueError: A number is out of its range.
    """
    if buffer < 1:
        raise ValueError(f"buffer must be at least 1 frame, not {buffer}")
    for name, value in (("stall", stall), ("max_backoff", max_backoff), ("rate", rate)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a number above 0, not {value}")
    if size is not None:
        _check_size(size)
    opener, description, stream = _route(uri, size, color, stall, live is not False)
    if stream and (rate is not None or loop):
        raise SourceError(f"{mask(description)} sets its own pace and cannot start over; leave out rate and loop.")
    if loop and (isinstance(uri, Iterator) or (isinstance(uri, str) and uri == "-")):
        raise SourceError("A source that can be read only once cannot loop; give a list, a folder or a video.")
    live = stream if live is None else live
    return Source(opener, description, Policy(live, stream and live, buffer, rate, loop, stall, max_backoff, wait))


def _route(
    uri: str | Path | Iterable[Any], size: tuple[int, int] | None, color: str, stall: float, newest: bool
) -> tuple[Opener, str, bool]:
    """How to open ``uri``, its name in messages, and whether it is a camera or stream.

    ``newest``: a camera or stream may drop frames.
    """
    text = str(uri) if isinstance(uri, (str, Path)) else ""
    if text == "-":
        return (*_standard_input(size, color), False)
    if not isinstance(uri, (str, Path)):
        _leave_out("size", size is not None, "cameras, pipelines and raw frames")
        return (*_arrays(uri, color), False)
    _leave_out("color", color != "rgb", "raw frames and arrays")
    scheme, separator, rest = text.partition("://")
    if text.startswith("/dev/"):
        scheme, separator, rest = "v4l2", "://", text
    scheme = scheme.lower()
    if scheme == "v4l2":
        return _v4l2(rest, size), text, True
    if scheme == "csi":
        return _csi(rest, size, newest), text, True
    if scheme == "gst":
        return _gstreamer(rest, size, newest), text, True
    _leave_out("size", size is not None, "cameras, pipelines and raw frames")
    if not separator:
        return (*_path(Path(text).expanduser()), False)
    if scheme not in SCHEMES:
        raise SourceError(f"'{scheme}://' is not a source.{did_you_mean(scheme, SCHEMES)} A source is {FORMS}.")
    from duallora_edge.runtime.sources.decoding import open_stream

    return lambda stop: open_stream(text, stall, newest, stop), text, True


def _leave_out(name: str, given: bool, users: str) -> None:
    if given:
        raise SourceError(f"{name} is only for {users}; leave it out.")


def _arrays(arrays: object, color: str) -> tuple[Opener, str]:
    if not isinstance(arrays, Iterable) or isinstance(arrays, (bytes, bytearray)):
        raise SourceError(
            f"An object of type {type(arrays).__name__} is not a source; give an iterable of arrays, or {FORMS}."
        )
    if isinstance(arrays, np.ndarray) and arrays.ndim != 4:
        raise SourceError(
            f"An array of shape {arrays.shape} is not a sequence of frames; put a single frame into a list."
        )
    if color not in ("rgb", "bgr"):
        raise SourceError(f"color must be 'rgb' or 'bgr' for arrays, not {color!r}; leave it out for grey arrays.")
    return lambda stop: Arrays(arrays, color), f"frames from {type(arrays).__name__}"


def _standard_input(size: tuple[int, int] | None, color: str) -> tuple[Opener, str]:
    from duallora_edge.runtime.sources.raw import CHANNELS, RawFrames

    if size is None:
        raise SourceError("Raw frames on standard input need a size; give width and height.")
    if color not in CHANNELS:
        raise SourceError(f"color must be one of {', '.join(CHANNELS)}, not {color!r}.")
    if sys.stdin is None or sys.stdin.isatty():
        raise SourceError("Standard input is a terminal; pipe raw frames into it.")
    return lambda stop: RawFrames(sys.stdin.fileno(), size, color, stop), f"standard input, {size[0]}x{size[1]} {color}"


def _path(path: Path) -> tuple[Opener, str]:
    if path.is_dir():
        return lambda stop: Images(path), str(path)
    if not path.exists():
        folder = path.parent
        there = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=1)
        hint = f" Did you mean '{folder / near[0]}'?" if near else ""
        raise SourceError(f"'{mask(str(path))}' does not exist.{hint} A source is {FORMS}.")
    if path.suffix.lower() in SUFFIXES:
        return lambda stop: OneImage(path), str(path)
    from duallora_edge.runtime.sources.decoding import open_video

    return lambda stop: open_video(path, stop), str(path)


def _v4l2(rest: str, size: tuple[int, int] | None) -> Opener:
    device, _, query = rest.partition("?")
    device = f"/dev/video{device}" if device.isdecimal() else device
    if not device.startswith("/dev/"):
        raise SourceError(f"'{device}' is not a camera; write v4l2:///dev/video0 or v4l2://0.")
    options = _options(query, _V4L2)
    if size is not None:
        options = {"width": size[0], "height": size[1], **options}
    from duallora_edge.runtime.sources.video import Camera

    return lambda stop: Camera(device, options)


def _csi(rest: str, size: tuple[int, int] | None, newest: bool) -> Opener:
    sensor, _, query = rest.partition("?")
    if not sensor.isdecimal():
        raise SourceError(f"'{sensor}' is not a sensor number; write csi://0 for the first camera.")
    options = _options(query, _CSI)
    if "mode" in options and "fps" in options:
        raise SourceError("mode has the frame rate; leave out fps.")
    flip = options.get("flip", 0)

    def turned(width: int, height: int) -> tuple[int, int]:
        return (height, width) if flip % 2 else (width, height)  # the odd ones turn by 90 degrees

    width, height, fps = map(int, re.split("[x@]", options.get("mode", CSI_MODE)))
    out_width, out_height = size or turned(width, height)
    size = options.get("width", out_width), options.get("height", out_height)
    if "mode" not in options:  # that of the size of the frames
        width, height = turned(*size)
    _check_size((width, height))
    _check_size(size)
    from duallora_edge.runtime.sources.gstreamer import Pipeline, csi_pipeline, split, to_frames

    words = to_frames(
        split(csi_pipeline(int(sensor), (width, height, options.get("fps", fps)), size, flip)), size, newest
    )
    return lambda stop: Pipeline(words, stop)


def _gstreamer(rest: str, size: tuple[int, int] | None, newest: bool) -> Opener:
    # A pipeline may contain '?', so only an unmistakable query at the end counts as one.
    match = re.fullmatch(r"(.*)\?((?:(?:width|height)=\d+&?)+)", rest, re.DOTALL)
    pipeline, query = match.groups() if match else (rest, "")
    options = _options(query, _SIDES)
    width, height = size or (0, 0)
    size = options.get("width", width), options.get("height", height)
    if 0 in size or not pipeline.strip():
        raise SourceError("gst:// needs a pipeline and the size of its frames: gst://PIPELINE?width=640&height=480.")
    _check_size(size)
    from duallora_edge.runtime.sources.gstreamer import Pipeline, split, to_frames

    words = to_frames(split(pipeline), size, newest)
    return lambda stop: Pipeline(words, stop)


def _options(query: str, allowed: dict[str, Any]) -> dict[str, Any]:
    """The options after '?'; ``allowed`` gives the range of each, None for those of `_PATTERNS`."""
    options: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise SourceError(f"'{name}' is not an option of this source.{hint} Options: {', '.join(allowed)}.")
        if allowed[name] is None:
            pattern, meaning = _PATTERNS[name]
            if not re.fullmatch(pattern, text, re.ASCII):
                raise SourceError(f"{name} must be {meaning}, not '{text}'.")
            options[name] = text
            continue
        low, high = allowed[name]
        if not re.fullmatch(r"[0-9]{1,5}", text) or not low <= int(text) <= high:
            raise SourceError(f"{name} must be a number from {low} to {high}, not '{text}'.")
        options[name] = int(text)
    return options


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise SourceError(
            f"A size must have sides from 1 to {MAX_SIDE} and at most {MAX_PIXELS:,} pixels, not {width}x{height}."
        )
