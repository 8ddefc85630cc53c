"""Raw frames through a pipe."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from duallora_edge.errors import SourceError
from duallora_edge.runtime.sources import EndOfStream, open_source

WIDTH, HEIGHT = 7, 5


class Input(io.StringIO):
    """Standard input with the descriptor of a pipe."""

    def __init__(self, fd: int, terminal: bool = False) -> None:
        super().__init__()
        self.fd, self.terminal = fd, terminal

    def fileno(self) -> int:
        return self.fd

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.FileIO]:
    """The end that writes of a pipe to standard input."""
    fd, end = os.pipe()
    monkeypatch.setattr("sys.stdin", Input(fd))
    with open(end, "wb", buffering=0) as writer:  # noqa: PTH123 - a descriptor has no path
        yield writer
    os.close(fd)


@pytest.mark.parametrize(("color", "channels"), [("rgb", 3), ("bgr", 3), ("gray", 1)])
def test_frames_arrive_as_they_were_written(pipe: io.FileIO, color: str, channels: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH, channels), dtype=np.uint8)
    data = frames.tobytes()
    with open_source("-", size=(WIDTH, HEIGHT), color=color) as source:
        pipe.write(data[:30])
        assert source.read(timeout=0.05) is None
        pipe.write(data[30:])
        pipe.close()
        received = np.stack([frame.pixels for frame in source])
        assert source.stats.note is None
    expected = {"rgb": frames, "bgr": frames[..., ::-1], "gray": np.repeat(frames, 3, 3) if channels == 1 else None}
    np.testing.assert_array_equal(received, expected[color])


@pytest.mark.parametrize("size", [0, 50])
def test_not_one_frame_is_an_error(pipe: io.FileIO, size: int) -> None:
    pipe.write(bytes(size))
    pipe.close()
    with (
        open_source("-", size=(WIDTH, HEIGHT)) as source,
        pytest.raises(SourceError, match=rf"first frame was complete \({size} of 105 bytes\); check the program"),
    ):
        list(source)


def test_an_incomplete_last_frame_is_told(pipe: io.FileIO) -> None:
    pipe.write(bytes(WIDTH * HEIGHT * 3 + 50))
    pipe.close()
    with open_source("-", size=(WIDTH, HEIGHT)) as source:
        assert len(list(source)) == 1
        assert source.stats.note == "the last frame was incomplete and left out (50 of 105 bytes)"


def test_closing_ends_a_wait_for_bytes(pipe: io.FileIO, until: Callable[[Callable[[], object]], None]) -> None:
    source = open_source("-", size=(WIDTH, HEIGHT))
    source.close()
    with pytest.raises(EndOfStream):
        source.read()
    until(lambda: not any(thread.name.startswith("duallora-edge") for thread in threading.enumerate()))
    pipe.write(b"x")  # the descriptor is still open


def test_a_file_as_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "frames").write_bytes(bytes(WIDTH * HEIGHT * 4))
    with (tmp_path / "frames").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        with open_source("-", size=(WIDTH, HEIGHT), color="gray") as source:
            assert len(list(source)) == 4


def test_a_terminal_sends_no_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Input(0, terminal=True))
    with pytest.raises(SourceError, match="pipe raw frames into it"):
        open_source("-", size=(WIDTH, HEIGHT))
