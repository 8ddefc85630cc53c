"""The dynamic memory: which task an image belongs to, and how far that opens each residual adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.statistics.gaussian import GaussianClassifier


class DynamicMemory(nn.Module):
    """p(t | x) from the prefix summary phi: class Gaussians with one covariance, summed over the classes of a task.

    The prefix never changes, so the statistics of old tasks stay valid for ever. One image is read at a time,
    never the batch. ``gaussian`` is of phi, its components are ``classes`` [T] of each task in turn.
    """

    weight: Tensor
    bias: Tensor
    task_sums: Tensor

    def __init__(
        self, gaussian: GaussianClassifier, classes: Sequence[int], temperature: float, device: torch.device
    ) -> None:
        super().__init__()
        sums = torch.block_diag(*(torch.ones(count, 1) for count in classes))
        self.temperature = temperature
        for name, value in (("weight", gaussian.weight), ("bias", gaussian.bias), ("task_sums", sums)):
            self.register_buffer(name, value.float().to(device), persistent=False)

    def logits(self, phi: Tensor) -> Tensor:
        """Log-likelihoods of phi up to a common term, one a component, [B, K]."""
        return phi @ self.weight.T + self.bias

    def forward(self, phi: Tensor) -> Tensor:
        """Task posterior [B, T] of summaries phi."""
        return (self.logits(phi) / self.temperature).softmax(dim=1) @ self.task_sums


def gate_matrix(infos: Sequence[TaskInfo], ranks: Sequence[int]) -> Tensor:
    """G [T, sum of ranks] such that the gates of an image with task posterior p are p G.

    A rank of an isolated residual of task s is opened by p_s, one of a ``previous`` residual by P(task >= s):
    either way the gates recreate the network in which the image's own task was trained. Gate ``open`` never closes.
    """
    columns = []
    for task, (info, rank) in enumerate(zip(infos, ranks, strict=True)):
        column = torch.zeros(len(infos), rank)
        if info.gate == "open":
            column[:] = 1
        elif info.residual == "previous":
            column[task:] = 1
        else:
            column[task] = 1
        columns.append(column)
    return torch.cat(columns, dim=1) if columns else torch.zeros(0, 0)
