"""The dynamic memory: the gates that a task posterior opens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from duallora_edge.learner.network.dynamic_memory import gate_matrix
from duallora_edge.learner.network.task_info import TaskInfo


def info(name: str, classes: list[str], residual: str = "isolated") -> TaskInfo:
    return TaskInfo(name, tuple(classes), "dual_lora", residual, 0, "", {})


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        (["isolated", "isolated", "isolated"], [0.2, 0.3, 0.5]),
        (["previous", "previous", "previous"], [1.0, 0.8, 0.5]),
        (["isolated", "previous", "isolated"], [0.2, 0.8, 0.5]),
        (["none", "none", "previous"], [0.2, 0.3, 0.5]),
    ],
)
def test_gates_of_a_posterior(modes: list[str], expected: list[float]) -> None:
    infos = [info(str(i), ["x"], mode) for i, mode in enumerate(modes)]
    ranks = [2, 0, 3]
    gates = torch.tensor([[0.2, 0.3, 0.5]]) @ gate_matrix(infos, ranks)
    torch.testing.assert_close(gates, torch.tensor([expected]).repeat_interleave(torch.tensor(ranks), dim=1))


def test_open_gates_are_open_for_every_posterior() -> None:
    infos = [replace(info(str(i), ["x"], mode), gate="open") for i, mode in enumerate(("isolated", "previous", "none"))]
    posterior = torch.eye(3)
    torch.testing.assert_close(posterior @ gate_matrix(infos, [2, 0, 3]), torch.ones(3, 5))
