"""The network that a list of learned tasks makes: the model that answers, is evaluated and is exported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from duallora_edge.learner.network.adapters import AdaptedBlock, Adapter, Collect, Rows, fold
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.network.task_record import BlockRecord
from duallora_edge.learner.statistics.calibration import Mixture, NoveltyScale
from duallora_edge.learner.statistics.gaussian import GaussianClassifier

NOVELTY_THRESHOLD = 0.95


@dataclass(frozen=True)
class Outputs:
    """Calibrated answers for B images, float32: probabilities [B, C], task_probabilities [B, T], novelty [B] in
    0..1 (the share of held-back images of known classes that look less novel), features [B, D] (f and phi)."""

    probabilities: Tensor
    task_probabilities: Tensor
    novelty: Tensor
    features: Tensor


@dataclass(frozen=True)
class Catalogue:
    """Names and order of everything a list of tasks knows.

    A component is one class of one task. ``class_of`` and ``task_of`` [K] map components to classes and tasks.
    """

    classes: tuple[str, ...]
    tasks: tuple[str, ...]
    class_of: Tensor
    task_of: Tensor

    @classmethod
    def of(cls, infos: Sequence[TaskInfo]) -> Catalogue:
        names = list(dict.fromkeys(name for info in infos for name in info.classes))
        class_of = [names.index(name) for info in infos for name in info.classes]
        task_of = [index for index, info in enumerate(infos) for _ in info.classes]
        return cls(tuple(names), tuple(i.name for i in infos), torch.tensor(class_of), torch.tensor(task_of))

    def class_sums(self) -> Tensor:
        """Matrix [K, C] of zeros and ones that adds the probabilities of the components of a class."""
        return nn.functional.one_hot(self.class_of, len(self.classes)).float()

    def task_sums(self) -> Tensor:
        """Matrix [K, T] of zeros and ones that adds the probabilities of the components of a task."""
        return nn.functional.one_hot(self.task_of, len(self.tasks)).float()


def gate_matrix(infos: Sequence[TaskInfo], ranks: Sequence[int]) -> Tensor:
    """G [T, sum of ranks] such that the gates of an image with task posterior p are p G.

    A rank of an isolated residual of task s is opened by p_s, one of a ``previous`` residual by P(task >= s):
    either way the gates recreate the network in which the image's own task was trained. Gate ``open`` never closes.
    """
    columns = []
    for task, (info, rank) in enumerate(zip(infos, ranks, strict=True)):
        column = torch.zeros(len(infos), rank)
        if info.gate == "open":
            column[:] = 1
        elif info.residual == "previous":
            column[task:] = 1
        else:
            column[task] = 1
        columns.append(column)
    return torch.cat(columns, dim=1) if columns else torch.zeros(0, 0)


class DynamicMemory(nn.Module):
    """p(t | x) from the prefix summary phi: class Gaussians with one covariance, summed over the classes of a task.

    The prefix never changes, so the statistics of old tasks stay valid for ever. One image is read at a time,
    never the batch. ``gaussian`` is of phi, its components are ``classes`` [T] of each task in turn.
    """

    weight: Tensor
    bias: Tensor
    task_sums: Tensor

    def __init__(
        self, gaussian: GaussianClassifier, classes: Sequence[int], temperature: float, device: torch.device
    ) -> None:
        super().__init__()
        sums = torch.block_diag(*(torch.ones(count, 1) for count in classes))
        self.temperature = temperature
        _set_buffers(self, device, weight=gaussian.weight, bias=gaussian.bias, task_sums=sums)

    def logits(self, phi: Tensor) -> Tensor:
        """Log-likelihoods of phi up to a common term, one a component, [B, K]."""
        return phi @ self.weight.T + self.bias

    def forward(self, phi: Tensor) -> Tensor:
        """Task posterior [B, T] of summaries phi."""
        return (self.logits(phi) / self.temperature).softmax(dim=1) @ self.task_sums


class Network(nn.Module):
    """Backbone plus the updates of a list of tasks; weights are re-summed from the immutable base, in fp32.

    ``updates`` holds one sequence of block records a task; ``is_untouched`` says that they change nothing.
    """

    def __init__(
        self,
        backbone: Backbone,
        infos: Sequence[TaskInfo],
        updates: Sequence[Sequence[BlockRecord]],
        memory: DynamicMemory,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.memory = memory
        self.blocks = [AdaptedBlock(block) for block in backbone.suffix]
        adapters = [a for blocks in updates for block in blocks for a in (block.orthogonal, block.residual)]
        self.is_untouched = not any(len(a.q_down) or len(a.v_down) for a in adapters)
        for index, block in enumerate(self.blocks):
            records = [blocks[index] for blocks in updates]
            block.weight = fold_all(block.weight, [record.orthogonal for record in records])
            ranks = [len(record.residual.q_down) for record in records]
            if sum(ranks):
                stacked = (torch.cat(parts) for parts in zip(*(r.residual for r in records), strict=True))
                block.adapter = Adapter(*(part.to(block.weight) for part in stacked))
                block.gate_map = gate_matrix(infos, ranks).to(block.weight)

    def from_prefix(self, tokens: Tensor, phi: Tensor, *, collect: Collect = "none") -> tuple[Tensor, list[Rows]]:
        """Features [f ; phi] [B, D] of prefix tokens [B, L, d] and summaries phi, each under its own gates.

        With ``collect`` also what each block's projections read (see `run_suffix`).
        """
        with torch.autocast(phi.device.type, enabled=False):  # gates and phi keep full precision
            posterior = self.memory(phi)
        f, rows = run_suffix(self.backbone, self.blocks, tokens, posterior, collect=collect)
        return torch.cat([f.float(), phi], dim=1), rows

    def forward(self, images: Tensor) -> Tensor:
        """Features [f ; phi] [B, D] of RGB frames uint8 [B, S, S, 3]."""
        return self.from_prefix(*self.backbone.prefix(images))[0]


@dataclass(frozen=True)
class Scores:
    """The logits of K components as an affine function of features [B, D]: weight [K, D'], bias [K].

    With an ``expansion`` [M, D] they read relu(x expansion^T) [B, M] instead of x. ``inflation`` is how much more they
    vary among new images than among those they were fitted to, None where that is not known.
    """

    weight: Tensor
    bias: Tensor
    expansion: Tensor | None = None
    inflation: float | None = None


class Classifier(nn.Module):
    """Calibrated class, task and novelty answers from the features [f ; phi].

    ``scores`` decide the class. The novelty is the relative Mahalanobis distance (Ren et al. 2021), from the
    ``gaussian`` of all features: the squared distance to the nearest component less that to the mean of all images
    under the covariance of all images. A function of the Gaussian logits alone, it needs no D x D matrix.
    """

    weight: Tensor
    bias: Tensor
    expansion: Tensor
    gaussian_weight: Tensor
    gaussian_bias: Tensor
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
            gaussian_weight=gaussian.weight,
            gaussian_bias=gaussian.bias,
            background=background,
            background_bias=background_bias,
            novelty_start=start,
            novelty_width=width,
            novelty_height=height,
            class_sums=catalogue.class_sums(),
            task_sums=catalogue.task_sums(),
        )

    def logits(self, features: Tensor) -> Tensor:
        """Uncalibrated logits of the components [B, K] of features [B, D]."""
        if self.expansion.numel():
            features = (features @ self.expansion.T).relu()
        return features @ self.weight.T + self.bias

    def raw_novelty(self, features: Tensor) -> Tensor:
        """Relative squared Mahalanobis distance [B]: below 0 for images nearer to a class than to all images."""
        logits = features @ self.gaussian_weight.T + self.gaussian_bias
        background = (logits @ self.background + self.background_bias).square().sum(dim=1)
        return background - 2 * logits.amax(dim=1)

    def novelty(self, features: Tensor) -> Tensor:
        """The raw novelty on the scale of held-back images, 0..1, [B]."""
        steps = (self.raw_novelty(features)[:, None] - self.novelty_start) / self.novelty_width
        return steps.clamp(0, 1) @ self.novelty_height

    def forward(self, features: Tensor) -> Outputs:
        """Calibrated outputs of features [B, D]."""
        components = self.mixture(self.logits(features))
        return Outputs(
            probabilities=components @ self.class_sums,
            task_probabilities=components @ self.task_sums,
            novelty=self.novelty(features),
            features=features,
        )


class ComposedModel(nn.Module):
    """The whole: frames in, calibrated answers out. `methods.compose` makes one from the tasks of a run."""

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


def fold_all(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """The fused qkv weight with adapters folded in one after the other."""
    for adapter in adapters:
        weight = fold(weight, adapter)
    return weight


def run_suffix(
    backbone: Backbone,
    blocks: Iterable[AdaptedBlock],
    tokens: Tensor,
    posterior: Tensor | None = None,
    *,
    collect: Collect = "none",
    recompute: bool = False,
) -> tuple[Tensor, list[Rows]]:
    """Final features f [B, d] of prefix tokens [B, L, d], and what each block's projections read (``collect``).

    The last block is computed for the class token alone where the backbone pools by it. Where it pools over the
    tokens, every token counts and ``class`` means ``all``. With ``recompute`` only the input of a block is kept for
    the gradient, and the rest computed again.
    """
    collected = []
    blocks = list(blocks)
    if collect == "class" and not backbone.pools_class_token:
        collect = "all"
    for block in blocks:
        last = block is blocks[-1]
        run = partial(block, class_token_only=last and backbone.pools_class_token, collect=collect)
        if recompute:
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        tokens, rows = run(tokens, posterior)
        if rows is not None:
            collected.append(rows)
    return backbone.feature(tokens), collected
