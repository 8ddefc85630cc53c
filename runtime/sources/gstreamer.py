"""GStreamer pipelines, run by gst-launch-1.0 in a child process, so that a crashing camera stack harms nothing else."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import numpy as np

from duallora_edge.errors import SourceError
from duallora_edge.runtime.preprocess import to_rgb
from duallora_edge.runtime.sources.capture import Capture, Picture, mask
from duallora_edge.runtime.sources.raw import fill

PROGRAM = "gst-launch-1.0"
PIPE_BYTES = 2**20
LOG_BYTES = 4096
END_S = 0.5  # for an orderly end, which cameras on the CSI bus need to be free again
KILL_WAIT_S = 2.0

# Becomes the program that it is given, and dies with the thread that started it, even if that is killed.
_GUARD = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)


def csi_pipeline(sensor: int, size: tuple[int, int], fps: int, flip: int) -> str:
    """The pipeline of a CSI camera of a Jetson, up to BGRx frames of ``size`` (width, height) in ordinary memory."""
    width, height = size
    return (
        f"nvarguscamerasrc sensor-id={sensor}"
        f" ! video/x-raw(memory:NVMM),width={width},height={height},framerate={fps}/1"
        f" ! nvvidconv flip-method={flip} ! video/x-raw,format=BGRx"
    )


def launch_arguments(pipeline: str, size: tuple[int, int], fd: int) -> list[str]:
    """The arguments of gst-launch-1.0 that make it write RGB frames, scaled to ``size`` (width, height), to ``fd``.

    Raises `SourceError` when the quotes of the pipeline do not match.
    """
    try:
        words = shlex.split(pipeline)
    except ValueError as error:
        raise SourceError(f"The pipeline '{mask(pipeline)}' cannot be parsed ({error}); correct it.") from error
    caps = f"video/x-raw,format=RGB,width={size[0]},height={size[1]}"
    return ["-q", *words, "!", "videoconvert", "!", "videoscale", "!", caps, "!", "fdsink", f"fd={fd}"]


class Pipeline(Capture):
    """The frames of a pipeline that ends in raw video of ``size`` (width, height)."""

    def __init__(self, pipeline: str, size: tuple[int, int], stop: threading.Event) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise SourceError(f"{PROGRAM} is not installed: apt install gstreamer1.0-tools.")
        self._stop, self._size = stop, size
        self._log = b""
        # Not standard output, on which camera drivers print their own messages.
        self._frames, frames = os.pipe()
        try:
            arguments = launch_arguments(pipeline, size, frames)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(frames,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._frames)
            raise
        finally:
            os.close(frames)
        assert self._process.stdout is not None
        self._messages = self._process.stdout.fileno()
        os.set_blocking(self._messages, False)
        with suppress(OSError):  # only faster; the system may allow less
            fcntl.fcntl(self._frames, getattr(fcntl, "F_SETPIPE_SZ", 1031), PIPE_BYTES)

    def read(self) -> Picture | None:
        width, height = self._size
        stride = -(-width * 3 // 4) * 4  # GStreamer pads rows of RGB to four bytes
        buffer = np.empty(height * stride, np.uint8)
        count = fill(self._frames, buffer, self._stop, self._drain)
        self._drain()
        if count == buffer.size:
            return Picture(to_rgb(buffer.reshape(height, stride)[:, : width * 3].reshape(height, width, 3)))
        if not self._stop.is_set():
            self._raise_failure()
        return None

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
        said = next((line for line in lines if line.startswith(("ERROR", "WARNING: err"))), (lines or [""])[-1])
        ended = "closed its output" if code is None else f"ended with code {code}"
        ended = f"was killed by signal {-code}" if code and code < 0 else ended
        reason = f" ({mask(said[:300])})" if said else ""
        raise SourceError(f"The GStreamer pipeline {ended}{reason}; check it with {PROGRAM}.")

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
