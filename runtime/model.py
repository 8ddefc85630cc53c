"""A bundle on a backend."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from duallora_edge.errors import BackendError
from duallora_edge.runtime.backends.ladder import Backend
from duallora_edge.runtime.bundle import Bundle, Outputs
from duallora_edge.runtime.prediction import Prediction, Timings
from duallora_edge.runtime.preprocess import Pixels


class Model:
    """What a `Classifier` serves until another one is swapped in; immutable."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self.backend = backend
        self.classes = bundle.manifest.classes
        self.tasks = tuple(task.name for task in bundle.manifest.tasks)

    def __str__(self) -> str:
        return str(self.bundle)

    def predict(self, images: Pixels, preprocess_ms: Sequence[float]) -> list[Prediction]:
        """Run ``uint8 [N, S, S, 3]`` images, which took ``preprocess_ms`` (N values) to prepare.

        Raises `BackendError` when the device fails or returns values that are not numbers.
        """
        start = time.perf_counter()
        outputs = self.backend.infer(images)
        inferred = time.perf_counter()
        labels, tasks = outputs.probabilities.argmax(axis=1), outputs.task_probabilities.argmax(axis=1)
        end = time.perf_counter()
        share = 1000 / len(images)
        rest = ((inferred - start) * share, (end - inferred) * share)
        rows = zip(range(len(images)), labels, tasks, preprocess_ms, strict=True)
        return [self._predict(outputs, row, label, task, Timings(before, *rest)) for row, label, task, before in rows]

    def _predict(self, outputs: Outputs, row: int, label: int, task: int, timings: Timings) -> Prediction:
        manifest = self.bundle.manifest
        threshold = manifest.calibration.novelty_threshold
        confidence, novelty = float(outputs.probabilities[row, label]), float(outputs.novelty[row])
        task_confidence = float(outputs.task_probabilities[row, task])
        if not math.isfinite(confidence + task_confidence + novelty):  # argmax takes a NaN for the largest
            raise BackendError(
                f"The model returned values that are not numbers on '{self.backend.name}'; use another backend."
            )
        return Prediction(
            label=self.classes[label],
            confidence=confidence,
            task=self.tasks[task],
            task_confidence=task_confidence,
            novelty=novelty,
            is_novel=None if threshold is None else novelty > threshold,
            timings=timings,
            bundle=manifest.name,
            bundle_version=manifest.bundle_version,
            probabilities=outputs.probabilities[row],
            classes=self.classes,
        )
