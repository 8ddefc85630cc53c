"""Records: what is stored is what was learned, and nothing twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.statistics.gaussian import ClassStatistics


@pytest.mark.parametrize("features", [1, 2, 7])
def test_the_factor_of_the_scatter_is_stored_and_read(two_tasks: list[TaskRecord], features: int) -> None:
    x = torch.randn(20, features, generator=torch.Generator().manual_seed(0))
    statistics = ClassStatistics.of(x, torch.arange(20) % 2, 2)
    record = replace(two_tasks[0], statistics=statistics, discriminants=None)
    files = record.tensors()
    assert files["statistics"]["factor"].shape == (features, features)
    found = TaskRecord.from_tensors(record.info, files).statistics
    for name in ("counts", "means", "scatter"):
        torch.testing.assert_close(getattr(found, name), getattr(statistics, name), rtol=1e-6, atol=1e-6)


def test_discriminants_are_stored_and_read(two_tasks: list[TaskRecord]) -> None:
    record = two_tasks[0]
    found = TaskRecord.from_tensors(record.info, record.tensors()).discriminants
    assert found and record.discriminants
    assert record.discriminants.inflation and record.discriminants.inflation > 1
    assert found.inflation == pytest.approx(record.discriminants.inflation)
    torch.testing.assert_close(found.weight, record.discriminants.weight.float())
    torch.testing.assert_close(found.bias, record.discriminants.bias.float())


@pytest.mark.parametrize(
    ("file", "name"),
    [("adapters", "blocks.1.residual.v_up"), ("bases", "blocks.0.v"), ("statistics", "curve.nll"), ("head", "head")],
)
def test_a_missing_tensor_is_named(two_tasks: list[TaskRecord], file: str, name: str) -> None:
    files = two_tasks[0].tensors()
    del files[file][name]
    with pytest.raises(KeyError, match=name.replace(".", r"\.")):
        TaskRecord.from_tensors(two_tasks[0].info, files)
