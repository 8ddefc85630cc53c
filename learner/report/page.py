"""The report of a run: metrics.json, and one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from duallora_edge.files import write_atomic, write_json
from duallora_edge.learner.report.answers import SIDE, Answers, Change, by_class, changes, confused_pairs
from duallora_edge.learner.report.definitions import DEFINITIONS, TOO_FEW, span
from duallora_edge.learner.report.metrics import Metrics
from duallora_edge.learner.report.plots import (
    MOST_CELLS,
    MOST_NUMBERS,
    RIGHT,
    WRONG,
    accuracy_svg,
    confusion_svg,
    matrix_svg,
    printable,
    reliability_svg,
    swatch_svg,
)

Comparisons = Sequence[tuple[str, Metrics]]
Row = TypeVar("Row")

MOST_CLASSES = 200  # of a matrix of classes; more of them are a matrix of tasks
MOST_ROWS = 1000  # of a table
MOST_PAIRS = 100  # of classes, those confused most
_FIRST_ROWS = 10  # of a long table that are shown, while the others are folded
_CARDS = {
    "last_accuracy": "task not given",
    "average_incremental_accuracy": "mean over the states after each task",
    "forgetting_since_learned": "more classes compete, and drift",
    "forgetting_task_given": "drift alone",
    "task_accuracy": "found by the model itself",
    "calibration_error": "confidence against right answers",
}
_COMPARED = (
    "last_accuracy",
    "last_accuracy_task_given",
    "average_incremental_accuracy",
    "forgetting_since_learned",
    "forgetting_task_given",
    "task_accuracy",
    "calibration_error",
)


@dataclass(frozen=True)
class About:
    """What a report is about: the name of the run, the method, and further facts in the order to show them.

    ``details`` maps a label to its text, such as ``{"Backbone": "vit_tiny_patch16_224", "Seed": "0"}``. ``doubts`` are
    sentences on what is not to be trusted.
    """

    run: str
    method: str
    details: Mapping[str, str] = field(default_factory=dict)
    doubts: Sequence[str] = ()


def write_report(
    folder: Path, metrics: Metrics, about: About, comparisons: Comparisons = (), answers: Answers | None = None
) -> Path:
    """Write metrics.json and report.html into ``folder``.

    ``comparisons`` are other methods on the same stream, each with its name. ``answers`` are those that the last row of
    the metrics counts; without them, or with others, the page has no classes and no pictures. It is made before
    anything is written, and each file appears whole; report.html comes last. Returns its path.
    """
    page = _page(metrics, about, comparisons, answers if answers and answers.fits(metrics) else None)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        "about": asdict(about),
        **metrics.to_json(),
        "comparisons": [{"name": name, **other.to_json()} for name, other in comparisons],
    }
    write_json(folder / "metrics.json", stored)
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def _page(metrics: Metrics, about: About, comparisons: Comparisons, answers: Answers | None) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # Every name from outside goes through one of these two.
    environment.filters.update(
        line=printable, short=partial(printable, limit=60), number="{:,}".format, count=_count, percent=_percent,
        points=_points, span=span, formula=_formula, split=_split,
    )  # fmt: skip
    template, style = (files(__package__).joinpath(name).read_text("utf-8") for name in ("report.html", "report.css"))
    several = len(metrics.tasks) > 1
    earlier = {name for task in metrics.tasks[:-1] for name in task.classes}
    return environment.from_string(template).render(
        style=Markup(style),
        about=about,
        metrics=metrics,
        several=several,
        comparisons=[(about.method, metrics), *comparisons],
        definitions=DEFINITIONS,
        cards=[(DEFINITIONS[key], *_number(metrics, key), _CARDS[key]) for key in _CARDS if _has_card(metrics, key)],
        compared={key: DEFINITIONS[key] for key in _COMPARED},
        accuracy=accuracy_svg(metrics, comparisons) if several or comparisons else "",
        swatch=swatch_svg,
        matrix=matrix_svg(metrics) if several else "",
        matrix_step=-(-len(metrics.tasks) // MOST_CELLS),
        reliability=reliability_svg(metrics.last),
        earlier_classes=earlier,
        most_rows=MOST_ROWS,
        most_numbers=MOST_NUMBERS,
        numbered_tasks=list(enumerate(metrics.per_task, 1)),
        **_of_change(metrics, answers),
        **(_of_answers(metrics, answers) if answers else {"answers": None}),
    )


def _of_answers(metrics: Metrics, answers: Answers) -> dict[str, Any]:
    """What the page shows of single classes and images."""
    pairs = confused_pairs(metrics, answers)
    return {
        "answers": answers,
        "classes": by_class(metrics, answers),
        "pairs": pairs[:MOST_PAIRS],
        "across": sum(pair.images for pair in pairs if pair.answer_task != pair.task),
        "wrong": sum(pair.images for pair in pairs),
        "confusion": _confusion(metrics, answers),
        "of_classes": len(metrics.classes) <= MOST_CLASSES,
        "steps": {"wrong": (0, *WRONG), "right": (0, *RIGHT)},
        "side": SIDE,
    }


def _confusion(metrics: Metrics, answers: Answers) -> Markup | str:
    """The matrix of classes, by tasks where each class has one; of many classes that of tasks, if there are several."""
    counts, of_task = answers.confusion(metrics), list(metrics.first_tasks.values())
    first = [] if metrics.shares_classes else [i for i, task in enumerate(of_task) if i == 0 or task != of_task[i - 1]]
    if len(counts) <= MOST_CLASSES:
        label = "Classes of the images (rows) and of the answers (columns)"
        return confusion_svg(counts, metrics.classes, first, label) if len(counts) > 1 else ""
    if len(first) < 2:
        return ""
    counts = np.add.reduceat(np.add.reduceat(counts, first, axis=0), first, axis=1)
    names = [metrics.tasks[of_task[i]].name for i in first]
    return confusion_svg(counts, names, (), "Tasks of the images (rows) and of the answers (columns)")


def _of_change(metrics: Metrics, answers: Answers | None) -> dict[str, Any]:
    """What the last task changed, as far as the number of test images can tell."""
    kinds = dict(zip(("tasks", "classes"), changes(metrics, answers), strict=True))

    def told(kind: Sequence[Change]) -> list[Change]:
        return [change for change in kind if change.is_told]

    return {"changes": {name: (len(kind), told(kind)) for name, kind in kinds.items()}}


def _has_card(metrics: Metrics, key: str) -> bool:
    return key == "last_accuracy" or (
        metrics.summary[key] is not None and (len(metrics.tasks) > 1 or not DEFINITIONS[key].several_tasks)
    )


def _number(metrics: Metrics, key: str) -> tuple[str, str, str]:
    """The number, its unit and its interval."""
    text = DEFINITIONS[key].headline(metrics.summary[key], metrics.intervals[key])
    number, _, unit = (text, "", "") if text == TOO_FEW else text.partition(" ")
    return number, unit, span(metrics.intervals[key])


def _split(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """The rows that are shown, and those that are folded."""
    return rows[:_FIRST_ROWS], rows[_FIRST_ROWS:MOST_ROWS]


def _count(number: int, noun: str) -> str:
    plural = noun if number == 1 else noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {plural}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"


def _points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "−")


def _formula(text: str) -> Markup:
    return Markup(re.sub(r"_\{([^}]*)\}", r"<sub>\1</sub>", str(escape(text))))
