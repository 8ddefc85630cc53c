"""Whole calls of training and measuring on small image folders, with the embedded backbone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from duallora_edge.errors import ConfigError, DataError, RunError
from duallora_edge.learner import train as training
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data.fingerprint import resembling
from duallora_edge.learner.device import pick_device, pick_precision
from duallora_edge.learner.evaluate import measure_run
from duallora_edge.learner.measurements import stored_answers, stored_metrics
from duallora_edge.learner.methods import METHODS
from duallora_edge.learner.network.answers import Catalogue
from duallora_edge.learner.network.backbone import load_backbone
from duallora_edge.learner.report.answers import MOST
from duallora_edge.learner.report.metrics import Metrics
from duallora_edge.learner.run_directory import ANSWERS, PICTURES, REPORT, RunDirectory
from duallora_edge.learner.train import describe_size, train_run

QUICK = TrainConfig(
    device="cpu",
    precision="fp32",
    rank_orthogonal=2,
    rank_residual=2,
    summaries=1,
    epochs=1,
    min_steps=4,
    batch_size=16,
    checkpoint_steps=2,
)
GIVEN = (
    *("rank_orthogonal", "rank_residual", "summaries", "epochs", "min_steps", "batch_size", "precision"),
    "checkpoint_steps",
)


class Notes(Callback):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.rows: list[int] = []
        self.stages: set[str] = set()
        self.steps: list[int] = []

    def step(self, step: int, steps: int, loss: torch.Tensor, rate: float) -> None:
        self.steps.append(step)

    def say(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        assert 0 < done <= total
        self.stages.add(stage)

    def measured(self, metrics: Metrics) -> None:
        self.rows.append(len(metrics.tasks))


def train(
    run: Path, data: Path | str = "", *, again: str | None = None, notes: Notes | None = None, **settings: object
) -> Notes:
    notes = notes or Notes()
    train_run(run, replace(QUICK, data=str(data), **settings), [*GIVEN, *settings], notes, again=again)
    return notes


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, image_stream: Path) -> tuple[Path, Notes]:
    """A run that learned both tasks of the stream; to be copied before it is changed."""
    path = tmp_path_factory.mktemp("learned") / "run"
    return path, train(path, image_stream)


@pytest.fixture
def run(tmp_path: Path, learned: tuple[Path, Notes]) -> Path:
    return Path(shutil.copytree(learned[0], tmp_path / "run"))


def test_a_stream_is_learned_and_reported(learned: tuple[Path, Notes]) -> None:
    path, notes = learned
    assert [record.info.name for record in RunDirectory.open(path).records()] == ["01-round", "02-lines"]
    assert notes.rows == [1, 2] and notes.stages == {"decode", "encode", "train"}
    for name in ("report.html", "metrics.json", "rows.json", "answers.json", "data.png"):
        assert (path / "reports" / name).stat().st_size > 0
    assert "  02-lines: cross 9, ring 9" in notes.lines
    assert not (path / "checkpoint").exists()


def test_the_answers_are_those_of_the_newest_state_beside_the_one_before(run: Path, image_stream: Path) -> None:
    opened = RunDirectory.open(run)
    answers, row = stored_answers(opened, opened.digest()), stored_metrics(opened).rows[-1]
    assert answers is not None and answers.fits(stored_metrics(opened)) and len(row) == 2
    assert stored_answers(opened, opened.digest(opened.active_tasks()[:1])) is None
    assert answers.right_before is not None and {task for task, _ in answers.right_before} == {0}
    assert len(answers.mistakes) == min(MOST, sum(cell.n - cell.correct for cell in row))
    measure_run(opened, None, "cpu", None, Notes())
    assert stored_answers(opened, opened.digest()) == answers
    (run / ANSWERS).write_text('{"state": ')
    train(run, image_stream)  # nothing is measured, and the page does without
    assert "The answers of this state are not at hand" in (run / REPORT).read_text("utf-8")


def test_a_run_without_pictures(tmp_path: Path, image_stream: Path) -> None:
    train(tmp_path / "run", image_stream, pictures=False)
    run = RunDirectory.open(tmp_path / "run")
    measure_run(run, None, "cpu", None, Notes())
    answers = stored_answers(run, run.digest())
    assert answers is not None and answers.counts and not answers.mistakes and not answers.novel
    assert not (run.path / PICTURES).exists() and "<img" not in (run.path / REPORT).read_text("utf-8")


def test_the_same_call_again_learns_nothing(run: Path, image_stream: Path) -> None:
    before = RunDirectory.open(run).digest()
    report = (run / REPORT).read_bytes()
    notes = train(run, image_stream)
    assert (run / REPORT).read_bytes() == report
    for name in ("01-round", "02-lines"):
        assert f"Task {name} is already learned from these images" in notes.lines
    assert notes.rows == [] and RunDirectory.open(run).digest() == before


def test_without_data_the_last_images_are_used(run: Path) -> None:
    assert "Task 02-lines is already learned from these images" in train(run).lines


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


APART = [
    ("site", "site/tasks", {}, "The images in .* lie inside the run"),
    ("site", "site", {}, "The images in .* lie inside the run"),
    ("link", "site/tasks", {}, "The images in .* lie inside the run"),
    ("site", "link/tasks", {}, "The images in .* lie inside the run"),
    ("site/tasks/run", "site/tasks", {}, "lies inside the images in"),
    ("link/tasks/run", "site/tasks", {}, "lies inside the images in"),
    ("site", "site/list.csv", {}, "The images in .* lie inside the run"),
    ("site", "list.csv", {}, "Images of .* lie inside the run"),
    ("site", "photos", {}, "Images of .* lie inside the run"),
    ("run", "site/tasks", {"weights": "run/w.safetensors"}, "The weights in .* lie inside the run"),
    ("run", "torchvision:MNIST", {"data_root": "run/new"}, "The data sets in .* lie inside the run"),
]


@pytest.mark.parametrize(("run", "data", "settings", "reason"), APART)
def test_a_run_is_apart_from_what_it_learns_from(
    tmp_path: Path, image_task: Callable[..., Path], run: str, data: str, settings: dict[str, str], reason: str
) -> None:
    """Folders, links to them, and single images that a manifest or a link takes from elsewhere."""
    images = image_task(tmp_path / "site" / "tasks" / "one", {"disc": 0, "square": 1}, train=2, test=1)
    (tmp_path / "link").symlink_to("site")
    rows = [f"{path},{path.parent.name}\n" for path in sorted(images.rglob("*.png"))]
    for file in (tmp_path / "list.csv", tmp_path / "site" / "list.csv"):
        file.write_text("path,label\n" + "".join(rows))
    for path in images.rglob("train/*/*.png"):  # the last one is a link
        (tmp_path / "photos" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "photos" / path.parent.name / path.name)
    (tmp_path / "photos" / "disc" / "00.png").unlink()
    (tmp_path / "photos" / "disc" / "00.png").symlink_to(images / "train" / "disc" / "00.png")
    before = contents(tmp_path)
    with pytest.raises(DataError, match=f"{reason}.*; give another"):
        train(
            tmp_path / run,
            data if data.startswith("torchvision") else tmp_path / data,
            **{key: str(tmp_path / value) for key, value in settings.items()},
        )
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()


def test_a_folder_of_images_never_becomes_a_run(tmp_path: Path, image_task: Callable[..., Path]) -> None:
    image_task(tmp_path / "site" / "tasks" / "one", {"disc": 0, "square": 1}, train=2, test=1)
    shutil.copytree(tmp_path / "site" / "tasks", tmp_path / "photos")
    before = contents(tmp_path / "site")
    with pytest.raises(RunError, match=r"holds other files \(tasks, .*give an empty or new folder"):
        train(tmp_path / "site", tmp_path / "photos")
    assert contents(tmp_path / "site") == before


def test_tasks_one_by_one_equal_the_stream(
    tmp_path: Path, learned: tuple[Path, Notes], image_stream: Path, image_task: Callable[..., Path]
) -> None:
    for name in ("01-round", "02-lines"):
        train(tmp_path / "run", image_stream / name, task_name=name)
    assert RunDirectory.open(tmp_path / "run").digest() == RunDirectory.open(learned[0]).digest()


def test_other_images_under_a_learned_name_are_refused(
    run: Path, tmp_path: Path, image_task: Callable[..., Path]
) -> None:
    before = RunDirectory.open(run).digest()
    image_task(tmp_path / "other" / "02-lines", {"cross": 2, "ring": 3}, seed=9)
    with pytest.raises(DataError, match=r"a task '02-lines' from other images; .*--again '02-lines', or .*--task-name"):
        train(run, tmp_path / "other")
    assert RunDirectory.open(run).digest() == before


@pytest.fixture
def grown(tmp_path: Path, image_stream: Path, image_task: Callable[..., Path]) -> Path:
    """The stream with more images in both tasks; the second has a new class, and one that the first has as well."""
    for name, kinds in (("01-round", {"disc": 0, "square": 1}), ("02-lines", {"cross": 2, "disc": 0, "dot": 4})):
        more = image_task(tmp_path / "more" / name, kinds, train=4, test=2, seed=5)
        for path in more.rglob("*.png"):
            path.rename(path.with_name(f"more-{path.name}"))
        shutil.copytree(image_stream / name, tmp_path / "grown" / name)
        shutil.copytree(more, tmp_path / "grown" / name, dirs_exist_ok=True)
    return tmp_path / "grown"


def half_grown(grown: Path, image_stream: Path, name: str) -> Path:
    """The grown stream, in which all tasks but one are as they were."""
    for folder in grown.iterdir():
        if folder.name != name:
            shutil.rmtree(folder)
            shutil.copytree(image_stream / folder.name, folder)
    return grown


def state(run: Path) -> tuple[str, list[dict[str, bytes]], bytes]:
    """What a run is, bit for bit: its digest, the files of its tasks in order, and what was measured."""
    opened = RunDirectory.open(run)
    folders = [run / "tasks" / entry.folder for entry in opened.active_tasks()]
    assert {path.name for path in (run / "tasks").iterdir()} == {folder.name for folder in folders}
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    return opened.digest(), files, (run / "reports" / "rows.json").read_bytes()


def test_the_newest_task_again_equals_learning_it_from_all_images_at_first(
    run: Path, tmp_path: Path, grown: Path, image_stream: Path
) -> None:
    half_grown(grown, image_stream, "02-lines")
    notes = train(run, grown, again="02-lines")
    assert any(line.startswith("Task 2 02-lines, again: 4 classes, ") for line in notes.lines)
    assert "Task 01-round is already learned from these images" in notes.lines
    assert notes.rows == [2]  # the first state was measured before
    train(tmp_path / "fresh", grown)
    assert state(run) == state(tmp_path / "fresh")
    assert {source["data"] for source in RunDirectory.open(run).sources().values()} == {str(grown)}
    records = RunDirectory.open(run).records()
    assert Catalogue.of([record.info for record in records]).classes == ("disc", "square", "cross", "dot", "ring")
    before = state(run)
    notes = train(run, grown, again="02-lines")
    assert "Task 02-lines is already learned from these images" in notes.lines and notes.rows == notes.steps == []
    assert state(run) == before


def test_an_earlier_task_again_equals_removing_and_learning_it(run: Path, tmp_path: Path, grown: Path) -> None:
    """Its images are where they were when it was learned; a new task of the same source comes after it."""
    other = Path(shutil.copytree(run, tmp_path / "other"))
    (grown / "02-lines").rename(grown / "00-new")
    opened = RunDirectory.open(other)
    opened.set_active_tasks(opened.active_tasks()[1:])
    train(other, grown / "01-round", task_name="01-round")
    train(other, grown)
    notes = train(run, grown, again="01-round")
    assert state(run) == state(other)
    names = [record.info.name for record in RunDirectory.open(run).records()]
    assert names == ["02-lines", "01-round", "00-new"] and notes.rows == [1, 2, 3]
    before = state(run)
    measure_run(RunDirectory.open(run), None, "cpu", None, Notes())
    assert state(run) == before


def test_without_data_a_task_is_learned_again_from_its_own_source(tmp_path: Path, grown: Path) -> None:
    for name in ("01-round", "02-lines"):
        train(tmp_path / "run", grown / name)
    (grown / "01-round" / "train" / "disc" / "00.png").unlink()
    train(tmp_path / "run", again="01-round")
    assert [info["data"] for info in RunDirectory.open(tmp_path / "run").sources().values()] == [
        str(grown / name) for name in ("01-round", "02-lines")
    ]
    names = [record.info.name for record in RunDirectory.open(tmp_path / "run").records()]
    assert names == ["02-lines", "01-round"]
    (tmp_path / "run" / "sources.json").unlink()
    with pytest.raises(ConfigError, match="knows no images of '01-round'; name them with --data"):
        train(tmp_path / "run", again="01-round")


def test_of_several_tasks_that_have_grown_one_is_learned_again(run: Path, grown: Path, image_stream: Path) -> None:
    first, second = RunDirectory.open(run).active_tasks()
    notes = train(run, grown, again="02-lines")
    assert "Task 01-round stays as it was learned from other images; --again '01-round' changes it" in notes.lines
    opened = RunDirectory.open(run)
    assert opened.active_tasks()[0] == first and second not in opened.active_tasks()
    assert [Path(source["data"]) for source in opened.sources().values()] == [image_stream, grown]
    train(run, grown, again="01-round")
    notes = train(run, grown)
    assert notes.rows == notes.steps == []
    assert [record.info.name for record in opened.records()] == ["02-lines", "01-round"]


class Stopped(Notes):
    """Stops the training after three of its steps."""

    def step(self, step: int, steps: int, loss: torch.Tensor, rate: float) -> None:
        super().step(step, steps, loss, rate)
        if step == 3:
            raise KeyboardInterrupt


def test_learning_again_continues_where_it_was_stopped(
    run: Path, tmp_path: Path, grown: Path, image_stream: Path
) -> None:
    half_grown(grown, image_stream, "01-round")
    whole, before = Path(shutil.copytree(run, tmp_path / "whole")), state(run)
    train(whole, grown, again="01-round")
    with pytest.raises(KeyboardInterrupt):
        train(run, grown, again="01-round", notes=Stopped())
    assert state(run) == before and RunDirectory.open(run).training_steps() == 2
    sources = RunDirectory.open(run).sources()
    assert (sources["01-round"]["data"], sources["02-lines"]["data"]) == (str(image_stream), str(grown))
    assert train(run, grown, again="01-round").steps[0] == 3
    assert state(run) == state(whole) and not (run / "checkpoint").exists()


def test_a_task_that_cannot_be_learned_again(
    run: Path, tmp_path: Path, grown: Path, image_stream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(run)
    with pytest.raises(RunError, match="has no task 'lines'; it has 01-round, 02-lines"):
        train(run, grown, again="lines")
    with pytest.raises(RunError, match="is not a folder"):
        train(tmp_path / "none", grown, again="02-lines")
    with pytest.raises(DataError, match=r"holds no task '02-lines' to learn again, but 01-round; name .* --task-name"):
        train(run, grown / "01-round", again="02-lines")
    monkeypatch.setattr(METHODS["dual_lora"], "removable", False)
    with pytest.raises(RunError, match=r"Later tasks of dual_lora build on 01-round; only the newest can be .* again"):
        train(run, grown, again="01-round")
    assert "Task 01-round is already learned from these images" in train(run, image_stream, again="01-round").lines
    assert state(run) == before
    train(run, grown, again="02-lines")
    assert state(run) != before


def test_what_others_put_into_a_task_that_is_learned_again_stays(run: Path, grown: Path) -> None:
    foreign = run / "tasks" / RunDirectory.open(run).active_tasks()[1].folder / "notes.txt"
    foreign.write_text("mine")
    notes = train(run, grown, again="02-lines")
    assert f"{foreign.parent} stays: it holds files that the task did not write." in notes.lines
    assert [path.name for path in foreign.parent.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        ({"seed": 5}, ["seed is 0, not 5"]),
        ({"rank_residual": 3, "method": "frozen"}, ["rank_residual is 2, not 3", "method is 'dual_lora'"]),
        ({"backbone": "vit_tiny_patch16_224", "size": 128}, ["backbone is 'embedded'", "size is None, not 128"]),
    ],
)
def test_settings_of_a_run_cannot_change(
    run: Path, image_stream: Path, settings: dict[str, object], problems: list[str]
) -> None:
    with pytest.raises(ConfigError, match="made with other settings") as caught:
        train(run, image_stream, **settings)
    assert all(problem in str(caught.value) for problem in problems)


def test_automatic_precision_never_contradicts(run: Path, image_stream: Path) -> None:
    assert RunDirectory.open(run).config.precision == "fp32"
    train(run, image_stream, precision="auto")


def test_rollback_and_training_again_give_the_same_run(run: Path, image_stream: Path) -> None:
    opened = RunDirectory.open(run)
    tasks, digest = {p: p.read_bytes() for p in (run / "tasks").rglob("*.*") if p.is_file()}, opened.digest()
    opened.set_active_tasks(opened.active_tasks()[:1])
    assert train(run, image_stream).rows == [2]  # the first state was measured before
    assert RunDirectory.open(run).digest() == digest
    assert {p: p.read_bytes() for p in (run / "tasks").rglob("*.*") if p.is_file()} == tasks


def test_measuring_again_gives_the_same_numbers(run: Path) -> None:
    before = json.loads((run / "reports" / "rows.json").read_text())
    notes = Notes()
    measure_run(RunDirectory.open(run), None, "cpu", None, notes)
    assert notes.rows == [1, 2]
    assert json.loads((run / "reports" / "rows.json").read_text()) == before


def test_a_folder_that_grows_makes_no_test_image_of_a_learned_one(
    tmp_path: Path, image_task: Callable[..., Path]
) -> None:
    """Class folders, whose split is ours: measuring keeps it, learning again extends it."""
    folder, aside = image_task(tmp_path / "images", {"disc": 0, "square": 1}, train=30) / "train", tmp_path / "aside"
    for path in folder.glob("*/*[02468].png"):
        (aside / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(aside / path.parent.name / path.name)
    train(tmp_path / "run", folder, task_name="t")
    run = RunDirectory.open(tmp_path / "run")
    (before,) = (record.split for record in run.records())
    assert len(before.test) == 6 and len(before.learned) == 24
    shutil.copytree(aside, folder, dirs_exist_ok=True)
    notes = Notes()
    measure_run(run, None, "cpu", None, notes)
    said = "Task t: its images have changed since it was learned (30 new); the split stays, 6 images are measured"
    assert said in notes.lines
    (row,) = json.loads((run.path / "reports" / "rows.json").read_text()).values()
    assert row[0]["n"] == 6
    train(tmp_path / "run", folder, again="t", task_name="t")
    (after,) = (record.split for record in run.records())
    assert resembling(before.test, after.test).all() and not resembling(after.test, before.learned).any()
    assert resembling(before.learned, after.learned).all() and len(after.test) > 6
    assert len(after.learned) + len(after.test) == 60
    measure_run(run, None, "cpu", None, notes := Notes())
    assert not any("have changed" in line for line in notes.lines)


def test_images_that_another_task_learned_are_not_measured(tmp_path: Path, image_task: Callable[..., Path]) -> None:
    first = image_task(tmp_path / "first", {"disc": 0, "square": 1})
    second = image_task(tmp_path / "second", {"disc": 3, "square": 4})
    shutil.copy(first / "train" / "disc" / "00.png", second / "test" / "disc" / "copy.png")
    shutil.copy(first / "test" / "disc" / "01.png", second / "train" / "disc" / "copy.png")
    train(tmp_path / "run", first)
    notes = train(tmp_path / "run", second)
    assert "  left out of the test: images that earlier tasks learned (1)" in notes.lines
    assert "  left out of training: test images of earlier tasks (1)" in notes.lines
    one, two = (record.split for record in RunDirectory.open(tmp_path / "run").records())
    assert not resembling(two.test, one.learned).any() and not resembling(two.learned, one.test).any()


def test_learned_images_are_known_under_other_names_and_in_other_formats(
    tmp_path: Path, image_task: Callable[..., Path]
) -> None:
    def photo(seed: int) -> Image.Image:
        small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC)

    for index in range(40):
        folder = tmp_path / "first" / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photo(index).save(folder / f"{index}.png")
    train(tmp_path / "run", tmp_path / "first", task_name="t")
    (split,) = (record.split for record in RunDirectory.open(tmp_path / "run").records())
    assert len(split.learned) == 40
    for index in range(0, 60, 2):  # 20 copies of what was learned as "a", and 10 new photos
        folder = tmp_path / "later" / "a"
        folder.mkdir(parents=True, exist_ok=True)
        photo(index).resize((70, 70)).save(folder / f"renamed-{index}.jpg", quality=70)
    measure_run(RunDirectory.open(tmp_path / "run"), str(tmp_path / "later"), "cpu", None, Notes())
    (row,) = json.loads((tmp_path / "run" / "reports" / "rows.json").read_text()).values()
    assert row[0]["n"] == 10
    shutil.copytree(tmp_path / "later" / "a", tmp_path / "second" / "test" / "c")
    for index in range(60, 80):
        folder = tmp_path / "second" / "train" / "cd"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photo(index).save(folder / f"{index}.png")
    notes = train(tmp_path / "run", tmp_path / "second")
    assert "  left out of the test: images that earlier tasks learned (20)" in notes.lines


def test_a_run_without_tasks_cannot_be_measured(run: Path) -> None:
    RunDirectory.open(run).set_active_tasks([])
    with pytest.raises(RunError, match="learned no task yet"):
        measure_run(RunDirectory.open(run), None, "cpu", None, Notes())


def test_images_that_are_gone_are_said_and_not_measured(
    tmp_path: Path, image_task: Callable[..., Path], image_stream: Path
) -> None:
    first = image_task(tmp_path / "first", {"disc": 0, "square": 1})
    train(tmp_path / "run", first)
    shutil.rmtree(first)
    notes = train(tmp_path / "run", image_stream / "02-lines")
    assert any(f"images from {first} cannot be read and are not measured" in line for line in notes.lines)
    last = list(json.loads((tmp_path / "run" / "reports" / "rows.json").read_text()).values())[-1]
    assert [cell["n"] for cell in last] == [0, 8]


def test_a_lost_note_of_the_sources_stops_nothing(run: Path, tmp_path: Path, image_task: Callable[..., Path]) -> None:
    (run / "sources.json").unlink()
    with pytest.raises(ConfigError, match="knows no images yet; name them with --data"):
        train(run)
    train(run, image_task(tmp_path / "third", {"dot": 4, "bar": 5}))
    assert len(RunDirectory.open(run).active_tasks()) == 3


def test_a_single_class_and_a_known_class(run: Path, tmp_path: Path, image_task: Callable[..., Path]) -> None:
    notes = train(run, image_task(tmp_path / "new-site", {"cross": 6}))
    assert any("one class gives no gradient" in line for line in notes.lines)
    records = RunDirectory.open(run).records()
    assert records[-1].info.classes == ("cross",) and len(records) == 3


def test_the_only_class_of_a_run_is_said(tmp_path: Path, image_task: Callable[..., Path]) -> None:
    notes = train(tmp_path / "run", image_task(tmp_path / "photos", {"images": 0}, train=4, test=1))
    assert any("'images' is the only class" in line for line in notes.lines)
    notes = train(tmp_path / "run", image_task(tmp_path / "more", {"cross": 2}, train=4, test=1))
    assert not any("is the only class" in line for line in notes.lines)


def write_boxes(root: Path, kind: str, shapes: Path) -> Path:
    """Twelve pictures with a disc and a square side by side, as a COCO or YOLO detection set."""
    (root / "images").mkdir(parents=True)
    for number in range(12):
        pair = [np.asarray(Image.open(shapes / "train" / name / f"{number:02d}.png")) for name in ("disc", "square")]
        Image.fromarray(np.concatenate(pair, axis=1)).save(root / "images" / f"{number:02d}.png")
    if kind == "YOLO":
        (root / "labels").mkdir()
        (root / "data.yaml").write_text("names: [disc, square]")
        for number in range(12):
            (root / "labels" / f"{number:02d}.txt").write_text("0 0.25 0.5 0.5 1\n1 0.75 0.5 0.5 1\n")
    else:
        value = {
            "images": [{"id": n, "file_name": f"{n:02d}.png", "width": 128, "height": 64} for n in range(12)],
            "categories": [{"id": 0, "name": "disc"}, {"id": 1, "name": "square"}],
            "annotations": [
                {"image_id": n, "category_id": k, "bbox": [64 * k, 0, 64, 64]} for n in range(12) for k in (0, 1)
            ],
        }
        (root / "annotations.json").write_text(json.dumps(value))
    return root


@pytest.mark.parametrize("kind", ["COCO", "YOLO"])
def test_a_detection_set_is_refused_or_learned_box_by_box(
    tmp_path: Path, kind: str, image_task: Callable[..., Path]
) -> None:
    shapes = image_task(tmp_path / "shapes", {"disc": 0, "square": 1}, train=12)
    data, path = write_boxes(tmp_path / "data", kind, shapes), tmp_path / "run"
    with pytest.raises(DataError, match=f"is a {kind} detection set .* give --crop-boxes"):
        train(path, data)
    assert not path.exists()
    train(path, data, crop_boxes=True)
    (record,) = RunDirectory.open(path).records()
    assert record.info.classes == ("disc", "square")
    assert measure_run(RunDirectory.open(path), None, "cpu", None, Callback()).last.n == 4  # the crops are found again


def test_five_images_a_class_and_no_test_images(tmp_path: Path, image_task: Callable[..., Path]) -> None:
    """Fewer than five training images a class: nothing is held back, and with none for the test nothing is measured."""
    folder = image_task(tmp_path / "few", {"disc": 0, "square": 1}, train=4, test=1)
    shutil.rmtree(folder / "test")
    notes = train(tmp_path / "run", folder)
    assert any("8 images to learn from, 0 for validation, 0 for the test" in line for line in notes.lines)


def test_real_digits_are_learned_without_forgetting(tmp_path: Path) -> None:
    """Three tasks of two handwritten digits (scikit-learn's): far better than chance on all of them at the end."""
    digits = load_digits()
    for split, chosen in (("train", slice(0, 200)), ("test", slice(200, 300))):
        for index, (image, label) in enumerate(zip(digits.images[chosen], digits.target[chosen], strict=True)):
            if label < 6:
                folder = tmp_path / "digits" / split / str(label)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32)).save(folder / f"{index}.png")
    notes = Notes()
    config = replace(
        QUICK, data=str(tmp_path / "digits"), classes_per_task=2, min_steps=15, rank_orthogonal=8, rank_residual=8
    )
    metrics = train_run(tmp_path / "run", config, [], notes)
    assert notes.rows == [1, 2, 3]
    assert (metrics.summary["last_accuracy"] or 0) > 0.8


