"""The Python interface of learning, on a small stream of generated images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duallora_edge.errors import ConfigError, RunError
from duallora_edge.learner import Callback, Learner
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.report.metrics import Metrics
from duallora_edge.learner.run_directory import RunDirectory

QUICK = {"device": "cpu", "precision": "fp32", "epochs": 1, "min_steps": 4, "batch_size": 16, "summaries": 1}


class Notes(Callback):
    """What was told, in order: the name of each method once for each run of calls of it."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.rows: list[int] = []

    def note(self, what: str) -> None:
        if self.told[-1:] != [what]:
            self.told.append(what)

    def start(self, config: TrainConfig, tasks: tuple[str, ...]) -> None:
        self.note(f"start {config.method} {tasks}")

    def step(self, step: int, steps: int, loss: Tensor, rate: float) -> None:
        assert 1 <= step <= steps and not loss.requires_grad
        self.losses.append(float(loss))
        self.rates.append(rate)
        self.note("step")

    def learned(self, task: str, seconds: float) -> None:
        self.note(f"learned {task}")

    def measured(self, metrics: Metrics) -> None:
        self.rows.append(len(metrics.rows[-1]))
        self.note(f"measured {len(metrics.tasks)}")

    def end(self, metrics: Metrics) -> None:
        self.note(f"end {len(metrics.tasks)}")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, image_stream: Path) -> tuple[Path, Notes, Metrics]:
    """A run of both tasks of the stream; to be copied before it is changed."""
    path, notes = tmp_path_factory.mktemp("learner") / "run", Notes()
    return path, notes, Learner(path, callbacks=[notes, Callback()], **QUICK).learn(image_stream)


def test_callbacks_hear_everything_in_order(learned: tuple[Path, Notes, Metrics]) -> None:
    path, notes, _ = learned
    first, second = (task.name for task in Learner(path).tasks)
    assert notes.told == [
        f"start dual_lora {(first, second)}",
        *("step", f"learned {first}", "measured 1"),
        *("step", f"learned {second}", "measured 2"),
        "end 2",
    ]
    assert notes.rows == [1, 2]
    steps = len(notes.rates) // 2
    assert notes.rates[0] == notes.rates[steps] == pytest.approx(1e-3)
    assert notes.rates == sorted(notes.rates[:steps], reverse=True) * 2
    assert notes.losses[0] > notes.losses[steps - 1] > 0


def test_a_run_is_read_without_learning(learned: tuple[Path, Notes, Metrics], tmp_path: Path) -> None:
    path, _, metrics = learned
    learner = Learner(path)
    assert learner.metrics.to_json() == metrics.to_json()
    assert learner.config.min_steps == 4
    new = Learner(tmp_path / "new", size=32)
    assert new.tasks == () and new.config.size == 32 and not new.path.exists()
    for use in (lambda: new.metrics, new.evaluate, new.rollback, new.model, lambda: new.export(tmp_path / "bundle")):
        with pytest.raises(RunError, match="is not a folder"):
            use()


def test_undoing_and_learning_again_gives_the_same_state(
    learned: tuple[Path, Notes, Metrics], image_stream: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(learned[0], path)
    digest = RunDirectory.open(path).digest()
    learner = Learner(path, device="cpu")
    first, second = (task.name for task in learner.tasks)
    assert learner.rollback() == second and [task.name for task in learner.tasks] == [first]
    learner.learn(image_stream, evaluate=False)
    assert RunDirectory.open(path).digest() == digest
    learner.remove(first)
    assert [task.name for task in learner.tasks] == [second]
    with pytest.raises(RunError, match=f"has no task '{first}'"):
        learner.remove(first)


def test_a_task_that_has_grown_is_learned_again(
    learned: tuple[Path, Notes, Metrics], image_stream: Path, image_task: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(learned[0], tmp_path / "run")
    shutil.copytree(image_stream, tmp_path / "stream")
    image_task(tmp_path / "more", {"star": 5}, train=5, test=3)
    shutil.copytree(tmp_path / "more", tmp_path / "stream" / "01-round", dirs_exist_ok=True)
    notes = Notes()
    learner = Learner(tmp_path / "run", callbacks=[notes], device="cpu")
    metrics = learner.learn(tmp_path / "stream", again="01-round")
    assert notes.told[1:] == ["step", "learned 01-round", "measured 1", "measured 2", "end 2"]
    assert [(task.name, len(task.classes)) for task in learner.tasks] == [("02-lines", 2), ("01-round", 3)]
    assert learner.metrics.to_json() == metrics.to_json() and [cell.n for cell in metrics.rows[-1]] == [8, 11]
    assert learner.model().catalogue.classes == ("cross", "ring", "disc", "square", "star")


def test_measuring_again_gives_the_same_metrics(learned: tuple[Path, Notes, Metrics], tmp_path: Path) -> None:
    shutil.copytree(learned[0], tmp_path / "run")
    notes = Notes()
    metrics = Learner(tmp_path / "run", callbacks=[notes]).evaluate(comparisons=[Learner(learned[0])])
    assert metrics.to_json() == learned[2].to_json()
    assert notes.told == ["measured 1", "measured 2", "end 2"]


def test_the_model_answers_as_the_bundle(learned: tuple[Path, Notes, Metrics], tmp_path: Path) -> None:
    learner = Learner(learned[0])
    bundle = learner.export(tmp_path / "bundle", target="x86-cpu")
    golden = bundle.golden()
    with torch.no_grad():
        outputs = learner.model()(torch.from_numpy(golden.image.copy()))
    for name in ("probabilities", "task_probabilities", "novelty", "features"):
        torch.testing.assert_close(
            getattr(outputs, name), torch.from_numpy(getattr(golden, name).copy()), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"sise": 32}, "unknown key 'sise', did you mean 'size'"),
        ({"size": "large"}, "size must be a whole number"),
        ({"epochs": -1}, "epochs must be between 0 and 10000"),
        ({"method": "lora"}, "method must be one of"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Learner(tmp_path / "run", **settings)


def test_settings_that_the_run_was_not_made_with(learned: tuple[Path, Notes, Metrics], image_stream: Path) -> None:
    with pytest.raises(ConfigError, match="min_steps is 4, not 8"):
        Learner(learned[0], min_steps=8).learn(image_stream)
