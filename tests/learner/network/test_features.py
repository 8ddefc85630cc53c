"""Features and second moments of many images equal those of one large batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.adapters import AdaptedBlock, Collect
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.features import collect_features, suffix_features
from duallora_edge.learner.network.network import run_suffix
from duallora_edge.learner.network.prefix_cache import Encoded
from duallora_edge.learner.network.task_record import TaskRecord


@pytest.fixture
def encoded(tiny_backbone: Backbone, make_task: Callable[..., PreparedTask]) -> Encoded:
    """Twelve images behind the prefix, in batches of five."""
    task = make_task("a", ["x", "y"], [0, 1], train=6)
    return Encoded(tiny_backbone, task.train, task.classes, batch_size=5)


@pytest.mark.parametrize("collect", ["class", "all"])
@torch.no_grad()
def test_suffix_features(tiny_backbone: Backbone, encoded: Encoded, collect: Collect) -> None:
    blocks = [AdaptedBlock(block) for block in tiny_backbone.suffix]
    features, moments = suffix_features(tiny_backbone, blocks, encoded, "fp32", collect)
    expected, rows = run_suffix(tiny_backbone, blocks, encoded.batch(torch.arange(12)), collect=collect)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    for (q, v), read in zip(moments, rows, strict=True):
        torch.testing.assert_close(q, read.q.double().T @ read.q.double(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(v, read.v.double().T @ read.v.double(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_collected_features(tiny_backbone: Backbone, encoded: Encoded, two_tasks: list[TaskRecord]) -> None:
    network = compose(tiny_backbone, two_tasks).network
    features, moments = collect_features(network, encoded, "fp32")
    expected, _ = network.from_prefix(encoded.batch(torch.arange(12)), encoded.phi)
    assert moments == []
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
