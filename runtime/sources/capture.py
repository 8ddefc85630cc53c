"""What a source reads from: one camera, stream or file that is open."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import NamedTuple

from duallora_edge.runtime.preprocess import Pixels


class Picture(NamedTuple):
    """``pixels`` ``uint8 [H, W, 3]`` RGB, and the file they came from (None for a stream).

    ``captured`` is the moment of the capture in seconds of `time.monotonic`, None if only its arrival is known.
    """

    pixels: Pixels
    name: str | None = None
    captured: float | None = None


class Capture:
    """Something open that gives pictures; read and closed in one thread.

    ``note`` says, after the end, what went wrong.
    """

    note: str | None = None

    def read(self) -> Picture | None:
        """The next picture, None at the end.

        Raises `DataError` for a picture that cannot be used, after which the next may be read, and anything else
        when the capture is broken.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release camera, file and threads."""


# Opens a capture or raises; long waits end when the event is set, because the capture is not wanted any more.
Opener = Callable[[threading.Event], Capture]

_USER = re.compile(r"(?i)(?<!csi)://\S*@")  # the mode of a CSI camera has an '@', and no user
_SECRET = re.compile(r"(?i)((?:pass(?:word|wd)?|pwd|pw|token|secret|key)=)[^&\s]+")


def mask(text: str) -> str:
    """The text without the user names and passwords of addresses, for messages and logs."""
    # Up to the last '@', since a password may contain one.
    return _SECRET.sub(r"\1***", _USER.sub("://***@", text))
