"""Confidence intervals of 95 % for what is measured on a limited number of test images.

Frames of one scene tell less than as many other images: shares are those of fewer, `independent` images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Interval = tuple[float, float]

# A number whose interval is wider than this says next to nothing, so it is not shown as a headline.
TOO_WIDE = 0.2
_Z = 1.959963984540054  # of the standard normal distribution
_DRAWS = 1000


def independent(right: npt.NDArray[np.bool_], scenes: npt.NDArray[np.int64]) -> float:
    """How many independent images tell as much about the share of right answers as ``right`` [n] of ``scenes`` [n].

    It is n by the design effect (Kish 1965), the variance of the share between scenes (with its correction for their
    number) over that between images; at most n, and at least the number of scenes, which counts where all
    answers are alike.
    """
    n, count = len(right), len(np.unique(scenes))
    if count < 2 or right.all() or not right.any():
        return float(count)
    off = right - right.mean()
    of_scenes = np.bincount(np.unique(scenes, return_inverse=True)[1], off)
    between = float(np.square(of_scenes).sum()) * count / (count - 1)
    return float(np.clip(n * np.square(off).sum() / max(between, 1e-9), count, n))


def wilson(right: float, n: float) -> Interval | None:
    """The interval of a share of ``n`` independent images (Wilson 1927); None without images."""
    if not n:
        return None
    share, z = right / n, _Z
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # Rounding must not put the share itself outside.
    return min(max(centre - reach, 0.0), share), max(min(centre + reach, 1.0), share)


def difference(first: float, of_first: Interval, second: float, of_second: Interval) -> Interval:
    """The interval of ``first`` - ``second`` from theirs (Newcombe 1998, method 10).

    It takes the two for independent. Two answers about the same images are not, so that it is too wide for those.
    """
    gap = first - second
    below = math.hypot(first - of_first[0], of_second[1] - second)
    above = math.hypot(of_first[1] - first, second - of_second[0])
    return gap - below, gap + above


def mean_of_independent(values: Sequence[float], intervals: Sequence[Interval]) -> Interval | None:
    """The interval of the mean of independent ``values`` from theirs, by the same way; None without any."""
    if not values:
        return None
    below, above = (
        math.sqrt(sum((value - interval[side]) ** 2 for value, interval in zip(values, intervals, strict=True)))
        for side in (0, 1)
    )
    mean = sum(values) / len(values)
    return mean - below / len(values), mean + above / len(values)


def mean_of_same(intervals: Iterable[Interval]) -> Interval | None:
    """The interval of the mean of values measured on the same images: the mean of the ends; None without any."""
    ends = list(intervals)
    if not ends:
        return None
    return sum(low for low, _ in ends) / len(ends), sum(high for _, high in ends) / len(ends)


def calibration_interval(
    counts: Sequence[int], correct: Sequence[int], confidence: Sequence[float], independent: float
) -> Interval | None:
    """The interval of the expected calibration error, by the bootstrap; None without images.

    The bins keep their images, ``counts``, and the sums of their ``confidence``; the right answers of each are drawn
    anew with the share of ``correct`` ones in it. Half a right and half a wrong one are added, so that a handful of
    right answers does not count as certainty. What chance adds to every bin makes the error of a resample larger than
    that of the images, as it made that larger than the truth; so the interval reaches as far down as up.
    It is as much wider as fewer images are ``independent``.
    """
    n = sum(counts)
    if not n:
        return None
    shares = [(right + 0.5) / (count + 1) for right, count in zip(correct, counts, strict=True)]
    draws = np.random.default_rng(0).binomial(counts, shares, (_DRAWS, len(counts)))
    errors = np.abs(draws - np.asarray(confidence)).sum(axis=1) / n
    found = float(np.abs(np.asarray(correct) - np.asarray(confidence)).sum() / n)
    reach = float(np.quantile(np.abs(errors - found), 0.95)) * math.sqrt(n / independent)
    return max(found - reach, 0.0), found + reach


def is_too_wide(interval: Interval | None) -> bool:
    """Whether a number with this interval says next to nothing."""
    return interval is not None and interval[1] - interval[0] > TOO_WIDE
