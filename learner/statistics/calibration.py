"""Calibration on validation images: temperatures of the class and task probabilities, and the scale of the novelty.

A task leaves behind sums over its validation images, so that the tasks of a run can be pooled without any image: sums
of likelihoods and confidences at each setting, and quantiles of the novelty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Temperatures at which likelihoods of validation images are recorded, each STEP times the one before.
STEP = 2.0**0.25
TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(-8, 33))
# Shapes of the mixture: how many times the second temperature is the first, and the weight of the second.
SHAPES = ((1.0, 0.0), *((spread, share) for spread in (2.0, 4.0, 8.0) for share in (0.05, 0.1, 0.2, 0.3, 0.5)))
DEFAULT_TASK_TEMPERATURE = 4.0
DEFAULT_CLASS_TEMPERATURE = 8.0
# Shares of validation images between which the novelty is interpolated.
LEVELS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.999)
QUANTILES = 65
FOLDS = 5


@dataclass(frozen=True)
class Mixture:
    """Two temperatures: (1 - share) softmax(l / temperature) + share softmax(l / (spread temperature)).

    One temperature (Guo et al. 2017) cannot be right both for the easy images and for the rare hard ones, which
    the second, flatter part is for.
    """

    temperature: float
    spread: float = 1.0
    share: float = 0.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Probabilities [n, K] of logits [n, K]."""
        sharp = (logits / self.temperature).softmax(dim=1)
        if not self.share:
            return sharp
        return (1 - self.share) * sharp + self.share * (logits / (self.spread * self.temperature)).softmax(dim=1)


@dataclass(frozen=True)
class CalibrationCurve:
    """Sums over validation images, float64.

    Attributes:
        nll: negative log-likelihood of the true class, [len(SHAPES), len(TEMPERATURES)].
        confidence: probability of the answer, [len(SHAPES), len(TEMPERATURES)].
        counts: images and right answers, [2].
    """

    nll: Tensor
    confidence: Tensor
    counts: Tensor

    @classmethod
    def empty(cls) -> CalibrationCurve:
        """The curve of no images."""
        shape = (len(SHAPES), len(TEMPERATURES))
        return cls(
            torch.zeros(shape, dtype=torch.float64),
            torch.zeros(shape, dtype=torch.float64),
            torch.zeros(2, dtype=torch.float64),
        )

    @classmethod
    def of(cls, logits: Tensor, sums: Tensor, truth: Tensor) -> CalibrationCurve:
        """The curve of logits [n, K] whose components add up to classes by ``sums`` [K, C]; true classes [n]."""
        curve = cls.empty()
        logits, sums = logits.double(), sums.double()
        # Spreads are powers of the step between temperatures, so that every part is a softmax computed once.
        reach = round(math.log(max(spread for spread, _ in SHAPES), STEP))
        parts = [(logits / (TEMPERATURES[0] * STEP**i)).softmax(dim=1) @ sums for i in range(len(TEMPERATURES) + reach)]
        for row, (spread, share) in enumerate(SHAPES):
            shift = round(math.log(spread, STEP))
            for column in range(len(TEMPERATURES)):
                probabilities = (1 - share) * parts[column] + share * parts[column + shift]
                true = probabilities.gather(1, truth[:, None]).clamp(min=1e-12)
                curve.nll[row, column] = -true.log().sum()
                curve.confidence[row, column] = probabilities.amax(dim=1).sum()
        right = ((logits.softmax(dim=1) @ sums).argmax(dim=1) == truth).sum()
        curve.counts[:] = torch.tensor([len(truth), int(right)])
        return curve

    def __add__(self, other: CalibrationCurve) -> CalibrationCurve:
        """The curve of both sets of images together."""
        return CalibrationCurve(self.nll + other.nll, self.confidence + other.confidence, self.counts + other.counts)

    def scaled(self, share: float) -> CalibrationCurve:
        """The curve where every image counts as ``share`` images."""
        return CalibrationCurve(self.nll * share, self.confidence * share, self.counts * share)

    def warmer(self, factor: float) -> CalibrationCurve:
        """The curve of logits that are ``factor`` times these, interpolated; beyond the ends the end is taken."""
        last = len(TEMPERATURES) - 1
        positions = torch.arange(last + 1, dtype=torch.float64) - math.log(factor) / math.log(STEP)
        low = positions.floor().clamp(0, last - 1).long()
        share = (positions - low).clamp(0, 1)
        nll, confidence = (c[:, low] * (1 - share) + c[:, low + 1] * share for c in (self.nll, self.confidence))
        return CalibrationCurve(nll, confidence, self.counts)

    @property
    def accuracy(self) -> float | None:
        """Share of right answers, None without images."""
        return float(self.counts[1] / self.counts[0]) if self.counts[0] else None


def neighbour_folds(labels: Tensor) -> Tensor:
    """The fold int64 [n] of each of n images, by their classes [n]: up to `FOLDS` runs of neighbours of each class.

    Neighbours are often frames of one scene, so that they are left out together. The only image of a class is in no
    fold, -1.
    """
    fold = torch.full_like(labels, -1)
    counts = labels.bincount()
    count = min(FOLDS, int(counts.max())) if len(counts) else 0
    for label in range(len(counts)):
        members = (labels == label).nonzero()[:, 0]
        if len(members) > 1:
            fold[members] = torch.arange(len(members)) * count // len(members)
    return fold


