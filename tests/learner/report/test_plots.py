"""Plots are PNG files of a sane size for every length of stream and every name."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from duallora_edge.learner.report.metrics import BINS, Cell, Metrics, TaskClasses
from duallora_edge.learner.report.plots import accuracy_png, matrix_png, printable, reliability_png

HOSTILE = ["$\\frac{", "_hidden", "名前", "a" * 300, "two\nlines", "", "\x1b[31m", "50 % $x$"]


def cell(accuracy: float) -> Cell:
    counts = (20,) * BINS
    right = tuple(round(20 * accuracy) for _ in counts)
    confidence = tuple(20 * (m + 0.5) / BINS for m in range(BINS))
    return Cell(sum(counts), sum(right), sum(right), sum(right), counts, right, confidence)


def stream(size: int, names: list[str] | None = None) -> Metrics:
    names = names or [f"task {i}" for i in range(size)]
    rows = tuple(tuple(cell(0.9 - 0.01 * (k - i)) for i in range(k + 1)) for k in range(size))
    return Metrics(tuple(TaskClasses(names[i], (f"class {i}",)) for i in range(size)), rows)


def decode(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    pixels = np.asarray(image.convert("RGB"))
    assert 600 <= pixels.shape[0] <= 1200
    assert 600 <= pixels.shape[1] <= 1200
    assert len(png) < 300_000
    assert (pixels[0, 0] == 255).all(), "the background is white"
    assert pixels.std() > 5, "something is drawn"
    return pixels


@pytest.mark.parametrize("size", [1, 10, 50])
def test_streams_of_every_length(size: int) -> None:
    decode(matrix_png(stream(size)))
    decode(accuracy_png(stream(size), "dual_lora", [("frozen", stream(max(1, size - 1)))]))


def test_more_comparisons_than_colours() -> None:
    decode(accuracy_png(stream(2), "dual_lora", [(f"method {i}", stream(2)) for i in range(8)]))


def test_hostile_names_neither_fail_nor_warn() -> None:
    metrics = stream(len(HOSTILE), HOSTILE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(matrix_png(metrics))
        decode(accuracy_png(metrics, HOSTILE[0], [(name, stream(2)) for name in HOSTILE]))


def test_nothing_measured() -> None:
    empty = Metrics((TaskClasses("t", ("c",)),), ((Cell(),),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(matrix_png(empty))
        decode(accuracy_png(empty, "dual_lora"))
        decode(reliability_png(Cell()))


def test_reliability_shows_the_counts() -> None:
    assert (decode(reliability_png(cell(0.6))) != decode(reliability_png(cell(0.9)))).any()


def test_one_run_leaves_no_trace_in_the_next() -> None:
    first = accuracy_png(stream(3), "dual_lora")
    matrix_png(stream(5))
    assert accuracy_png(stream(3), "dual_lora") == first


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
