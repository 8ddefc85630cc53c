"""Orthogonal LoRA with bases from all tokens, after InfLoRA (Liang and Li, arXiv 2404.00228)."""

from __future__ import annotations

from torch import Tensor

from duallora_edge.learner.methods.base import Method
from duallora_edge.learner.methods.lesson import Lesson
from duallora_edge.learner.methods.training import DownProjections, past_bases
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.statistics.subspace import constrained_directions, empty_basis


class InfLora(Method):
    """One adapter for each task, with both ranks together, orthogonal to everything that earlier tokens span.

    As in InfLoRA the down-projection is computed from the inputs of the layer and fixed, and the up-projection is
    trained; targets (query and value), classifier and budget are those of DualLoRA.
    """

    name = "inflora"
    summary = "orthogonal adapters with bases from all tokens (InfLoRA)"

    def learn(self, lesson: Lesson) -> TaskRecord:
        """Train outside the subspace of all earlier tokens, then extend it."""
        rank = lesson.config.rank_orthogonal + lesson.config.rank_residual
        none = empty_basis(lesson.backbone.dim)

        def downs(index: int, q: Tensor, v: Tensor) -> DownProjections:
            q_basis, v_basis = past_bases(lesson.past, index, lesson.backbone.dim)
            return DownProjections(
                constrained_directions(q, q_basis, rank), constrained_directions(v, v_basis, rank), none
            )

        blocks, head = self.adapt(lesson, "all", downs)
        return self.finish(lesson, blocks, head, collect="all")
