"""Raw frames from a file descriptor: standard input, or the output of another program."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

import numpy as np

from duallora_edge.errors import SourceError
from duallora_edge.runtime.preprocess import Pixels, to_rgb
from duallora_edge.runtime.sources.capture import Capture, Picture

CHANNELS = {"rgb": 3, "bgr": 3, "gray": 1}
POLL_MS = 100  # how often a waiting read checks whether it is still wanted


def fill(fd: int, buffer: Pixels, stop: threading.Event, idle: Callable[[], None] = lambda: None) -> int:
    """Read bytes into ``buffer`` ``uint8 [N]`` until it is full, the input ends or ``stop`` is set.

    Returns how many came. ``idle`` is called whenever nothing has come for a moment.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    view, filled = buffer.data, 0
    while filled < len(view) and not stop.is_set():
        if not poll.poll(POLL_MS):
            idle()
            continue
        count = os.readv(fd, [view[filled:]])
        if not count:
            break
        filled += count
    return filled


class RawFrames(Capture):
    """Frames ``uint8 [H, W, C]`` one after the other, without a header.

    ``size`` is (width, height), ``color`` a key of `CHANNELS`. The descriptor stays open. Raises `SourceError` when
    the input ends before the first frame does.
    """

    def __init__(self, fd: int, size: tuple[int, int], color: str, stop: threading.Event) -> None:
        width, height = size
        self._fd, self._stop = fd, stop
        self._shape = (height, width, CHANNELS[color])
        self._color = "rgb" if color == "gray" else color
        self._empty = True  # no frame so far

    def read(self) -> Picture | None:
        buffer = np.empty(int(np.prod(self._shape)), np.uint8)
        count = fill(self._fd, buffer, self._stop)
        if count == buffer.size:
            self._empty = False
            return Picture(to_rgb(buffer.reshape(self._shape), self._color))
        if self._empty and not self._stop.is_set():
            raise SourceError(
                f"The input ended before the first frame was complete ({count:,} of {buffer.size:,} bytes); check the "
                "program that writes it, and the size."
            )
        if count and not self._stop.is_set():
            self.note = f"the last frame was incomplete and left out ({count:,} of {buffer.size:,} bytes)"
        return None
