"""The untouched network with a classifier in closed form: nothing is trained, so nothing can be forgotten."""

from __future__ import annotations

from duallora_edge.learner.methods.base import Method
from duallora_edge.learner.methods.lesson import Lesson
from duallora_edge.learner.methods.training import untrained
from duallora_edge.learner.network.task_record import TaskRecord


class Frozen(Method):
    """What a pretrained network offers without training. How strong it is depends on the classifier."""

    name = "frozen"
    summary = "no training: a closed-form classifier on the untouched network"
    trains = False

    def learn(self, lesson: Lesson) -> TaskRecord:
        """Collect statistics."""
        blocks, head = untrained(lesson)
        return self.finish(lesson, blocks, head)
