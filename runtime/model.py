"""A bundle on a backend."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from duallora_edge.errors import BackendError
from duallora_edge.runtime.backends.ladder import Backend
from duallora_edge.runtime.bundle import Bundle
from duallora_edge.runtime.field.teaching import TASK, Taught
from duallora_edge.runtime.prediction import Prediction, Timings
from duallora_edge.runtime.preprocess import Pixels


class Model:
    """What a `Classifier` serves until another one is swapped in; only ``taught`` is replaced meanwhile."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self.backend = backend
        self.taught: Taught | None = None
        self._tasks = tuple(task.name for task in bundle.manifest.tasks)

    def __str__(self) -> str:
        return str(self.bundle)

    def names(self, taught: Taught | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The classes and the tasks of the bundle and of what was taught beside it."""
        classes, tasks = self.bundle.manifest.classes, self._tasks
        return (classes, tasks) if taught is None else ((*classes, *taught.classes), (*tasks, TASK))

    def predict(self, images: Pixels, preprocess_ms: Sequence[float]) -> list[Prediction]:
        """Run ``uint8 [N, S, S, 3]`` images, which took ``preprocess_ms`` (N values) to prepare.

        Raises `BackendError` when the device fails or returns values that are not numbers.
        """
        start = time.perf_counter()
        outputs, taught = self.backend.infer(images), self.taught
        inferred = time.perf_counter()
        if taught is not None:
            outputs = taught(outputs)
        manifest, (classes, tasks) = self.bundle.manifest, self.names(taught)
        threshold = manifest.calibration.novelty_threshold
        best, best_task = outputs.probabilities.argmax(axis=1), outputs.task_probabilities.argmax(axis=1)
        end = time.perf_counter()
        share = 1000 / len(images)
        predictions = []
        for row, (label, task, before) in enumerate(zip(best, best_task, preprocess_ms, strict=True)):
            confidence, novelty = float(outputs.probabilities[row, label]), float(outputs.novelty[row])
            task_confidence = float(outputs.task_probabilities[row, task])
            if not math.isfinite(confidence + task_confidence + novelty):  # argmax takes a NaN for the largest
                raise BackendError(
                    f"The model returned values that are not numbers on '{self.backend.name}'; use another backend."
                )
            predictions.append(
                Prediction(
                    label=classes[label],
                    confidence=confidence,
                    task=tasks[task],
                    task_confidence=task_confidence,
                    novelty=novelty,
                    is_novel=None if threshold is None else novelty > threshold,
                    timings=Timings(before, (inferred - start) * share, (end - inferred) * share),
                    bundle=manifest.name,
                    bundle_version=manifest.bundle_version,
                    probabilities=outputs.probabilities[row],
                    classes=classes,
                    features=outputs.features[row],
                )
            )
        return predictions
