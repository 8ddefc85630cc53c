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
from duallora_edge.learner.report.definitions import DEFINITIONS, TOO_FEW
from duallora_edge.learner.report.metrics import Cell, Metrics, Predictions, TaskClasses
from duallora_edge.learner.report.page import About, write_report

FILES = ["accuracy.png", "matrix.png", "metrics.json", "reliability.png", "report.html"]
VOID = {"meta", "img", "br", "hr", "link", "input"}


def stream(names: list[str], seed: int = 0) -> Metrics:
    """Two classes a task, 20 test images a task, random answers."""
    generator = np.random.default_rng(seed)
    rows = []
    for k in range(len(names)):
        row = []
        for i in range(k + 1):
            probabilities = generator.dirichlet(np.ones(2 * k + 2), 20).astype(np.float32)
            tasks = probabilities.reshape(20, k + 1, 2).sum(axis=2)
            labels = generator.integers(2 * i, 2 * i + 2, 20)
            row.append(Cell.from_predictions(Predictions(labels, probabilities, i, tasks), [2 * i, 2 * i + 1]))
        rows.append(tuple(row))
    return Metrics(tuple(TaskClasses(name, (f"{name} a", f"{name} b")) for name in names), tuple(rows))


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


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is drawn, which takes longer than the rest of a page."""
    for name in ("accuracy_png", "matrix_png", "reliability_png"):
        monkeypatch.setattr(page, name, lambda *_: b"no figure")


@pytest.mark.usefixtures("undrawn")
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
    for shown in ("site-a", "vit_tiny", "frozen", f"{tasks}. task {tasks - 1}"):
        assert shown in text
    assert DEFINITIONS["last_accuracy"].format(metrics.summary["last_accuracy"]) in text
    assert [tag for tag in reader.tags if tag in ("h1", "main", "title")] == ["title", "main", "h1"]
    assert all(value for key, value in reader.attributes if key == "alt")


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    path = write_report(tmp_path, stream(["a", "b"]), ABOUT)
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|//[a-z]", re.sub(r"base64,[^\"]*", "", html))
    reader = Reader(html)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    sources = [value or "" for key, value in reader.attributes if key in ("src", "href", "srcset")]
    assert len(sources) == 3
    embedded = set()
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        embedded.add(base64.b64decode(data))
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert embedded == {(tmp_path / name).read_bytes() for name in FILES if name.endswith(".png")}


@pytest.mark.usefixtures("undrawn")
def test_metrics_json_reads_back(tmp_path: Path) -> None:
    metrics, other = stream(["a", "b", "c"]), stream(["a", "b", "c"], seed=1)
    write_report(tmp_path, metrics, ABOUT, [("frozen", other)])
    stored = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert Metrics.from_json(stored) == metrics
    assert Metrics.from_json(stored["comparisons"][0]) == other
    assert stored["comparisons"][0]["name"] == "frozen"
    assert stored["about"]["run"] == "site-a"


@pytest.mark.usefixtures("undrawn")
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
    plain = Reader(write_report(tmp_path, stream(["a", "b"]), ABOUT, [("c", stream(["a"]))]).read_text())
    metrics = stream([name, "b"])
    hostile = Reader(write_report(tmp_path, metrics, about, [(name, stream([name]))]).read_text("utf-8"))
    assert sorted(set(hostile.tags)) == sorted(set(plain.tags))
    assert {key for key, _ in hostile.attributes} == {key for key, _ in plain.attributes}
    assert name in hostile.text
    assert f"{name} a, {name} b" in hostile.text


@pytest.mark.usefixtures("undrawn")
def test_shared_classes_are_pointed_out(tmp_path: Path) -> None:
    day = stream(["day", "night"])
    night = TaskClasses("night", day.tasks[0].classes)
    shared = Metrics((day.tasks[0], night), day.rows)
    sentence = "some classes appear in several tasks"
    assert sentence not in write_report(tmp_path, day, ABOUT).read_text(encoding="utf-8")
    assert sentence in write_report(tmp_path, shared, ABOUT).read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
def test_too_few_test_images_are_no_headline(tmp_path: Path) -> None:
    page = Reader(write_report(tmp_path, stream(["one"]), About("run", "dual_lora")).read_text("utf-8"))
    assert TOO_FEW in page.text  # in one piece
    assert any(text.startswith("95 % interval: ") for text in page.text)


@pytest.mark.usefixtures("undrawn")
def test_without_test_images_the_page_says_so(tmp_path: Path) -> None:
    nothing = Metrics((TaskClasses("a", ("x",)),), ((Cell(),),))
    html = write_report(tmp_path, nothing, ABOUT).read_text(encoding="utf-8")
    assert "Without test images nothing could be measured" in html
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html).lower().replace("finance", "")


@pytest.mark.usefixtures("undrawn")
def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path, stream(["a"]), ABOUT)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(page, "reliability_png", fail)
    with pytest.raises(MemoryError):
        write_report(tmp_path, stream(["a", "b"]), ABOUT)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
