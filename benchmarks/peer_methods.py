"""Published ways against drift and forgetting, with our backbone, budget and images: for measuring, not for use.

    DUALLORA_EDGE_METHODS=benchmarks/peer_methods.py duallora-edge compare --latency-rounds 0 \
        --methods drift_map,ssiat,fecam --stream ... --out ...

A record has a fixed set of tensors, and these methods need more: the drift of the features in each task, or a
covariance of each class. They keep it in the memory of the process, under the class means of the task, which identify
images, seed and network. So a run can be learned, measured and continued in one process only, and not exported.

* ``drift_map``: sequential LoRA; a linear map carries the old class statistics to the new features.
* ``ssiat``: sequential LoRA; old class means move as the new images around them (SSIAT, Tan et al. 2024, arXiv
  2403.19979, by the semantic drift compensation of Yu et al. 2020, arXiv 2004.00440). Of SSIAT it leaves out adapters
  beside the MLPs, the cosine loss with a margin, and the head trained on samples from the class Gaussians.
* ``fecam``: a Mahalanobis distance for each class on the frozen f (FeCAM, Goswami et al. 2023, arXiv 2309.14062).
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duallora_edge.errors import RunError
from duallora_edge.learner.methods import METHODS
from duallora_edge.learner.methods.frozen import Frozen
from duallora_edge.learner.methods.lesson import Lesson
from duallora_edge.learner.methods.scoring import ClassifierData, mean_f
from duallora_edge.learner.methods.sequential import Sequential
from duallora_edge.learner.methods.training import leading_directions
from duallora_edge.learner.network.adapters import fold
from duallora_edge.learner.network.answers import Catalogue, Classifier, ComposedModel
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.features import suffix_features
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.statistics.calibration import CalibrationCurve
from duallora_edge.learner.statistics.gaussian import ClassStatistics, GaussianClassifier

DRIFT_RIDGE = 1.0  # share of the mean of the diagonal of the Gram matrix, as in `statistics.ridge`
SIGMA = 0.3  # of the root mean square distance to a class mean; 0.3 on features of length 1 in Yu et al.
FLOOR = 1e-3  # added to correlations, which are singular where LayerNorm fixes the sum of the features
FECAM_SCALE = 64.0  # distances of features of length 1 are small; nothing but the range of the temperatures needs it

# Statistics of [f ; phi] of earlier tasks before a task was trained to those after it.
Move = Callable[[Sequence[ClassStatistics]], list[ClassStatistics]]
_kept: dict[tuple[str, bytes], Any] = {}


def _key(task: TaskRecord) -> tuple[str, bytes]:
    return task.info.method, hashlib.sha256(task.statistics.means.float().numpy().tobytes()).digest()


def _recall(task: TaskRecord) -> Any:
    """What was kept with a task. Raises `RunError` in another process than the one that learned it."""
    if (kept := _kept.get(_key(task))) is None:
        raise RunError(f"{task.info.method} can be measured only in the process that learned it; use a new --out.")
    return kept


class Carried(Sequential):
    """Sequential LoRA with our classifier; the old statistics of f follow the drift that new images show."""

    classifier = "lda"
    removable = False

    @abstractmethod
    def fit_move(self, old: Tensor, new: Tensor, statistics: Sequence[ClassStatistics]) -> Move:
        """The move of a task from features f, float64 [n, d], of its images before and after training, and from the
        ``statistics`` of the earlier tasks before it."""

    def learn(self, lesson: Lesson) -> TaskRecord:
        """Train as `Sequential`, and move the old statistics before the new ones join them."""
        lesson = replace(lesson, past=_moved(lesson.past))
        blocks, head = self.adapt(lesson, "class", lambda index, q, v: leading_directions(lesson, q, v))
        suffix = self.training_blocks(lesson)
        features = partial(suffix_features, lesson.backbone, suffix, lesson.train, lesson.config.precision, "none")
        old = features()[0].double()
        for block, added in zip(suffix, blocks, strict=True):
            block.weight = fold(block.weight, added.orthogonal)
        before = [task.statistics for task in lesson.past]
        move = self.fit_move(old, features()[0].double(), before)
        past = [replace(task, statistics=new) for task, new in zip(lesson.past, move(before), strict=True)]
        record = self.finish(replace(lesson, past=past), blocks, head)
        _kept[_key(record)] = move
        return record

    def compose(self, backbone: Backbone, tasks: Sequence[TaskRecord]) -> ComposedModel:
        """The model of the tasks with the statistics of old ones moved to the newest features."""
        return super().compose(backbone, _moved(tasks))


def _moved(tasks: Sequence[TaskRecord]) -> list[TaskRecord]:
    """The tasks with what the statistics of each would be in the newest network."""
    statistics: list[ClassStatistics] = []
    for task in tasks:
        statistics = [*_recall(task)(statistics), task.statistics]
    return [
        replace(task, statistics=new, discriminants=GaussianClassifier.fit([new]))
        for task, new in zip(tasks, statistics, strict=True)
    ]


class DriftMap(Carried):
    """f_new = f_old W with the W nearest to the identity: min |F_new - F_old W|^2 + r |W - 1|^2.

    The ridge r is `DRIFT_RIDGE` times the mean of the diagonal of F_old^T F_old; a much weaker one fits the few new
    images and is wrong for old classes. Variances that the factor of the statistics leaves out stay independent.
    """

    name = "drift_map"
    summary = "sequential, old class statistics carried along by a linear map of the features"

    def fit_move(self, old: Tensor, new: Tensor, statistics: Sequence[ClassStatistics]) -> Move:
        eye, gram = torch.eye(old.shape[1], dtype=torch.float64), old.T @ old
        W = eye + torch.linalg.solve(gram + DRIFT_RIDGE * gram.diagonal().mean() * eye, old.T @ (new - old))

        def times(rows: Tensor, w: Tensor) -> Tensor:
            return torch.cat([rows[..., : len(w)].double() @ w, rows[..., len(w) :]], dim=-1)

        return lambda earlier: [
            ClassStatistics(s.counts, times(s.means, W), times(s.factor, W), times(s.diagonal, W.square()))
            for s in earlier
        ]


class Ssiat(Carried):
    """Each old mean m moves by the mean of f_new - f_old over the new images, weighted by exp(-|f_old - m|^2 / 2 s^2).

    The distance s is `SIGMA` times the root mean square of |f_old - m|. Covariances stay what they were.
    """

    name = "ssiat"
    summary = "sequential, old class means moved by semantic drift compensation (after SSIAT)"

    def fit_move(self, old: Tensor, new: Tensor, statistics: Sequence[ClassStatistics]) -> Move:
        shifts = []
        for s in statistics:
            squares = torch.cdist(s.means[:, : old.shape[1]], old).square()
            sigma2 = (SIGMA**2 * squares.mean(dim=1, keepdim=True)).clamp(min=torch.finfo(torch.float64).tiny)
            shift = (-squares / (2 * sigma2)).softmax(dim=1) @ (new - old)
            shifts.append(F.pad(shift, (0, s.means.shape[1] - shift.shape[1])))
        return lambda earlier: [replace(s, means=s.means + shift) for s, shift in zip(earlier, shifts, strict=True)]


class Fecam(Frozen):
    """The frozen f of each class as a Gaussian of its own, after a power transform; no phi.

    As in FeCAM: features to the power 0.5 (here with their sign, as those of a ViT can be negative); the covariance S
    of a class plus the mean of its variances on the diagonal and the mean of its covariances elsewhere (both weights
    1); scaled to correlations R; (x - m)^T R^-1 (x - m) with x and m of length 1, where m is the transformed mean.
    """

    name = "fecam"
    summary = "frozen network, Mahalanobis distance of each class (FeCAM)"
    classifier = "mean_f"  # what `finish` needs; `compose` puts the distances in its place

    def learn(self, lesson: Lesson) -> TaskRecord:
        """A Gaussian for each class; validation images calibrate first and join it afterwards."""
        record, suffix = super().learn(lesson), self.training_blocks(lesson)
        train, held = lesson.train, lesson.validation
        f, g = (suffix_features(lesson.backbone, suffix, x, lesson.config.precision, "none")[0] for x in (train, held))
        catalogue = Catalogue.of([*(task.info for task in lesson.past), record.info])
        truth = torch.tensor([catalogue.classes.index(name) for name in record.info.classes])[held.labels]
        logits = _distances(
            g, [*(pair for task in lesson.past for pair in _recall(task)), *_gaussians(f, train.labels)]
        )
        curve = CalibrationCurve.of(logits, catalogue.class_sums(), truth)
        _kept[_key(record)] = _gaussians(torch.cat([f, g]), torch.cat([train.labels, held.labels]))
        info = replace(record.info, validation={**record.info.validation, "accuracy": curve.accuracy})
        return replace(record, info=info, curve=curve)

    def compose(self, backbone: Backbone, tasks: Sequence[TaskRecord]) -> ComposedModel:
        model, data = super().compose(backbone, tasks), ClassifierData.of(tasks, backbone.dim)
        mixture, scale = model.classifier.mixture, model.classifier.scale
        fecam = FecamClassifier(model.catalogue, data.gaussian, mean_f(data), mixture, scale, backbone.device)
        fecam.gaussians = [(m.to(backbone.device), w.to(backbone.device)) for t in tasks for m, w in _recall(t)]
        model.classifier = fecam
        return model


class FecamClassifier(Classifier):
    """The classifier with quadratic logits, from the ``gaussians`` of all components."""

    gaussians: Sequence[tuple[Tensor, Tensor]]

    def evidence(self, features: Tensor) -> Tensor:
        return _distances(features, self.gaussians)


def _gaussians(f: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each class of features [n, d] its centre [d] and W [d, d] with W W^T = R^-1, float32."""
    gaussians = []
    for k in range(int(labels.max()) + 1):
        own = f[labels == k].double()
        x = _power(own) - _power(own).mean(dim=0)
        S, eye = x.T @ x / max(len(x) - 1, 1), torch.eye(x.shape[1], dtype=torch.float64)
        variance, covariance = S.diagonal().mean(), (S.sum() - S.trace()) / (S.numel() - len(S))
        S = S + variance * eye + covariance * (1 - eye)
        scale = S.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        root = torch.linalg.cholesky((S / scale / scale[:, None]).fill_diagonal_(1 + FLOOR))
        whitening = torch.linalg.solve_triangular(root, eye, upper=False).T
        gaussians.append((F.normalize(_power(own.mean(dim=0)), dim=0).float(), whitening.float()))
    return gaussians


def _distances(features: Tensor, gaussians: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits [n, K]: squared distances of [f ; phi] or f, negative."""
    x = F.normalize(_power(features[:, : len(gaussians[0][0])]), dim=1)
    return torch.stack([-FECAM_SCALE * ((x - m) @ w).square().sum(dim=1) for m, w in gaussians], dim=1)


def _power(f: Tensor) -> Tensor:
    return f.sign() * f.abs().sqrt()


for method in (DriftMap, Ssiat, Fecam):
    METHODS[method.name] = method
