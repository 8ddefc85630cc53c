"""The report of a run: metrics.json, three plots, and one HTML page that needs no other file, no network."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from duallora_edge.files import write_atomic, write_json
from duallora_edge.learner.report.definitions import DEFINITIONS, TOO_FEW, span
from duallora_edge.learner.report.metrics import Metrics, TaskResult
from duallora_edge.learner.report.plots import accuracy_png, matrix_png, printable, reliability_png

Comparisons = Sequence[tuple[str, Metrics]]

_CARDS = (
    "last_accuracy",
    "average_incremental_accuracy",
    "forgetting_since_learned",
    "forgetting_task_given",
    "task_accuracy",
    "calibration_error",
)
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


def write_report(folder: Path, metrics: Metrics, about: About, comparisons: Comparisons = ()) -> Path:
    """Write metrics.json, matrix.png, accuracy.png, reliability.png and report.html into ``folder``.

    ``comparisons`` are other methods on the same stream, each with its name. Everything is drawn before
    anything is written, and each file appears whole; report.html comes last. Returns its path.
    """
    images = {
        "accuracy.png": accuracy_png(metrics, about.method, comparisons),
        "matrix.png": matrix_png(metrics),
        "reliability.png": reliability_png(metrics.last),
    }
    page = _page(metrics, about, comparisons, images)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in images.items():
        write_atomic(folder / name, content)
    stored = {
        "about": asdict(about),
        **metrics.to_json(),
        "comparisons": [{"name": name, **other.to_json()} for name, other in comparisons],
    }
    write_json(folder / "metrics.json", stored)
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def _page(metrics: Metrics, about: About, comparisons: Comparisons, images: Mapping[str, bytes]) -> str:
    title = _text(about.run)
    sections = [
        _header(metrics, about),
        _cards(metrics),
        _figures(metrics, about, comparisons, images),
        _comparison_table(metrics, about, comparisons) if comparisons else "",
        _task_table(metrics),
        _class_names(metrics),
        _definitions(metrics),
    ]
    template, style = (files(__package__).joinpath(name).read_text("utf-8") for name in ("report.html", "report.css"))
    return Template(template).substitute(title=title, style=style, sections="".join(sections))


def _text(name: str, limit: int | None = None) -> str:
    """A name from outside as HTML: one line, every markup character escaped."""
    return escape(printable(name, limit))


def _count(number: int, noun: str) -> str:
    plural = noun if number == 1 else noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {plural}"


def _header(metrics: Metrics, about: About) -> str:
    facts = {"Method": about.method, **about.details}
    items = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>\n" for k, v in facts.items())
    counts = ", ".join(
        [
            _count(len(metrics.tasks), "task"),
            _count(metrics.class_count, "class"),
            _count(metrics.last.n, "test image"),
        ]
    )
    notices = about.doubts if metrics.last.n else ["Without test images nothing could be measured."]
    notice = "".join(f'<p class="notice">{_text(line)}.</p>\n' for line in (text.rstrip(".") for text in notices))
    return f"""<header>
<p class="kicker">Continual learning report</p>
<h1>{_text(about.run)}</h1>
<p class="counts">{counts}</p>
{notice}<dl class="facts">
{items}</dl>
</header>
"""


def _cards(metrics: Metrics) -> str:
    classes = _count(metrics.class_count, "class")
    notes = {
        "last_accuracy": f"{classes}, task not given",
        "average_incremental_accuracy": "mean over the states after each task",
        "forgetting_since_learned": "more classes compete, and drift",
        "forgetting_task_given": "drift alone",
        "task_accuracy": "found by the model itself",
        "calibration_error": "confidence against right answers",
    }
    cards = []
    for key in _CARDS:
        interval = metrics.intervals[key]
        text = DEFINITIONS[key].headline(metrics.summary[key], interval)
        number, _, unit = (text, "", "") if text == TOO_FEW else text.partition(" ")
        ends = f'<p class="note">95 % interval: {span(interval)}</p>' if interval else ""
        cards.append(
            f'<div class="card"><h2>{DEFINITIONS[key].title}</h2>'
            f'<p class="number">{number}<span class="unit"> {unit}</span></p>'
            f'<p class="note">{notes[key]}</p>{ends}</div>\n'
        )
    return f'<section aria-label="Headline numbers">\n<div class="cards">\n{"".join(cards)}</div>\n</section>\n'


def _figures(metrics: Metrics, about: About, comparisons: Comparisons, images: Mapping[str, bytes]) -> str:
    last = DEFINITIONS["last_accuracy"].format(metrics.summary["last_accuracy"])
    error = DEFINITIONS["calibration_error"].format(metrics.summary["calibration_error"])
    beside = " and ".join(name for name, _ in comparisons)
    alts = {
        "accuracy.png": f"Accuracy over all classes after each task of {about.method}"
        + (f" beside {beside}" if beside else "")
        + f"; {last} at the end.",
        "matrix.png": "Heat map of the accuracy on each task (columns) after each task (rows). The diagonal"
        " and the last row are in the table of tasks.",
        "reliability.png": f"Share of right answers by stated confidence; calibration error {error}.",
    }
    captions = {
        "accuracy.png": "Each point: the test images of all tasks so far, with all their classes competing.",
        "matrix.png": "Down a column: what later tasks did to one task. Values in percent.",
        "reliability.png": "Dots on the dashed line: the confidence can be taken at its word.",
    }
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(images[name]).decode()}"'
        f' alt="{_text(alts[name])}"><figcaption>{captions[name]}</figcaption></figure>\n'
        for name in captions
    )
    return f'<section>\n<h2>What happened</h2>\n<div class="figures">\n{figures}{_reading()}</div>\n</section>\n'


def _reading() -> str:
    return """<div class="reading">
