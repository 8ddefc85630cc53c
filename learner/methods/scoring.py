"""How classes are scored: affine functions of the features, fitted in closed form to what the tasks left behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora_edge.learner.network.answers import Catalogue, Scores
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.statistics.gaussian import ClassStatistics, Discriminants, GaussianClassifier
from duallora_edge.learner.statistics.ridge import (
    RidgeSums,
    best_strength,
    random_projection,
    ridge_weights,
    right_answers,
)

T = TypeVar("T")
RIDGE_SCALE = 64.0  # regression to 0 and 1 gives scores far below the range of the temperatures


@dataclass(frozen=True)
class ClassifierData:
    """What classifiers are fitted to: one entry for each task, oldest first.

    Attributes:
        dim: width d of the final feature f; the features [f ; phi] are D wide.
        heads: linear heads [K, d + 1], bias last.
        statistics: class statistics of the features.
        discriminants: of the classes of each task alone, for `lda`, None for tasks learned with another classifier.
        ridge_sums: sums for `ridge`, None for tasks learned with another classifier.
        inflation: whether the inflation of the Gaussians is asked for, which takes half of the time to fit them.
    """

    dim: int
    heads: Sequence[Tensor]
    statistics: Sequence[ClassStatistics]
    discriminants: Sequence[Discriminants | None]
    ridge_sums: Sequence[RidgeSums | None]
    inflation: bool = True

    @classmethod
    def of(cls, tasks: Sequence[TaskRecord], dim: int) -> ClassifierData:
        """The data of tasks."""
        return cls(
            dim,
            [task.head for task in tasks],
            [task.statistics for task in tasks],
            [task.discriminants for task in tasks],
            [task.ridge_sums for task in tasks],
        )

    def followed_by(
        self,
        head: Tensor,
        statistics: ClassStatistics,
        discriminants: Discriminants | None,
        ridge_sums: RidgeSums | None,
    ) -> ClassifierData:
        """The data with one more task."""
        return ClassifierData(
            self.dim,
            [*self.heads, head],
            [*self.statistics, statistics],
            [*self.discriminants, discriminants],
            [*self.ridge_sums, ridge_sums],
            self.inflation,
        )

    @cached_property
    def gaussian(self) -> GaussianClassifier:
        """The classes of all tasks as Gaussians of [f ; phi]."""
        return GaussianClassifier.fit(self.statistics, inflation=self.inflation)

    @property
    def features(self) -> int:
        """Width D of the features."""
        return self.statistics[-1].means.shape[1]


def lda(data: ClassifierData) -> Scores:
    """Linear discriminants of all features [f ; phi]; the classes of one task are told apart with its own covariance.

    The covariance of all tasks together tells the tasks apart, but fits no single task: where tasks differ much, as
    traffic signs and textures do, it treats what varies among the images of other tasks as noise.
    """
    within = _known(data.discriminants)
    return Scores(data.gaussian.weight, data.gaussian.bias, data.gaussian.inflation, within=within)


def lda_f(data: ClassifierData) -> Scores:
    """Linear discriminants of the final feature f alone."""
    alone = GaussianClassifier.fit([statistics.part(slice(0, data.dim)) for statistics in data.statistics])
    return Scores(_with_phi(alone.weight, data), alone.bias, alone.inflation)


def mean_f(data: ClassifierData) -> Scores:
    """The nearest class mean m of the final feature f: -|f - m|^2 / 2 up to a common term."""
    means = torch.cat([statistics.means[:, : data.dim] for statistics in data.statistics])
    return Scores(_with_phi(means, data), -means.square().sum(dim=1) / 2, None)


def heads(data: ClassifierData) -> Scores:
    """The linear heads on f that the adapters were trained with."""
    weights = torch.cat([*data.heads]).double()
    return Scores(_with_phi(weights[:, :-1], data), weights[:, -1], None)


def _with_phi(weight: Tensor, data: ClassifierData) -> Tensor:
    """Weights [K, d] on f as weights [K, D] on [f ; phi], zero for phi."""
    return F.pad(weight, (0, data.features - data.dim))


def ridge(data: ClassifierData) -> Scores:
    """Ridge regression to one-hot labels on random features of [f ; phi] (see `statistics.ridge`).

    The strength of the ridge is the one with the most right answers on the validation images of all tasks.
    """
    sums = _known(data.ridge_sums)
    weight = ridge_weights(sums, best_strength(sums))
    bias = torch.zeros(len(weight), dtype=torch.float64)
    return Scores(RIDGE_SCALE * weight, bias, None, random_projection(data.features))


def _known(values: Sequence[T | None]) -> list[T]:
    """The values of tasks that all have one; that a run has them is checked when it is read."""
    return [each for each in values if each is not None]


def fit_ridge_sums(
    past: Sequence[RidgeSums | None],
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    classes: int,
) -> RidgeSums:
    """The sums of the training images of a new task, with the right answers on its validation images.

    ``train`` and ``validation`` are features [n, D] and labels int64 [n] in 0..classes-1; there may be no validation
    images.
    """
    new = RidgeSums.of(*train, classes)
    features, labels = validation
    if not len(labels):
        return new
    known = _known(past)
    offset = sum(len(task.sums) for task in known)
    return RidgeSums(new.gram, new.sums, right_answers([*known, new], features, labels + offset))


class _Gaps:
    """Logits of the mean images of the classes of a task, and how gaps between logits vary within its classes."""

    def __init__(self, discriminants: Discriminants, means: Tensor, covariance: Tensor) -> None:
        weight = discriminants.weight.double()
        self.means = means @ weight.T + discriminants.bias
        self._covariance = weight @ covariance @ weight.T
        self._inflation = discriminants.inflation or 1.0

    def variance(self, first: int, second: int) -> float:
        """The variance of the gap between two logits among new images."""
        c = self._covariance
        return self._inflation * float(c[first, first] + c[second, second] - 2 * c[first, second])


CLASSIFIERS: dict[str, Callable[[ClassifierData], Scores]] = {
    "lda": lda,
    "lda_f": lda_f,
    "mean_f": mean_f,
    "ridge": ridge,
    "heads": heads,
}


def overconfidence(scores: Scores, catalogue: Catalogue, statistics: ClassStatistics, task: int) -> float | None:
    """By which factor the logits of new images of a task are too large, predicted from its class ``statistics``.

    In the logits of images of one class, the gap to the nearest rival class has mean m and variance v. For two
    Gaussians with one variance the log-odds are 2 m / v times the gap, so the logits are v / 2m times too large; the
    result is the geometric mean over the classes of the task. Features are not Gaussian, so only the change of this
    number from one classifier to the next is used. It leaves out that few images also pull the estimated means apart.
    None where the scores have no ``inflation`` or the task has no rival.
    """
    if scores.inflation is None:
        return None
    own = (catalogue.task_of == task).nonzero()[:, 0].tolist()
    covariance = statistics.covariance()
    among_all = _Gaps(scores, statistics.means, covariance)
    among_own = _Gaps(scores.within[task], statistics.means, covariance) if scores.within else None
    logarithms = []
    for row, component in enumerate(own):
        gaps = among_all.means[row, component] - among_all.means[row]
        if among_own:
            gaps[own] = among_own.means[row, row] - among_own.means[row]
        rival = (catalogue.class_of != catalogue.class_of[component]) & (gaps > 0)
        if not rival.any():
            continue
        nearest = int(gaps.where(rival, torch.inf).argmin())
        if among_own and nearest in own:
            variance = among_own.variance(row, own.index(nearest))
        else:
            variance = among_all.variance(component, nearest)
        if variance > 0:
            logarithms.append(math.log(variance / (2 * gaps[nearest])))
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None
