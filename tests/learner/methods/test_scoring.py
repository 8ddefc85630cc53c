"""Every classifier against a slow formula on the features themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from duallora_edge.learner.methods.scoring import (
    CLASSIFIERS,
    RIDGE_SCALE,
    ClassifierData,
    fit_ridge_sums,
    lda,
    overconfidence,
)
from duallora_edge.learner.network.answers import Catalogue, Scores
from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.statistics import ridge
from duallora_edge.learner.statistics.gaussian import PRIOR_IMAGES_PER_FEATURE, ClassStatistics, GaussianClassifier
from duallora_edge.learner.statistics.ridge import STRENGTHS, RidgeSums, random_projection

F, D, SIZES = 4, 7, ((30, 2), (40, 3))  # f is the first part of the features; images and classes of two tasks
TASKS = (("s", 2), ("t", 3))
RIGHT = (torch.tensor([9.0, 8, 0, 0, 0, 0, 0]), torch.tensor([0.0, 8, 9, 0, 0, 0, 0]))  # together 10^-2 is best


def draw(seed: int, images: int, classes: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    features = rng.normal(size=(images, D)) * np.geomspace(2, 0.3, D) + 2 * rng.normal(size=(classes, D))[labels]
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ClassifierData:
    """Two tasks of random features, with fewer random features than in use."""
    monkeypatch.setattr(ridge, "RANDOM_FEATURES", 50)
    data = ClassifierData(F, [], [], [], [])
    for seed, (images, classes) in enumerate(SIZES):
        features, labels = draw(seed, images, classes)
        head = torch.randn(classes, F + 1, generator=torch.Generator().manual_seed(seed))
        sums = replace(RidgeSums.of(features, labels, classes), right=RIGHT[seed])
        data = data.followed_by(head, ClassStatistics.of(features, labels, classes), None, sums)
    return data


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


def least_squares(x: np.ndarray, train: np.ndarray, labels: np.ndarray, strength: float = STRENGTHS[1]) -> np.ndarray:
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
def test_scores_equal_the_formula(data: ClassifierData, name: str) -> None:
    scores = CLASSIFIERS[name](data)
    x = draw(9, 12, 4)[0].double()
    read = x if scores.expansion is None else (x @ scores.expansion.double().T).relu()
    found = (read @ scores.weight.T + scores.bias).numpy()
    expected = SLOW[name](x.numpy(), *everything())
    if name != "ridge":  # a term common to all components cancels in differences
        found, expected = found - found[:, :1], expected - expected[:, :1]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)
    assert found.shape == (12, 5) and len(set(expected.argmax(axis=1))) > 1


def test_heads_are_one_linear_layer_for_each_task(data: ClassifierData) -> None:
    scores, x = CLASSIFIERS["heads"](data), draw(9, 12, 4)[0].double()
    slow = torch.cat([x[:, :F] @ head[:, :F].double().T + head[:, F].double() for head in data.heads], dim=1)
    torch.testing.assert_close(x @ scores.weight.T + scores.bias, slow)


def test_right_answers_at_each_strength_of_the_ridge(data: ClassifierData) -> None:
    x, labels = draw(1, *SIZES[1])
    truth = (labels + SIZES[0][1]).numpy()
    slow = [(least_squares(x.double().numpy(), *everything(), s).argmax(axis=1) == truth).sum() for s in STRENGTHS]
    first = data.ridge_sums[0]
    assert first
    found = fit_ridge_sums([first], draw(1, *SIZES[1]), (x, labels), SIZES[1][1])
    assert found.right.tolist() == slow
    assert max(slow) > 30 > min(slow)


def test_without_validation_images_there_are_no_right_answers(data: ClassifierData) -> None:
    x, labels = draw(1, *SIZES[1])
    assert fit_ridge_sums([], (x, labels), (x[:0], labels[:0]), SIZES[1][1]).right.tolist() == [0] * len(STRENGTHS)


def test_the_strength_is_chosen_over_all_tasks(data: ClassifierData) -> None:
    def norm(*right: Tensor) -> float:
        sums = [replace(t, right=r) for t, r in zip(data.ridge_sums, right, strict=True) if t]
        return float(CLASSIFIERS["ridge"](replace(data, ridge_sums=sums)).weight.norm())

    assert norm(RIGHT[1], RIGHT[1]) < norm(*RIGHT) < norm(RIGHT[0], RIGHT[0])  # a stronger ridge is shorter


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
        fitted = lda(ClassifierData(dim, [], [statistics], [None], []))
        scores = replace(fitted, weight=factor * fitted.weight, bias=factor * fitted.bias)
        asked = torch.arange(5000) % 2
        new = torch.from_numpy(rng.normal(size=(5000, dim)) + means[asked])
        predicted.append(overconfidence(scores, catalogue, statistics, 0))
        found.append(calibrated_temperature(scores, new, asked))
    assert np.exp(np.mean(np.log(predicted))) == pytest.approx(np.exp(np.mean(np.log(found))), rel=0.3)


def test_overconfidence_within_a_task_is_that_of_its_own_discriminants(data: ClassifierData) -> None:
    """Two tasks far from each other: the nearest rival of each class is in its own task."""
    moved = replace(data.statistics[1], means=data.statistics[1].means + 100)
    own = [GaussianClassifier.fit([statistics]) for statistics in (data.statistics[0], moved)]
    infos = [TaskInfo(name, tuple(name + str(k) for k in range(n)), "frozen", "none", 0, "", {}) for name, n in TASKS]
    scores = lda(replace(data, statistics=[data.statistics[0], moved], discriminants=own))
    for task, (statistics, info) in enumerate(zip((data.statistics[0], moved), infos, strict=True)):
        alone = lda(ClassifierData(F, [], [statistics], [None], []))
        expected = overconfidence(alone, Catalogue.of([info]), statistics, 0)
        assert expected == pytest.approx(overconfidence(scores, Catalogue.of(infos), statistics, task), rel=1e-4)


def test_overconfidence_is_unknown_without_a_rival() -> None:
    catalogue = Catalogue.of([TaskInfo(name, ("a",), "frozen", "none", 0, "", {}) for name in "xy"])  # one class, twice
    statistics = [ClassStatistics.of(*draw(seed, 9, 1), 1) for seed in range(2)]
    scores = lda(ClassifierData(F, [], statistics, [None, None], []))
    assert overconfidence(scores, catalogue, statistics[1], 1) is None
    assert overconfidence(replace(scores, inflation=None), catalogue, statistics[1], 1) is None
