"""Sequential fine-tuning: unconstrained adapters of the same size, one after the other. Nothing guards the past."""

from __future__ import annotations

import torch

from duallora_edge.learner.methods.base import Method
from duallora_edge.learner.recipe import Downs, Lesson, look, train_adapters, untrained
from duallora_edge.learner.record import TaskRecord
from duallora_edge.learner.subspace import empty_basis, top_directions


class Sequential(Method):
    """LoRA in the leading directions of each task's features, folded into the weights after the task."""

    name = "sequential"
    summary = "unconstrained adapters of the same size, one linear head a task"
    classifier = "heads"

    def learn(self, lesson: Lesson) -> TaskRecord:
        """Train on top of everything before, with nothing held fixed but the frozen weights."""
        blocks, head = untrained(lesson.backbone), torch.zeros(len(lesson.task.classes), lesson.backbone.dim + 1)
        if len(lesson.task.classes) > 1:
            suffix = self.training_blocks(lesson)
            rank = lesson.config.rank_orthogonal + lesson.config.rank_residual
            none = empty_basis(lesson.backbone.dim)
            before = look(lesson, suffix, "class")
            downs = [Downs(top_directions(q, rank), top_directions(v, rank), none) for q, v in before.moments]
            blocks, head = train_adapters(lesson, suffix, downs, before.features)
        return self.finish(lesson, lesson.info(self.name), blocks, head)
