"""The plots of a report as SVG. Their colours are classes of report.css, which follows the dark mode of the reader.

Text is as large as the plot allows at 400 pixels. Lines differ in their markers too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from duallora_edge.learner.report.metrics import BINS, Cell, Metrics

WIDTH, HEIGHT = 440, 330  # of a plot with axes, in its own units
MOST_CELLS = 60  # rows and columns of the accuracy matrix
MOST_NUMBERS = 25  # rows and columns of a matrix up to which numbers fit into its cells, and names beside it
# Shapes around the point where a path is.
MARKERS = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "m-3.5-3.5h7v7h-7z",
    "m0-4.5l4.5 8h-9z",
    "m0-5l5 5-5 5-5-5z",
    "m0 4.5l4.5-8h-9z",
    "m-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
)
_LEFT, _TOP, _RIGHT, _BOTTOM = 48, 12, WIDTH - 22, HEIGHT - 44

Point = tuple[float, float]


def printable(name: str, limit: int | None = None) -> str:
    """A name as one line of visible characters, shortened in the middle to ``limit`` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in name).split()) or "(no name)"
    if limit is None or len(line) <= limit:
        return line
    tail = (limit - 1) // 2
    return f"{line[: limit - 1 - tail]}…{line[-tail:]}"


def accuracy_svg(metrics: Metrics, comparisons: Sequence[tuple[str, Metrics]] = ()) -> Markup:
    """Accuracy over all classes so far after each task, for the run and what it is compared with.

    Thin lines follow the single tasks of the run, of many tasks some.
    """
    longest = max(len(m.tasks) for m in (metrics, *(other for _, other in comparisons)))

    def points(values: Iterable[float | None], first: int = 0) -> list[Point]:
        """Accuracies from the state after task ``first`` on."""
        return [
            (x(k), math.nan if value is None else _BOTTOM - (_BOTTOM - _TOP) * value)
            for k, value in enumerate(values, first)
        ]

    def x(k: int) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (k + 0.5) / longest

    ticks = range(0, longest, _step(longest, 12))
    parts = [_axes(), *(_text(x(i), _BOTTOM + 18, f"{i + 1}") for i in ticks)]
    parts.append(_text((_LEFT + _RIGHT) / 2, HEIGHT - 8, "tasks learned", "label"))
    matrix = metrics.accuracy_matrix
    followed = range(0, len(matrix), _step(len(matrix), MOST_CELLS))
    parts += [Markup('<path class="single" d="{0}"/>').format(_path(points(matrix[i:, i], i))) for i in followed]
    for index, (_, other) in reversed(list(enumerate([("", metrics), *comparisons]))):
        found = points(other.incremental_accuracy)
        parts.append(_series(found, found if len(found) <= MOST_CELLS else (), index))
    return _svg(WIDTH, HEIGHT, parts, "Accuracy over all classes after each task")


def swatch_svg(index: int) -> Markup:
    """A piece of a line of `accuracy_svg` for its legend: 0 is the run, the others are what it is compared with."""
    return Markup('<svg class="swatch" width="28" height="12" aria-hidden="true">{0}</svg>').format(
        _series([(0, 6), (14, 6), (28, 6)], [(14, 6)], index)
    )


def _series(points: Sequence[Point], marked: Sequence[Point], index: int) -> Markup:
    """A line in the colour and with the markers that belong to its number."""
    style = index and 1 + (index - 1) % (len(MARKERS) - 1)
    dots = "".join(f"M{x:.1f} {y:.1f}{MARKERS[style]}" for x, y in marked if not math.isnan(y))
    return Markup('<g class="line{0}{1}"><path class="stroke" d="{2}"/><path d="{3}"/></g>').format(
        style, " again" if index >= len(MARKERS) else "", _path(points), dots
    )


def _path(points: Sequence[Point]) -> str:
    """A line through points, with gaps where one is NaN."""
    pen, parts = "M", []
    for x, y in points:
        if math.isnan(y):
            pen = "M"
            continue
        parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(parts)


def reliability_svg(cell: Cell) -> Markup:
    """Reliability diagram of ``cell``: share of right answers, and number of images, by confidence."""
    parts, most, foot = [], max(1, *cell.bin_count), 50
    bottom = _BOTTOM - foot - 14
    parts.append(_axes(bottom))
    width, height = (_RIGHT - _LEFT) / BINS, bottom - _TOP
    for m, (count, right, confidence) in enumerate(
        zip(cell.bin_count, cell.bin_correct, cell.bin_confidence, strict=True)
    ):
        if count:
            x, tall, few = _LEFT + m * width, height * right / count, foot * count / most
            parts.append(_rect(x + 1, bottom - tall, width - 2, tall, "bar"))
            parts.append(_rect(x + 1, _BOTTOM - few, width - 2, few, "count"))
            dot = f"M{_LEFT + (_RIGHT - _LEFT) * confidence / count:.1f} {bottom - tall:.1f}{MARKERS[0]}"
            parts.append(Markup('<path class="dot" d="{0}"/>').format(dot))
    parts.append(Markup('<path class="ideal" d="M{0} {1}L{2} {3}"/>').format(_LEFT, bottom, _RIGHT, _TOP))
    shares = range(0, 101, 20)
    parts += [_text(_LEFT + (_RIGHT - _LEFT) * share / 100, _BOTTOM + 18, f"{share} %") for share in shares]
    parts.append(_text(_LEFT - 6, _BOTTOM - foot + 10, f"{most:,}", "end"))
    parts.append(_text((_LEFT + _RIGHT) / 2, HEIGHT - 8, "confidence; below, number of images", "label"))
    return _svg(WIDTH, HEIGHT, parts, "Share of right answers by confidence")


