"""A sheet with the first images of each class: what the network sees of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from duallora_edge.learner.report.plots import printable

INK, MUTED = "#1f2933", "#52606d"
SIDE = 72  # pixels of a thumbnail
EACH = 4  # images of a class at most
MOST = 400  # thumbnails at most
WIDTH = 1280
_GAP, _MARGIN, _TITLE, _NAME = 3, 16, 30, 20


@dataclass(frozen=True, eq=False)
class ClassPictures:
    """A class of a task: its number of images, and the first of them, uint8 [n, S, S, 3]."""

    task: str
    name: str
    count: int
    pixels: npt.NDArray[np.uint8]


def each(classes: int) -> int:
    """How many images of each class fit on a sheet of so many classes."""
    return max(1, min(EACH, MOST // max(1, classes)))


def sheet_png(classes: Sequence[ClassPictures]) -> bytes:
    """The images of the classes as a PNG file, task by task. Of more than `MOST` classes the first ones are shown."""
    shown = classes[:MOST]
    columns = each(len(classes))
    cell = columns * (SIDE + _GAP) + 3 * _GAP
    across = (WIDTH - 2 * _MARGIN) // cell
    places, bottom = _places(shown, across, cell)
    sheet = Image.new("RGB", (WIDTH, bottom + _TITLE + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = _font(17), _font(13)
    for (left, top), one, before in zip(places, shown, [None, *shown[:-1]], strict=True):
        if before is None or one.task != before.task:
            draw.text((_MARGIN, top - _TITLE), _fit(one.task, WIDTH - 2 * _MARGIN, large), INK, large)
        count = f" {one.count:,}"
        room = cell - 3 * _GAP - small.getlength(count)
        draw.text((left, top), _fit(one.name, room, small) + count, INK, small)
        for index, pixels in enumerate(one.pixels[:columns]):
            picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left + index * (SIDE + _GAP), top + _NAME))
    more = f"; {len(classes) - len(shown):,} more classes are not shown" if len(classes) > len(shown) else ""
    text = f"The first training images of each class as the network sees them, and how many there are{more}."
    draw.text((_MARGIN, bottom + _GAP), text, MUTED, small)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _places(classes: Sequence[ClassPictures], across: int, cell: int) -> tuple[list[tuple[int, int]], int]:
    """Left and top of each class, where each task begins a row under its title; and where the last row ends."""
    height = _NAME + SIDE + 3 * _GAP
    places: list[tuple[int, int]] = []
    column, top, task = 0, _MARGIN - height, None
    for one in classes:
        if one.task != task:
            column, top, task = 0, top + height + _TITLE, one.task
        elif column == across:
            column, top = 0, top + height
        places.append((_MARGIN + column * cell, top))
        column += 1
    return places, top + height


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fit(name: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """As much of a name as so many pixels hold."""
    limit = 200
    text = printable(name, limit)
    while font.getlength(text) > width and limit > 3:
        limit = min(limit, len(text)) - 1
        text = printable(name, limit)
    return text
