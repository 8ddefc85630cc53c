"""Runs a GStreamer pipeline and writes its frames to a file descriptor: the child process of `gstreamer.Pipeline`.

It is a program that imports nothing of the project: ``gstreamer_child.py PARENT FD``, with the words of the pipeline as
JSON on standard input, because everybody can read the arguments of a process, and an address may contain a password.
The pipeline ends in an appsink of the name `SINK` that receives RGB. Each frame is a `HEADER`, which is its width, its
height and the moment of its capture (seconds of `time.monotonic`, NaN if unknown), then its rows, padded to four bytes.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import struct
import sys
import time
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from types import SimpleNamespace
from typing import Any

LIBRARIES = ("libgstreamer-1.0.so.0", "libgstapp-1.0.so.0")
SINK = "frames"
HEADER = struct.Struct("=IId")
PAUSED, PLAYING, NULL = 3, 4, 1  # GstState
FAILURE, NO_PREROLL = 0, 3  # GstStateChangeReturn; a live source has no preroll
ERROR = 2  # GstMessageType
TIME = 3  # GstFormat
NO_TIME = 2**64 - 1
WAIT_NS = 100_000_000

# The functions that are used, each with the types of its result and its arguments.
FUNCTIONS = {
    "gst_init": (None, c_void_p, c_void_p),
    "gst_parse_launchv": (c_void_p, POINTER(c_char_p), POINTER(c_void_p)),
    "gst_bin_get_by_name": (c_void_p, c_void_p, c_char_p),
    "gst_element_set_state": (c_int, c_void_p, c_int),
    "gst_element_get_base_time": (c_uint64, c_void_p),
    "gst_element_get_clock": (c_void_p, c_void_p),
    "gst_element_get_bus": (c_void_p, c_void_p),
    "gst_clock_get_time": (c_uint64, c_void_p),
    "gst_bus_timed_pop_filtered": (c_void_p, c_void_p, c_uint64, c_int),
    "gst_message_parse_error": (None, c_void_p, POINTER(c_void_p), POINTER(c_char_p)),
    "gst_app_sink_try_pull_sample": (c_void_p, c_void_p, c_uint64),
    "gst_app_sink_is_eos": (c_int, c_void_p),
    "gst_sample_get_buffer": (c_void_p, c_void_p),
    "gst_sample_get_caps": (c_void_p, c_void_p),
    "gst_sample_get_segment": (c_void_p, c_void_p),
    "gst_segment_to_running_time": (c_uint64, c_void_p, c_int, c_uint64),
    "gst_caps_get_structure": (c_void_p, c_void_p, c_uint),
    "gst_structure_get_int": (c_int, c_void_p, c_char_p, POINTER(c_int)),
    "gst_buffer_extract": (c_size_t, c_void_p, c_size_t, c_void_p, c_size_t),
    "gst_mini_object_unref": (None, c_void_p),
    "gst_object_unref": (None, c_void_p),
}


class _Error(ctypes.Structure):
    """The start of a GError."""

    _fields_ = (("domain", ctypes.c_uint32), ("code", c_int), ("message", c_char_p))


class _Buffer(ctypes.Structure):
    """The start of a GstBuffer, whose time has no function that reads it."""

    _fields_ = (
        ("type", c_size_t),
        ("counters", c_int * 2),
        ("flags", c_uint),
        ("functions", c_void_p * 3),
        ("private_number", c_uint),
        ("private_pointer", c_void_p),
        ("pool", c_void_p),
        ("pts", c_uint64),
    )


class Failure(Exception):  # noqa: N818 - its text is the message of GStreamer
    """The pipeline does not work."""


def load() -> Any:
    """The functions of GStreamer by their names without ``gst_``. Raises `Failure` where it is not installed."""
    gst = SimpleNamespace()
    try:
        libraries = [ctypes.CDLL(name) for name in LIBRARIES]
    except OSError as error:
        hint = "apt install gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good"
        raise Failure(f"GStreamer is not installed ({error}): {hint}") from error
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(libraries["app_sink" in name], name)
        function.restype, function.argtypes = result, arguments
        setattr(gst, name.removeprefix("gst_"), function)
    return gst


def message(error: c_void_p) -> str:
    text = ctypes.cast(error, POINTER(_Error)).contents.message
    return text.decode(errors="replace") if text else "unknown"


def build(gst: Any, words: list[str]) -> Any:
    """The pipeline of these words. Raises `Failure`."""
    error = c_void_p()
    pipeline = gst.parse_launchv((c_char_p * (len(words) + 1))(*map(os.fsencode, words)), byref(error))
    if error or not pipeline:
        raise Failure(message(error))
    return pipeline


class Frames:
    """The frames of a pipeline that has been built. Raises `Failure` when the pipeline does."""

    def __init__(self, gst: Any, pipeline: Any) -> None:
        self._gst, self._pipeline = gst, pipeline
        self._sink = gst.bin_get_by_name(pipeline, SINK.encode())
        self._bus = gst.element_get_bus(pipeline)
        self._pixels = bytearray()
        paused = gst.element_set_state(pipeline, PAUSED)
        self._live = paused == NO_PREROLL
        if FAILURE in (paused, gst.element_set_state(pipeline, PLAYING)):
            self._check(WAIT_NS)
            raise Failure("The pipeline cannot be started")
        self._clock: Any = None

    def write(self, fd: int) -> bool:
        """Write the next frame, or nothing if none comes for a moment. False at the end."""
        gst = self._gst
        sample = gst.app_sink_try_pull_sample(self._sink, WAIT_NS)
        self._check(0)
        if not sample:
            return not gst.app_sink_is_eos(self._sink)
        try:
            header = self._take(sample)
        finally:
            gst.mini_object_unref(sample)
        for part in (header, self._pixels):
            view = memoryview(part)
            while view:
                view = view[os.write(fd, view) :]
        return True

    def _check(self, wait: int) -> None:
        found = self._gst.bus_timed_pop_filtered(self._bus, wait, ERROR)
        if found:
            error, details = c_void_p(), c_char_p()
            self._gst.message_parse_error(found, byref(error), byref(details))
            # The details are the place in the source of GStreamer and then, often, the reason.
            reason = (details.value or b"").decode(errors="replace").partition("\n")[2]
            raise Failure(f"{message(error)} {' '.join(reason.split())}")

    def _take(self, sample: Any) -> bytes:
        """The header of a frame, whose pixels are kept."""
        gst, width, height = self._gst, c_int(), c_int()
        caps = gst.caps_get_structure(gst.sample_get_caps(sample), 0)
        gst.structure_get_int(caps, b"width", byref(width))
        gst.structure_get_int(caps, b"height", byref(height))
        size = -(-width.value * 3 // 4) * 4 * height.value
        if len(self._pixels) != size:
            self._pixels = bytearray(size)
        buffer = gst.sample_get_buffer(sample)
        if gst.buffer_extract(buffer, 0, (ctypes.c_char * size).from_buffer(self._pixels), size) != size:
            raise Failure(f"A frame of {width.value}x{height.value} is incomplete")
        return HEADER.pack(width.value, height.value, self._captured(sample, buffer))

    def _captured(self, sample: Any, buffer: Any) -> float:
        """When a live source stamped the frame: GStreamer counts from the start of the pipeline, on its own clock."""
        gst = self._gst
        pts = ctypes.cast(buffer, POINTER(_Buffer)).contents.pts
        if not self._live or pts == NO_TIME:
            return math.nan
        running = gst.segment_to_running_time(gst.sample_get_segment(sample), TIME, pts)
        self._clock = self._clock or gst.element_get_clock(self._pipeline)
        if running == NO_TIME or not self._clock:
            return math.nan
        age = gst.clock_get_time(self._clock) - gst.element_get_base_time(self._pipeline) - running
        return time.monotonic() - max(0, age) / 1e9


def main() -> int:
    parent, fd = map(int, sys.argv[1:])
    # Die with the thread that started this process, even if that is killed.
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != parent:
        return 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if the parent ignores it
    words = json.load(sys.stdin)
    pipeline = None
    try:
        gst = load()
        gst.init(None, None)
        pipeline = build(gst, words)
        frames = Frames(gst, pipeline)
        while frames.write(fd):
            pass
    except KeyboardInterrupt:
        pass
    except (Failure, OSError) as error:
        print(f"ERROR: {error}", flush=True)
        return 1
    finally:
        if pipeline:  # cameras on the CSI bus need an orderly end to be free again
            gst.element_set_state(pipeline, NULL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
