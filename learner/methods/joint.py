"""Joint training: one set of adapters learned on all tasks at once; a bound, not a learner over time."""

from __future__ import annotations

from duallora_edge.learner.methods.sequential import Sequential


class Joint(Sequential):
    """The adapters of `Sequential` on everything at once, with the classifier of DualLoRA."""

    name = "joint"
    summary = "adapters trained on all tasks at once: what forgetting nothing could reach"
    classifier = "lda"
    single_task = True
