"""Class statistics and the Gaussian classifier against direct formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from duallora_edge.learner.statistics.gaussian import (
    PRIOR_IMAGES_PER_FEATURE,
    ClassStatistics,
    GaussianClassifier,
    _Covariance,
    compact_covariance,
    expected_novelty,
)

DIM = 6


def sample(seed: int, n: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    features = rng.normal(size=(n, DIM)) * np.geomspace(5, 0.1, DIM) + rng.normal(size=(classes, DIM))[labels]
    return torch.from_numpy(features), torch.from_numpy(labels)


def assert_equal(a: ClassStatistics, b: ClassStatistics) -> None:
    for name in ("counts", "means", "scatter"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-9, msg=name)


def test_statistics_equal_loops() -> None:
    features, labels = sample(0, 40, 3)
    statistics = ClassStatistics.of(features, labels, 4)  # the last class has no image
    scatter = np.zeros((DIM, DIM))
    for k in range(3):
        rows = features[labels == k].numpy()
        np.testing.assert_allclose(statistics.means[k], rows.mean(axis=0))
        scatter += len(rows) * np.cov(rows.T, bias=True)
    np.testing.assert_allclose(statistics.scatter, scatter)
    assert statistics.counts.tolist() == [*(float((labels == k).sum()) for k in range(3)), 0.0]


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 30), split=st.integers(0, 30), classes=st.integers(1, 4))
def test_statistics_of_a_union_are_the_sum(seed: int, n: int, split: int, classes: int) -> None:
    features, labels = sample(seed, n, classes)
    whole = ClassStatistics.of(features, labels, classes)
    parts = [ClassStatistics.of(features[s], labels[s], classes) for s in (slice(split), slice(split, None))]
    assert_equal(parts[0] + parts[1], whole)
    assert_equal(parts[1] + parts[0], whole)


@given(seed=st.integers(0, 2**32 - 1), start=st.integers(0, DIM), stop=st.integers(0, DIM))
def test_a_part_has_the_statistics_of_those_features(seed: int, start: int, stop: int) -> None:
    features, labels = sample(seed, 20, 3)
    chosen = slice(start, stop)
    assert_equal(
        ClassStatistics.of(features, labels, 3).part(chosen), ClassStatistics.of(features[:, chosen], labels, 3)
    )


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 30), rank=st.integers(0, DIM + 1))
def test_compressed_statistics_keep_means_and_variances(seed: int, n: int, rank: int) -> None:
    exact = ClassStatistics.of(*sample(seed, n, 2), 2)
    short = exact.compressed(rank)
    assert len(short.factor) <= rank and bool((short.diagonal >= 0).all())
    assert torch.equal(short.means, exact.means) and torch.equal(short.counts, exact.counts)
    torch.testing.assert_close(short.scatter.diagonal(), exact.scatter.diagonal(), rtol=1e-9, atol=1e-9)
    if rank >= DIM:
        assert_equal(short, exact)


def test_compressed_statistics_are_the_best_of_their_rank_for_correlations() -> None:
    """Against numpy: the off-diagonal correlations of the factor are those of the leading eigenvectors."""
    exact = ClassStatistics.of(*sample(3, 30, 2), 2)
    scale = exact.scatter.diagonal().sqrt().numpy()
    values, vectors = np.linalg.eigh(exact.scatter.numpy() / np.outer(scale, scale))
    for rank in range(1, DIM):
        expected = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T * np.outer(scale, scale)
        factor = exact.compressed(rank).factor
        np.testing.assert_allclose(factor.T @ factor, expected, rtol=1e-8, atol=1e-8)


def slow_covariance(statistics: list[ClassStatistics]) -> np.ndarray:
    """The shrunk covariance, element by element."""
    n = sum(float(s.counts.sum()) for s in statistics)
    k = sum(len(s.counts) for s in statistics)
    pooled = sum(s.scatter.numpy() for s in statistics) / (n - k)
    a = PRIOR_IMAGES_PER_FEATURE * DIM / (n + PRIOR_IMAGES_PER_FEATURE * DIM)
    sigma = np.zeros((DIM, DIM))
    for i in range(DIM):
        for j in range(DIM):
            sigma[i, j] = pooled[i, j] if i == j else (1 - a) * pooled[i, j]
    return sigma + 1e-4 * np.trace(pooled) / DIM * np.eye(DIM)


@pytest.mark.parametrize("seed", range(3))
def test_logits_are_log_densities_up_to_a_common_term(seed: int) -> None:
    statistics = [ClassStatistics.of(*sample(seed + i, 30, classes), classes) for i, classes in enumerate((2, 3))]
    fitted = GaussianClassifier.fit(statistics)
    x = sample(99, 8, 2)[0]
    sigma, means = slow_covariance(statistics), torch.cat([s.means for s in statistics]).numpy()
    expected = np.stack([multivariate_normal(mean, sigma).logpdf(x.numpy()) for mean in means], axis=1)
    logits = (x @ fitted.weight.T + fitted.bias).numpy()
    np.testing.assert_allclose(
        logits - logits[:, :1], expected - expected[:, :1], rtol=1e-8, atol=1e-8
    )  # the common term cancels in differences between classes
    shares = np.concatenate([s.counts.numpy() for s in statistics]) / 60
    centred = means - shares @ means
    np.testing.assert_allclose(fitted.shares, shares)
    np.testing.assert_allclose(fitted.gram, centred @ np.linalg.inv(sigma) @ centred.T, rtol=1e-8)


@pytest.mark.parametrize(
    ("seed", "sizes"), [(0, [(30, 2), (30, 3)]), (1, [(9, 4)]), (2, [(200, 2), (5, 1)]), (3, [(12, 1)])]
)
def test_background_gives_the_relative_distance(seed: int, sizes: list[tuple[int, int]]) -> None:
    """min_k d_k^2 under Sigma less the distance to the mean of all images under Sigma + B, from the logits alone."""
    statistics = [ClassStatistics.of(*sample(seed + i, n, classes), classes) for i, (n, classes) in enumerate(sizes)]
    fitted = GaussianClassifier.fit(statistics)
    sigma, means = slow_covariance(statistics), torch.cat([s.means for s in statistics]).numpy()
    counts = np.concatenate([s.counts.numpy() for s in statistics])
    centre = counts @ means / counts.sum()
    between = sum(n * np.outer(m - centre, m - centre) for n, m in zip(counts, means, strict=True)) / counts.sum()
    factor, offset = fitted.background()
    for x in sample(77, 6, 2)[0]:
        logits = fitted.weight @ x + fitted.bias
        found = float((logits @ factor + offset).square().sum() - 2 * logits.max())
        near = min((x.numpy() - m) @ np.linalg.solve(sigma, x.numpy() - m) for m in means)
        gap = x.numpy() - centre
        assert found == pytest.approx(near - gap @ np.linalg.solve(sigma + between, gap), rel=1e-7, abs=1e-7)


def test_background_with_an_empty_class_is_finite() -> None:
    features, labels = sample(0, 20, 2)
    factor, offset = GaussianClassifier.fit([ClassStatistics.of(features, labels, 3)]).background()
    assert bool(torch.isfinite(factor).all() and torch.isfinite(offset).all())


@pytest.mark.parametrize(
    ("name", "features", "labels"),
    [
        ("one image", [[1.0, 2.0]], [0]),
        ("one image a class", [[0.0, 0.0], [1.0, 2.0]], [0, 1]),
        ("a constant feature", [[0.0, 3.0], [1.0, 3.0], [5.0, 3.0], [6.0, 3.0]], [0, 0, 1, 1]),
        ("copies of one image", [[1.0, 2.0]] * 4, [0, 0, 0, 0]),
    ],
)
def test_degenerate_classes_stay_finite(name: str, features: list[list[float]], labels: list[int]) -> None:
    x, y = torch.tensor(features), torch.tensor(labels)
    fitted = GaussianClassifier.fit([ClassStatistics.of(x, y, max(labels) + 1)])
    logits = x.double() @ fitted.weight.T + fitted.bias
    assert bool(torch.isfinite(logits).all()), name
    assert torch.equal(logits.argmax(dim=1), y)


def test_the_order_of_tasks_does_not_matter() -> None:
    parts = [ClassStatistics.of(*sample(i, 20, 2), 2) for i in range(3)]
    forward, backward = GaussianClassifier.fit(parts), GaussianClassifier.fit(parts[::-1])
    torch.testing.assert_close(forward.weight, backward.weight.reshape(3, 2, DIM).flip(0).reshape(6, DIM))


@pytest.mark.parametrize(("images", "dim"), [(60, 40), (200, 40), (4000, 40), (30, 2)])
def test_the_inflation_is_how_much_more_the_logits_of_new_images_vary(images: int, dim: int) -> None:
    """Against fresh samples of the same distribution, averaged over twenty draws."""
    rng = np.random.default_rng(0)
    scale, ratios, predicted = np.geomspace(3, 0.2, dim), [], []
    for _ in range(20):
        means = rng.normal(size=(3, dim)) * scale
        labels = torch.arange(images) % 3
        seen, new = (torch.from_numpy(rng.normal(size=(images, dim)) * scale + means[labels]) for _ in range(2))
        statistics = ClassStatistics.of(seen, labels, 3)
        fitted = GaussianClassifier.fit([statistics])
        truth = torch.from_numpy(means)[labels]
        inside, outside = (
            torch.trace(fitted.weight @ (x - m).T @ (x - m) @ fitted.weight.T) / (images - lost)
            for x, m, lost in ((seen, statistics.means[labels], 3), (new, truth, 0))
        )
        ratios.append(float(outside / inside))
        predicted.append(fitted.inflation)
    assert np.mean(predicted) == pytest.approx(np.mean(ratios), rel=0.15)


@pytest.mark.parametrize(("rows", "dim"), [((2, 1), 9), ((0, 4), 9), ((4,), 8), ((30, 5), 9)])
def test_few_rows_are_solved_as_many_are(rows: tuple[int, ...], dim: int) -> None:
    rng = np.random.default_rng(len(rows))
    factors = [rng.normal(size=(count, dim)) for count in rows]
    right, diagonal = rng.normal(size=(3, dim)), rng.uniform(0.1, 2, size=dim)
    scatter = 0.3 * sum(factor.T @ factor for factor in factors)
    inverse = np.linalg.inv(scatter + np.diag(diagonal))
    sigma = _Covariance(
        [torch.from_numpy(f) for f in factors], torch.tensor(0.3, dtype=torch.float64), torch.from_numpy(diagonal)
    )
    np.testing.assert_allclose(sigma.solve(torch.from_numpy(right)), right @ inverse, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sigma.inverse_diagonal(), inverse.diagonal(), rtol=1e-9, atol=1e-9)
    assert float(sigma.freedom()) == pytest.approx(np.trace(scatter @ inverse))


def test_centre_and_variances_are_those_of_all_images() -> None:
    features, labels = sample(5, 200, 3)
    fitted = GaussianClassifier.fit([ClassStatistics.of(features, labels, 3)])
    np.testing.assert_allclose(fitted.centre, features.mean(dim=0))
    np.testing.assert_allclose(fitted.variances, features.var(dim=0), rtol=0.05)


@pytest.mark.parametrize("rank", [2, 100])
def test_the_expected_novelty_by_dense_matrices(rank: int) -> None:
    rng = np.random.default_rng(rank)
    tasks = []
    for images in (60, 90):
        labels = torch.from_numpy(rng.permutation(np.arange(images) % 3))
        features = 1.5 * rng.normal(size=(3, 8))[labels] + rng.normal(size=(images, 8)) * np.geomspace(3, 0.3, 8)
        tasks.append(ClassStatistics.of(torch.from_numpy(features), labels, 3).compressed(rank))
    within = sum(task.scatter for task in tasks).numpy() / (150 - 6)
    a = 2 / (150 + 2)
    sigma = (1 - a) * within + np.diag(a * within.diagonal() + 1e-4 * within.diagonal().mean())
    means = torch.cat([task.means for task in tasks]).numpy()
    shares = torch.cat([task.counts for task in tasks]).numpy() / 150
    centred = means - shares @ means
    inverse, total = np.linalg.inv(sigma), np.linalg.inv(sigma + (centred.T * shares) @ centred)
    for task, found, part in zip(tasks, expected_novelty(tasks), (slice(3), slice(3, 6)), strict=True):
        images = float(task.counts.sum())
        fitted, rest = task.factor.T.numpy() @ task.factor.numpy() / images, np.diag(task.diagonal) / images
        n = images / 3
        c = (1 - a) * n / (n - 1) / (150 - 6)
        h, left = np.trace(inverse @ fitted), np.trace(total @ fitted)
        own = (n / (n - 1)) ** 2 * (np.trace(inverse @ rest) + h / (1 - c * h))
        gaps = task.counts.numpy() / images @ np.einsum("kd,de,ke->k", centred[part], total, centred[part])
        assert found == pytest.approx(own - left - np.trace(total @ rest) - gaps - c * left**2 / (1 - c * left))


@pytest.mark.parametrize("rank", [0, 2, DIM])
def test_a_compact_covariance(rank: int) -> None:
    tasks = [ClassStatistics.of(*sample(seed, 30, 2), 2) for seed in range(3)]
    compact, sigma = compact_covariance(tasks, rank), slow_covariance(tasks)
    found = (compact.factor.T @ compact.factor + torch.diag(compact.diagonal)).numpy()
    np.testing.assert_allclose(np.diag(found), np.diag(sigma))  # variances are exact at any rank
    assert len(compact.factor) == rank
    if rank == DIM:
        np.testing.assert_allclose(found, sigma, atol=1e-9)
    within = sum(task.scatter.numpy() for task in tasks) / (sum(float(task.counts.sum()) for task in tasks) - 6)
    assert compact.distance == pytest.approx(np.trace(within @ np.linalg.inv(found)))


def test_without_spread_nothing_is_inflated() -> None:
    one_each = ClassStatistics.of(torch.eye(3, DIM), torch.arange(3), 3)
    assert GaussianClassifier.fit([one_each]).inflation == pytest.approx(1.0)
    assert bool((one_each.covariance() == 0).all())
