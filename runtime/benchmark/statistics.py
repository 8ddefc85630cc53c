"""Statistics of run times: how far a percentile can be trusted, whether the runs were stable, ratios with an interval.

All intervals assume independent runs. Neighbouring runs on one machine are not quite independent, so the true
interval is at least this wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]

SHARES = (0.5, 0.9, 0.99)
CONFIDENCE = 0.95
MAX_COV = 0.10
MAX_DRIFT = 0.05
MLPERF_CONFIDENCE = 0.99
MLPERF_MULTIPLE = 2**13
RESAMPLES = 2000
RATIO_INTERVAL = (5.0, 95.0)


@dataclass(frozen=True)
class Percentile:
    """A percentile of run times, with its distribution-free interval ``low`` to ``high`` at `CONFIDENCE`.

    ``value`` is interpolated linearly. All three are None when there are fewer than ``least`` runs: then the interval
    has no upper end, so the slowest of the runs may well be below the percentile. ``needed`` is the number of runs
    that MLPerf asks for.
    """

    share: float
    value: float | None
    low: float | None
    high: float | None
    least: int
    needed: int


@dataclass(frozen=True)
class Latency:
    """Statistics of ``n`` runs after ``warmup`` runs that do not count; times in ms.

    ``cov`` is std / mean, ``drift`` the median of the second half over that of the first, minus 1.
    ``notes`` say why a number deserves less trust; ``samples`` are all times, float64 ``[n]``, as they were measured.
    """

    n: int
    warmup: int
    mean: float
    std: float
    cov: float
    p50: Percentile
    p90: Percentile
    p99: Percentile
    drift: float
    notes: tuple[str, ...]
    samples: Times = field(repr=False, compare=False)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and the 5th and 95th percentile of its bootstrap distribution."""

    value: float
    low: float
    high: float


def runs_needed(share: float) -> int:
    """How many runs MLPerf Inference requires for the percentile ``share`` (0..1).

    Its rules allow a margin of (1 - share) / 20 around the share, at a confidence of 99 %:
    z^2 share (1 - share) / margin^2 runs with z = 2.576, rounded up to a multiple of 2^13. (MLCommons,
    inference_policies, inference_rules.adoc: 24,576 for p90, 270,336 for p99.)
    """
    z = NormalDist().inv_cdf(0.5 + MLPERF_CONFIDENCE / 2)
    margin = (1 - share) / 20
    return math.ceil(z**2 * share * (1 - share) / margin**2 / MLPERF_MULTIPLE) * MLPERF_MULTIPLE


def runs_least(share: float) -> int:
    """The fewest runs with which a percentile has an upper bound: share^n <= (1 - `CONFIDENCE`) / 2."""
    return math.ceil(math.log((1 - CONFIDENCE) / 2) / math.log(share))


def interval_positions(n: int, share: float) -> tuple[int, int]:
    """The positions (from 0) among the ``n`` ordered runs between which a percentile lies at `CONFIDENCE`.

    For a share from 0.5 and at least `runs_least` runs; with fewer there is no upper position. The number B of n
    independent runs below the percentile is binomial, whatever their distribution. So the l-th run (from 1) lies
    above the percentile with the probability P(B < l), and the u-th below it with P(B >= u); each may be
    (1 - `CONFIDENCE`) / 2 at most. (H. A. David, H. N. Nagaraja: Order Statistics, section 7.1.)
    """
    least, probabilities = _binomial(n, share)
    tail = (1 - CONFIDENCE) / 2
    below = np.cumsum(probabilities)  # [k]: P(B <= least + k)
    above = np.cumsum(probabilities[::-1])[::-1]  # [k]: P(B >= least + k)
    low = least + int(np.searchsorted(below, tail, side="right"))  # the largest l with P(B <= l - 1) <= tail
    high = least + int((above > tail).sum())  # the smallest u with P(B >= u) <= tail
    return low - 1, high - 1


def _binomial(n: int, share: float) -> tuple[int, Times]:
    """P(B = k) of n draws for all k from the first one returned, where it is not negligible (12 sigma)."""
    mode = min(n, int((n + 1) * share))
    reach = 12 * math.ceil(math.sqrt(n * share * (1 - share))) + 12
    first, last = max(0, mode - reach), min(n, mode + reach)
    logarithm = math.lgamma(n + 1) - math.lgamma(mode + 1) - math.lgamma(n - mode + 1)
    logarithm += mode * math.log(share) + (n - mode) * math.log1p(-share)
    odds = share / (1 - share)
    up, down = np.arange(mode, last), np.arange(mode, first, -1)
    upwards = np.cumprod((n - up) / (up + 1) * odds)
    downwards = np.cumprod(down / (n - down + 1) / odds)
    return first, math.exp(logarithm) * np.concatenate([downwards[::-1], [1.0], upwards])


def percentile(ordered: Times, share: float) -> Percentile:
    """A percentile of run times ``[n]`` in ms that are in ascending order."""
    n, least, needed = len(ordered), runs_least(share), runs_needed(share)
    if n < least:
        return Percentile(share, None, None, None, least, needed)
    low, high = interval_positions(n, share)
    value = float(np.quantile(ordered, share))
    return Percentile(share, value, float(ordered[low]), float(ordered[high]), least, needed)


def summarize(samples: npt.ArrayLike, warmup: int = 0, settled: bool = True) -> Latency:
    """The statistics of at least two run times, in ms and in the order in which they were measured.

    ``warmup``: how many runs came before; ``settled``: whether their times became steady.
    """
    times = np.asarray(samples, dtype=np.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"samples must be [n] with n of at least 2, not {list(times.shape)}")
    mean, std = float(times.mean()), float(times.std(ddof=1))
    first, second = np.median(times[: len(times) // 2]), np.median(times[len(times) // 2 :])
    cov, drift = std / mean, float(second / first - 1)
    notes = []
    if not settled:
        notes.append(f"unstable: after {warmup} runs of warm-up the times had not settled")
    if cov > MAX_COV:
        notes.append(f"unstable: the runs vary by {cov:.0%} of their mean; close other programs, fix the clocks")
    if abs(drift) > MAX_DRIFT:
        notes.append(f"unstable: the second half differs from the first by {drift:+.0%}; check clocks and temperature")
    ordered = np.sort(times)
    p50, p90, p99 = (percentile(ordered, share) for share in SHARES)
    return Latency(len(times), warmup, mean, std, cov, p50, p90, p99, drift, tuple(notes), times)


def ratio_of_medians(medians: npt.ArrayLike, seed: int = 0) -> Ratio:
    """The median of the first column of ``medians [rounds, 2]`` over that of the second, with a bootstrap interval.

    Each row holds the times of two programs in the same round. Rows are drawn as a whole, `RESAMPLES` times, so that
    a slow round affects the ratio little. (B. Efron, R. Tibshirani: An Introduction to the Bootstrap, chapter 13.)
    """
    rounds = np.asarray(medians, dtype=np.float64)
    if rounds.ndim != 2 or rounds.shape[1] != 2 or len(rounds) < 2:
        raise ValueError(f"medians must be [rounds, 2] with at least 2 rounds, not {list(rounds.shape)}")
    rows = np.random.default_rng(seed).integers(0, len(rounds), (RESAMPLES, len(rounds)))
    drawn = np.median(rounds[rows], axis=1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], RATIO_INTERVAL)
    top, bottom = np.median(rounds, axis=0)
    return Ratio(float(top / bottom), float(low), float(high))
