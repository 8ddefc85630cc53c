"""The report: complete, self-contained, escaped, well-formed, and written whole."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duallora_edge.learner.report import page
from duallora_edge.learner.report.answers import SIDE, Answers
from duallora_edge.learner.report.definitions import DEFINITIONS, TOO_FEW
from duallora_edge.learner.report.metrics import Cell, Metrics, Predictions, TaskClasses
from duallora_edge.learner.report.page import About, write_report

FILES = ["metrics.json", "report.html"]
VOID = {"meta", "img", "br", "hr", "link", "input"}
PICTURE = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)


def stream(names: list[str], seed: int = 0, each: int = 2) -> Metrics:
    """So many classes a task, 20 test images a task, random answers."""
    return answered(names, seed, each)[0]


def answered(names: list[str], seed: int = 0, each: int = 2, images: int = 20) -> tuple[Metrics, Answers]:
    """The same with the answers of the last state beside those of the state before."""
    generator = np.random.default_rng(seed)
    rows, states = [], []
    for k in range(len(names)):
        row, parts = [], []
        for i in range(k + 1):
            probabilities = generator.dirichlet(np.ones(each * (k + 1)), images).astype(np.float32)
            tasks = probabilities.reshape(images, k + 1, each).sum(axis=2)
            labels = generator.integers(each * i, each * (i + 1), images)
            novel = generator.random(images) < 0.1
            predictions = Predictions(labels, probabilities, i, np.minimum(tasks, 1), novel)
            row.append(Cell.from_predictions(predictions, range(each * i, each * (i + 1))))
            newest = k == len(names) - 1
            parts.append(Answers.of_task(predictions, (lambda n: PICTURE[None].repeat(len(n), 0)) if newest else None))
        rows.append(tuple(row))
        states.append(Answers.joined(parts))
    letters = [chr(97 + i) if each <= 26 else f"{i}" for i in range(each)]
    tasks = tuple(TaskClasses(name, tuple(f"{name} {letter}" for letter in letters)) for name in names)
    return Metrics(tasks, tuple(rows)), states[-1].after(states[-2] if len(states) > 1 else None)


class Reader(HTMLParser):
    """Collects the text and attributes of a page and fails on tags that do not balance."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


ABOUT = About("site-a", "dual_lora", {"Backbone": "vit_tiny", "Seed": "0"})


@pytest.mark.parametrize("tasks", [1, 3, 12])
def test_the_folder_is_complete_and_the_page_well_formed(tmp_path: Path, tasks: int) -> None:
    metrics = stream([f"task {i}" for i in range(tasks)])
    path = write_report(tmp_path / "new" / "reports", metrics, ABOUT, [("frozen", metrics)])
    assert path.name == "report.html"
    assert sorted(file.name for file in path.parent.iterdir()) == FILES
    reader = Reader(path.read_text(encoding="utf-8"))
    text = " ".join(reader.text)
    for definition in DEFINITIONS.values():
        assert definition.title in text
    for shown in ("site-a", "vit_tiny", "frozen"):
        assert shown in text
    assert (f"{tasks}. task {tasks - 1}" in text) == (tasks > 1)
    assert DEFINITIONS["last_accuracy"].format(metrics.summary["last_accuracy"]) in text
    assert [tag for tag in reader.tags if tag in ("h1", "main", "title")] == ["title", "main", "h1"]
    assert all(value for key, value in reader.attributes if key == "alt")


def test_a_single_task_is_not_compared_with_itself(tmp_path: Path) -> None:
    text = " ".join(Reader(write_report(tmp_path, stream(["a"]), ABOUT).read_text(encoding="utf-8")).text)
    for definition in DEFINITIONS.values():
        assert (definition.title in text) != definition.several_tasks, definition.title


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    path = write_report(tmp_path, stream(["a", "b"]), ABOUT)
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|//[a-z]", re.sub(r"base64,[^\"]*", "", html))
    reader = Reader(html)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert "src" not in dict(reader.attributes)


def test_pictures_are_inside_the_page(tmp_path: Path) -> None:
    metrics, answers = answered(["a", "b"])
    reader = Reader(write_report(tmp_path, metrics, ABOUT, (), answers).read_text(encoding="utf-8"))
    sources = [value or "" for key, value in reader.attributes if key in ("src", "href", "srcset")]
    assert len(sources) == len(answers.mistakes) + len(answers.novel) > 20
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.size == (SIDE, SIDE)


@pytest.mark.parametrize("tasks", [1, 3])
def test_answers_are_shown_by_class(tmp_path: Path, tasks: int) -> None:
    metrics, answers = answered([f"task {i}" for i in range(tasks)])
    text = " ".join(Reader(write_report(tmp_path, metrics, ABOUT, (), answers).read_text("utf-8")).text)
    for title in ("Classes", "Which classes are confused", "The most confident mistakes", "Known images called novel"):
        assert title in text
    wrong = metrics.last.n - metrics.last.correct
    assert f"{wrong} wrong answers to {metrics.last.n} test images" in text
    assert ("What the last task changed" in text) == (tasks > 1)
    assert ("with a class of another task" in text) == (tasks > 1)
    without = write_report(tmp_path, metrics, ABOUT).read_text("utf-8")
    assert "Which classes are confused" not in without and "evaluate" in without


