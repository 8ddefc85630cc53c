"""Ridge sums: they add up over sets of images."""

from __future__ import annotations

import pytest
import torch

from duallora_edge.learner.statistics import ridge
from duallora_edge.learner.statistics.ridge import RidgeSums


def test_the_sums_of_two_sets_of_images_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "RANDOM_FEATURES", 50)
    x, labels = torch.randn(20, 7, generator=torch.Generator().manual_seed(5)), torch.arange(20) % 2
    whole = RidgeSums.of(x, labels, 2)
    parts = RidgeSums.of(x[:7], labels[:7], 2) + RidgeSums.of(x[7:], labels[7:], 2)
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.sums, whole.sums, rtol=1e-4, atol=1e-4)


def test_the_sums_equal_those_of_the_random_features() -> None:
    x, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, 2, 0, 0, 2])
    hidden = (x @ ridge.random_projection(3).T).clamp(min=0).double()
    found = RidgeSums.of(x, labels, 3)
    torch.testing.assert_close(found.gram.double(), hidden.T @ hidden, rtol=1e-4, atol=1e-4)
    slow = torch.stack([hidden[labels == k].sum(dim=0) for k in range(3)])
    torch.testing.assert_close(found.sums.double(), slow, rtol=1e-4, atol=1e-4)