def test_the_defaults_forget_nothing_of_the_digits(tmp_path: Path) -> None:
    """Five tasks, in the order of the demo, from half of its images: old ones must not be read as new ones."""
    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images[::2], digits.target[::2], strict=True)):
        folder = tmp_path / "digits" / ("test" if index % 4 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32)).save(folder / f"{index}.png")
    config = TrainConfig(data=str(tmp_path / "digits"), classes_per_task=2, device="cpu")
    metrics = train_run(tmp_path / "run", config, [], Notes())
    assert (metrics.summary["last_accuracy"] or 0) > 0.95
    assert (metrics.summary["forgetting_since_learned"] or 0) < 0.03


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu!", "mps", "meta", ""):
        with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or cuda:N"):
            pick_device(name)


def test_precision() -> None:
    assert pick_precision("fp32", torch.device("cpu")) == "fp32"
    assert pick_precision("auto", torch.device("cpu")) in ("fp32", "bf16")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (64, "Input 64 px; --size 48 would take 0.56 of it and cost accuracy"),
        (32, "Input 32 px (the backbone's own size of 64 px takes 4.0 times the work); --size 24 would take 0.58 "),
        (8, "Input 8 px (the backbone's own size of 64 px takes 34.3 times the work)"),
    ],
)
def test_what_a_size_costs_is_said(size: int, expected: str) -> None:
    assert describe_size(load_backbone("embedded", size=size)).startswith(expected)


def test_a_measured_loss_is_said_for_networks_made_for_a_larger_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_LOST", {(32, 24): 1.5, (128, 96): 1.5})
    assert describe_size(load_backbone("embedded", size=32)).endswith("(1.5 points with a ViT-Ti on CIFAR-100)")
    assert describe_size(load_backbone("embedded", size=128)).endswith("cost accuracy")
