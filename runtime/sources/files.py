"""Captures of existing images: files, and arrays in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from duallora_edge.errors import DataError, SourceError
from duallora_edge.runtime.preprocess import read_image, to_rgb
from duallora_edge.runtime.sources.capture import Capture, Picture

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


def find_images(folder: Path) -> list[Path]:
    """The images below a folder, sorted by path. Raises `SourceError` when there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise SourceError(f"{folder} contains no images ({', '.join(sorted(SUFFIXES))}); give another folder.")
    return found


class OneImage(Capture):
    """An image file. Raises `DataError` when it cannot be read."""

    def __init__(self, path: Path) -> None:
        self._picture: Picture | None = Picture(read_image(path), str(path))

    def read(self) -> Picture | None:
        picture, self._picture = self._picture, None
        return picture


class Images(Capture):
    """The images of a folder and of those below it."""

    def __init__(self, folder: Path) -> None:
        self._paths = iter(find_images(folder))

    def read(self) -> Picture | None:
        path = next(self._paths, None)
        return None if path is None else Picture(read_image(path), str(path))


class Arrays(Capture):
    """Arrays from Python code, in any layout that `to_rgb` accepts."""

    def __init__(self, arrays: Iterable[Any], color: str) -> None:
        self._arrays = iter(arrays)
        self._color = color

    def read(self) -> Picture | None:
        for item in self._arrays:
            try:
                array = np.asarray(item)
            except ValueError as error:
                raise DataError(f"A frame must be an array; this cannot be converted to one ({error}).") from error
            pixels = to_rgb(array, self._color)
            if np.may_share_memory(pixels, array):  # the caller may fill the same array again
                pixels = to_rgb(array.copy(), self._color)
            return Picture(pixels)
        return None
