"""The lesson: everything a method may look at to learn one task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.dynamic_memory import DynamicMemory
from duallora_edge.learner.network.prefix_cache import Encoded
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.statistics.calibration import TEMPERATURES, neighbour_folds
from duallora_edge.learner.statistics.gaussian import STORED_DIRECTIONS, ClassStatistics, GaussianClassifier
from duallora_edge.learner.timing import phase, timed

if TYPE_CHECKING:
    from duallora_edge.learner.config import TrainConfig


class Checkpoint(Protocol):
    """Where training in progress is kept: tensors by name, with the number of steps done."""

    def load(self) -> tuple[int, dict[str, Tensor]] | None: ...

    def save(self, step: int, tensors: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class GateValidation:
    """How well the prefix posterior finds the newest task on its validation images.

    Attributes:
        nll: negative log-likelihood of the task, summed over the images, at each temperature [len(TEMPERATURES)].
        task_accuracy: share of the images whose most probable task is theirs; None where nothing was measured.
    """

    nll: Tensor
    task_accuracy: float | None


@dataclass(frozen=True)
class Lesson:
    """The task to learn, with everything that is known before.

    Attributes:
        backbone: the frozen network.
        past: the records of the tasks learned so far, oldest first; they must not be changed.
        task: names and images of the new task.
        train, validation: its images behind the frozen prefix.
        config: the configuration.
        checkpoint: where training in progress is kept.
        callback: hears of the steps.
    """

    backbone: Backbone
    past: Sequence[TaskRecord]
    task: PreparedTask
    train: Encoded
    validation: Encoded
    config: TrainConfig
    checkpoint: Checkpoint
    callback: Callback

    @property
    def number(self) -> int:
        """How many tasks were learned before."""
        return len(self.past)

    def statistics(self, features: Tensor) -> ClassStatistics:
        """The statistics of features [n, D] of the training images with their views, which count as one image."""
        rows = ClassStatistics.of(features, self.train.labels, len(self.task.classes))
        return rows.scaled(1 / (1 + self.train.views))

    @cached_property
    def gaussian(self) -> GaussianClassifier:
        """The classes of all tasks, this one included, as Gaussians of phi."""
        with phase("statistics"):
            new = self.statistics(self.train.phi)
            known = summary_statistics(self.past, self.backbone)
            return GaussianClassifier.fit([*known, new.compressed(STORED_DIRECTIONS)], inflation=False)

    @property
    def domain_folds(self) -> Tensor:
        """The fold of each validation image, int64 [n] (see `neighbour_folds`), -1 where its class has none.

        A class has folds where a whole domain of it was held back: `hold_back` goes beyond twice what it is to hold
        only for a scene of that size, and images that differ so much are more than a scene. Validation images that the
        user gave are what is to come, and have none.
        """
        labels, classes = self.validation.labels, len(self.task.classes)
        if self.task.validation_given:
            return torch.full_like(labels, -1)
        held = labels.bincount(minlength=classes)
        learned = self.train.labels[: self.train.images].bincount(minlength=classes)
        wanted = (self.config.validation_fraction * (held + learned)).round().clamp(min=1)
        return torch.where((held > 2 * wanted)[labels], neighbour_folds(labels), -1)

    @cached_property
    def gate_validation(self) -> GateValidation:
        """How well the new task is recognised; not measured for a first task or without validation images."""
        if not self.past or not len(self.validation):
            return GateValidation(torch.zeros(len(TEMPERATURES)), None)
        return validate_gate(self.dynamic_memory(1.0, torch.device("cpu")), self.validation.phi)

    def dynamic_memory(self, temperature: float, device: torch.device) -> DynamicMemory:
        """The dynamic memory of all tasks, this one included."""
        classes = [*(len(record.info.classes) for record in self.past), len(self.task.classes)]
        return DynamicMemory(self.gaussian, classes, temperature, device)


def summary_statistics(tasks: Sequence[TaskRecord], backbone: Backbone) -> list[ClassStatistics]:
    """The part of the statistics of tasks that belongs to phi."""
    return [task.statistics.part(slice(backbone.dim, None)) for task in tasks]


@timed("statistics")
def validate_gate(memory: DynamicMemory, phi: Tensor) -> GateValidation:
    """Measure the task posterior on summaries ``phi`` [n, summary_dim] of images of the newest task."""
    logits = memory.logits(phi).double()
    sums = memory.task_sums.double()
    posteriors = [(logits / t).softmax(dim=1) @ sums for t in TEMPERATURES]
    nll = torch.stack([-p[:, -1].clamp(min=1e-12).log().sum() for p in posteriors])
    # At the lowest temperature nearly all probability is on the task of the likeliest class, whatever temperature is
    # chosen later.
    correct = posteriors[0].argmax(dim=1) == sums.shape[1] - 1
    return GateValidation(nll, float(correct.double().mean()))
