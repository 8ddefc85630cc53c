"""Steadier answers from a sequence of frames."""

from __future__ import annotations

import math
from dataclasses import replace

from duallora_edge.runtime.bundle import FloatArray
from duallora_edge.runtime.prediction import Prediction


class ExponentialSmoothing:
    """Exponential moving average of the class probabilities, over time rather than over frames.

    A frame that comes ``t`` seconds after the last one counts ``1 - exp(-t / seconds)``, so that the answer follows a
    change by 63 % within ``seconds`` whatever the frame rate is. It starts anew when the bundle changes. Task, novelty
    and timings stay those of the frame.
    """

    def __init__(self, seconds: float) -> None:
        if not (seconds > 0 and math.isfinite(seconds)):
            raise ValueError(f"seconds must be a positive number, not {seconds}")
        self.seconds = seconds
        self._mean: FloatArray | None = None
        self._bundle: tuple[object, ...] = ()
        self._captured = 0.0

    def __call__(self, prediction: Prediction, captured: float) -> Prediction:
        """The prediction of a frame captured at ``captured`` seconds, with the averaged probabilities."""
        bundle = (prediction.bundle, prediction.bundle_version, prediction.classes)
        if self._mean is None or bundle != self._bundle:
            self._mean = prediction.probabilities
        else:
            weight = -math.expm1(-max(0.0, captured - self._captured) / self.seconds)
            self._mean = self._mean + (prediction.probabilities - self._mean) * weight
        self._bundle, self._captured = bundle, captured
        best = int(self._mean.argmax())
        return replace(
            prediction,
            label=prediction.classes[best],
            confidence=float(self._mean[best]),
            probabilities=self._mean,
        )
