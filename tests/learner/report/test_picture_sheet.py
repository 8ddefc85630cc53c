"""The sheet shows the images it is given, class by class, and stays a readable size."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from duallora_edge.learner.report.picture_sheet import EACH, MOST, SIDE, WIDTH, ClassPictures, each, sheet_png


def drawn(classes: list[ClassPictures]) -> np.ndarray:
    with Image.open(io.BytesIO(sheet_png(classes))) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image)


def plain(task: str, name: str, colours: list[tuple[int, int, int]]) -> ClassPictures:
    pixels = np.array(colours, np.uint8)[:, None, None, :].repeat(32, 1).repeat(32, 2)
    return ClassPictures(task, name, 1234, pixels)


def test_every_image_is_on_the_sheet() -> None:
    classes = [
        plain("first", "red", [(200, 0, 0), (210, 0, 0)]),
        plain("first", "green", [(0, 200, 0)]),
        plain("second", "blue", [(0, 0, 200)] * EACH),
    ]
    sheet = drawn(classes)
    assert sheet.shape[1] == WIDTH
    for colour, count in (((200, 0, 0), 1), ((210, 0, 0), 1), ((0, 200, 0), 1), ((0, 0, 200), EACH)):
        assert (sheet == colour).all(axis=2).sum() == count * SIDE * SIDE
    rows = {name: np.flatnonzero((sheet == colour).all(axis=2).any(axis=1)).min()
            for name, colour in (("red", (200, 0, 0)), ("green", (0, 200, 0)), ("blue", (0, 0, 200)))}  # fmt: skip
    assert rows["red"] == rows["green"] < rows["blue"]


@pytest.mark.parametrize(("classes", "images"), [(1, EACH), (100, 4), (200, 2), (400, 1), (1000, 1)])
def test_images_of_each_class(classes: int, images: int) -> None:
    assert each(classes) == images
    assert min(classes, MOST) * images <= MOST


@pytest.mark.parametrize("count", [1, 100, 450])
def test_many_classes(count: int) -> None:
    classes = [plain("all", f"class {index}", [(9, 99, 199)] * each(count)) for index in range(count)]
    sheet = drawn(classes)
    assert (sheet == (9, 99, 199)).all(axis=2).sum() == min(count, MOST) * each(count) * SIDE * SIDE
    assert sheet.shape[0] < 6000


@pytest.mark.parametrize("name", ["x" * 2000, "日本語", "$\\alpha$", "a\nb", "\u202e", " "])
def test_names_of_others(name: str) -> None:
    drawn([plain(name, name, [(1, 2, 3)])])
