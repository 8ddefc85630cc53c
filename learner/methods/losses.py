"""What training minimises: functions of the logits and features of one batch, averaged over its images."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A scalar from logits [B, K], labels int64 [B], features f [B, d], and f [B, d] as it was before the training."""


def cross_entropy(logits: Tensor, labels: Tensor, features: Tensor, features_before: Tensor) -> Tensor:
    """Cross-entropy alone; the features are not held."""
    return F.cross_entropy(logits, labels)


def distilled_cross_entropy(
    logits: Tensor, labels: Tensor, features: Tensor, features_before: Tensor, *, weight: float
) -> Tensor:
    """CE + weight (1 - cos(f, f_before)).

    The pull keeps directions of the features that the few classes of this task do not need and later classes may.
    """
    loss = F.cross_entropy(logits, labels)
    if weight:
        loss = loss + weight * (1 - F.cosine_similarity(features, features_before)).mean()
    return loss


def kl_distillation_loss(
    logits: Tensor, labels: Tensor, features: Tensor, features_before: Tensor, *, weight: float
) -> Tensor:
    """(1 - weight) CE + weight KL(softmax(f_before) || softmax(f)), as in arXiv 2311.02428, where the weight is 0.4."""
    loss = F.cross_entropy(logits, labels)
    if weight:
        divergence = F.kl_div(
            features.log_softmax(dim=1), features_before.log_softmax(dim=1), reduction="batchmean", log_target=True
        )
        loss = (1 - weight) * loss + weight * divergence
    return loss