def test_the_page_of_another_state_has_no_answers(tmp_path: Path) -> None:
    metrics, answers = stream(["a", "b"], seed=1), answered(["a", "b"])[1]
    assert not answers.fits(metrics)
    assert write_report(tmp_path, metrics, ABOUT, (), answers).read_bytes() == (
        write_report(tmp_path, metrics, ABOUT).read_bytes()
    )


def test_sentences_have_the_numbers_of_the_run(tmp_path: Path) -> None:
    metrics = stream(["a", "b", "c"])
    text = " ".join(" ".join(Reader(write_report(tmp_path, metrics, ABOUT).read_text("utf-8")).text).split())
    assert "recognised among 2 classes after the first task can now be taken for one of 6" in text
    assert "Learning “c” added 2 new classes. Accuracy over all classes so far went from" in text
    assert "more classes compete for every image" not in write_report(tmp_path, stream(["a"]), ABOUT).read_text("utf-8")
    again = Metrics((metrics.tasks[0], TaskClasses("night", metrics.tasks[0].classes)), metrics.rows[:2])
    assert "“night” added no new class" in write_report(tmp_path, again, ABOUT).read_text("utf-8")


@pytest.mark.parametrize(("tasks", "each"), [(1, 1000), (20, 50)])
def test_the_page_is_bounded(tmp_path: Path, tasks: int, each: int) -> None:
    metrics, answers = answered([f"a task with a name {i}" for i in range(tasks)], each=each, images=2000 // tasks)
    assert metrics.class_count == 1000
    html = write_report(tmp_path, metrics, ABOUT, [("frozen", metrics)], answers).read_bytes()
    assert len(html) < 1_000_000
    assert len(Reader(html.decode()).tags) < 40_000


def test_regions_that_scroll_have_a_name_and_the_focus(tmp_path: Path) -> None:
    metrics, answers = answered(["a", "b"], each=12)
    html = write_report(tmp_path, metrics, ABOUT, [("frozen", metrics)], answers).read_text("utf-8")
    regions = re.findall(r'<div class="scroll"([^>]*)>', html)
    assert len(regions) > 5 and len(set(regions)) == len(regions)
    assert all(re.fullmatch(r' role="region" aria-label="[^"]+" tabindex="0"', region) for region in regions)
    assert html.count("<table>") == len(re.findall(r'tabindex="0">\s*<table>', html))


def test_metrics_json_reads_back(tmp_path: Path) -> None:
    metrics, other = stream(["a", "b", "c"]), stream(["a", "b", "c"], seed=1)
    write_report(tmp_path, metrics, ABOUT, [("frozen", other)])
    stored = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert Metrics.from_json(stored) == metrics
    assert Metrics.from_json(stored["comparisons"][0]) == other
    assert stored["comparisons"][0]["name"] == "frozen"
    assert stored["about"]["run"] == "site-a"


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        '" onload="alert(1)',
        "'><img src=x>",
        "</style></title>",
        "a & b",
        "$\\frac{",
        "-->",
        "x" * 500,
    ],
)
def test_names_from_outside_are_only_text(tmp_path: Path, name: str) -> None:
    about = About(name, name, {name: name})
    metrics, answers = answered(["a", "b"])
    plain = Reader(write_report(tmp_path, metrics, ABOUT, [("c", stream(["a"]))], answers).read_text())
    metrics, answers = answered([name, "b"])
    hostile = Reader(write_report(tmp_path, metrics, about, [(name, stream([name]))], answers).read_text("utf-8"))
    assert sorted(set(hostile.tags)) == sorted(set(plain.tags))
    assert {key for key, _ in hostile.attributes} == {key for key, _ in plain.attributes}
    assert name in hostile.text
    assert f"{name} a, {name} b" in hostile.text


def test_shared_classes_are_pointed_out(tmp_path: Path) -> None:
    day = stream(["day", "night"])
    night = TaskClasses("night", day.tasks[0].classes)
    shared = Metrics((day.tasks[0], night), day.rows)
    sentence = "some classes appear in several tasks"
    assert sentence not in write_report(tmp_path, day, ABOUT).read_text(encoding="utf-8")
    assert sentence in write_report(tmp_path, shared, ABOUT).read_text(encoding="utf-8")


def test_too_few_test_images_are_no_headline(tmp_path: Path) -> None:
    page = Reader(write_report(tmp_path, stream(["one"]), About("run", "dual_lora")).read_text("utf-8"))
    assert TOO_FEW in page.text  # in one piece
    assert any(text.startswith("95 % interval: ") for text in page.text)


def test_without_test_images_the_page_says_so(tmp_path: Path) -> None:
    nothing = Metrics((TaskClasses("a", ("x",)),), ((Cell(),),))
    html = write_report(tmp_path, nothing, ABOUT).read_text(encoding="utf-8")
    assert "Without test images nothing could be measured" in html
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html).lower().replace("finance", "")


def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path, stream(["a"]), ABOUT)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(page, "reliability_svg", fail)
    with pytest.raises(MemoryError):
        write_report(tmp_path, stream(["a", "b"]), ABOUT)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
