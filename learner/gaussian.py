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


@dataclass(frozen=True)
class ClassStatistics:
    """Sufficient statistics of features [n, D] of K classes.

    ``counts`` float64 [K], ``means`` float64 [K, D], ``scatter`` float64 [D, D]: the sum over classes of the
    centred outer products.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> ClassStatistics:
        """Statistics of features [n, D] with labels int64 [n] in 0..classes-1; classes without rows count 0."""
        x = features.double()
        counts = torch.bincount(labels, minlength=classes).double()
        sums = torch.zeros(classes, x.shape[1], dtype=torch.float64).index_add_(0, labels, x)
        means = sums / counts.clamp(min=1)[:, None]
        centred = x - means[labels]
        return cls(counts, means, centred.T @ centred)

    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        """Statistics of the union of two sets of images of the same classes (Chan et al. 1979, pairwise update)."""
        counts = self.counts + other.counts
        share = other.counts / counts.clamp(min=1)
        gap = other.means - self.means
        between = self.counts * share
        scatter = self.scatter + other.scatter + (gap * between[:, None]).T @ gap
        return ClassStatistics(counts, self.means + gap * share[:, None], scatter)

    def part(self, features: slice) -> ClassStatistics:
        """The statistics of a contiguous part of the features."""
        return ClassStatistics(self.counts, self.means[:, features], self.scatter[features, features])


@dataclass(frozen=True)
class GaussianClassifier:
    """K Gaussians with one covariance Sigma: their log-likelihoods are linear in x up to a common term.

    With z = x ``whitening`` + ``offset`` (the whitened, centred features), log N(x; mu_k, Sigma) equals
    ``x weight_k^T + bias_k - |z|^2 / 2`` up to a constant. ``weight`` [K, D], ``bias`` [K], ``whitening`` [D, D],
    ``offset`` [D], all float64. Centring keeps the terms small, which float32 needs.
    """

    weight: Tensor
    bias: Tensor
    whitening: Tensor
    offset: Tensor

    @classmethod
    def fit(cls, statistics: Sequence[ClassStatistics]) -> GaussianClassifier:
        """Pool the statistics; Sigma = (1 - a) S + a diag(S) with the pooled within-class covariance S.

        a = m / (n + m) with n images and a prior worth m = D / 4 images: a lot of shrinkage for a first small
        task, next to none after many. Shrinking towards the diagonal keeps the different scales of the features.
        A small multiple of the mean variance is added so that constant features, or as many classes as images,
        stay invertible.
        """
        counts = torch.cat([s.counts for s in statistics])
        means = torch.cat([s.means for s in statistics])
        freedom = (counts.sum() - len(counts)).clamp(min=1)
        pooled = torch.stack([s.scatter for s in statistics]).sum(dim=0) / freedom
        variance = pooled.diagonal()
        prior = PRIOR_IMAGES_PER_FEATURE * len(variance)
        shrinkage = prior / (float(counts.sum()) + prior)
        # Without any spread (one image a class) the distance between the means is all there is: unit variance.
        floor = 1e-4 * variance.mean() if variance.mean() > 0 else torch.ones((), dtype=torch.float64)
        sigma = (1 - shrinkage) * pooled + torch.diag(shrinkage * variance + floor)
        values, vectors = torch.linalg.eigh(sigma)
        whitening = vectors * values.rsqrt()
        centre = means.mean(dim=0)
        centred = (means - centre) @ whitening
        weight = centred @ whitening.T
        return cls(weight, -0.5 * centred.square().sum(dim=1) - weight @ centre, whitening, -centre @ whitening)
