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

    Attributes:
        label: The most probable class.
        confidence: Its calibrated probability.
        task: The task whose images the frame resembles most. It need not be one that introduced the label, because a
            known class may appear in a new domain.
        task_confidence: The probability of ``task``.
        novelty: From 0 to 1: the share of validation images of known classes that are less novel.
        is_novel: Whether the novelty exceeds the threshold; None for a bundle without a threshold.
        timings: Milliseconds spent on this frame.
        bundle: Name of the bundle that answered.
        bundle_version: Its version.
        probabilities: float32 ``[C]``, in the order of ``classes``.
        classes: The names of the classes.
        features: What describes the frame, float32 ``[D]``; None where it was not asked for.
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
    features: FloatArray | None = field(default=None, repr=False)

    def top(self, k: int) -> list[tuple[str, float]]:
        """The most probable classes.

        Args:
            k: How many classes; all of them if there are fewer.

        Returns:
            Pairs of a class and its probability, best first.

        Raises:
            ValueError: ``k`` is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.classes[index], float(self.probabilities[index])) for index in order]

    def to_json(self, top: int = 5) -> dict[str, Any]:
        """The prediction as JSON values.

        Args:
            top: How many of the best classes to include instead of all probabilities.

        Returns:
            A dict of JSON values.
        """
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
