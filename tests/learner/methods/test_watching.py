"""The points of a training: few enough, always the same ones, and without effect on what is learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from duallora_edge.learner.callbacks import Callback, Point
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import PixelSet, PreparedTask
from duallora_edge.learner.methods import learn_task, watching
from duallora_edge.learner.methods.lesson import Lesson
from duallora_edge.learner.methods.watching import POINTS, VALIDATIONS, Watcher, validation_accuracy
from duallora_edge.learner.network.adapters import AdaptedBlock
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.prefix_cache import Encoded
from duallora_edge.learner.network.task_record import TaskRecord

CONFIG = TrainConfig(device="cpu", precision="fp32", rank_orthogonal=2, rank_residual=2, epochs=1, min_steps=6)


class Points(Callback):
    def __init__(self) -> None:
        self.points: list[Point] = []

    def trained(self, point: Point) -> None:
        self.points.append(point)


class NoCheckpoint:
    def load(self) -> None:
        return None

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        pass


@pytest.fixture
def task(make_task: Callable[..., PreparedTask]) -> PreparedTask:
    return make_task("first", ["a", "b"], [0, 1])


@pytest.fixture
def lesson(tiny_backbone: Backbone, task: PreparedTask) -> Lesson:
    train, validation = (Encoded(tiny_backbone, part, task.classes) for part in (task.train, task.validation))
    return Lesson(tiny_backbone, [], task, train, validation, CONFIG, NoCheckpoint(), Points())


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 99, 100, 101, 457, 20_000])
def test_points_are_bounded_and_end_with_the_last_step(lesson: Lesson, steps: int) -> None:
    heard, limits = Points(), []

    def accuracy(limit: int) -> float:
        limits.append(limit)
        return 0.5

    watcher = Watcher(replace(lesson, callback=heard), steps, accuracy)
    for step in range(1, steps + 1):
        watcher.step(step, 32, torch.tensor(2.0), 0.1)
    points = heard.points
    assert len(points) == min(steps, POINTS) and points[-1].step == points[-1].steps == steps
    assert {(p.task, p.loss, p.learning_rate) for p in points} == {("first", 2.0, 0.1)}
    assert all(p.images_per_second > 0 for p in points)
    validated = [p.step for p in points if p.validation_accuracy is not None]
    assert len(validated) == len(limits) == min(steps, VALIDATIONS) and validated[-1] == steps
    assert sum(limits) <= steps * CONFIG.batch_size / watching.TRAINED_PER_VALIDATED


@pytest.mark.parametrize(("limit", "taken"), [(100, 8), (8, 8), (7, 4), (3, 3), (1, 1), (0, 1)])
def test_validation_images_are_thinned_out_evenly(lesson: Lesson, limit: int, taken: int) -> None:
    """A head that takes every image for class b, of which the second half are."""
    blocks = [AdaptedBlock(block) for block in lesson.backbone.suffix]
    seen = []

    def logits(f: torch.Tensor) -> torch.Tensor:
        seen.append(len(f))
        return torch.tensor([0.0, 1.0]).expand(len(f), 2)

    state = torch.get_rng_state()
    stride = -(-8 // max(limit, 1))
    right = sum(index >= 4 for index in range(0, 8, stride))
    assert validation_accuracy(lesson, blocks, logits, limit) == right / taken
    assert sum(seen) == taken and torch.equal(state, torch.get_rng_state())


def test_without_validation_images_there_is_no_accuracy(lesson: Lesson) -> None:
    empty = replace(lesson, validation=Encoded(lesson.backbone, PixelSet(lesson.train.pixels[:0], ()), ["a", "b"]))
    assert validation_accuracy(empty, [], lambda f: f, 10) is None


@pytest.mark.parametrize("method", ["dual_lora", "sequential", "task_arithmetic"])
def test_watching_changes_no_bit(
    tiny_backbone: Backbone, task: PreparedTask, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def learned(callback: Callback) -> TaskRecord:
        return learn_task(tiny_backbone, [], task, replace(CONFIG, method=method), NoCheckpoint(), callback)

    heard = Points()
    watched = learned(heard).tensors()
    assert [point.step for point in heard.points] == [1, 2, 3, 4, 5, 6]
    assert 0 <= (heard.points[-1].validation_accuracy or -1) <= 1
    monkeypatch.setattr(Watcher, "step", lambda *_: None)
    alone = learned(Callback()).tensors()
    assert watched.keys() == alone.keys()
    for name, tensors in watched.items():
        assert all(torch.equal(tensor, alone[name][key]) for key, tensor in tensors.items()), name
