"""Drift: answers beside their distribution at export."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from duallora_edge.runtime.service.drift import APART, DECILES, ENOUGH, WINDOW, Drift, DriftReport

EXPECTED = tuple(1 - (1 - level) ** 2 for level in DECILES)


def report(confidences: np.ndarray, novelties: np.ndarray, deciles: tuple[float, ...] = EXPECTED) -> DriftReport:
    drift = Drift()
    for confidence, novelty in zip(confidences, novelties, strict=True):
        drift.add("a", float(confidence), float(novelty))
    return drift.report(deciles)


def test_answers_as_at_export_are_steady() -> None:
    even = np.random.default_rng(0).random(WINDOW)
    found = report(1 - (1 - even) ** 2, even)
    assert found.status == "steady" and found.answers == WINDOW
    assert max(found.confidence or 1, found.novelty or 1) < 0.05


@pytest.mark.parametrize(("power", "shift"), [(3.0, 0.0), (1.0, 0.4)])
def test_others_have_drifted(power: float, shift: float) -> None:
    even = np.random.default_rng(1).random(ENOUGH)
    found = report((1 - (1 - even) ** 2) ** (2 * power - 1), (even + shift).clip(0, 1))
    assert found.status == "drifted" and max(found.confidence or 0, found.novelty or 0) > APART


def test_what_is_not_known_is_said() -> None:
    even = np.linspace(0, 1, ENOUGH)
    assert report(even[:-1], even[:-1]).status == "unknown"
    assert report(even, even, ()).status == "unknown"
    assert report(even[:0], even[:0]) == DriftReport("unknown", 0, None, None, None)
    assert report(even, even, DECILES).mean_confidence == pytest.approx(0.5)


def test_another_bundle_starts_anew_and_old_answers_are_forgotten() -> None:
    drift = Drift()
    for _ in range(ENOUGH):
        drift.add(("a", 1), 0.1, 0.99)
    assert drift.report(EXPECTED).status == "drifted"
    drift.add(("a", 2), 0.5, 0.5)
    assert drift.report(EXPECTED).answers == 1
    for value in np.random.default_rng(2).random(3 * WINDOW):
        drift.add(("a", 2), 1 - (1 - value) ** 2, value)
    assert drift.report(EXPECTED).status == "steady" and drift.report(EXPECTED).answers == WINDOW


@given(st.lists(st.floats(0, 1), min_size=ENOUGH, max_size=ENOUGH))
def test_the_gap_is_at_most_that_of_kolmogorov_and_smirnov(values: list[float]) -> None:
    found = report(np.array(values), np.array(values), DECILES)
    assert found.novelty is not None
    assert found.novelty <= kstest(values, "uniform").statistic + 1e-9