def matrix_svg(metrics: Metrics) -> Markup:
    """Heat map of the accuracy matrix: one row for the state after each task, one column for each task.

    Of more than `MOST_CELLS` tasks some are shown.
    """
    step = _step(len(metrics.tasks), MOST_CELLS)
    shown = range(0, len(metrics.tasks), step)
    shares = metrics.accuracy_matrix[::step, ::step]
    levels = np.where(np.isnan(shares), 0, 1 + np.floor(np.nan_to_num(shares) * 9.99)).astype(np.int64)
    names = [(i + 1, metrics.tasks[i].name) for i in shown]
    return _matrix(names, levels, "acc", shares, "Accuracy on each task (columns) after each task (rows)")


def confusion_svg(counts: npt.NDArray[np.int64], names: Sequence[str], groups: Sequence[int], label: str) -> Markup:
    """Heat map of who is taken for whom, by shares of each row of ``counts`` [N, N].

    ``names`` are those of the rows; a group of rows begins at each of ``groups``.
    """
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)
    known = np.nan_to_num(shares)
    wrong = np.where(known > 0, 1 + np.searchsorted(WRONG, known, side="right"), 0)
    right = np.where(totals > 0, 11 + np.searchsorted(RIGHT, known, side="right"), 0)
    levels = np.where(np.eye(len(counts), dtype=bool), right, wrong)
    return _matrix(list(enumerate(names, 1)), levels, "conf", np.where(counts > 0, shares, np.nan), label, groups)


WRONG, RIGHT = (0.05, 0.1, 0.2), (0.5, 0.75, 0.9)  # shares at which the colours of `confusion_svg` change


def _matrix(
    names: Sequence[tuple[int, str]],
    levels: npt.NDArray[np.int64],
    kind: str,
    shares: npt.NDArray[np.float64],
    label: str,
    groups: Sequence[int] = (),
) -> Markup:
    """Cells of classes ``kind`` with the number of their level, no cell for level 0; lines begin groups of rows."""
    size = len(names)
    numbers = size <= MOST_NUMBERS
    side, left, top = (min(max(34, 240 / size), 60), 150, 24) if numbers else (600 / size, 60, 24)
    parts = []
    for level in np.unique(levels[levels > 0]).tolist():
        path = "".join(f"M{c} {r}h1v1h-1z" for r, c in np.argwhere(levels == level).tolist())
        parts.append(Markup('<path class="{0}{1}{2}" d="{3}"/>').format(kind, level, " apart" if numbers else "", path))
    borders = "".join(f"M0 {g}h{size}M{g} 0v{size}" for g in groups)
    parts.append(Markup('<path class="border" d="{0}"/>').format(borders))
    cells = Markup('<g transform="translate({0} {1}) scale({2:.4f})">{3}</g>').format(
        left, top, side, Markup("").join(parts)
    )
    texts = []
    if numbers:
        for row, (number, name) in enumerate(names):
            middle = top + side * (row + 0.5) + 4
            texts.append(_text(left - 8, middle, f"{printable(name, 16)} {number}", "end"))
            texts.append(_text(left + side * (row + 0.5), top - 8, f"{number}"))
            for column in range(size):
                if not math.isnan(shares[row, column]):
                    strong = " strong" if levels[row, column] in _STRONG[kind] else ""
                    value = f"{100 * shares[row, column]:.0f}"
                    texts.append(_text(left + side * (column + 0.5), middle, value, f"value{strong}"))
    else:
        for row in range(0, size, _step(size, 10)):
            at = side * (row + 0.5)
            texts.append(_text(left - 8, top + at + 7, f"{names[row][0]}", "end large"))
            texts.append(_text(left + at, top - 8, f"{names[row][0]}", "large"))
    width, height = left + side * size + 8, top + side * size + 8
    return _svg(width, height, [cells, *texts], label, fixed=numbers)


_STRONG = {"acc": range(8, 11), "conf": (3, 4, 13, 14)}  # levels on which text has the colour of the paper


def _step(count: int, most: int) -> int:
    """Of ``count`` things every how many are shown, so that they are at most ``most``."""
    return math.ceil(count / most)


def _svg(width: float, height: float, parts: Iterable[Markup], label: str, *, fixed: bool = False) -> Markup:
    size = Markup(' width="{0:.0f}" height="{1:.0f}"').format(width, height) if fixed else ""
    return Markup('<svg viewBox="0 0 {0:.0f} {1:.0f}"{2} role="img" aria-label="{3}">{4}</svg>').format(
        width, height, size, label, Markup("").join(parts)
    )


def _text(x: float, y: float, text: str, kind: str = "tick") -> Markup:
    return Markup('<text x="{0:.1f}" y="{1:.1f}" class="{2}">{3}</text>').format(x, y, kind, text)


def _rect(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return Markup('<rect x="{0:.1f}" y="{1:.1f}" width="{2:.1f}" height="{3:.1f}" class="{4}"/>').format(
        x, y, width, height, kind
    )


def _axes(bottom: float = _BOTTOM) -> Markup:
    """The scale of accuracies, from 0 at ``bottom`` to 1 at the top."""
    parts = []
    for share in range(0, 101, 20):
        y = bottom - (bottom - _TOP) * share / 100
        parts.append(Markup('<path class="grid" d="M{0} {1:.1f}H{2}"/>').format(_LEFT, y, _RIGHT))
        parts.append(_text(_LEFT - 6, y + 4, f"{share} %", "end"))
    return Markup("").join(parts)
