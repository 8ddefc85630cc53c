"""Which answers leave ``run``, and where to: standard output, files that are rotated, or an MQTT broker."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

from duallora_edge.errors import ConfigError
from duallora_edge.runtime.prediction import Prediction

OLDER_FILES = 4
START = b'{"schema": '  # of every line

Say = Callable[[str], object]
Write = Callable[[str], object]


class Changes:
    """Whether an answer says something else than the one before of its camera: another label, or novel for known."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, bool | None]] = {}

    def __call__(self, camera: str, prediction: Prediction) -> bool:
        """Note a prediction; True for the first one of a camera, and for each that differs from the one before."""
        said = prediction.label, prediction.is_novel
        last, self._last[camera] = self._last.get(camera), said
        return said != last


@contextmanager
def outlets(file: Path | None, megabytes: float, address: str | None, output: Write, say: Say) -> Iterator[Write]:
    """Yield what takes the lines of answers: they go to ``file`` and ``address``, or to ``output`` without these two.

    ``megabytes``: room for the file and its older ones. ``address``: a topic of an MQTT broker. ``say`` is told once
    what goes wrong later, and answers go on. Raises `ConfigError` when one of them cannot be used from the start.
    """
    with ExitStack() as stack:
        writes: list[Write] = []
        if file is not None:
            writes.append(stack.enter_context(closing(AnswerFile(file, megabytes, say))).write)
        if address is not None:
            from duallora_edge.runtime.service.mqtt import Publisher

            writes.append(stack.enter_context(Publisher(address, say)).write)

        def write(line: str) -> None:
            for each in writes or [output]:
                each(line)

        yield write


class AnswerFile(RotatingFileHandler):
    """Lines in a file. When it has a fifth of its room it becomes ``FILE.1``, and so on; the oldest is deleted.

    A line that cannot be written (a full disk) is left out whole, and the next one is tried again.
    """

    def __init__(self, path: Path, megabytes: float, say: Say) -> None:
        """Open a file, or continue one. Raises `ConfigError` when that fails or it holds something else."""
        for name in (path, *(Path(f"{path}.{number}") for number in range(1, OLDER_FILES + 1))):
            _check_answers(name)
        self._say = say
        self._failure: BaseException | None = None
        self._whole = 0  # bytes of the file up to the last whole line
        try:
            super().__init__(path, "a", int(megabytes * 1e6 / (OLDER_FILES + 1)), OLDER_FILES, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"Answers cannot be written to {path} ({error.strerror or error}); name another file in --sink."
            ) from error

    def write(self, line: str) -> None:
        """Add a line."""
        self.handle(logging.LogRecord("", logging.INFO, "", 0, line, None, None))

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `handle`."""
        before, now = self._failure, self._try(record)
        if now is not None and before is None:
            self._say(f"answers are left out, as {self.baseFilename} cannot be written: {now}")
        elif now is None and before is not None:
            self._say(f"answers are written to {self.baseFilename} again")

    def _try(self, record: logging.LogRecord) -> BaseException | None:
        self._failure = None
        super().emit(record)
        if self._failure is None and self.stream is not None:
            self._whole = os.fstat(self.stream.fileno()).st_size
        return self._failure

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Called by `emit` for what went wrong: take back what is half written; the next line opens the file again."""
        self._failure = sys.exc_info()[1]
        stream, self.stream = self.stream, None
        if stream is None:
            return
        handle = os.dup(stream.fileno())
        with suppress(OSError):
            stream.close()
        with suppress(OSError):
            if os.fstat(handle).st_size > self._whole:
                os.ftruncate(handle, self._whole)
        os.close(handle)

    def _open(self) -> io.TextIOWrapper:
        stream = super()._open()
        if _is_cut_off(Path(self.baseFilename)):
            stream.write("\n")
            stream.flush()
        self._whole = os.fstat(stream.fileno()).st_size
        return stream


def _check_answers(path: Path) -> None:
    """Raise `ConfigError` for what does not hold answers: rotating would delete it one day."""
    try:
        if not os.path.lexists(path):
            return
        # A power cut can leave zeros.
        if path.is_file() and START.startswith(_head(path).lstrip(b"\0")[: len(START)]):
            return
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); name another file in --sink.") from error
    raise ConfigError(f"{path} does not hold answers of 'run'; name another file in --sink.")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)


def _is_cut_off(path: Path) -> bool:
    """Whether the last line has no end, because its process was killed."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")
