"""Frames in, labels out: the four lines that a camera application needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from duallora_edge.errors import BackendError
from duallora_edge.runtime.backends import Backend, open_backend
from duallora_edge.runtime.bundle import Bundle, FloatArray, Outputs
from duallora_edge.runtime.preprocess import to_rgb


@dataclass(frozen=True)
class Timings:
    """Milliseconds spent on one frame; for a frame of a batch, its equal share of the batch."""

    preprocess_ms: float
    infer_ms: float
    postprocess_ms: float


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says about one frame.

    ``confidence`` is the calibrated probability of ``label``; ``task`` is the task that the frame looks like, with
    ``task_confidence``, and need not be one that introduced the label: a known class may appear in a new domain.
    ``is_novel`` is None for a bundle without a novelty threshold. ``probabilities``: float32 ``[C]``, in the
    order of ``classes``.
    """

    label: str
    confidence: float
    task: str
    task_confidence: float
    novelty: float
    is_novel: bool | None
    timings: Timings
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
        }


class Classifier:
    """A bundle on a backend. Nothing in it changes after `load`, so one classifier serves several threads.

    Attributes: ``bundle``, ``backend`` (its name and why nothing better is used), ``classes``, ``tasks``.
    """

    def __init__(self, bundle: Bundle, backend: Backend, color: str = "rgb") -> None:
        if color not in ("rgb", "bgr"):
            raise ValueError(f"color must be 'rgb' or 'bgr', not {color!r}")
        self.bundle = bundle
        self.backend = backend
        self.classes = bundle.manifest.classes
        self.tasks = tuple(task.name for task in bundle.manifest.tasks)
        self._color = color

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "auto",
        threads: int | None = None,
        strict: bool = False,
        color: str = "rgb",
        build: bool = False,
    ) -> Classifier:
        """Open and verify a bundle and start the best backend that answers its golden images correctly.

        ``backend``, ``threads``, ``strict`` and ``build`` as in `open_backend`; ``color`` is the channel order of the
        frames, ``"rgb"`` or ``"bgr"`` (OpenCV). Raises `BundleError` and `BackendError`.
        """
        bundle = Bundle.open(path)
        return cls(bundle, open_backend(bundle, backend, threads, strict, build), color)

    def __call__(self, frame: npt.ArrayLike) -> Prediction:
        """Classify one frame of any size: ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` or ``[H, W, 4]``, uint8 or uint16.

        Raises `DataError` for anything else and `BackendError` when the device fails.
        """
        return self.batch([frame])[0]

    def batch(self, frames: Sequence[npt.ArrayLike]) -> list[Prediction]:
        """Classify frames, which may differ in size, in one run of the model; errors as for a single frame."""
        if len(frames) == 0:
            return []
        start = time.perf_counter()
        prepare = self.bundle.manifest.preprocessing
        images = np.stack([prepare(to_rgb(np.asarray(frame), self._color)) for frame in frames])
        prepared = time.perf_counter()
        outputs = self.backend.run(images)
        inferred = time.perf_counter()
        labels, tasks = outputs.probabilities.argmax(axis=1), outputs.task_probabilities.argmax(axis=1)
        if not (np.isfinite(outputs.probabilities).all() and np.isfinite(outputs.novelty).all()):
            raise BackendError(
                f"The model returned values that are not numbers on '{self.backend.name}'; use another backend."
            )
        end = time.perf_counter()
        share = 1000 / len(frames)
        timings = Timings((prepared - start) * share, (inferred - prepared) * share, (end - inferred) * share)
        return [self._predict(outputs, *row, timings) for row in zip(range(len(frames)), labels, tasks, strict=True)]

    def _predict(self, outputs: Outputs, row: int, label: int, task: int, timings: Timings) -> Prediction:
        threshold = self.bundle.manifest.calibration.novelty_threshold
        novelty = float(outputs.novelty[row])
        return Prediction(
            label=self.classes[label],
            confidence=float(outputs.probabilities[row, label]),
            task=self.tasks[task],
            task_confidence=float(outputs.task_probabilities[row, task]),
            novelty=novelty,
            is_novel=None if threshold is None else novelty > threshold,
            timings=timings,
            probabilities=outputs.probabilities[row],
            classes=self.classes,
        )
