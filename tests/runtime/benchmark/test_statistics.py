"""Statistics against slow definitions: percentiles, exact binomial intervals, MLPerf's numbers, the bootstrap."""

from __future__ import annotations

import statistics
from fractions import Fraction
from itertools import accumulate
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duallora_edge.runtime.benchmark.statistics import (
    SHARES,
    interval_positions,
    percentile,
    ratio_of_medians,
    runs_least,
    runs_needed,
    summarize,
)


def by_hand(samples: list[float], share: float) -> float:
    """Linear interpolation between the two nearest ranks, by hand."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@given(st.lists(st.floats(0.01, 1e4), min_size=2, max_size=60))
def test_statistics_equal_their_definitions(samples: list[float]) -> None:
    found = summarize(samples, warmup=3)
    assert found.mean == pytest.approx(statistics.fmean(samples))
    assert found.std == pytest.approx(statistics.stdev(samples), rel=1e-6, abs=1e-9)
    assert found.cov == pytest.approx(found.std / found.mean)
    for part, share in zip((found.p50, found.p90, found.p99), SHARES, strict=True):
        assert part.share == share
        if len(samples) < runs_least(share):
            assert (part.value, part.low, part.high) == (None, None, None)
        else:
            assert part.value == pytest.approx(by_hand(samples, share))
            assert part.low is not None and part.high is not None
            assert part.low <= part.value <= part.high
    half = len(samples) // 2
    assert found.drift == pytest.approx(statistics.median(samples[half:]) / statistics.median(samples[:half]) - 1)
    assert (found.n, found.warmup) == (len(samples), 3)


@pytest.mark.parametrize(("share", "needed"), [(0.9, 24_576), (0.95, 57_344), (0.99, 270_336), (0.5, 8_192)])
def test_the_runs_that_mlperf_asks_for(share: float, needed: int) -> None:
    assert runs_needed(share) == needed  # the first three: table in MLCommons' inference_rules.adoc


def exact_positions(n: int, share: Fraction) -> tuple[int, int | None]:
    """The two ranks by their definition, with whole numbers; None where no upper rank exists."""
    up, whole = share.numerator, share.denominator
    below = [0, *accumulate(comb(n, k) * up**k * (whole - up) ** (n - k) for k in range(n + 1))]
    low = max(rank for rank in range(n + 1) if 40 * below[rank] <= whole**n)
    high = min(rank for rank in range(n + 2) if 40 * (whole**n - below[rank]) <= whole**n)
    return low - 1, high - 1 if high <= n else None


@pytest.mark.parametrize("share", [Fraction(1, 2), Fraction(9, 10), Fraction(99, 100)])
def test_interval_positions_equal_exact_fractions(share: Fraction) -> None:
    least = runs_least(float(share))
    assert exact_positions(least - 1, share)[1] is None
    for n in (least, least + 1, least + 7, 2 * least):
        assert interval_positions(n, float(share)) == exact_positions(n, share)


def test_an_interval_covers_the_true_percentile_as_often_as_it_says() -> None:
    times = np.sort(np.random.default_rng(0).exponential(size=(2000, 50)))
    low, high = interval_positions(50, 0.9)
    covered = ((times[:, low] <= np.log(10)) & (times[:, high] >= np.log(10))).mean()
    assert 0.95 <= covered < 0.99  # at least what it promises: ranks are whole numbers


def test_an_hour_of_runs_has_an_interval() -> None:
    found = percentile(np.linspace(1, 2, 3_600_000), 0.99)
    assert found.low is not None and found.high is not None and found.high - found.low < 0.001


@pytest.mark.parametrize(
    ("samples", "settled", "words"),
    [
        ([1.0, 1.01] * 500, True, []),
        ([1.0, 1.01] * 500, False, ["had not settled"]),
        ([1.0, 2.0] * 500, True, ["vary by"]),
        ([1.0] * 500 + [1.08] * 500, True, ["second half"]),
    ],
)
def test_notes_say_why_a_number_deserves_less_trust(samples: list[float], settled: bool, words: list[str]) -> None:
    notes = summarize(samples, 10, settled).notes
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True))


@pytest.mark.parametrize("samples", [[], [1.0], [[1.0, 2.0]]])
def test_too_few_samples(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        summarize(samples)


def test_a_ratio_ignores_what_slows_down_whole_rounds() -> None:
    slow = np.random.default_rng(1).uniform(1, 3, (20, 1))
    found = ratio_of_medians(slow * [1.2, 1.0])
    assert (found.value, found.low, found.high) == pytest.approx((1.2, 1.2, 1.2))
    noisy = ratio_of_medians(np.random.default_rng(2).normal([2, 1], 0.1, (20, 2)))
    assert 1.8 < noisy.low < noisy.value < noisy.high < 2.2
    assert noisy == ratio_of_medians(np.random.default_rng(2).normal([2, 1], 0.1, (20, 2)))


@pytest.mark.parametrize("medians", [[], [[1.0, 2.0]], [1.0, 2.0], [[1.0], [2.0]]])
def test_too_few_rounds(medians: list[object]) -> None:
    with pytest.raises(ValueError, match="at least 2 rounds"):
        ratio_of_medians(medians)  # type: ignore[arg-type]
