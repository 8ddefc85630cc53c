"""Sequential fine-tuning: unconstrained adapters of the same size, one after the other. Nothing guards the past."""

from __future__ import annotations

from torch import Tensor

from duallora_edge.learner.methods.base import Method
from duallora_edge.learner.methods.lesson import Lesson
from duallora_edge.learner.methods.training import DownProjections
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.statistics.subspace import empty_basis, top_directions


class Sequential(Method):
    """LoRA in the leading directions of each task's features, folded into the weights after the task."""

    name = "sequential"
    summary = "unconstrained adapters of the same size, one linear head for each task"
    classifier = "heads"

    def learn(self, lesson: Lesson) -> TaskRecord:
        """Train on top of everything before; only the frozen weights stay as they are."""
        rank = lesson.config.rank_orthogonal + lesson.config.rank_residual
        none = empty_basis(lesson.backbone.dim)

        def downs(index: int, q: Tensor, v: Tensor) -> DownProjections:
            return DownProjections(top_directions(q, rank), top_directions(v, rank), none)

        blocks, head = self.adapt(lesson, "class", downs)
        return self.finish(lesson, blocks, head)
