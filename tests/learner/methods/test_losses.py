"""The losses against slow formulas in NumPy, image by image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from duallora_edge.learner.methods.losses import cross_entropy, distilled_cross_entropy, kl_distillation_loss


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [5, 3], labels [5], features [5, 4] and the features before."""
    generator = torch.Generator().manual_seed(0)
    logits, f, before = (torch.randn(5, width, generator=generator, dtype=torch.float64) for width in (3, 4, 4))
    return logits, torch.tensor([0, 2, 1, 1, 0]), f, before


def softmax(row: np.ndarray) -> np.ndarray:
    return np.exp(row) / np.exp(row).sum()


def slow_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    return float(np.mean([-np.log(softmax(row)[k]) for row, k in zip(logits.numpy(), labels.tolist(), strict=True)]))


def test_cross_entropy() -> None:
    logits, labels, f, before = batch()
    assert float(cross_entropy(logits, labels, f, before)) == pytest.approx(slow_cross_entropy(logits, labels))


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_distilled_cross_entropy(weight: float) -> None:
    logits, labels, f, before = batch()
    cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(f.numpy(), before.numpy(), strict=True)]
    expected = slow_cross_entropy(logits, labels) + weight * np.mean([1 - cosine for cosine in cosines])
    assert float(distilled_cross_entropy(logits, labels, f, before, weight=weight)) == pytest.approx(expected)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_kl_distillation_loss(weight: float) -> None:
    """The divergence is taken from the features before to those now, not the other way round."""
    logits, labels, f, before = batch()
    divergences = []
    for now, then in zip(f.numpy(), before.numpy(), strict=True):
        p, q = softmax(then), softmax(now)
        divergences.append((p * np.log(p / q)).sum())
    expected = (1 - weight) * slow_cross_entropy(logits, labels) + weight * np.mean(divergences)
    assert float(kl_distillation_loss(logits, labels, f, before, weight=weight)) == pytest.approx(expected)


@pytest.mark.parametrize("loss", [distilled_cross_entropy, kl_distillation_loss])
def test_features_that_stay_cost_nothing(loss: Callable[..., Tensor]) -> None:
    logits, labels, f, _ = batch()
    found = loss(logits, labels, f, f, weight=0.4)
    share = 1.0 if loss is distilled_cross_entropy else 0.6
    assert float(found) == pytest.approx(share * slow_cross_entropy(logits, labels))
