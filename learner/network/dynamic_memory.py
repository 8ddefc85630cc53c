"""The dynamic memory: which task an image belongs to, and how far that opens each residual adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.statistics.gaussian import GaussianClassifier


class DynamicMemory(nn.Module):
    """The task posterior p(t | x) from the prefix summary phi of an image x.

    It is the posterior of Gaussian classes with one covariance, p(k | x) proportional to N(phi; mu_k, Sigma)^(1 /
    temperature), summed over the classes of each task. The prefix never changes, so the statistics of old tasks stay
    valid for ever. Each image is judged alone, never by its batch.

    ``gaussian`` has the classes of all tasks as components, in order; ``classes`` [T] are their numbers.
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
        """Log-likelihoods [B, K] of phi [B, summary_dim] under each component, up to a common term."""
        return phi @ self.weight.T + self.bias

    def forward(self, phi: Tensor) -> Tensor:
        """Task posterior [B, T] of summaries phi [B, summary_dim]."""
        return (self.logits(phi) / self.temperature).softmax(dim=1) @ self.task_sums


def gate_matrix(infos: Sequence[TaskInfo], ranks: Sequence[int]) -> Tensor:
    """G [T, sum of ranks] such that the gates of an image with task posterior p are p G.

    The ranks of an isolated residual of task s are opened by p_s, those of a ``previous`` residual by P(task >= s).
    Either way the gates recreate the network in which the image's own task was trained. The gate ``open`` is always 1.
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
