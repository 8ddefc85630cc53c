"""Small image folders made with Pillow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duallora_edge.learner.data import PreparedTask, open_stream, prepare
from duallora_edge.runtime.preprocess import Preprocessing

MakeImages = Callable[..., list[Path]]
Files = dict[str, list[tuple[Path, str]]]


@pytest.fixture
def make_images(tmp_path: Path) -> MakeImages:
    """``make_images("train/cat", 3)`` writes three different 16 px PNG files below ``tmp_path / "data"``."""
    rng = np.random.default_rng(0)

    def make(folder: str, count: int, size: tuple[int, int] = (16, 16)) -> list[Path]:
        target = tmp_path / "data" / folder
        target.mkdir(parents=True, exist_ok=True)
        paths = [target / f"{index:03d}.png" for index in range(count)]
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        return paths

    return make


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def photos(root: Path, make_images: MakeImages) -> Files:
    """Images in folders of two classes with their own test: path and class of each, by split."""
    counts = {"train": {"cat": 6, "dog": 5}, "test": {"cat": 2, "dog": 3}}
    return {
        split: [(path, name) for name, count in names.items() for path in make_images(f"{split}/{name}", count)]
        for split, names in counts.items()
    }


@pytest.fixture
def same_as_photos(root: Path, photos: Files, tmp_path: Path) -> Callable[[Path], None]:
    """``same_as_photos(source)`` asserts that a source has the images and classes of `photos`, to the last pixel."""

    def read(source: Path) -> PreparedTask:
        return prepare(open_stream(str(source)), Preprocessing(32), tmp_path / "cache").tasks[0]

    def content(task: PreparedTask) -> dict[str, list[tuple[str, bytes]]]:
        sets = {"learned": (task.train, task.validation), "test": (task.test,)}
        return {
            name: sorted(
                (label, pixels.tobytes()) for one in parts for label, pixels in zip(one.labels, one.pixels, strict=True)
            )
            for name, parts in sets.items()
        }

    def check(source: Path) -> None:
        expected, found = read(root), read(source)
        assert content(found) == content(expected)
        assert found.digest == expected.digest

    return check
