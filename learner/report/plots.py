"""The plots of a report as PNG files.

Drawn small with large type: the figures are less than 4 inches wide, so they stay readable at 400 pixels.
Colours are those of Okabe and Ito (2008), which colour-blind people can tell apart; markers differ too.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from duallora_edge.learner.report.metrics import BINS, Cell, Metrics

DPI = 240
FIGSIZE = (3.8, 3.6)  # inches
BLUE, SKY, ORANGE = "#0072B2", "#56B4E9", "#D55E00"
INK, MUTED, GREY, GRID = "#1f2933", "#52606d", "#9aa5b1", "#d9dee3"
OTHERS = [(ORANGE, "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), (SKY, "P")]
MOST_NUMBERS = 10  # tasks up to which numbers fit into the cells, and names beside them
MOST_NAMES = 12


def printable(name: str, limit: int | None = None) -> str:
    """A name as one line of visible characters, shortened in the middle to ``limit`` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in name).split()) or "(no name)"
    if limit is None or len(line) <= limit:
        return line
    tail = (limit - 1) // 2
    return f"{line[: limit - 1 - tail]}…{line[-tail:]}"


def matrix_png(metrics: Metrics) -> bytes:
    """Heat map of the accuracy matrix: one row for the state after each task, one column for each task."""
    size = len(metrics.tasks)
    figure = Figure(figsize=FIGSIZE, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(metrics.accuracy_matrix, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    if size <= MOST_NUMBERS:
        _write_numbers(axes, metrics)
    if size <= MOST_NAMES:
        names = [printable(task.name, 15) for task in metrics.tasks]
        axes.set_xticks(range(size), names, rotation=40, ha="right", rotation_mode="anchor", parse_math=False)
        axes.set_yticks(range(size), names, parse_math=False)
    else:
        ticks = range(math.ceil(size / 10) - 1, size, math.ceil(size / 10))
        axes.set_xticks(ticks, [str(tick + 1) for tick in ticks])
        axes.set_yticks(ticks, [str(tick + 1) for tick in ticks])
    axes.set_xlabel("accuracy on task", fontsize=9, color=MUTED)
    axes.set_ylabel("after task", fontsize=9, color=MUTED)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, format=PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=0)
    style_axes(axes, "Accuracy matrix")
    axes.spines[:].set_visible(False)
    return to_png(figure)


def _write_numbers(axes: Axes, metrics: Metrics) -> None:
    size = len(metrics.tasks)
    for k, row in enumerate(metrics.rows):
        for i, cell in enumerate(row):
            if cell.accuracy is None:
                axes.text(i, k, "–", ha="center", va="center", fontsize=9, color=MUTED)
                continue
            text = f"{100 * cell.accuracy:.{1 if size <= 5 else 0}f}"
            color = "white" if cell.accuracy > 0.65 else INK
            axes.text(i, k, text, ha="center", va="center", fontsize=9 if size <= 7 else 8, color=color)


def accuracy_png(metrics: Metrics, name: str, comparisons: Sequence[tuple[str, Metrics]] = ()) -> bytes:
    """Accuracy over all classes so far after each task, for the run and what it is compared with.

    Thin grey lines follow the single tasks of the run. ``name`` labels the run in the legend.
    """
    figure = Figure(figsize=FIGSIZE, layout="constrained")
    axes = figure.add_subplot()
    lines = [_line(axes, metrics, name, BLUE, "o", "-")]
    lines[0].set_zorder(4)
    for index, (other, found) in enumerate(comparisons):
        color, marker = OTHERS[index % len(OTHERS)]
        lines.append(_line(axes, found, other, color, marker, "-" if index < len(OTHERS) else "--"))
    if len(metrics.tasks) > 1:
        lines.append(_single_tasks(axes, metrics, name))
    columns = 2 if max(len(str(line.get_label())) for line in lines) <= 22 else 1
    legend = figure.legend(
        handles=lines, loc="outside lower center", ncols=columns, fontsize=8, frameon=False, labelcolor=INK
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    longest = max([len(metrics.tasks), *(len(found.tasks) for _, found in comparisons)])
    axes.set_xlim(0.7, longest + 0.3)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("tasks learned", fontsize=9, color=MUTED)
    axes.grid(axis="y", color=GRID, lw=0.6)
    style_axes(axes, "Accuracy over all classes so far")
    return to_png(figure)


def _line(axes: Axes, metrics: Metrics, name: str, color: str, marker: str, dashes: str) -> Line2D:
    values = np.array([np.nan if a is None else a for a in metrics.incremental_accuracy])
    label = printable(name, 40).lstrip("_") or "–"  # matplotlib hides labels with a leading underscore
    size = 5 if len(values) <= 20 else 3
    steps = range(1, len(values) + 1)
    return axes.plot(steps, values, color=color, marker=marker, ms=size, lw=2, ls=dashes, label=label)[0]


def _single_tasks(axes: Axes, metrics: Metrics, name: str) -> Line2D:
    size = len(metrics.tasks)
    width, marker = (0.8, ".") if size <= MOST_NAMES else (0.35, "")
    for i, column in enumerate(metrics.accuracy_matrix.T):
        axes.plot(range(i + 1, size + 1), column[i:], color=GREY, lw=width, marker=marker, ms=3, zorder=1)
    return Line2D([], [], color=GREY, lw=width, marker=marker, ms=3, label=f"each task of {printable(name, 32)}")


def reliability_png(cell: Cell) -> bytes:
    """Reliability diagram of ``cell``: share of right answers, and number of images, by confidence."""
    figure = Figure(figsize=FIGSIZE, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges = np.linspace(0, 1, BINS + 1)
    counts = np.array(cell.bin_count)
    filled = counts > 0
    centres, width = (edges[:-1] + edges[1:])[filled] / 2, 0.92 / BINS
    accuracy = np.array(cell.bin_correct)[filled] / counts[filled]
    upper.plot([0, 1], [0, 1], color=INK, lw=1, ls="--", zorder=3)
    upper.bar(centres, accuracy, width, color=SKY)
    confidence = np.array(cell.bin_confidence)[filled] / counts[filled]
    upper.plot(confidence, accuracy, ls="", marker="o", ms=4, mfc=ORANGE, mec="white", mew=0.6, zorder=4)
    lower.bar(centres, counts[filled], width, color=GREY)
    lower.set_ylim(0, 1.05 * max(1, counts.max()))
    upper.set_ylim(0, 1.02)
    upper.set_ylabel("right answers", fontsize=9, color=MUTED)
    upper.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lower.set_xlim(0, 1)
    lower.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    lower.set_xlabel("confidence", fontsize=9, color=MUTED)
    lower.set_ylabel("images", fontsize=9, color=MUTED)
    error = cell.calibration_error
    style_axes(upper, "Reliability, no test images" if error is None else f"Reliability, ECE = {100 * error:.1f} %")
    style_axes(lower, "")
    return to_png(figure)


def style_axes(axes: Axes, title: str) -> None:
    """The look that all plots share."""
    axes.set_title(title, fontsize=10.5, color=INK, loc="left", pad=8)
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.set_axisbelow(True)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    with warnings.catch_warnings():
        # names may be in a script that the font lacks; a box in the plot is enough, the page has the name
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(file, format="png", dpi=DPI, facecolor="white")
    return file.getvalue()
