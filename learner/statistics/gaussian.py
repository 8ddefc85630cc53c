"""Class statistics and the shared-covariance Gaussian classifier (linear discriminant analysis) built on them.

Statistics of tasks add up: nothing is ever re-estimated from old images. A *component* is one class of one task;
a class seen in several tasks has several components, whose probabilities are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PRIOR_IMAGES_PER_FEATURE = 0.25
# Rows of the factor that a task stores. Fewer cost accuracy where a task has thousands of images, more gain nothing.
STORED_DIRECTIONS = 256
# Both are shares of the mean square of the means. A mean variance below the first is rounding. At least the second is
# added to the variances, so that float32 can tell the distances between classes apart.
ROUNDING = 1e-10
LEAST_FLOOR = 1e-6


@dataclass(frozen=True)
class ClassStatistics:
    """Sufficient statistics of features [n, D] of K classes.

    The scatter, the sum over classes of the centred outer products [D, D], is ``factor``^T ``factor`` plus ``diagonal``
    on its diagonal. It is exact in what `of` and ``+`` return; `compressed` bounds what has to be stored.

    Attributes:
        counts: images of each class, float64 [K].
        means: their mean features, float64 [K, D].
        factor: rows of any number, float32 or float64 [k, D].
        diagonal: what is added to the variances, same dtype [D].
    """

    counts: Tensor
    means: Tensor
    factor: Tensor
    diagonal: Tensor

    @property
    def scatter(self) -> Tensor:
        """The sum over classes of the centred outer products, float64 [D, D]."""
        rows = self.factor.double()
        scatter = rows.T @ rows
        scatter.diagonal().add_(self.diagonal)
        return scatter

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> ClassStatistics:
        """Statistics of features [n, D] with labels int64 [n] in 0..classes-1; classes without rows count 0."""
        x = features.double()
        counts = torch.bincount(labels, minlength=classes).double()
        sums = torch.zeros(classes, x.shape[1], dtype=torch.float64).index_add_(0, labels, x)
        means = sums / counts.clamp(min=1)[:, None]
        return cls(counts, means, _fewest_rows(x - means[labels]), x.new_zeros(x.shape[1]))

    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        """Statistics of the union of two sets of images of the same classes (Chan et al. 1979, pairwise update)."""
        counts = self.counts + other.counts
        share = other.counts / counts.clamp(min=1)
        gap = other.means - self.means
        rows = [self.factor, other.factor, (self.counts * share).sqrt()[:, None] * gap]
        return ClassStatistics(
            counts, self.means + gap * share[:, None], _fewest_rows(torch.cat(rows)), self.diagonal + other.diagonal
        )

    def compressed(self, rank: int) -> ClassStatistics:
        """These statistics with at most ``rank`` rows in ``factor``; every variance stays exactly what it is.

        The rows are the leading principal directions of the correlations, so that the scales of the features do not
        matter. What they leave out of the variances goes to ``diagonal``. No row is the feature of an image any more.
        """
        variances = self.factor.square().sum(dim=0)
        scale = variances.sqrt().clamp(min=torch.finfo(variances.dtype).tiny)
        rows = self.factor / scale
        _, vectors = torch.linalg.eigh(rows @ rows.T)
        kept = vectors[:, max(len(rows) - rank, 0) :].T @ self.factor
        rest = (variances - kept.square().sum(dim=0)).clamp(min=0)
        return ClassStatistics(self.counts, self.means, kept, self.diagonal + rest)

    def scaled(self, share: float) -> ClassStatistics:
        """The statistics where every image counts as ``share`` images."""
        return ClassStatistics(self.counts * share, self.means, self.factor * share**0.5, self.diagonal * share)

    def part(self, features: slice) -> ClassStatistics:
        """The statistics of a contiguous part of the features."""
        return ClassStatistics(self.counts, self.means[:, features], self.factor[:, features], self.diagonal[features])

    def covariance(self) -> Tensor:
        """The covariance [D, D] within the classes."""
        return self.scatter / (self.counts.sum() - len(self.counts)).clamp(min=1)


@dataclass(frozen=True)
class Discriminants:
    """Logits of K classes as affine functions of features x [n, D]: x weight^T + bias.

    Attributes:
        weight: [K, D].
        bias: [K].
        inflation: the factor by which the logits vary more among new images than among those they were fitted to; None
            where that is not known.
    """

    weight: Tensor
    bias: Tensor
    inflation: float | None


@dataclass(frozen=True)
class GaussianClassifier(Discriminants):
    """K Gaussians with one covariance Sigma, as functions of features x [n, D] through K logits. All float64.

    With the means M [K, D] centred at the mean of all images c, the logits ``x weight^T + bias`` are log N(x; mu_k,
    Sigma) up to a term common to all k: ``weight`` [K, D] = M Sigma^-1, ``bias`` [K] = -weight c - diag(``gram``) / 2
    and ``gram`` [K, K] = M Sigma^-1 M^T. ``shares`` [K] are the shares of the images. Centring keeps the terms small,
    which float32 needs. ``centre`` c and ``variances`` [D] are those of all images.

    The ``inflation`` is the correction of generalised cross-validation (Golub, Heath and Wahba 1979),
    1 / (1 - df / n)^2 with n images (minus K) and df = tr(S (S + R)^-1) degrees of freedom, where S is the part of the
    pooled covariance that the factors of the statistics make, and R is diagonal: their ``diagonal`` and what shrinkage
    adds. None where it was not asked for.
    """

    gram: Tensor
    shares: Tensor
    centre: Tensor
    variances: Tensor

    @classmethod
    def fit(cls, statistics: Sequence[ClassStatistics], *, inflation: bool = True) -> GaussianClassifier:
        """Pool the statistics; Sigma = (1 - a) S + a diag(S) with the pooled within-class covariance S.

        a = m / (n + m) with n images and a prior worth m = D / 4 images: strong shrinkage for a first small task,
        hardly any after many. Shrinking towards the diagonal keeps the different scales of the features. A small
        multiple of the mean variance, or at least of the mean square of the means, is added, so that Sigma stays
        invertible with constant features or with as many classes as images. With the ``inflation`` it takes about
        twice as long.
        """
        return _Pool(statistics).classifier(inflation=inflation)

    def background(self) -> tuple[Tensor, Tensor]:
        """(F [K, K], o [K]) with |logits F + o|^2 = |x - c|^2 under Sigma minus |x - c|^2 under Sigma + B.

        B = M^T diag(shares) M is the covariance between the classes, so Sigma + B is that of all images. By the
        identity of Woodbury the difference is z^T (diag(1 / shares) + gram)^-1 z with z = M Sigma^-1 (x - c) =
        logits + diag(gram) / 2; F F^T is that inverse, written so that empty classes are harmless.
        """
        root = self.shares.sqrt()
        inner = torch.eye(len(root), dtype=torch.float64) + root[:, None] * self.gram * root
        factor = torch.linalg.solve_triangular(
            torch.linalg.cholesky(inner), torch.diag(root), upper=False
        ).T  # F = diag(root) L^-T
        return factor, self.gram.diagonal() / 2 @ factor


@dataclass(frozen=True)
class CompactCovariance:
    """The pooled covariance Sigma as ``factor``^T ``factor`` plus ``diagonal`` on its diagonal.

    Attributes:
        factor: [k, D], of which the variances are exact and the correlations those of the leading directions.
        diagonal: [D].
        distance: the mean squared Mahalanobis distance of an image from the mean of its class.
    """

    factor: Tensor
    diagonal: Tensor
    distance: float


def compact_covariance(statistics: Sequence[ClassStatistics], rank: int) -> CompactCovariance:
    """The covariance of `GaussianClassifier.fit` in few numbers, float64, with at most ``rank`` directions."""
    return _Pool(statistics).compact(rank)


def expected_novelty(statistics: Sequence[ClassStatistics]) -> list[float]:
    """An estimate of the mean raw novelty of new images of each of some tasks, under the Gaussians of all of them.

    For an image with residual r that was not among the n images of its class k, the squared distance to the mean is
    that of an image left out, (n / (n - 1))^2 h / (1 - c h) with h = r^T Sigma^-1 r and c = (1 - a) n / ((n - 1)
    (N - K)), by the formula of Sherman and Morrison; likewise for the distance to the mean of all images, where its
    share in the covariance between the classes is left out. Both are taken at the mean h of the task, and only the
    part of h that the ``factor`` of its statistics makes counts as fitted. On real features the estimate is 5 off the
    mean of held-back images on average, where single images deviate by 25 to 50 (benchmarks/RESULTS.md).
    """
    return _Pool(statistics).expected_novelty()


class _Pool:
    """Statistics pooled: the within-class covariance Sigma, factorised, with what it takes to classify."""

    def __init__(self, statistics: Sequence[ClassStatistics]) -> None:
        self.statistics = statistics
        counts = torch.cat([s.counts for s in statistics])
        means = torch.cat([s.means for s in statistics])
        self.images = (counts.sum() - len(counts)).clamp(min=1)
        apart, variance = torch.zeros(2, means.shape[1], dtype=torch.float64)
        for s in statistics:
            apart += s.diagonal / self.images
            variance += s.factor.double().square().sum(dim=0) / self.images
        variance += apart
        prior = PRIOR_IMAGES_PER_FEATURE * len(variance)
        shrinkage = prior / (float(counts.sum()) + prior)
        spread, size = variance.mean(), means.square().mean()
        floor = torch.maximum(1e-4 * spread, LEAST_FLOOR * size)
        if spread <= ROUNDING * size:  # one image per class, or copies: only distances are left
            floor = torch.ones_like(spread)
        self.shares = counts / counts.sum().clamp(min=1)
        self.centre = self.shares @ means
        self.centred = means - self.centre
        self.variances = variance + self.shares @ self.centred.square() + floor
        self.scale = (1 - shrinkage) / self.images
        added = shrinkage * variance + floor + (1 - shrinkage) * apart
        self.sigma = _Covariance([s.factor for s in statistics], self.scale, added)

    def classifier(self, *, inflation: bool) -> GaussianClassifier:
        weight = self.sigma.solve(self.centred)
        gram = weight @ self.centred.T
        factor = None
        if inflation:
            factor = float((1 - self.sigma.freedom().clamp(min=0) / self.images).clamp(min=0.1) ** -2)
        bias = -weight @ self.centre - gram.diagonal() / 2
        return GaussianClassifier(weight, bias, factor, gram, self.shares, self.centre, self.variances)

    def compact(self, rank: int) -> CompactCovariance:
        rows = self.scale.sqrt() * torch.cat([s.factor.double() for s in self.statistics])
        whole = ClassStatistics(self.shares, self.centred, _fewest_rows(rows), self.sigma.diagonal).compressed(rank)
        compact = _Covariance([whole.factor], torch.ones((), dtype=torch.float64), whole.diagonal)
        inverse, distance = compact.inverse_diagonal(), torch.zeros((), dtype=torch.float64)
        for s in self.statistics:
            within = s.factor.double()
            distance += ((compact.solve(within) * within).sum() + s.diagonal.double() @ inverse) / self.images
        return CompactCovariance(whole.factor, whole.diagonal, float(distance))

    def expected_novelty(self) -> list[float]:
        classifier = self.classifier(inflation=False)
        # What the covariance of all images leaves out of distances: |w (x - c)|^2 for each x.
        between = classifier.background()[0].T @ classifier.weight
        diagonal = self.sigma.inverse_diagonal()
        found, first = [], 0
        for s in self.statistics:
            images, rows, apart = s.counts.sum().clamp(min=1), s.factor.double(), s.diagonal.double()
            centred = self.centred[first : first + len(s.counts)]
            first += len(s.counts)
            fitted = (self.sigma.solve(rows) * rows).sum() / images
            rest = apart @ diagonal / images
            fitted_between = (rows @ between.T).square().sum() / images
            rest_between = (apart @ between.square().T).sum() / images
            distances = (self.sigma.solve(centred) * centred).sum(dim=1) - (centred @ between.T).square().sum(dim=1)
            means = s.counts / images @ distances
            each = (images / len(s.counts)).clamp(min=2)
            more = each / (each - 1)
            c = self.scale * more
            own = more**2 * (rest + fitted / (1 - c * fitted).clamp(min=0.05))
            left = fitted - fitted_between
            total = left + rest - rest_between + means + c * left**2 / (1 - c * left).clamp(min=0.05)
            found.append(float(own - total))
        return found


class _Covariance:
    """Sigma = S + diag(``diagonal``), where S is ``scale`` times the sum of F^T F over ``factors`` F [k, D].

    A few rows are solved for by the identity of Woodbury in [k, k], many in [D, D].
    """

    def __init__(self, factors: Sequence[Tensor], scale: Tensor, diagonal: Tensor) -> None:
        self.diagonal = diagonal
        self._count, dim = sum(map(len, factors)), len(diagonal)
        self._few = 2 * self._count < dim
        if self._few:
            self._root = diagonal.sqrt()
            self._rows = scale.sqrt() * torch.cat([*factors]).double() / self._root
            inner = torch.eye(self._count, dtype=torch.float64) + self._rows @ self._rows.T
        else:
            inner = torch.diag(diagonal)
            for factor in factors:  # one by one, since a stack would take the memory of all of them once more
                part = factor.double()
                inner.addmm_(part.T, part, alpha=float(scale))
        self._lower = torch.linalg.cholesky(inner)

    def solve(self, right: Tensor) -> Tensor:
        """``right`` Sigma^-1, [n, D]."""
        if not self._few:
            return torch.cholesky_solve(right.T, self._lower).T
        scaled = right / self._root
        return (scaled - torch.cholesky_solve(self._rows @ scaled.T, self._lower).T @ self._rows) / self._root

    def inverse_diagonal(self) -> Tensor:
        """The diagonal [D] of Sigma^-1."""
        if not self._few:
            return torch.cholesky_inverse(self._lower).diagonal()
        white = torch.linalg.solve_triangular(self._lower, self._rows, upper=False)
        return (1 - white.square().sum(dim=0)) / self.diagonal

    def freedom(self) -> Tensor:
        """The degrees of freedom tr(S Sigma^-1)."""
        if self._few:
            return self._count - torch.cholesky_inverse(self._lower).trace()
        return len(self.diagonal) - self.diagonal @ self.inverse_diagonal()


def _fewest_rows(rows: Tensor) -> Tensor:
    """Rows [min(n, D), D] with the outer products of rows [n, D]."""
    if len(rows) <= rows.shape[1]:
        return rows
    factor: Tensor = torch.linalg.qr(rows, mode="r").R
    return factor
