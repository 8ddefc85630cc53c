"""Small image folders made with Pillow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeImages = Callable[..., list[Path]]


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
