"""First-session adaptation: adapters are trained on the first task alone, and later tasks are nothing but statistics.

With ``classifier=ridge`` it is RanPAC (McDonnell et al. 2023, arXiv 2307.02251), adapters and features aside: there the
first session trains adapters, scale and shift, or prompts, and the random features are those of f alone.
"""

from __future__ import annotations

from duallora_edge.learner.methods.lesson import Lesson
from duallora_edge.learner.methods.sequential import Sequential
from duallora_edge.learner.methods.training import untrained
from duallora_edge.learner.network.task_record import TaskRecord


class FirstSession(Sequential):
    """The adapters of `Sequential` for the first task, with the classifier of DualLoRA.

    The network does not change after the first task, so that the statistics of all tasks are those of one network. A
    first task of one class has no gradient, and then nothing is ever trained.
    """

    name = "first_session"
    summary = "adapters trained on the first task alone, then only statistics (RanPAC with the classifier ridge)"
    classifier = "lda"
    removable = False  # later tasks were measured in the network that the first one trained

    def learn(self, lesson: Lesson) -> TaskRecord:
        """Train on the first task; collect the statistics of a later one."""
        if not lesson.past:
            return super().learn(lesson)
        blocks, head = untrained(lesson)
        return self.finish(lesson, blocks, head)
