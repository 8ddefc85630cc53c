"""A source: a thread that captures, a small buffer, and what happens when a camera is lost."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from duallora_edge.errors import DataError, DualLoraEdgeError, SourceError
from duallora_edge.runtime.closing import Closing
from duallora_edge.runtime.device.probes import first_line
from duallora_edge.runtime.sources.capture import Opener, Picture, mask
from duallora_edge.runtime.sources.frame import Frame
from duallora_edge.runtime.sources.policy import Policy, Statistics

FIRST_BACKOFF_S = 0.5
START_S = 15.0  # until the first frame: cameras on the CSI bus and encrypted streams take seconds
WORKER_END_S = 0.75
CLOSE_S = 0.9
MAX_STUCK = 4  # threads that hang in a library; each keeps its memory
REASONS = 10


class EndOfStream(Exception):  # noqa: N818 - an event rather than an error, as StopIteration is
    """The source has no more frames, or has been closed."""


class _Session:
    """One thread that opens a capture and reads it to its end."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline  # the moment by which the next frame must be there
        self.stop = threading.Event()  # nobody wants its frames any more
        self.over = threading.Event()  # nothing more comes
        self.error: Exception | None = None
        self.frames = 0
        self.due = 0.0  # when the next frame may be handed over


class Source(Closing):
    """Frames of one camera, stream, video, folder or sequence; made by `open_source`.

    ``for frame in source`` gives all frames until the end, `read` a single one. Several threads may use it.

    Attributes:
        description: What the source reads from, without passwords.
        live: Whether frames are dropped if the reader is slow.
    """

    def __init__(self, opener: Opener, description: str, policy: Policy) -> None:
        """Open the source. Raises `SourceError` when that fails (with ``policy.wait``: keep trying)."""
        self.description = mask(description)
        self.live = policy.live
        self._opener = opener
        self._policy = policy
        self._condition = threading.Condition()  # guards all that follows; reentrant, for a signal may close
        self._buffer: deque[Frame] = deque()
        self._statistics = Statistics()
        self._session: _Session | None = None
        self._opened = self._ended = self._closed = False
        self._error: Exception | None = None  # why it has ended, unless it ended normally
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="duallora-edge source", daemon=True)
        self._thread.start()
        try:
            if not (policy.reopens and policy.wait):
                self._wait_until_opened()
        except BaseException:
            self.close()
            raise

    def _wait_until_opened(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._opened or self._ended)
            if self._error is not None and not self._opened:
                self._raise(self._error)

    @property
    def stats(self) -> Statistics:
        """The current counts."""
        return self._statistics

    def read(self, timeout: float = 1.0) -> Frame | None:
        """Wait for the next frame.

        Args:
            timeout: How many seconds to wait.

        Returns:
            The frame, or None if none came in time, which is not an error.

        Raises:
            EndOfStream: After the last frame, and after `close`.
            SourceError: A source that does not reconnect broke before its end.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._buffer or self._ended or self._closed, timeout)
            if self._closed:
                raise EndOfStream(f"{self.description} is closed")
            if self._buffer:
                self._count(delivered=1)
                self._condition.notify_all()
                return self._buffer.popleft()
            if self._error is not None:
                self._raise(self._error)
            if self._ended:
                raise EndOfStream(f"{self.description} has no more frames")
            self._count(timeouts=1)
            return None

    def __iter__(self) -> Iterator[Frame]:
        """All frames until the end, however long one takes to come."""
        while True:
            try:
                frame = self.read()
            except EndOfStream:
                return
            if frame is not None:
                yield frame

    def close(self) -> None:
        """End the source; a read that waits raises `EndOfStream`. Does nothing the second time.

        Any thread may call it, and so may a signal handler. Takes less than a second: a library that does not return
        is left to itself.
        """
        self._closing.set()
        with self._condition:
            self._closed = True
            self._statistics = replace(self._statistics, connected=False)
            if self._session is not None:
                self._session.stop.set()
                self._session.over.set()
            self._condition.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S)

    def _count(self, **more: int) -> None:
        old = self._statistics
        self._statistics = replace(old, **{name: getattr(old, name) + number for name, number in more.items()})

    def _raise(self, error: Exception) -> None:
        if isinstance(error, DualLoraEdgeError):
            raise SourceError(mask(str(error)))
        reason = mask(first_line(error))
        raise SourceError(f"{self.description} failed ({reason}); check what it reads.") from error

    # The rest runs in the threads of the source.

    def _supervise(self) -> None:
        backoff, stuck = FIRST_BACKOFF_S, list[threading.Thread]()
        while not self._closing.is_set():
            stuck = [thread for thread in stuck if thread.is_alive()]
            if len(stuck) < MAX_STUCK:
                session, error = self._run(stuck)
                if self._closing.is_set() or not self._policy.reopens:
                    return self._end(error)
                lost = error or SourceError(f"{self.description} stopped sending frames; check the camera.")
                if not (self._opened or self._policy.wait):
                    return self._end(lost)
                backoff = FIRST_BACKOFF_S if session.frames else backoff
            else:
                lost = SourceError(f"{len(stuck)} attempts hang inside the library; restart the program.")
            with self._condition:
                self._statistics = replace(self._statistics, connected=False, last_error=mask(first_line(lost)))
            self._closing.wait(min(backoff, self._policy.max_backoff))
            backoff *= 2
        self._end(None)

    def _run(self, stuck: list[threading.Thread]) -> tuple[_Session, Exception | None]:
        """Capture in a thread until there is nothing more, or until it hangs, which adds it to ``stuck``."""
        reopens = self._policy.reopens
        session = _Session(time.monotonic() + max(START_S, self._policy.stall) if reopens else math.inf)
        with self._condition:
            self._session = session
            if self._closed:
                return session, None
        if not reopens:
            self._work(session)
            return session, session.error
        thread = threading.Thread(target=self._work, args=(session,), name="duallora-edge capture", daemon=True)
        thread.start()
        # At most `stall` at a time, because the first frame brings the deadline forward.
        while not session.over.wait(max(0.0, min(self._policy.stall, session.deadline - time.monotonic()))):
            if time.monotonic() >= session.deadline:
                seconds = self._policy.stall if session.frames else max(START_S, self._policy.stall)
                session.error = SourceError(f"{self.description} gave no frame for {seconds:g} s; check the camera.")
                break
        error = session.error  # before the thread, once told to stop, adds its own
        session.stop.set()
        thread.join(WORKER_END_S)
        if thread.is_alive():
            stuck.append(thread)
        return session, error

    def _end(self, error: Exception | None) -> None:
        with self._condition:
            self._ended, self._error = True, error
            reason = mask(first_line(error)) if error else self._statistics.last_error
            self._statistics = replace(self._statistics, connected=False, last_error=reason)
            self._condition.notify_all()

    def _work(self, session: _Session) -> None:
        try:
            while self._capture(session) and self._policy.loop and not session.stop.is_set():
                pass
        except Exception as error:  # cameras, libraries and the user's iterables may raise anything
            session.error = error
        finally:
            session.over.set()

    def _capture(self, session: _Session) -> bool:
        """Open, hand over the pictures until the end, close. False if there were none."""
        capture, before = self._opener(session.stop), session.frames
        try:
            if not self._policy.reopens:  # a camera is open when it gives a frame
                self._connected(session)
            while not session.stop.is_set():
                try:
                    picture = capture.read()
                except DataError as error:
                    self._refuse(error)
                    continue
                if picture is None or not self._offer(session, picture):
                    break
        finally:
            capture.close()
            if capture.note and not session.stop.is_set():
                with self._condition:
                    self._statistics = replace(self._statistics, note=mask(capture.note))
        return session.frames > before

    def _refuse(self, error: DataError) -> None:
        with self._condition:
            refusals = (*self._statistics.refusals, mask(first_line(error)))[-REASONS:]
            self._statistics = replace(self._statistics, refused=self._statistics.refused + 1, refusals=refusals)

    def _connected(self, session: _Session) -> None:
        with self._condition:
            if not session.stop.is_set() and not self._statistics.connected:
                reconnects = self._statistics.reconnects + self._opened
                self._statistics = replace(self._statistics, connected=True, reconnects=reconnects)
                self._opened = True
                self._condition.notify_all()

    def _offer(self, session: _Session, picture: Picture) -> bool:
        """Put a frame into the buffer. False if it is no longer wanted."""
        if self._policy.rate is not None:
            session.due = max(session.due + 1 / self._policy.rate, time.monotonic())
            session.stop.wait(session.due - time.monotonic())
        with self._condition:
            if not self.live:
                self._condition.wait_for(lambda: len(self._buffer) < self._policy.buffer or session.stop.is_set())
            if session.stop.is_set():
                return False
            if len(self._buffer) >= self._policy.buffer:
                self._buffer.popleft()
                self._count(dropped=1)
            now = time.monotonic()
            captured = now if picture.captured is None else min(picture.captured, now)
            timestamp = time.time() - (now - captured)
            self._buffer.append(Frame(picture.pixels, self._statistics.captured, captured, timestamp, picture.name))
            self._count(captured=1)
            session.frames += 1
            session.deadline = now + self._policy.stall if self._policy.reopens else math.inf
            self._connected(session)
            self._condition.notify_all()
        return True
