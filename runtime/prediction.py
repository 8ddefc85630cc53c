"""What a model says about a frame."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from duallora_edge.runtime.bundle import FloatArray


@dataclass(frozen=True)
class Timings:
    """Milliseconds spent on one frame; inference of a batch is shared out equally over its frames."""

    preprocess_ms: float
    infer_ms: float
    postprocess_ms: float


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says about one frame.

    ``confidence`` is the calibrated probability of ``label``; ``task`` is the task that the frame looks like, with
    ``task_confidence``, and need not be one that introduced the label: a known class may appear in a new domain.
    ``is_novel`` is None for a bundle without a novelty threshold. ``bundle`` and ``bundle_version`` name the bundle
    that answered. ``probabilities``: float32 ``[C]``, in the order of ``classes``.
    """

    label: str
    confidence: float
    task: str
    task_confidence: float
    novelty: float
    is_novel: bool | None
    timings: Timings
    bundle: str
    bundle_version: int
    probabilities: FloatArray = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)

    def top(self, k: int) -> list[tuple[str, float]]:
        """The ``k`` most probable classes (fewer when there are fewer), best first, with their probabilities."""
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.classes[index], float(self.probabilities[index])) for index in order]

    def to_json(self, top: int = 5) -> dict[str, Any]:
        """Everything as JSON values, with the ``top`` best classes instead of all probabilities."""
        return {
            "label": self.label,
            "confidence": self.confidence,
            "task": self.task,
            "task_confidence": self.task_confidence,
            "novelty": self.novelty,
            "is_novel": self.is_novel,
            "top": [{"label": label, "confidence": confidence} for label, confidence in self.top(top)],
            "timings": asdict(self.timings),
            "bundle": self.bundle,
            "bundle_version": self.bundle_version,
        }
