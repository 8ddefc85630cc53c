"""The table and the picture of several methods on one stream."""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from duallora_edge.errors import RunError
from duallora_edge.learner.report.definitions import span
from duallora_edge.learner.report.intervals import Interval, mean_of_same
from duallora_edge.learner.report.metrics import Metrics
from duallora_edge.learner.report.picture_sheet import INK, MUTED
from duallora_edge.learner.report.plots import printable

DPI = 240
# The colours of Okabe and Ito (2008), which colour-blind people can tell apart.
BLUE, ORANGE, GREY, GRID = "#0072B2", "#D55E00", "#9aa5b1", "#d9dee3"


@dataclass(frozen=True)
class Result:
    """One method and seed. Fractions, ``trained`` numbers a task, ``stored_bytes`` a task, ``seconds`` of learning.

    None where a number does not exist: a method that learns everything at once cannot forget. ``intervals`` are those
    of `Metrics.intervals`.
    """

    last: float | None
    average: float | None
    forgetting_from_best: float | None
    forgetting_since_learned: float | None
    forgetting_task_given: float | None
    calibration_error: float | None
    task_accuracy: float | None
    false_novelty: float | None
    novelty_detected: float | None
    trained: float
    stored_bytes: float
    seconds: float
    intervals: Mapping[str, Interval | None]

    @classmethod
    def of(cls, metrics: Metrics, *, single_task: bool, trained: float, stored_bytes: float, seconds: float) -> Result:
        """The result of a stream's metrics; ``single_task`` leaves out what needs several tasks."""
        summary = metrics.summary
        return cls(
            last=summary["last_accuracy"],
            average=None if single_task else summary["average_incremental_accuracy"],
            forgetting_from_best=summary["forgetting_from_best"],
            forgetting_since_learned=summary["forgetting_since_learned"],
            forgetting_task_given=summary["forgetting_task_given"],
            calibration_error=summary["calibration_error"],
            task_accuracy=None if single_task else summary["task_accuracy"],
            false_novelty=summary["false_novelty"],
            novelty_detected=summary["novelty_detected"],
            trained=trained,
            stored_bytes=stored_bytes,
            seconds=seconds,
            intervals=metrics.intervals,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Result:
        """The inverse of `to_json`. Raises `RunError` when it is something else."""
        try:
            ends = {key: tuple(interval) if interval else None for key, interval in value["intervals"].items()}
            return cls(**{**value, "intervals": ends})
        except (AttributeError, KeyError, TypeError) as error:
            raise RunError(f"A stored result is unreadable ({error}); delete it and compare again.") from error


# attribute, heading, factor, digits
COLUMNS = (
    ("last", "last", 100, 1),
    ("average", "average", 100, 1),
    ("forgetting_from_best", "F best", 100, 1),
    ("forgetting_since_learned", "F learned", 100, 1),
    ("forgetting_task_given", "F given", 100, 1),
    ("calibration_error", "ECE", 100, 1),
    ("task_accuracy", "task", 100, 1),
    ("false_novelty", "false", 100, 1),
    ("novelty_detected", "novel", 100, 1),
    ("trained", "trained", 1e-3, 1),
    ("stored_bytes", "stored", 1e-6, 2),
    ("seconds", "min", 1 / 60, 1),
)
LEGEND = (
    "Percent and points, mean ± standard deviation over seeds. *last*: accuracy over all classes after the last task; "
    "*interval*: of 95 %, for the number of test images, which seeds do not show; *average*: mean of that after each "
    "task; *F best*, *F learned*: mean drop of a task's accuracy from its best and since it was learned, among all "
    "classes; *F given*: since it was learned, among the classes of its task; *ECE*: calibration error, 15 bins; "
    "*task*: images whose task was found; *false*: images called novel although their class is known; *novel*: images "
    "called novel before their task was learned; *trained*: thousand numbers a task, heads left out; *stored*: MB a "
    "task; *min*: minutes of learning, prefix included, on this machine; *ms*: exported model, one image, ONNX "
    "Runtime on 2 threads. ¹ keeps training images."
)


def markdown(
    name: str,
    results: Mapping[str, Sequence[Result]],
    latencies: Mapping[str, float],
    keeps_images: Collection[str] = (),
) -> str:
    """The table as Markdown, one row a method."""
    headings = ["method", *(heading for _, heading, _, _ in COLUMNS), *(["ms"] if latencies else [])]
    headings.insert(2, "interval")
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for label, rows in results.items():
        cells = [f"`{label}`" + ("¹" if label in keeps_images else "")]
        cells += [_cell([getattr(row, key) for row in rows], factor, digits) for key, _, factor, digits in COLUMNS]
        ends = [interval for row in rows if (interval := row.intervals["last_accuracy"])]
        cells.insert(2, span(mean_of_same(ends)) or "–")
        if latencies:
            cells.append(f"{latencies[label]:.1f}" if label in latencies else "–")
        lines.append("| " + " | ".join(cells) + " |")
    seeds = max(map(len, results.values()), default=0)
    return f"**{name}**, {seeds} seed{'s' if seeds != 1 else ''}\n\n" + "\n".join(lines) + f"\n\n{LEGEND}\n"


def _cell(values: Sequence[float | None], factor: float, digits: int) -> str:
    known = [factor * value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{mean(known):.{digits}f}"
    spread = stdev(known) if len(known) > 1 else 0.0
    return f"{text} ± {spread:.{digits}f}" if len(known) > 1 else text


def comparison_png(name: str, results: Mapping[str, Sequence[Result]]) -> bytes:
    """Last accuracy of each method as bars with one dot a seed, and its task-given forgetting beside it."""
    labels = list(results)
    figure = Figure(figsize=(7.6, 1.1 + 0.32 * len(labels)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    for axes, key, color in ((left, "last", BLUE), (right, "forgetting_task_given", ORANGE)):
        for y, label in enumerate(labels):
            values = [v for row in results[label] if (v := getattr(row, key)) is not None]
            if not values:
                axes.text(0, y, " –", va="center", fontsize=8, color=INK)
                continue
            axes.barh(y, mean(values), color=color if y == 0 else GREY, height=0.65)
            axes.plot(values, [y] * len(values), ls="", marker="o", ms=3, color=INK)
            text = axes.text(max(*values, 0), y, f" {100 * mean(values):.1f}", va="center", fontsize=8, color=INK)
            text.set_parse_math(False)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="x", color=GRID, lw=0.6)
        axes.margins(x=0.18)
    left.set_yticks(range(len(labels)), [printable(label, 44) for label in labels], parse_math=False)
    left.invert_yaxis()
    left.set_xlim(0, 1.12)
    style_axes(left, f"Last accuracy, {printable(name, 24)}")
    style_axes(right, "Forgetting, given")
    return to_png(figure)


def style_axes(axes: Axes, title: str) -> None:
    """The look that all PNG plots share."""
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
        # names may be in a script that the font lacks; a box in the plot is enough, the table has the name
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(file, format="png", dpi=DPI, facecolor="white")
    return file.getvalue()