<h3>Why accuracy falls even where nothing is forgotten</h3>
<p>After each task, more classes compete for every image. A picture that was recognised among 10 classes can
be taken for one of 40 although no weight has moved. Part of the drop of an old task is therefore the harder
question, not a worse network.</p>
<p><strong>Forgetting, task given</strong> keeps the question the same: the choice stays limited to the task’s
own classes. What is left is the drift of the network. The difference between the two kinds of forgetting is
confusion between tasks.</p>
</div>
"""


def _table(label: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table inside a box that scrolls by itself; cells are HTML, the first of each row is its heading."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>\n'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">\n<table>\n'
        f"<thead><tr>{columns}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )


def _comparison_table(metrics: Metrics, about: About, comparisons: Comparisons) -> str:
    header = ["Method"] + [
        f"{DEFINITIONS[key].title}&nbsp;{'↑' if DEFINITIONS[key].higher_is_better else '↓'}" for key in _COMPARED
    ]
    rows = [
        [_text(name, 60), *(DEFINITIONS[key].format(other.summary[key]) for key in _COMPARED)]
        for name, other in [(about.method, metrics), *comparisons]
    ]
    return (
        "<section>\n<h2>Beside other methods</h2>\n<p>The same stream and the same test images. ↑ higher is"
        f" better, ↓ lower is better.</p>\n{_table('Comparison of methods', header, rows)}</section>\n"
    )


def _task_table(metrics: Metrics) -> str:
    header = ["Task", "Classes", "Images", "Just learned", "Now", "Forgotten"]
    header += ["Just learned, task given", "Now, task given", "Forgotten, task given"]
    rows = [_task_row(i, task) for i, task in enumerate(metrics.per_task)]
    return (
        "<section>\n<h2>Tasks</h2>\n<p>Accuracy in percent, in brackets its interval of 95 %; forgotten in points since"
        " the task had just been learned. <em>Task given</em>: the choice limited to the task’s own classes.</p>\n"
        f"{_table('Tasks', header, rows)}</section>\n"
    )


def _task_row(i: int, task: TaskResult) -> list[str]:
    values = (
        task.learned,
        task.now,
        task.forgetting_since_learned,
        task.learned_task_given,
        task.now_task_given,
        task.forgetting_task_given,
    )
    numbers = ["–" if value is None else f"{round(100 * value, 1) + 0.0:.1f}" for value in values]
    if task.now_interval:
        numbers[1] += f" ({span(task.now_interval)})"
    return [f"{i + 1}. {_text(task.name, 60)}", f"{task.classes:,}", f"{task.n:,}", *numbers]


def _class_names(metrics: Metrics) -> str:
    items = "".join(
        f"<dt>{_text(task.name)}</dt><dd>{', '.join(map(_text, task.classes))}</dd>\n" for task in metrics.tasks
    )
    return (
        "<section>\n<details>\n<summary>Names of the classes</summary>\n"
        f'<dl class="names">\n{items}</dl>\n</details>\n</section>\n'
    )


def _definitions(metrics: Metrics) -> str:
    shared = (
        "<p>In this stream some classes appear in several tasks, so the task of an image is ambiguous and"
        " <em>task identity</em> is left out.</p>\n"
        if metrics.shares_classes
        else ""
    )
    items = "".join(
        f"<div><dt>{d.title}</dt><dd class='value'>{d.format(metrics.summary[key])}</dd>"
        f"<dd class='formula'>{_formula(d.formula)}</dd><dd>{d.meaning}</dd></div>\n"
        for key, d in DEFINITIONS.items()
    )
    notation = _formula(
        "T: number of tasks. a_{k,i}: accuracy on the test images of task i with the model as it was after"
        " task k, all classes known by then competing. b_{k,i}: the same with the choice limited to the"
        " classes of task i. Tasks without test images are left out of every mean."
    )
    return (
        f"<section>\n<h2>Definitions</h2>\n<p>{notation}</p>\n{shared}"
        f'<dl class="definitions">\n{items}</dl>\n</section>\n'
    )


def _formula(text: str) -> str:
    return re.sub(r"_\{([^}]*)\}", r"<sub>\1</sub>", escape(text))
