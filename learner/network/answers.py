"""From features to calibrated answers, and the composed model that gives them: evaluated, exported and served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from duallora_edge.learner.network.network import Network
from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.statistics.calibration import Mixture, NoveltyScale
from duallora_edge.learner.statistics.gaussian import Discriminants, GaussianClassifier

NOVELTY_THRESHOLD = 0.95
LEAST_REMOTENESS, MOST_REMOTENESS = 0.1, 100.0


@dataclass(frozen=True)
class Outputs:
    """Calibrated answers for B images, all float32.

    Attributes:
        probabilities: of each class, [B, C].
        task_probabilities: of each task, [B, T].
        novelty: share of the validation images of known classes that look less novel, 0..1, [B].
        features: [f ; phi], [B, D].
    """

    probabilities: Tensor
    task_probabilities: Tensor
    novelty: Tensor
    features: Tensor


@dataclass(frozen=True)
class Catalogue:
    """Names and order of the classes and tasks that a list of tasks knows.

    A component is one class of one task, so a class that two tasks know has two. ``class_of`` and ``task_of``,
    int64 [K], map components to classes and tasks.
    """

    classes: tuple[str, ...]
    tasks: tuple[str, ...]
    class_of: Tensor
    task_of: Tensor

    @classmethod
    def of(cls, infos: Sequence[TaskInfo]) -> Catalogue:
        """The catalogue of tasks; classes are in the order in which they appear first."""
        names = list(dict.fromkeys(name for info in infos for name in info.classes))
        class_of = [names.index(name) for info in infos for name in info.classes]
        task_of = [index for index, info in enumerate(infos) for _ in info.classes]
        return cls(tuple(names), tuple(i.name for i in infos), torch.tensor(class_of), torch.tensor(task_of))

    def class_sums(self) -> Tensor:
        """Matrix [K, C] of zeros and ones that adds the probabilities of the components of a class."""
        return nn.functional.one_hot(self.class_of, len(self.classes)).float()

    def members(self) -> Tensor:
        """The components of each task, int64 [T, most components of a task]; short rows repeat their first one."""
        rows = [(self.task_of == task).nonzero()[:, 0] for task in range(len(self.tasks))]
        longest = max(len(row) for row in rows)
        return torch.stack([torch.cat([row, row[:1].expand(longest - len(row))]) for row in rows])

    def task_sums(self) -> Tensor:
        """Matrix [K, T] of zeros and ones that adds the probabilities of the components of a task."""
        return nn.functional.one_hot(self.task_of, len(self.tasks)).float()


@dataclass(frozen=True)
class Scores(Discriminants):
    """The logits v = x weight^T + bias of K components, functions of features x [B, D].

    Attributes:
        expansion: [M, D]; where it is given, relu(x expansion^T) [B, M] is read instead of x, and ``weight`` is [K, M].
        within: discriminants u of the classes of each task alone, or none. Where they are given, the likeliest
            component of a task keeps its logit among all tasks, and the others stand behind it as they do in u: the
            logits are v' = u - max u + max v, with both maxima over the task.
    """

    expansion: Tensor | None = None
    within: Sequence[Discriminants] = ()


class Classifier(nn.Module):
    """Calibrated class, task and novelty answers from the features [f ; phi].

    ``scores`` decide the class. The logits are calibrated after a division by the `remoteness` of the image: the
    further an image lies from what was learned, the less they say. The novelty is the relative Mahalanobis distance
    (Ren et al. 2021, arXiv 2106.09022) under the ``gaussian`` of all features: the squared distance to the nearest
    component minus the squared distance to the mean of all images under their covariance. It is a function of the
    Gaussian logits alone, so no D x D matrix is needed.
    """

    weight: Tensor
    bias: Tensor
    expansion: Tensor
    within_weight: Tensor
    within_bias: Tensor
    members: Tensor
    gaussian_weight: Tensor
    gaussian_bias: Tensor
    centre: Tensor
    precision: Tensor
    background: Tensor
    background_bias: Tensor
    novelty_start: Tensor
    novelty_width: Tensor
    novelty_height: Tensor
    class_sums: Tensor
    task_sums: Tensor

    def __init__(
        self,
        catalogue: Catalogue,
        gaussian: GaussianClassifier,
        scores: Scores,
        mixture: Mixture,
        scale: NoveltyScale,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.mixture, self.scale = mixture, scale
        background, background_bias = gaussian.background()
        start, width, height = scale.steps()
        _set_buffers(
            self,
            device,
            weight=scores.weight,
            bias=scores.bias,
            expansion=torch.zeros(0, 0) if scores.expansion is None else scores.expansion,
            within_weight=torch.cat([each.weight for each in scores.within]) if scores.within else torch.zeros(0, 0),
            within_bias=torch.cat([each.bias for each in scores.within]) if scores.within else torch.zeros(0),
            gaussian_weight=gaussian.weight,
            gaussian_bias=gaussian.bias,
            centre=gaussian.centre,
            precision=1 / (len(gaussian.centre) * gaussian.variances),
            background=background,
            background_bias=background_bias,
            novelty_start=start,
            novelty_width=width,
            novelty_height=height,
            class_sums=catalogue.class_sums(),
            task_sums=catalogue.task_sums(),
        )
        self.register_buffer("members", catalogue.members().to(device), persistent=False)

    def logits(self, features: Tensor) -> Tensor:
        """Uncalibrated logits of the components [B, K] of features [B, D]."""
        read = (features @ self.expansion.T).relu() if self.expansion.numel() else features
        logits = read @ self.weight.T + self.bias
        if not len(self.within_bias):
            return logits
        within = features @ self.within_weight.T + self.within_bias
        best, best_within = (each[:, self.members].amax(dim=2) for each in (logits, within))
        return within + (best - best_within) @ self.task_sums.T

    def remoteness(self, features: Tensor) -> Tensor:
        """The mean squared deviation from the mean image in units of the variances, [B]: 1 on average, from 0.1 to 100.

        It stands for the distance by which the posterior predictive of Gaussians with estimated parameters, a Student's
        t, flattens its odds (e.g. Murphy 2012, section 4.6.3), and needs two numbers a feature.
        """
        return ((features - self.centre).square() @ self.precision).clamp(LEAST_REMOTENESS, MOST_REMOTENESS)

    def evidence(self, features: Tensor) -> Tensor:
        """The logits of the components [B, K] in units of the remoteness, of which calibrated ones are made."""
        return self.logits(features) / self.remoteness(features)[:, None]

    def raw_novelty(self, features: Tensor) -> Tensor:
        """Relative squared Mahalanobis distance [B]: negative for images nearer to a class than to the mean of all."""
        logits = features @ self.gaussian_weight.T + self.gaussian_bias
        background = (logits @ self.background + self.background_bias).square().sum(dim=1)
        return background - 2 * logits.amax(dim=1)

    def novelty(self, features: Tensor) -> Tensor:
        """The raw novelty on the scale of validation images, 0..1, [B]."""
        steps = (self.raw_novelty(features)[:, None] - self.novelty_start) / self.novelty_width
        return steps.clamp(0, 1) @ self.novelty_height

    def forward(self, features: Tensor) -> Outputs:
        """Calibrated outputs of features [B, D]."""
        components = self.mixture(self.evidence(features))
        return Outputs(
            probabilities=components @ self.class_sums,
            task_probabilities=components @ self.task_sums,
            novelty=self.novelty(features),
            features=features,
        )


class ComposedModel(nn.Module):
    """The whole model: frames in, calibrated answers out. `methods.compose` makes it from the tasks of a run."""

    def __init__(self, catalogue: Catalogue, network: Network, classifier: Classifier) -> None:
        super().__init__()
        self.catalogue, self.network, self.classifier = catalogue, network, classifier

    def forward(self, images: Tensor) -> Outputs:
        """Outputs of RGB frames uint8 [B, S, S, 3]."""
        outputs: Outputs = self.classifier(self.network(images))
        return outputs

    def from_prefix(self, tokens: Tensor, phi: Tensor) -> Outputs:
        """Outputs of cached prefix tokens [B, L, d] and summaries phi."""
        outputs: Outputs = self.classifier(self.network.from_prefix(tokens, phi)[0])
        return outputs


def _set_buffers(module: nn.Module, device: torch.device, **values: Tensor) -> None:
    for name, value in values.items():
        module.register_buffer(name, value.float().to(device), persistent=False)