def best_mixture(curves: Sequence[CalibrationCurve], kind: str = "mixture") -> Mixture:
    """The mixture whose mean confidence equals the accuracy, and among those the likeliest, over all validation images.

    A few confident mistakes dominate the likelihood; matching the confidence first keeps them from making all other
    answers too cautious. One right and one wrong image are added, so that a handful of right answers does not count as
    certainty. Without validation images it is the default. ``kind`` ``temperature`` chooses one temperature by the
    likelihood alone, and ``none`` leaves the logits as they are.
    """
    curve = sum(curves, CalibrationCurve.empty())
    if kind == "none":
        return Mixture(1.0)
    if not curve.counts[0]:
        return Mixture(DEFAULT_CLASS_TEMPERATURE)
    if kind == "temperature":
        return Mixture(TEMPERATURES[int(curve.nll[0].argmin())])
    images, right = curve.counts.tolist()
    target = images * (right + 1) / (images + 2)
    choices = []
    for row, (spread, share) in enumerate(SHAPES):
        position = _crossing(curve.confidence[row].tolist(), target)
        nll = _between(curve.nll[row].tolist(), position)
        choices.append((nll, Mixture(_temperature(position), spread, share)))
    return min(choices, key=lambda choice: choice[0])[1]


def best_temperature(curves: Sequence[Tensor]) -> float:
    """The temperature of the task posterior with the lowest NLL on validation images; a default without any.

    ``curves`` holds the NLL of each task, [len(TEMPERATURES)].
    """
    total = torch.stack([curve.double() for curve in curves]).sum(dim=0)
    if float(total.abs().sum()) == 0:
        return DEFAULT_TASK_TEMPERATURE
    return TEMPERATURES[int(total.argmin())]


def _crossing(falling: Sequence[float], target: float) -> float:
    """The position (an index with fraction) at which a falling curve comes down to ``target``."""
    for index in range(1, len(falling)):
        if falling[index] <= target:
            before, after = falling[index - 1], falling[index]
            return index - 1 + (min(max((before - target) / (before - after), 0.0), 1.0) if before > after else 0.0)
    return float(len(falling) - 1)


def _between(curve: Sequence[float], position: float) -> float:
    index = min(int(position), len(curve) - 2)
    return curve[index] + (position - index) * (curve[index + 1] - curve[index])


def _temperature(position: float) -> float:
    return TEMPERATURES[0] * STEP**position


@dataclass(frozen=True)
class NoveltyScale:
    """Maps a raw novelty to the share of validation images of known classes that look less novel, 0..1.

    Piecewise linear between ``knots`` [len(LEVELS) + 1]; an image beyond all known ones approaches 1.
    """

    knots: tuple[float, ...]

    @classmethod
    def pooled(cls, quantiles: Sequence[Tensor], images: Sequence[float]) -> NoveltyScale:
        """Pool the tasks: ``quantiles`` [QUANTILES] of each, at evenly spaced shares, weighted by their images."""
        values = torch.cat([q.double() for q in quantiles])
        weights = torch.cat(
            [torch.full_like(q, n / len(q), dtype=torch.float64) for q, n in zip(quantiles, images, strict=True)]
        )
        order = values.argsort()
        values, cumulative = values[order], weights[order].cumsum(0) - weights[order] / 2
        shares = cumulative / weights.sum()
        indices = [min(int(torch.searchsorted(shares, level)), len(values) - 1) for level in LEVELS]
        knots = [float(values[index]) for index in indices]
        reach = max(knots[-1] - knots[LEVELS.index(0.5)], 1e-6 * max(1.0, abs(knots[0]), abs(knots[-1])))
        # Equal neighbours (few validation images) would make steps of infinite slope.
        spaced = [knots[0]]
        for knot in [*knots[1:], knots[-1] + reach]:
            spaced.append(max(knot, spaced[-1] + 1e-6 * reach))
        return cls(tuple(spaced))

    @classmethod
    def unknown(cls) -> NoveltyScale:
        """The scale of a classifier whose raw novelty was not measured: of images whose novelty was 0."""
        return cls.pooled([quantiles(torch.zeros(0))], [1.0])

    @property
    def levels(self) -> tuple[float, ...]:
        """The shares at the knots."""
        return (*LEVELS, 1.0)

    def steps(self) -> tuple[Tensor, Tensor, Tensor]:
        """(start, width, height) [len(LEVELS)] of the pieces: score = sum_j height_j clamp((x - start_j) / width_j)."""
        knots, levels = (torch.tensor(values, dtype=torch.float64) for values in (self.knots, self.levels))
        return knots[:-1], knots.diff(), levels.diff()


def quantiles(scores: Tensor) -> Tensor:
    """Quantiles [QUANTILES] of scores [n] at evenly spaced shares; zeros without any."""
    if not len(scores):
        return torch.zeros(QUANTILES, dtype=torch.float64)
    return scores.double().quantile(torch.linspace(0, 1, QUANTILES, dtype=torch.float64))
