"""DualLoRA: an orthogonal and a residual adapter a task, opened per image by the dynamic memory."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from duallora_edge.learner.methods.base import Method
from duallora_edge.learner.methods.training import Downs, Lesson, past_bases
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.statistics.subspace import (
    constrained_directions,
    empty_basis,
    inside_directions,
    top_directions,
    union,
)

RELIABLE_IDENTITY = 0.9


class DualLora(Method):
    """The abstract of arXiv 2411.00623, with formulas of our own (see the documentation of the method)."""

    name = "dual_lora"
    summary = "orthogonal and residual adapters, dynamic memory, task identity"

    def learn(self, lesson: Lesson) -> TaskRecord:
        """Encode, decide how the residual is gated, choose the down-projections, train, collect."""
        residual = residual_mode(lesson) if len(lesson.task.classes) > 1 else "none"
        choose = partial(self.downs, lesson, residual)
        blocks, head = self.adapt(lesson, "class", choose, distillation=lesson.config.distillation)
        return self.finish(lesson, lesson.info(self.name, residual), blocks, head, collect="class")

    def downs(self, lesson: Lesson, residual: str, index: int, q: Tensor, v: Tensor) -> Downs:
        """The fixed down-projections of one block: orthogonal for query and value, residual shared by both.

        Fixing them keeps the constraint exact under any optimiser: an update (x A^T) B cannot reach what A is
        orthogonal to.
        """
        past = [task.blocks[index] for task in lesson.past]
        config, dim = lesson.config, lesson.backbone.dim
        q_basis, v_basis = past_bases(lesson.past, index, dim)
        both = q / q.trace() + v / v.trace()
        own = empty_basis(dim)
        if residual == "isolated":
            own = top_directions(both, config.rank_residual)
        elif residual == "previous" and past:
            newest = union(past[-1].q_basis.double(), past[-1].v_basis.double())
            own = inside_directions(both, newest, config.rank_residual)
        return Downs(
            constrained_directions(q, q_basis, config.rank_orthogonal),
            constrained_directions(v, v_basis, config.rank_orthogonal),
            own,
        )


def residual_mode(lesson: Lesson) -> str:
    """``isolated`` while the task identity is reliable on held-back images of the tasks so far, else ``previous``."""
    config = lesson.config
    if config.rank_residual == 0:
        return "none"
    if config.residual != "auto":
        return config.residual
    known_before = (task.info.held_back for task in lesson.past)
    measured = [(held.get("images"), held.get("task_accuracy")) for held in known_before]
    measured.append((len(lesson.held), lesson.identity.accuracy if lesson.identity else None))
    known = [(n, accuracy) for n, accuracy in measured if n and accuracy is not None]
    if not known:
        return "isolated"
    reliable = sum(n * accuracy for n, accuracy in known) / sum(n for n, _ in known) >= RELIABLE_IDENTITY
    return "isolated" if reliable else "previous"
