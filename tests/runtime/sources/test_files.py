"""Folders, images and arrays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duallora_edge.errors import SourceError
from duallora_edge.runtime.sources import find_images, open_source


def test_a_folder_is_read_in_the_order_of_its_paths(image_folder: Path) -> None:
    with open_source(image_folder) as source:
        frames = list(source)
        assert [frame.name for frame in frames] == [str(image_folder / n) for n in ("a/one.png", "b/two.JPG", "c.bmp")]
        assert [frame.pixels.shape for frame in frames] == [(6, 8, 3), (6, 9, 3), (6, 10, 3)]
        assert np.asarray(frames[2])[0, 0].tolist() == [100, 0, 0]
        assert not source.live and source.description == str(image_folder)


def test_a_broken_image_is_left_out_and_named(image_folder: Path) -> None:
    (image_folder / "b/bad.png").write_bytes((image_folder / "a/one.png").read_bytes()[:40])
    with open_source(str(image_folder)) as source:
        assert len(list(source)) == 3
        assert source.stats.refused == 1
        assert source.stats.refusals[0].startswith(f"{image_folder / 'b/bad.png'} cannot be read as an image")


def test_a_folder_starts_over_and_sees_new_images(image_folder: Path) -> None:
    with open_source(image_folder, loop=True) as source:
        names = [Path(frame.name or "").name for frame, _ in zip(source, range(7), strict=False)]
        assert names == ["one.png", "two.JPG", "c.bmp"] * 2 + ["one.png"]
        (image_folder / "z.png").write_bytes((image_folder / "a/one.png").read_bytes())
        assert "z.png" in [Path(frame.name or "").name for frame, _ in zip(source, range(20), strict=False)]


def test_one_image(image_folder: Path) -> None:
    with open_source(image_folder / "c.bmp") as source:
        (frame,) = source
    assert frame.pixels.shape == (6, 10, 3)
    (image_folder / "c.bmp").write_bytes(b"BM")
    with pytest.raises(SourceError, match="cannot be read as an image"):
        open_source(image_folder / "c.bmp")


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="contains no images"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match="contains no images"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("array", "color", "pixel"),
    [
        (np.full((4, 6), 9, np.uint8), "rgb", [9, 9, 9]),
        (np.full((4, 6, 1), 9, np.uint8), "rgb", [9, 9, 9]),
        (np.full((4, 6, 3), (1, 2, 3), np.uint8), "rgb", [1, 2, 3]),
        (np.full((4, 6, 3), (1, 2, 3), np.uint8), "bgr", [3, 2, 1]),
        (np.full((4, 6, 4), (1, 2, 3, 255), np.uint8), "rgb", [1, 2, 3]),
        (np.full((4, 6), 9 << 8, np.uint16), "rgb", [9, 9, 9]),
    ],
)
def test_arrays_of_every_layout(array: np.ndarray, color: str, pixel: list[int]) -> None:
    with open_source([array], color=color) as source:
        (frame,) = source
    assert frame.pixels.shape == (4, 6, 3) and frame.pixels.dtype == np.uint8
    assert frame.pixels[0, 0].tolist() == pixel and frame.name is None


def test_what_is_no_frame_is_left_out() -> None:
    good = np.zeros((4, 6, 3), np.uint8)
    absurd = np.broadcast_to(np.uint8(0), (20_000, 20_000))
    items: list[Any] = [good, None, good.astype(float), np.zeros((0, 6, 3), np.uint8), [[1], [2, 3]], "text", absurd]
    with open_source([*items, good]) as source:
        assert [frame.sequence for frame in source] == [0, 1]
        assert source.stats.refused == len(items) - 1


def test_a_caller_may_fill_the_same_array_again() -> None:
    def camera() -> Iterator[np.ndarray]:
        array = np.zeros((2, 2), np.uint8)
        for number in range(10):
            array[:] = number
            yield array

    with open_source(camera(), buffer=3) as source:
        assert [int(frame.pixels[0, 0, 0]) for frame in source] == list(range(10))


def test_an_error_in_the_code_that_makes_the_frames_is_raised() -> None:
    def camera() -> Iterator[np.ndarray]:
        yield np.zeros((2, 2), np.uint8)
        raise KeyError("sensor")

    with open_source(camera()) as source:
        assert source.read() is not None
        with pytest.raises(SourceError, match="KeyError: 'sensor'") as caught:
            source.read()
        assert isinstance(caught.value.__cause__, KeyError)


def test_an_array_of_frames() -> None:
    with open_source(np.zeros((5, 4, 6, 3), np.uint8)) as source:
        assert len(list(source)) == 5
