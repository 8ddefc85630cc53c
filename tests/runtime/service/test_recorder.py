"""The frames of the next seconds become a class: those of the camera, spread evenly, one class at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duallora_edge.errors import DataError
from duallora_edge.runtime.field.taught_folder import MAX_SIDE, read_taught
from duallora_edge.runtime.prediction import Prediction, Timings
from duallora_edge.runtime.service.pipeline import Answer, Region
from duallora_edge.runtime.service.recorder import FRAMES, Recorder
from duallora_edge.runtime.sources import Frame


class Camera:
    """A monitor that sees another shade of grey every few milliseconds."""

    def __init__(self, side: int = 16) -> None:
        self.answer: Any = None
        self._side = side

    def last(self, camera: str) -> Any:
        return self.answer if camera == "door" else None

    def see(self, number: int) -> None:
        pixels = np.full((self._side, 2 * self._side, 3), number % 256, np.uint8)
        prediction = Prediction("a", 1.0, "t", 1.0, 0.0, None, Timings(0, 0, 0), "b", 1, np.ones(1, np.float32), ("a",))
        self.answer = Answer(Frame(pixels, number, float(number), float(number)), prediction, prediction, None)


@contextmanager
def running(camera: Camera, interval_s: float = 0.005) -> Iterator[None]:
    ends = threading.Event()

    def go() -> None:
        number = 1
        while not ends.wait(interval_s):
            camera.see(number)
            number += 1

    thread = threading.Thread(target=go)
    thread.start()
    yield
    ends.set()
    thread.join()


def shades(folder: Path, name: str) -> list[int]:
    return sorted(int(frame[0, 0, 0]) for frame in read_taught(folder, lambda frame: frame)[name])


def test_frames_are_spread_over_the_time(tmp_path: Path) -> None:
    camera = Camera()
    camera.see(0)
    with running(camera):
        count = Recorder(camera, tmp_path).record("mug", 0.6, "door")
    found = shades(tmp_path, "mug")
    assert len(found) == count <= FRAMES and count > FRAMES // 2
    assert 0 not in found and found[-1] - found[0] > 40  # what was seen before is not of the class


def test_only_what_is_classified_and_no_larger_than_needed(tmp_path: Path) -> None:
    camera = Camera(1000)
    with running(camera, 0.05):
        Recorder(camera, tmp_path, Region(0, 0, 0.5, 1)).record("mug", 0.3, "door")
    (frames,) = read_taught(tmp_path, lambda frame: frame).values()
    assert {frame.shape for frame in frames} == {(MAX_SIDE, MAX_SIDE, 3)}


@pytest.mark.parametrize(
    ("name", "seconds", "words"),
    [("../x", 1, "cannot name a class"), ("mug", 0, "cannot be recorded"), ("mug", 61, "cannot be recorded"),
     ("mug", float("nan"), "cannot be recorded"), ("mug", 0.1, "No frame came")],
)  # fmt: skip
def test_what_cannot_be_recorded(tmp_path: Path, name: str, seconds: float, words: str) -> None:
    camera = Camera()
    camera.see(0)
    recorder = Recorder(camera, tmp_path)
    with pytest.raises(DataError, match=words):
        recorder.record(name, seconds, "door")
    assert not list(tmp_path.iterdir())


def test_one_class_at_a_time_and_forgotten_again(tmp_path: Path) -> None:
    camera = Camera()
    recorder = Recorder(camera, tmp_path)
    with running(camera):
        first = threading.Thread(target=recorder.record, args=("mug", 0.5, "door"))
        first.start()
        time.sleep(0.1)
        with pytest.raises(DataError, match="Another class"):
            recorder.record("hat", 0.1, "door")
        first.join()
        recorder.record("hat", 0.1, "door")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hat", "mug"]
    with pytest.raises(DataError, match="No frame came"):
        recorder.record("hat", 0.1, "yard")
    with pytest.raises(DataError, match="No frame came"):
        recorder.record("hat", 0.1, "yard")
    recorder.forget("mug")
    assert [path.name for path in tmp_path.iterdir()] == ["hat"]
    with pytest.raises(DataError, match="no taught class"):
        recorder.forget("mug")
