"""Every classifier against a slow formula on the features themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from duallora_edge.learner.methods import scoring as classifiers
from duallora_edge.learner.methods.scoring import (
    CLASSIFIERS,
    RIDGE_SCALE,
    RIDGES,
    lda,
    overconfidence,
    random_projection,
    ridge_memory,
    ridge_right,
)
from duallora_edge.learner.network.network import Catalogue, Scores
from duallora_edge.learner.network.task_record import TaskInfo, TaskRecord
from duallora_edge.learner.statistics.calibration import CalibrationCurve
from duallora_edge.learner.statistics.gaussian import PRIOR_IMAGES_PER_FEATURE, ClassStatistics, GaussianClassifier

F, D, SIZES = 4, 7, ((30, 2), (40, 3))  # f is the first part of the features; images and classes of two tasks
RIGHT = (torch.tensor([9.0, 8, 0, 0, 0, 0, 0]), torch.tensor([0.0, 8, 9, 0, 0, 0, 0]))  # together 10^-2 is best


def draw(seed: int, images: int, classes: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    features = rng.normal(size=(images, D)) * np.geomspace(2, 0.3, D) + 2 * rng.normal(size=(classes, D))[labels]
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[TaskRecord]:
    """Two tasks of random features, with fewer random features than in use."""
    monkeypatch.setattr(classifiers, "RANDOM_FEATURES", 50)
    records = []
    for seed, (images, classes) in enumerate(SIZES):
        features, labels = draw(seed, images, classes)
        info = TaskInfo(str(seed), tuple("abc"[:classes]), "frozen", "none", 0, "", {})
        head = torch.randn(classes, F + 1, generator=torch.Generator().manual_seed(seed))
        memory = {**ridge_memory(features, labels, classes), "ridge.right": RIGHT[seed]}
        statistics = ClassStatistics.of(features, labels, classes)
        empty = CalibrationCurve.empty()
        records.append(TaskRecord(info, (), head, statistics, empty, torch.zeros(1), torch.zeros(1), memory))
    return records


def everything() -> tuple[np.ndarray, np.ndarray]:
    """The features of all tasks and their components."""
    parts = [draw(seed, *size) for seed, size in enumerate(SIZES)]
    labels = torch.cat([parts[0][1], parts[1][1] + SIZES[0][1]])
    return torch.cat([x for x, _ in parts]).double().numpy(), labels.numpy()


def discriminants(x: np.ndarray, train: np.ndarray, labels: np.ndarray, part: slice) -> np.ndarray:
    """-(x - m_k)^T Sigma^-1 (x - m_k) / 2 with the shrunk within-class covariance of some features."""
    x, train = x[:, part], train[:, part]
    means = np.stack([train[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
    pooled = sum(np.outer(row - means[k], row - means[k]) for row, k in zip(train, labels, strict=True))
    pooled = pooled / (len(train) - len(means))
    prior = PRIOR_IMAGES_PER_FEATURE * train.shape[1]
    a = prior / (len(train) + prior)
    sigma = (1 - a) * pooled + a * np.diag(np.diag(pooled)) + 1e-4 * np.diag(pooled).mean() * np.eye(len(pooled))
    return np.array([[-(row - m) @ np.linalg.solve(sigma, row - m) / 2 for m in means] for row in x])


def nearest_means(x: np.ndarray, train: np.ndarray, labels: np.ndarray) -> np.ndarray:
    means = [train[labels == k, :F].mean(axis=0) for k in range(labels.max() + 1)]
    return np.array([[-np.square(row[:F] - mean).sum() / 2 for mean in means] for row in x])


def least_squares(x: np.ndarray, train: np.ndarray, labels: np.ndarray, strength: float = RIDGES[1]) -> np.ndarray:
    projection = random_projection(D).double().numpy()
    hidden, asked = (np.maximum(rows @ projection.T, 0) for rows in (train, x))
    gram = hidden.T @ hidden
    ridge = strength * np.diag(gram).mean() * np.eye(len(gram))
    return RIDGE_SCALE * asked @ np.linalg.solve(gram + ridge, hidden.T @ np.eye(labels.max() + 1)[labels])


SLOW: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "lda": lambda x, train, labels: discriminants(x, train, labels, slice(0, D)),
    "lda_f": lambda x, train, labels: discriminants(x, train, labels, slice(0, F)),
    "mean_f": nearest_means,
    "ridge": least_squares,
}


@pytest.mark.parametrize("name", SLOW)
def test_scores_equal_the_formula(tasks: list[TaskRecord], name: str) -> None:
    gaussian = GaussianClassifier.fit([task.statistics for task in tasks])
    scores = CLASSIFIERS[name](tasks, gaussian)
    x = draw(9, 12, 4)[0].double()
    read = x if scores.expansion is None else (x @ scores.expansion.double().T).relu()
    found = (read @ scores.weight.T + scores.bias).numpy()
    expected = SLOW[name](x.numpy(), *everything())
    if name != "ridge":  # a term common to all components cancels in differences
        found, expected = found - found[:, :1], expected - expected[:, :1]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)
    assert found.shape == (12, 5) and len(set(expected.argmax(axis=1))) > 1


def test_heads_are_one_linear_layer_a_task(tasks: list[TaskRecord]) -> None:
    gaussian = GaussianClassifier.fit([task.statistics for task in tasks])
    scores, x = CLASSIFIERS["heads"](tasks, gaussian), draw(9, 12, 4)[0].double()
    slow = torch.cat([x[:, :F] @ t.head[:, :F].double().T + t.head[:, F].double() for t in tasks], dim=1)
    torch.testing.assert_close(x @ scores.weight.T + scores.bias, slow)


def test_right_answers_at_each_strength_of_the_ridge(tasks: list[TaskRecord]) -> None:
    x, labels = draw(1, *SIZES[1])
    truth = labels + SIZES[0][1]
    slow = [(least_squares(x.double().numpy(), *everything(), s).argmax(axis=1) == truth.numpy()).sum() for s in RIDGES]
    assert ridge_right(tasks, x, truth).tolist() == slow
    assert max(slow) > 30 > min(slow)


def test_the_strength_is_chosen_over_all_tasks(tasks: list[TaskRecord]) -> None:
    gaussian = GaussianClassifier.fit([task.statistics for task in tasks])

    def norm(*right: Tensor) -> float:
        counted = [replace(t, memory={**t.memory, "ridge.right": r}) for t, r in zip(tasks, right, strict=True)]
        return float(CLASSIFIERS["ridge"](counted, gaussian).weight.norm())

    assert norm(RIGHT[1], RIGHT[1]) < norm(*RIGHT) < norm(RIGHT[0], RIGHT[0])  # a stronger ridge is shorter


def test_the_ridge_of_two_sets_of_images_is_their_sum(tasks: list[TaskRecord]) -> None:
    x, labels = draw(5, 20, 2)
    whole, parts = ridge_memory(x, labels, 2), [ridge_memory(x[s], labels[s], 2) for s in (slice(7), slice(7, None))]
    for key in ("ridge.gram", "ridge.sums"):
        torch.testing.assert_close(parts[0][key] + parts[1][key], whole[key], rtol=1e-4, atol=1e-4)


def calibrated_temperature(scores: Scores, features: Tensor, labels: Tensor) -> float:
    """The temperature with the least negative log-likelihood, by search."""
    logits = features.double() @ scores.weight.T + scores.bias
    temperatures = np.geomspace(0.1, 30, 100)  # steps of 6 %
    nll = [float(torch.nn.functional.cross_entropy(logits / t, labels)) for t in temperatures]
    return float(temperatures[int(np.argmin(nll))])


@pytest.mark.parametrize(("images", "dim", "factor"), [(5000, 5, 1.0), (5000, 5, 3.0), (1000, 200, 0.5)])
def test_overconfidence_is_the_temperature_of_gaussian_classes(images: int, dim: int, factor: float) -> None:
    """Against the best temperature on new images of two Gaussian classes, averaged over ten draws."""
    rng = np.random.default_rng(0)
    catalogue = Catalogue.of([TaskInfo("t", ("a", "b"), "frozen", "none", 0, "", {})])
    predicted, found = [], []
    for _ in range(10):
        labels = torch.arange(images) % 2
        centre = rng.normal(size=dim)
        means = np.stack([centre, -centre]) / np.linalg.norm(centre)
        statistics = ClassStatistics.of(torch.from_numpy(rng.normal(size=(images, dim)) + means[labels]), labels, 2)
        fitted = lda([], GaussianClassifier.fit([statistics]))
        scores = replace(fitted, weight=factor * fitted.weight, bias=factor * fitted.bias)
        asked = torch.arange(5000) % 2
        new = torch.from_numpy(rng.normal(size=(5000, dim)) + means[asked])
        predicted.append(overconfidence(scores, catalogue, statistics, 0))
        found.append(calibrated_temperature(scores, new, asked))
    assert np.exp(np.mean(np.log(predicted))) == pytest.approx(np.exp(np.mean(np.log(found))), rel=0.3)


def test_overconfidence_is_unknown_without_a_rival() -> None:
    catalogue = Catalogue.of([TaskInfo(name, ("a",), "frozen", "none", 0, "", {}) for name in "xy"])  # one class, twice
    statistics = [ClassStatistics.of(*draw(seed, 9, 1), 1) for seed in range(2)]
    scores = lda([], GaussianClassifier.fit(statistics))
    assert overconfidence(scores, catalogue, statistics[1], 1) is None
    assert overconfidence(replace(scores, inflation=None), catalogue, statistics[1], 1) is None
