"""Ridge regression to one-hot labels on random features relu(x R): sums that add up over sets of images and tasks.

The head of RanPAC (McDonnell et al. 2023, arXiv 2307.02251).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duallora_edge.learner.statistics.gaussian import ClassStatistics

RANDOM_FEATURES = 2000
# The ridge is one of these shares of the mean of the diagonal of the Gram matrix.
STRENGTHS = tuple(10.0**power for power in range(-3, 4))


@dataclass(frozen=True)
class RidgeSums:
    """What the regression needs of some images of K classes, with M random features.

    Attributes:
        gram: Gram matrix of the random features, float32 [M, M].
        sums: their sums by class, float32 [K, M].
        right: right answers on validation images at each of the `STRENGTHS`, float32 [len(STRENGTHS)].
    """

    gram: Tensor
    sums: Tensor
    right: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> RidgeSums:
        """The sums of features [n, D] with labels int64 [n] in 0..classes-1; no right answers yet."""
        statistics = ClassStatistics.of(random_features(features), labels, classes)
        sums = statistics.counts[:, None] * statistics.means
        gram = statistics.scatter + statistics.means.T @ sums
        return cls(gram.float(), sums.float(), torch.zeros(len(STRENGTHS)))

    def __add__(self, other: RidgeSums) -> RidgeSums:
        """The sums of both sets of images of the same classes; the right answers of both."""
        return RidgeSums(self.gram + other.gram, self.sums + other.sums, self.right + other.right)


def ridge_weights(tasks: Sequence[RidgeSums], strength: float) -> Tensor:
    """Weights float64 [K, M] on the random features for the K components of all tasks."""
    gram = torch.stack([task.gram.double() for task in tasks]).sum(dim=0)
    sums = torch.cat([task.sums.double() for task in tasks])
    gram = gram + strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.cholesky_solve(sums.T, torch.linalg.cholesky(gram)).T


def right_answers(tasks: Sequence[RidgeSums], features: Tensor, truth: Tensor) -> Tensor:
    """Right answers float32 [len(STRENGTHS)] on features [n, D] with true components [n]."""
    hidden = random_features(features).double()
    answers = ((hidden @ ridge_weights(tasks, strength).T).argmax(dim=1) for strength in STRENGTHS)
    return torch.tensor([float((answer == truth).sum()) for answer in answers])


def best_strength(tasks: Sequence[RidgeSums]) -> float:
    """The strength with the most right answers on the validation images of all tasks."""
    return STRENGTHS[int(torch.stack([task.right for task in tasks]).sum(dim=0).argmax())]


def random_features(features: Tensor) -> Tensor:
    """relu(x R) [n, M] of features [n, D]."""
    return (features @ random_projection(features.shape[1]).T).relu()


def random_projection(features: int) -> Tensor:
    """The fixed projection R^T [M, D], the same for every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(RANDOM_FEATURES, features, generator=generator) / features**0.5
