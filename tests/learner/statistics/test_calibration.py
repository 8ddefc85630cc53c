"""Calibration: curves against slow loops, mixtures against what they promise, and the scale of the novelty."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from duallora_edge.learner.statistics.calibration import (
    DEFAULT_CLASS_TEMPERATURE,
    DEFAULT_TASK_TEMPERATURE,
    LEVELS,
    QUANTILES,
    SHAPES,
    STEP,
    TEMPERATURES,
    CalibrationCurve,
    Mixture,
    NoveltyScale,
    best_mixture,
    best_temperature,
    quantiles,
)

SUMS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]]).double()  # five components, three classes


def draw(seed: int, images: int, heat: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits [images, 5] and true classes drawn from their probabilities at temperature ``heat``."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(images, 5)) * 6)
    probabilities = ((logits / heat).softmax(dim=1) @ SUMS).numpy()
    truth = [int(rng.choice(3, p=row / row.sum())) for row in probabilities]
    return logits, torch.tensor(truth, dtype=torch.long)


def slow_mixture(logits: list[float], temperature: float, spread: float, share: float) -> list[float]:
    """Probabilities of the components of one image."""

    def softmax(heat: float) -> list[float]:
        powers = [math.exp((value - max(logits)) / heat) for value in logits]
        return [power / sum(powers) for power in powers]

    sharp, flat = softmax(temperature), softmax(spread * temperature)
    return [(1 - share) * a + share * b for a, b in zip(sharp, flat, strict=True)]


@pytest.mark.parametrize("mixture", [Mixture(2.0), Mixture(3.0, 4.0, 0.2)], ids=str)
def test_a_mixture_equals_the_formula(mixture: Mixture) -> None:
    logits, _ = draw(0, 7)
    slow = [slow_mixture(row, mixture.temperature, mixture.spread, mixture.share) for row in logits.tolist()]
    np.testing.assert_allclose(mixture(logits), slow, rtol=1e-10)


@pytest.mark.parametrize("images", [1, 6])
def test_a_curve_equals_slow_loops(images: int) -> None:
    logits, truth = draw(1, images)
    curve = CalibrationCurve.of(logits.float(), SUMS.float(), truth)
    for row, (spread, share) in enumerate(SHAPES):
        for column, temperature in enumerate(TEMPERATURES):
            nll = confidence = 0.0
            for image, true in zip(logits.float().tolist(), truth.tolist(), strict=True):
                classes = np.array(slow_mixture(image, temperature, spread, share)) @ SUMS.numpy()
                nll -= math.log(max(classes[true], 1e-12))
                confidence += classes.max()
            assert float(curve.nll[row, column]) == pytest.approx(nll, rel=1e-9, abs=1e-9)
            assert float(curve.confidence[row, column]) == pytest.approx(confidence, rel=1e-9)
    answers = [int(np.argmax(np.array(slow_mixture(image, 1, 1, 0)) @ SUMS.numpy())) for image in logits.tolist()]
    right = sum(answer == true for answer, true in zip(answers, truth.tolist(), strict=True))
    assert curve.counts.tolist() == [images, right] and curve.accuracy == pytest.approx(right / images)


@pytest.mark.parametrize("split", [0, 5, 12])
def test_curves_of_two_halves_add_up_to_the_whole(split: int) -> None:
    logits, truth = draw(2, 12)
    parts = [CalibrationCurve.of(logits[s], SUMS, truth[s]) for s in (slice(split), slice(split, None))]
    added, whole = parts[0] + parts[1], CalibrationCurve.of(logits, SUMS, truth)
    for name in ("nll", "confidence", "counts"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name))
    assert CalibrationCurve.empty().accuracy is None


@pytest.mark.parametrize(("steps", "rel"), [(0, 1e-12), (3, 1e-12), (-4, 1e-12), (0.5, 0.02), (-1.3, 0.02)])
def test_the_curve_of_larger_logits_is_the_curve_moved(steps: float, rel: float) -> None:
    logits, truth = draw(3, 200)
    factor = STEP**steps
    curve = CalibrationCurve.of(logits, SUMS, truth)
    moved, slow = curve.warmer(factor), CalibrationCurve.of(logits * factor, SUMS, truth)
    inside = slice(6, -6)
    torch.testing.assert_close(moved.nll[:, inside], slow.nll[:, inside], rtol=rel, atol=0)
    torch.testing.assert_close(moved.confidence[:, inside], slow.confidence[:, inside], rtol=rel, atol=0)
    assert torch.equal(moved.counts, curve.counts)


@pytest.mark.parametrize(("seed", "images", "heat"), [(0, 2000, 3.0), (1, 2000, 1.0), (2, 300, 12.0), (3, 20, 3.0)])
def test_the_confidence_of_the_best_mixture_is_the_accuracy(seed: int, images: int, heat: float) -> None:
    logits, truth = draw(seed, images, heat)
    halves = [CalibrationCurve.of(logits[s], SUMS, truth[s]) for s in (slice(images // 3), slice(images // 3, None))]
    mixture = best_mixture(halves)
    confidence = float((mixture(logits) @ SUMS).amax(dim=1).mean())
    right = float((halves[0] + halves[1]).counts[1])
    assert confidence == pytest.approx((right + 1) / (images + 2), abs=0.003)
    if mixture.share == 0 and images > 1000:
        assert mixture.temperature == pytest.approx(heat, rel=0.15)


@pytest.mark.parametrize("truth", [[0] * 5, [1] * 5], ids=["all right", "all wrong"])
def test_a_handful_of_answers_makes_nobody_certain(truth: list[int]) -> None:
    logits = torch.tensor([[30.0, 0, 0, 0, 0]]).repeat(5, 1)
    curve = CalibrationCurve.of(logits, SUMS, torch.tensor(truth))
    mixture = best_mixture([curve])
    confidence = float((mixture(logits.double()) @ SUMS).amax(dim=1).mean())
    assert confidence == pytest.approx(6 / 7, abs=0.01) if truth[0] == 0 else confidence < 0.5


def test_other_kinds_of_calibration() -> None:
    logits, truth = draw(4, 200)
    curve = CalibrationCurve.of(logits, SUMS, truth)
    assert best_mixture([curve], "none") == Mixture(1.0)
    slow = {t: -float(((logits / t).softmax(1) @ SUMS)[range(200), truth].log().sum()) for t in TEMPERATURES}
    assert best_mixture([curve], "temperature") == Mixture(min(slow, key=lambda t: slow[t]))
    for kind in ("mixture", "temperature"):
        assert best_mixture([CalibrationCurve.empty()] * 2, kind) == Mixture(DEFAULT_CLASS_TEMPERATURE)


def test_best_temperature_is_the_least_of_the_summed_curves() -> None:
    temperatures = torch.tensor(TEMPERATURES)
    curves = [(temperatures.log() - torch.tensor(best).log()) ** 2 for best in (2.0, 8.0)]
    none = torch.zeros(len(TEMPERATURES))
    assert best_temperature(curves[:1]) == 2.0
    assert best_temperature(curves) == 4.0
    assert best_temperature([none, none]) == DEFAULT_TASK_TEMPERATURE
    assert best_temperature([none, curves[1]]) == 8.0


def score(scale: NoveltyScale, raw: Tensor) -> Tensor:
    """The novelty of raw values [n], as the model computes it but in float64."""
    start, width, height = scale.steps()
    return ((raw.double()[:, None] - start) / width).clamp(0, 1) @ height


def test_the_scale_is_the_share_of_pooled_images_below() -> None:
    rng = np.random.default_rng(0)
    tasks = [torch.from_numpy(rng.normal(m, s, n)) for m, s, n in ((0, 1, 6000), (3, 2, 2000), (-40, 9, 500))]
    scale = NoveltyScale.pooled([quantiles(raw) for raw in tasks], [len(raw) for raw in tasks])
    pooled = torch.cat(tasks)
    found = score(scale, pooled)
    for level in (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98):
        assert float((found > level).double().mean()) == pytest.approx(1 - level, abs=0.015)
    torch.testing.assert_close(found, torch.from_numpy(np.interp(pooled, scale.knots, scale.levels)), rtol=0, atol=1e-9)


SCORES = {
    "no image": torch.zeros(0),
    "one image": torch.tensor([3.0]),
    "two images": torch.tensor([-5.0, 1e4]),
    "equal images": torch.full((9,), -2.5),
    "equal and large": torch.full((9,), 3e5),
    "many": torch.linspace(-30, 12, 200) ** 3,
}


@pytest.mark.parametrize("kind", SCORES)
def test_the_scale_is_monotone_and_within_0_and_1(kind: str) -> None:
    parts = quantiles(SCORES[kind])
    assert parts.shape == (QUANTILES,) and bool((parts.diff() >= 0).all())
    scale = NoveltyScale.pooled([parts], [float(max(len(SCORES[kind]), 1))])
    assert all(math.isfinite(knot) for knot in scale.knots) and len(scale.knots) == len(LEVELS) + 1
    x = torch.cat([torch.linspace(-1e5, 1e5, 4001), SCORES[kind], torch.tensor([1e30, -1e30])]).sort().values
    found = score(scale, x)
    assert bool((found.diff() >= -1e-12).all()) and float(found[0]) == 0
    assert float(found[-1]) == pytest.approx(1) and float(found.max()) <= 1 + 1e-12
