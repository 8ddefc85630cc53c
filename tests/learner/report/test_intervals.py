"""Intervals against a library, published examples and repeated draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from duallora_edge.learner.report.intervals import (
    calibration_interval,
    difference,
    independent,
    is_too_wide,
    mean_of_independent,
    mean_of_same,
    wilson,
)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_a_share_is_that_of_wilson(case: tuple[int, int]) -> None:
    right, n = case
    found = wilson(right, n)
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found and 0 <= found[0] <= right / n <= found[1] <= 1


@pytest.mark.parametrize(
    ("first", "second", "expected"),  # Newcombe 1998, table II, method 10
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
    ],
)
def test_the_interval_of_a_difference(
    first: tuple[int, int], second: tuple[int, int], expected: tuple[float, float]
) -> None:
    intervals = wilson(*first), wilson(*second)
    assert intervals[0] and intervals[1]
    found = difference(first[0] / first[1], intervals[0], second[0] / second[1], intervals[1])
    assert found == pytest.approx(expected, abs=1e-4)


def test_means() -> None:
    ends = [(0.5, 0.7), (0.7, 0.9)]
    assert mean_of_same(ends) == pytest.approx((0.6, 0.8))
    assert mean_of_independent([0.6, 0.8], ends) == pytest.approx((0.7 - 0.1 / 2**0.5, 0.7 + 0.1 / 2**0.5))
    assert mean_of_independent([0.6], [(0.5, 0.9)]) == pytest.approx((0.5, 0.9))
    assert mean_of_independent([], []) is mean_of_same([]) is wilson(0, 0) is None


@pytest.mark.parametrize(
    ("right", "scenes", "expected"),
    [
        ([], [], 0),
        ([1, 0, 1, 1], [0, 1, 2, 3], 4),
        ([1, 0, 1, 1], [7, 7, 7, 7], 1),  # one scene tells nothing of others
        ([1, 1, 1, 1], [0, 0, 1, 1], 2),
        ([1, 1, 0, 0], [0, 0, 1, 1], 2),  # scenes of one answer each: never below their number
        ([1, 0, 1, 0], [0, 0, 1, 1], 4),  # alike: never above the number of images
        # 10 images in 4 scenes, share 0.6: scenes are off by 0.2, 0.8, -1.2 and 0.2, squares of images add up to 2.4
        ([1, 1, 0, 1, 1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 2, 3, 3, 3, 2], 10 * 2.4 / 2.16 * 3 / 4),
    ],
)
def test_independent_images(right: list[int], scenes: list[int], expected: float) -> None:
    assert independent(np.array(right, bool), np.array(scenes, np.int64)) == pytest.approx(expected)


@pytest.mark.parametrize("images", [1, 5, 20])
def test_intervals_of_scenes_cover_the_truth(images: int) -> None:
    """Sixty scenes whose images mostly share one answer, drawn 300 times: near 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(0)
    scenes = np.repeat(np.arange(60), images)
    covered = narrow = 0
    for _ in range(300):
        share = rng.beta(1.6, 0.4, 60)
        right = rng.random(len(scenes)) < share[scenes]
        n = independent(right, scenes)
        low, high = wilson(right.mean() * n, n) or (0.0, 0.0)
        covered += low <= 0.8 <= high
        low, high = wilson(int(right.sum()), len(right)) or (0.0, 0.0)
        narrow += low <= 0.8 <= high
    assert covered >= 0.92 * 300
    assert images == 1 or narrow < covered - 0.08 * 300  # images that count one by one promise too much


@pytest.mark.parametrize(("n", "bias"), [(400, 0.1), (2000, 0.1), (2000, 0.03)])
def test_the_interval_of_the_calibration_error_covers_it(n: int, bias: float) -> None:
    """Answers whose confidence is too high by ``bias`` in every bin, drawn 200 times."""
    rng = np.random.default_rng(0)
    confidences = np.array([0.5, 0.7, 0.9])
    covered = 0
    for _ in range(200):
        counts = rng.multinomial(n, [0.2, 0.3, 0.5])
        correct = rng.binomial(counts, confidences - bias)
        found = calibration_interval(counts.tolist(), correct.tolist(), (counts * confidences).tolist(), n)
        assert found
        covered += found[0] <= bias <= found[1]
    assert covered >= 180
    assert calibration_interval([0], [0], [0.0], 0) is None


@pytest.mark.parametrize(("right", "n", "expected"), [(5, 6, True), (10, 10, True), (50, 100, False), (97, 100, False)])
def test_few_images_do_not_tell(right: int, n: int, expected: bool) -> None:
    assert is_too_wide(wilson(right, n)) is expected


def test_without_a_measurement_there_is_nothing_to_tell() -> None:
    assert not is_too_wide(None)
