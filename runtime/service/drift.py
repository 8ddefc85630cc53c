"""Drift: whether answers are still distributed as they were when the model was exported."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

WINDOW = 1000
# From so many answers on, two distributions that differ by this much at some decile are said to differ. Frames of a
# camera resemble each other, so that the size of the difference counts and not whether chance could make it.
ENOUGH, APART = 200, 0.3
DECILES = tuple(level / 10 for level in range(1, 10))


@dataclass(frozen=True)
class DriftReport:
    """The latest answers beside those on test images.

    Attributes:
        status: ``steady``, ``drifted``, or ``unknown`` while there are too few answers or nothing to compare with.
        answers: how many answers count, the latest `WINDOW` at most.
        confidence, novelty: the largest difference between the shares of answers below a decile of then and now, 0..1
            (Kolmogorov and Smirnov); None where unknown. On images like those of the training the novelty is
            distributed evenly by its definition.
        mean_confidence: of the answers, None without any.
    """

    status: str
    answers: int
    confidence: float | None
    novelty: float | None
    mean_confidence: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Drift:
    """The latest confidences and novelties of one version of one bundle."""

    def __init__(self) -> None:
        self._of: object = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def add(self, bundle: object, confidence: float, novelty: float) -> None:
        """Count an answer; those of another ``bundle`` are forgotten."""
        if bundle != self._of:
            self._of = bundle
            self._recent.clear()
        self._recent.append((confidence, novelty))

    def report(self, confidence_deciles: Sequence[float]) -> DriftReport:
        """The report, with the deciles of the confidence at export (see `Calibration`)."""
        count = len(self._recent)
        confidences, novelties = zip(*self._recent, strict=True) if count else ((), ())
        mean = float(np.mean(confidences)) if count else None
        if count < ENOUGH or not confidence_deciles:
            return DriftReport("unknown", count, None, None, mean)
        apart = _largest_gap(confidences, confidence_deciles), _largest_gap(novelties, DECILES)
        return DriftReport("drifted" if max(apart) > APART else "steady", count, *apart, mean)


def _largest_gap(values: Iterable[float], deciles: Sequence[float]) -> float:
    """The largest difference, over the deciles, between the share of values below and that of the decile."""
    below = (np.fromiter(values, float)[:, None] <= np.asarray(deciles)).mean(axis=0)
    return float(np.abs(below - DECILES).max())
