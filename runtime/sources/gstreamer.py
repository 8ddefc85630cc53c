"""GStreamer pipelines, run in a child process, so that a crashing camera stack harms nothing else."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from duallora_edge.errors import SourceError
from duallora_edge.runtime.preprocess import Pixels, to_rgb
from duallora_edge.runtime.sources import gstreamer_child
from duallora_edge.runtime.sources.capture import Capture, Picture, mask
from duallora_edge.runtime.sources.gstreamer_child import HEADER, SINK
from duallora_edge.runtime.sources.raw import fill

PIPE_BYTES = 2**20
LOG_BYTES = 4096
END_S = 0.5  # for an orderly end, which cameras on the CSI bus need to be free again
KILL_WAIT_S = 2.0

DECODER = "nvv4l2decoder"  # the hardware decoder of a Jetson
RANK = {"GST_PLUGIN_FEATURE_RANK": f"{DECODER}:MAX"}  # before all other decoders, unless the user has set the variable

Size = tuple[int, int]  # width, height


def csi_pipeline(sensor: int, mode: tuple[int, int, int], size: Size, flip: int) -> str:
    """The pipeline of a CSI camera of a Jetson, up to BGRx frames of ``size`` in ordinary memory.

    ``mode`` is the width, height and frame rate asked of the sensor. The image compositor turns the picture, scales it
    with its best filter, and copies it out of the memory of the camera.
    """
    width, height, fps = mode
    return (
        f"nvarguscamerasrc sensor-id={sensor}"
        f" ! video/x-raw(memory:NVMM),format=NV12,width={width},height={height},framerate={fps}/1"
        f" ! nvvidconv flip-method={flip} interpolation-method=5"
        f" ! video/x-raw,format=BGRx,width={size[0]},height={size[1]}"
    )


def split(pipeline: str) -> list[str]:
    """The words of a pipeline. Raises `SourceError` when its quotes do not match."""
    try:
        return shlex.split(pipeline)
    except ValueError as error:
        raise SourceError(f"The pipeline '{mask(pipeline)}' cannot be parsed ({error}); correct it.") from error


def to_frames(words: Sequence[str], size: Size | None, newest: bool) -> list[str]:
    """The words of a pipeline that ends in raw video, continued to RGB frames, scaled to ``size`` unless that is None.

    With ``newest`` a frame that waits gives way to a newer one, otherwise the pipeline waits.
    """
    queue = ["!", "queue", "leaky=downstream", "max-size-buffers=1"] if newest else []
    scale = ["!", "videoscale"] if size else []
    caps = "video/x-raw,format=RGB" + (f",width={size[0]},height={size[1]}" if size else "")
    sink = ["appsink", f"name={SINK}", "sync=false", "max-buffers=1", f"drop={str(newest).lower()}"]
    return [*words, *queue, "!", "videoconvert", *scale, "!", caps, "!", *sink]


class Pipeline(Capture):
    """The frames of a pipeline whose words `to_frames` made."""

    def __init__(self, words: Sequence[str], stop: threading.Event) -> None:
        self._stop = stop
        self._log = b""
        # Not standard output, on which camera drivers print their own messages.
        self._frames, frames = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", gstreamer_child.__file__, str(os.getpid()), str(frames)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(frames,),
                start_new_session=True,
                env={**RANK, **os.environ},
            )
        except BaseException:
            os.close(self._frames)
            raise
        finally:
            os.close(frames)
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(json.dumps(list(words)).encode())
        self._messages = self._process.stdout.fileno()
        os.set_blocking(self._messages, False)
        with suppress(OSError):  # only faster; the system may allow less
            fcntl.fcntl(self._frames, getattr(fcntl, "F_SETPIPE_SZ", 1031), PIPE_BYTES)

    def read(self) -> Picture | None:
        header = self._fill(HEADER.size)
        if header is not None:
            width, height, captured = HEADER.unpack(header.data)
            stride = -(-width * 3 // 4) * 4  # GStreamer pads rows of RGB to four bytes
            rows = self._fill(height * stride)
            if rows is not None:
                pixels = rows.reshape(height, stride)[:, : width * 3].reshape(height, width, 3)
                return Picture(to_rgb(pixels), captured=None if math.isnan(captured) else captured)
        if not self._stop.is_set():
            self._raise_failure()
        return None

    def _fill(self, size: int) -> Pixels | None:
        """That many bytes, None if they do not come any more."""
        buffer = np.empty(size, np.uint8)
        count = fill(self._frames, buffer, self._stop, self._drain)
        self._drain()
        return buffer if count == size else None

    def _drain(self) -> None:
        """Keep the end of the program's output; a full pipe would stop the program."""
        with suppress(BlockingIOError):
            self._log = (self._log + os.read(self._messages, 2**16))[-LOG_BYTES:]

    def _raise_failure(self) -> None:
        """Raise `SourceError` unless the pipeline has come to its end."""
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            code = None
        self._drain()
        if code == 0:
            return
        lines = [line.strip() for line in self._log.decode(errors="replace").splitlines() if line.strip()]
        # The first error is the cause; the later ones follow from it.
        said = next((line for line in lines if line.startswith("ERROR")), (lines or [""])[-1])
        ended = "closed its output" if code is None else f"ended with code {code}"
        ended = f"was killed by signal {-code}" if code and code < 0 else ended
        reason = f" ({mask(said[:300])})" if said else ""
        raise SourceError(f"The GStreamer pipeline {ended}{reason}; check it with gst-launch-1.0.")

    def close(self) -> None:
        for number in (signal.SIGINT, signal.SIGKILL):
            if self._process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                # With a limit: a process that hangs inside a driver cannot be killed.
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(END_S if number == signal.SIGINT else KILL_WAIT_S)
        os.close(self._frames)
        assert self._process.stdout is not None
        self._process.stdout.close()
