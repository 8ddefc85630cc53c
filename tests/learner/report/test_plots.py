"""Plots are well-formed SVG of a bounded size for every length of stream and every name."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from duallora_edge.learner.report.metrics import BINS, Cell, Metrics, TaskClasses
from duallora_edge.learner.report.plots import (
    MARKERS,
    MOST_CELLS,
    MOST_NUMBERS,
    accuracy_svg,
    confusion_svg,
    matrix_svg,
    printable,
    reliability_svg,
    swatch_svg,
)

HOSTILE = ["$\\frac{", "_hidden", "名前", "a" * 300, "two\nlines", "", "\x1b[31m", "<b>&\"'{0}"]


def cell(accuracy: float) -> Cell:
    counts = (20,) * BINS
    right = tuple(round(20 * accuracy) for _ in counts)
    confidence = tuple(20 * (m + 0.5) / BINS for m in range(BINS))
    return Cell(sum(counts), sum(right), sum(right), sum(right), counts, right, confidence)


def stream(size: int, names: list[str] | None = None) -> Metrics:
    names = names or [f"task {i}" for i in range(size)]
    rows = tuple(tuple(cell(0.9 - 0.05 * min(k - i, 9)) for i in range(k + 1)) for k in range(size))
    return Metrics(tuple(TaskClasses(names[i], (f"class {i}",)) for i in range(size)), rows)


def parse(svg: str) -> ElementTree.Element:
    """The root of a plot whose shapes all lie inside of it."""
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg" and len(svg) < 150_000 and 'nan"' not in svg and "nan " not in svg
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter():
        if element.tag in ("text", "rect"):
            assert left <= float(element.attrib["x"]) <= width and top <= float(element.attrib["y"]) <= height
    return root


def texts(root: ElementTree.Element, kind: str) -> list[str]:
    return [e.text or "" for e in root.iter("text") if kind in e.attrib["class"].split()]


def drawn(root: ElementTree.Element, kind: str) -> int:
    """Cells in paths of a class."""
    return sum(e.attrib["d"].count("M") for e in root.iter("path") if e.attrib["class"].startswith(kind))


@pytest.mark.parametrize("size", [1, 10, MOST_NUMBERS + 1, MOST_CELLS, MOST_CELLS + 1, 200])
def test_streams_of_every_length(size: int) -> None:
    metrics = stream(size)
    parse(accuracy_svg(metrics, [("frozen", stream(max(1, size - 1)))]))
    shown = math.ceil(size / math.ceil(size / MOST_CELLS))
    root = parse(matrix_svg(metrics))
    assert drawn(root, "acc") == shown * (shown + 1) // 2
    assert len(texts(root, "value")) == (shown * (shown + 1) // 2 if size <= MOST_NUMBERS else 0)


def test_the_matrix_says_what_the_metrics_say() -> None:
    root = parse(matrix_svg(stream(3)))
    assert texts(root, "value") == ["90", "85", "90", "80", "85", "90"]
    assert texts(root, "end") == ["task 0 1", "task 1 2", "task 2 3"]


def test_more_comparisons_than_markers() -> None:
    svg = accuracy_svg(stream(2), [(f"method {i}", stream(2)) for i in range(2 * len(MARKERS))])
    parse(svg)
    lines = re.findall(r'<g class="(line[^"]*)"', svg)
    assert len(set(lines)) == 2 * len(MARKERS) - 1  # the third round looks like the second
    assert lines[-1] == "line0"  # the run lies on top
    parse(f'<svg viewBox="0 0 28 12">{swatch_svg(7)}</svg>')


def test_hostile_names_are_text() -> None:
    assert texts(parse(matrix_svg(stream(len(HOSTILE), HOSTILE))), "end")[-1] == "<b>&\"'{0} 8"
    counts = np.ones((len(HOSTILE), len(HOSTILE)), np.int64)
    parse(confusion_svg(counts, HOSTILE, (), HOSTILE[-1].replace("{0}", "")))


def test_nothing_measured() -> None:
    empty = Metrics((TaskClasses("t", ("c",)),), ((Cell(),),))
    assert drawn(parse(matrix_svg(empty)), "acc") == 0
    parse(accuracy_svg(empty))
    parse(reliability_svg(Cell()))
    assert drawn(parse(confusion_svg(np.zeros((3, 3), np.int64), ["a", "b", "c"], (0,), "none")), "conf") == 0


def test_a_gap_where_nothing_was_measured() -> None:
    metrics = stream(3)
    rows = (metrics.rows[0], (Cell(), Cell()), metrics.rows[2])
    line = parse(accuracy_svg(Metrics(metrics.tasks, rows))).findall("g")[-1].find("path")
    assert line is not None and line.attrib["d"].count("M") == 2


def test_reliability_shows_the_counts() -> None:
    heights = [
        [
            float(e.attrib["height"])
            for e in parse(reliability_svg(cell(share))).iter("rect")
            if e.attrib["class"] == kind
        ]
        for share in (0.4, 0.8)
        for kind in ("bar", "count")
    ]
    assert len(heights[0]) == BINS and heights[1] == heights[3]
    assert [round(high / low, 1) for low, high in zip(heights[0], heights[2], strict=True)] == [2.0] * BINS


@pytest.mark.parametrize("size", [2, MOST_NUMBERS, MOST_NUMBERS + 1, 200])
def test_confusion(size: int) -> None:
    counts = 90 * np.eye(size, dtype=np.int64) + 10 * np.eye(size, k=1, dtype=np.int64)
    root = parse(confusion_svg(counts, [f"class {i}" for i in range(size)], (0, size // 2), "Classes"))
    assert drawn(root, "conf14") == size  # at least 90 %
    assert drawn(root, "conf3") == size - 1  # 10 %
    assert drawn(root, "conf") == 2 * size - 1
    assert drawn(root, "border") == 4
    assert texts(root, "value") == (["90", "10"] * (size - 1) + ["100"] if size <= MOST_NUMBERS else [])


@pytest.mark.parametrize(
    ("name", "limit", "shown"),
    [
        ("plain", None, "plain"),
        (" two\n\tlines\u200b ", None, "two lines"),
        ("", 12, "(no name)"),
        ("abcdefgh", 5, "ab…gh"),
        ("abcdefgh", 8, "abcdefgh"),
        ("lone \udcff surrogate", None, "lone surrogate"),
    ],
)
def test_printable(name: str, limit: int | None, shown: str) -> None:
    assert printable(name, limit) == shown
