"""How a source treats its frames, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """How a source treats its frames and its capture; see `open_source`.

    ``live``: the oldest frame is dropped when the reader is slow, otherwise the capture waits. ``reopens``: a capture
    that is lost is opened again, otherwise its end is the end of the source.
    """

    live: bool
    reopens: bool
    buffer: int = 1
    rate: float | None = None
    loop: bool = False
    stall: float = 5.0
    max_backoff: float = 30.0
    wait: bool = False


@dataclass(frozen=True)
class Statistics:
    """What a source has done so far.

    ``captured`` frames are ``delivered`` to the reader, ``dropped`` because it was slow, or wait in the buffer.
    ``refused`` are pictures that could not be used, the last of them with the reason in ``refusals``. ``timeouts``
    counts reads without a frame, ``reconnects`` how often a lost capture gave frames again. ``last_error`` is why a
    capture was last lost or could not be opened, ``note`` says what went wrong at the end.
    """

    captured: int = 0
    delivered: int = 0
    dropped: int = 0
    refused: int = 0
    refusals: tuple[str, ...] = ()
    timeouts: int = 0
    reconnects: int = 0
    connected: bool = False
    last_error: str | None = None
    note: str | None = None
