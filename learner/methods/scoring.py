"""How the classes are scored: affine functions of the features, fitted in closed form from what tasks left behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora_edge.learner.network.network import Catalogue, Scores
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.statistics.gaussian import ClassStatistics, GaussianClassifier

RANDOM_FEATURES = 2000
RIDGE_SCALE = 64.0  # regression to 0 and 1 gives scores far below the range of the temperatures
RIDGES = tuple(10.0**power for power in range(-3, 4))


def lda(tasks: Sequence[TaskRecord], gaussian: GaussianClassifier) -> Scores:
    """Linear discriminants of all features [f ; phi]."""
    return Scores(gaussian.weight, gaussian.bias, inflation=gaussian.inflation)


def lda_f(tasks: Sequence[TaskRecord], gaussian: GaussianClassifier) -> Scores:
    """Linear discriminants of the final feature f alone."""
    dim = tasks[-1].head.shape[1] - 1
    alone = GaussianClassifier.fit([task.statistics.part(slice(0, dim)) for task in tasks])
    weight = F.pad(alone.weight, (0, gaussian.weight.shape[1] - dim))
    return Scores(weight, alone.bias, inflation=alone.inflation)


def mean_f(tasks: Sequence[TaskRecord], gaussian: GaussianClassifier) -> Scores:
    """The nearest class mean of the final feature f: -|f - m|^2 / 2 up to a common term."""
    dim = tasks[-1].head.shape[1] - 1
    means = torch.cat([task.statistics.means[:, :dim] for task in tasks])
    return Scores(F.pad(means, (0, gaussian.weight.shape[1] - dim)), -means.square().sum(dim=1) / 2)


def heads(tasks: Sequence[TaskRecord], gaussian: GaussianClassifier) -> Scores:
    """The linear heads on f that the adapters were trained with, one a task."""
    weights = torch.cat([task.head for task in tasks]).double()
    return Scores(F.pad(weights[:, :-1], (0, gaussian.weight.shape[1] - weights.shape[1] + 1)), weights[:, -1])


def ridge(tasks: Sequence[TaskRecord], gaussian: GaussianClassifier) -> Scores:
    """Ridge regression to one-hot labels on random features relu(x R), x = [f ; phi].

    The head of RanPAC (McDonnell et al. 2023). The strength of the ridge is the one with the most right held-back
    answers over the tasks.
    """
    right = torch.stack([task.memory["ridge.right"] for task in tasks]).sum(dim=0)
    scores = _ridge(tasks, RIDGES[int(right.argmax())], gaussian.weight.shape[1])
    return Scores(RIDGE_SCALE * scores.weight, scores.bias, scores.expansion)


def _ridge(tasks: Sequence[TaskRecord], strength: float, features: int) -> Scores:
    gram = torch.stack([task.memory["ridge.gram"].double() for task in tasks]).sum(dim=0)
    sums = torch.cat([task.memory["ridge.sums"].double() for task in tasks])
    gram = gram + strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.cholesky_solve(sums.T, torch.linalg.cholesky(gram)).T
    return Scores(weight, torch.zeros(len(weight), dtype=torch.float64), random_projection(features))


def random_projection(features: int) -> Tensor:
    """The fixed projection R^T [RANDOM_FEATURES, D], the same for every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(RANDOM_FEATURES, features, generator=generator) / features**0.5


def ridge_memory(features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """What `ridge` needs of features [n, D] with labels [n]: Gram matrix and class sums of the random features."""
    hidden = (features @ random_projection(features.shape[1]).T).relu()
    statistics = ClassStatistics.of(hidden, labels, classes)
    sums = statistics.counts[:, None] * statistics.means
    gram = statistics.scatter + statistics.means.T @ sums
    return {"ridge.gram": gram.float(), "ridge.sums": sums.float(), "ridge.right": torch.zeros(len(RIDGES))}


def ridge_fits(memory: Mapping[str, Tensor], classes: int) -> bool:
    """Whether a memory holds what `ridge_memory` made of so many classes."""
    shapes = {
        "ridge.gram": (RANDOM_FEATURES, RANDOM_FEATURES),
        "ridge.sums": (classes, RANDOM_FEATURES),
        "ridge.right": (len(RIDGES),),
    }
    return all(
        key in memory and memory[key].shape == shape and memory[key].dtype == torch.float32
        for key, shape in shapes.items()
    )


def ridge_right(tasks: Sequence[TaskRecord], features: Tensor, truth: Tensor) -> Tensor:
    """Right answers [len(RIDGES)] on held-back features [n, D] with true components [n], at each strength."""
    right = []
    hidden = (features @ random_projection(features.shape[1]).T).relu().double()
    for strength in RIDGES:
        scores = _ridge(tasks, strength, features.shape[1])
        right.append(float(((hidden @ scores.weight.T).argmax(dim=1) == truth).sum()))
    return torch.tensor(right)


def overconfidence(scores: Scores, catalogue: Catalogue, statistics: ClassStatistics, task: int) -> float | None:
    """How many times too large the logits of a task's new images are, as its class ``statistics`` predict it.

    A class and its nearest rival are apart by a gap of mean m and variance v in the logits of images of the class. Of
    two Gaussians with one variance the log-odds are 2 m / v times the gap, so the logits are v / 2m times too large;
    this is the geometric mean over the classes of the task. Features are no Gaussians: only how it changes with the
    classifier is used. That few images also pull the estimated means apart is left out. None where it is not known
    or the task has no rival.
    """
    if scores.inflation is None:
        return None
    own = (catalogue.task_of == task).nonzero()[:, 0]
    means = statistics.means @ scores.weight.T + scores.bias
    covariance = scores.weight @ statistics.covariance() @ scores.weight.T
    variances = covariance.diagonal()
    logarithms = []
    for row, component in zip(means, own.tolist(), strict=True):
        gaps = row[component] - row
        rival = (catalogue.class_of != catalogue.class_of[component]) & (gaps > 0)
        if not rival.any():
            continue
        nearest = int(gaps.where(rival, torch.inf).argmin())
        variance = variances[component] + variances[nearest] - 2 * covariance[component, nearest]
        if variance > 0:
            logarithms.append(float((scores.inflation * variance / (2 * gaps[nearest])).log()))
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


CLASSIFIERS: dict[str, Callable[[Sequence[TaskRecord], GaussianClassifier], Scores]] = {
    "lda": lda,
    "lda_f": lda_f,
    "mean_f": mean_f,
    "ridge": ridge,
    "heads": heads,
}
