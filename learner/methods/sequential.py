"""Sequential fine-tuning: unconstrained adapters of the same size, one after the other. Nothing guards the past."""

from __future__ import annotations

from duallora_edge.learner.methods.base import Method
from duallora_edge.learner.methods.lesson import Lesson
from duallora_edge.learner.methods.training import leading_directions
from duallora_edge.learner.network.task_record import TaskRecord


class Sequential(Method):
    """LoRA in the leading directions of each task's features, folded into the weights after the task."""

    name = "sequential"
    summary = "unconstrained adapters of the same size, one linear head for each task"
    classifier = "heads"

    def learn(self, lesson: Lesson) -> TaskRecord:
        """Train on top of everything before; only the frozen weights stay as they are."""
        blocks, head = self.adapt(lesson, "class", lambda index, q, v: leading_directions(lesson, q, v))
        return self.finish(lesson, blocks, head)
