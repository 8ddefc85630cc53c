"""DualLoRA: an orthogonal and a residual adapter for each task, opened for each image by the dynamic memory."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from duallora_edge.learner.methods.base import Method
from duallora_edge.learner.methods.lesson import Lesson
from duallora_edge.learner.methods.losses import Loss, distilled_cross_entropy
from duallora_edge.learner.methods.training import DownProjections, past_bases
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.report.intervals import wilson
from duallora_edge.learner.statistics.subspace import (
    constrained_directions,
    empty_basis,
    inside_directions,
    top_directions,
    union,
)

RELIABLE_GATE = 0.9


class DualLora(Method):
    """The method of the abstract of arXiv 2411.00623; the formulas are our own (see the documentation).

    With C the second moment of what a projection reads for the new task, Theta the bases of all earlier tasks, Psi
    those that the newest of them added, and P = I - Theta^T Theta:

    * orthogonal adapter: down-projection = leading eigenvectors of P C P (`constrained_directions`);
    * residual adapter, ``isolated``: leading eigenvectors of C, opened by p(task = s | image);
    * residual adapter, ``previous``: leading directions of C inside Psi, opened by p(task >= s | image);
    * loss: cross-entropy + distillation (1 - cosine to the features before the task);
    * afterwards Theta grows by the directions that keep the share ``energy`` of C (`new_directions`).
    """

    name = "dual_lora"
    summary = "orthogonal and residual adapters, dynamic memory, task identity"

    def learn(self, lesson: Lesson) -> TaskRecord:
        """Choose the gate of the residual, choose the down-projections, train, collect the statistics."""
        residual = self.residual_mode(lesson)
        downs = partial(self.down_projections, lesson, residual)
        blocks, head = self.adapt(lesson, "class", downs, self.loss(lesson))
        return self.finish(lesson, blocks, head, residual=residual, collect="class")

    def residual_mode(self, lesson: Lesson) -> str:
        """``isolated`` while the gate surely finds the task of validation images, else ``previous``.

        What counts is the lower end of the interval of 95 % over the validation images of all tasks so far; where there
        are none, nothing is sure.
        """
        config = lesson.config
        if self.residual_rank(lesson) == 0 or len(lesson.task.classes) == 1:
            return "none"
        if config.residual != "auto":
            return config.residual
        if not lesson.past:
            return "isolated"
        measured = [
            (task.info.validation.get("images"), task.info.validation.get("gate_task_accuracy")) for task in lesson.past
        ]
        measured.append((len(lesson.validation), lesson.gate_validation.task_accuracy))
        known = [(images, accuracy) for images, accuracy in measured if images and accuracy is not None]
        found = round(sum(images * accuracy for images, accuracy in known))
        interval = wilson(found, round(sum(images for images, _ in known)))
        return "isolated" if interval and interval[0] >= RELIABLE_GATE else "previous"

    def residual_rank(self, lesson: Lesson) -> int:
        """The rank of the residual adapter, as far as those of all tasks stay within ``max_residual_rank``."""
        config = lesson.config
        blocks = zip(*(task.blocks for task in lesson.past), strict=True)
        used = max((sum(len(block.residual.q_down) for block in column) for column in blocks), default=0)
        return min(config.rank_residual, max(config.max_residual_rank - used, 0))

    def down_projections(self, lesson: Lesson, residual: str, index: int, q: Tensor, v: Tensor) -> DownProjections:
        """Down-projections of block ``index`` from its second moments, float64 [d, d], of query and value.

        They stay fixed, which keeps the constraint exact under any optimiser: an update (x A^T) B cannot act on what
        A is orthogonal to.
        """
        config, past = lesson.config, [task.blocks[index] for task in lesson.past]
        q_basis, v_basis = past_bases(lesson.past, index, lesson.backbone.dim)
        both = q / q.trace() + v / v.trace()
        shared = empty_basis(lesson.backbone.dim)
        if residual == "isolated":
            shared = top_directions(both, self.residual_rank(lesson))
        elif residual == "previous" and past:
            newest = union(past[-1].q_basis.double(), past[-1].v_basis.double())
            shared = inside_directions(both, newest, self.residual_rank(lesson))
        return DownProjections(
            q=constrained_directions(q, q_basis, config.rank_orthogonal),
            v=constrained_directions(v, v_basis, config.rank_orthogonal),
            residual=shared,
        )

    def loss(self, lesson: Lesson) -> Loss:
        """What training minimises."""
        return partial(distilled_cross_entropy, weight=lesson.config.distillation)
