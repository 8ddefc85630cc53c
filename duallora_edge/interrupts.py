"""Ctrl-C (SIGINT) that stops a long computation for certain.

Python raises `KeyboardInterrupt` wherever the program happens to be. In a ``__del__``, in the callback of a weak
reference (each import has some) or in a callback from C++ it is printed and lost, and training goes on. So the signal
is also noted, and long computations `check` in every step. A second one ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_noted = False


@contextmanager
def noted() -> Iterator[None]:
    """Note SIGINT in what happens inside. Programs that handle it themselves, and other threads, are left alone."""
    global _noted
    _noted = False
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def check() -> None:
    """Raises `KeyboardInterrupt` when a SIGINT was noted."""
    if _noted:
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    _noted = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt
