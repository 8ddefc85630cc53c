"""reports/history.jsonl: one line for each point, whatever happens to a training, and none of a task that is gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duallora_edge.errors import RunError
from duallora_edge.learner import Callback, Learner
from duallora_edge.learner.callbacks import Point
from duallora_edge.learner.history import HISTORY, History
from duallora_edge.learner.run_directory import RunDirectory

QUICK = {"device": "cpu", "precision": "fp32", "epochs": 1, "min_steps": 10, "batch_size": 16, "summaries": 1}
QUICK = {**QUICK, "checkpoint_steps": 4, "rank_orthogonal": 2, "rank_residual": 2}
POINT = Point("a", 1, 4, 0.5, 1e-3, 100.0, None)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / HISTORY).read_text(encoding="utf-8").splitlines()]


def timeless(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines(run)]


def append(run: Path, point: Point) -> None:
    """Write a line as an earlier process left it."""
    (run / "reports").mkdir(exist_ok=True)
    with (run / HISTORY).open("a") as file:
        file.write(json.dumps(asdict(point)) + "\n")


class KilledError(Exception):
    pass


class KilledAt(Callback):
    """Ends the training of the second task in a step, before or after its checkpoint."""

    def __init__(self, step: int, *, after: bool) -> None:
        self.last, self.after, self.task = step, after, ""

    def trained(self, point: Point) -> None:
        self.task = point.task
        if (point.task, point.step, self.after) == ("02-lines", self.last, False):
            raise KilledError

    def step(self, step: int, steps: int, loss: torch.Tensor, rate: float) -> None:
        if (self.task, step, self.after) == ("02-lines", self.last, True):
            raise KilledError


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, image_stream: Path) -> Path:
    """A run that learned both tasks of the stream; to be copied before it is changed."""
    path = tmp_path_factory.mktemp("learned") / "run"
    Learner(path, **QUICK).learn(image_stream, evaluate=False)
    return path


@pytest.fixture
def run(tmp_path: Path, learned: Path) -> Path:
    return Path(shutil.copytree(learned, tmp_path / "run"))


def test_each_task_has_its_points(learned: Path) -> None:
    found = lines(learned)
    assert [(line["task"], line["step"]) for line in found] == [
        (task, step) for task in ("01-round", "02-lines") for step in range(1, 11)
    ]
    assert all(line["steps"] == 10 and line["loss"] > 0 and line["images_per_second"] > 0 for line in found)
    assert [line["step"] for line in found[:10] if line["validation_accuracy"] is not None] == [3, 5, 8, 10]
    assert found[0]["learning_rate"] == 1e-3


def test_a_training_that_was_stopped_continues_its_history(learned: Path, image_stream: Path, tmp_path: Path) -> None:
    """Before the first checkpoint, around the next one, and at the end; no line is doubled and none is missing."""
    path = tmp_path / "run"
    for step, after in ((3, True), (8, False), (8, True), (10, True)):
        with pytest.raises(KilledError):
            Learner(path, callbacks=[KilledAt(step, after=after)], **QUICK).learn(image_stream, evaluate=False)
    with (path / HISTORY).open("a") as file:
        file.write('{"task": "02-li')  # as a power cut may leave it
    Learner(path, **QUICK).learn(image_stream, evaluate=False)
    assert timeless(path) == timeless(learned)
    assert RunDirectory.open(path).digest() == RunDirectory.open(learned).digest()


def test_tasks_that_are_gone_leave_no_line(run: Path, learned: Path, image_stream: Path) -> None:
    learner = Learner(run, device="cpu")
    learner.rollback()
    assert timeless(run) == timeless(learned)[:10]
    learner.learn(image_stream, evaluate=False)
    assert timeless(run) == timeless(learned)
    learner.remove("01-round")
    assert timeless(run) == timeless(learned)[10:]
    learner.rollback()
    assert not (run / HISTORY).exists()


@pytest.mark.parametrize(
    ("old", "kept"),
    [
        ([POINT, replace(POINT, step=2)], [1]),
        ([replace(POINT, steps=9), replace(POINT, step=2, steps=9)], []),  # another training of that name
        ([replace(POINT, task="b"), replace(POINT, step=4), replace(POINT, task="b", step=4)], [1, 4]),
    ],
)
def test_points_that_come_again_replace_their_lines(tmp_path: Path, old: list[Point], kept: list[int]) -> None:
    for point in old:
        append(tmp_path, point)
    callback = History(tmp_path)
    for step in (2, 3):
        callback.trained(replace(POINT, step=step, task="a"))
    assert [line["step"] for line in lines(tmp_path)] == [*kept, 2, 3]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_null(tmp_path: Path, loss: float) -> None:
    History(tmp_path).trained(replace(POINT, task="é\n", loss=loss))
    (line,) = lines(tmp_path)
    assert line["loss"] is None and line["task"] == "é\n"


@pytest.mark.parametrize("content", [b"[]\n", b"{}\n", b"7\n\xff\n", b'{"task": "a", "steps": 4, "step": "x"}\n'])
def test_lines_of_something_else_are_dropped(tmp_path: Path, content: bytes) -> None:
    append(tmp_path, replace(POINT, task="b"))
    with (tmp_path / HISTORY).open("ab") as file:
        file.write(content)
    History(tmp_path).trained(POINT)
    assert [line["task"] for line in lines(tmp_path)] == ["b", "a"]


def test_a_history_that_is_no_file_of_ours(tmp_path: Path) -> None:
    (tmp_path / HISTORY).mkdir(parents=True)
    with pytest.raises(RunError, match=r"history\.jsonl cannot be read .*; delete it"):
        History(tmp_path).trained(POINT)


def test_no_link_is_followed(tmp_path: Path) -> None:
    append(tmp_path, replace(POINT, task="b"))
    (tmp_path / HISTORY).rename(tmp_path / "elsewhere")
    (tmp_path / HISTORY).symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(OSError, match=r"history\.jsonl"):
        History(tmp_path).trained(POINT)
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_nothing_private_is_listed(run: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    assert "history" not in call("status", run, "--privacy")[1]
