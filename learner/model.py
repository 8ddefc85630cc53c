"""The network that a list of learned tasks makes: the model that answers, is evaluated and is exported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from duallora_edge.learner.adapters import AdaptedBlock, Adapter, Rows, fold
from duallora_edge.learner.backbone import Backbone
from duallora_edge.learner.gaussian import ClassStatistics, GaussianClassifier
from duallora_edge.learner.record import TEMPERATURES, BlockRecord, TaskInfo, TaskRecord

DEFAULT_TASK_TEMPERATURE = 4.0
DEFAULT_CLASS_TEMPERATURE = 8.0
NOVELTY_QUANTILES = (0.5, 0.9, 0.95, 0.99)
NOVELTY_QUANTILE = 0.95


@dataclass(frozen=True)
class Outputs:
    """Calibrated answers for B images: probabilities [B, C], task_probabilities [B, T], novelty [B], features
    [B, d + 3d] (f and phi), float32."""

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


def best_temperature(curves: Sequence[Tensor], default: float) -> float:
    """The temperature with the least held-back negative log-likelihood summed over tasks; ``default`` without any."""
    total = torch.stack([curve.double() for curve in curves]).sum(dim=0)
    if float(total.abs().sum()) == 0:
        return default
    return TEMPERATURES[int(total.argmin())]


def gate_matrix(infos: Sequence[TaskInfo], ranks: Sequence[int]) -> Tensor:
    """G [T, sum of ranks] such that the gates of an image with task posterior p are p G.

    A rank of an isolated residual of task s is opened by p_s, one of a ``previous`` residual by P(task >= s):
    either way the gates recreate the network in which the image's own task was trained.
    """
    columns = []
    for task, (info, rank) in enumerate(zip(infos, ranks, strict=True)):
        column = torch.zeros(len(infos), rank)
        if info.residual == "previous":
            column[task:] = 1
        else:
            column[task] = 1
        columns.append(column)
    return torch.cat(columns, dim=1) if columns else torch.zeros(0, 0)


class DynamicMemory(nn.Module):
    """p(t | x) from the prefix summary phi: class Gaussians with one covariance, summed over the classes of a task.

    The prefix never changes, so the statistics of old tasks stay valid for ever. One image is read at a time,
    never the batch. ``statistics`` are of phi, one a task.
    """

    weight: Tensor
    bias: Tensor
    task_sums: Tensor

    def __init__(self, statistics: Sequence[ClassStatistics], temperature: float, device: torch.device) -> None:
        super().__init__()
        gaussian = GaussianClassifier.fit(statistics)
        sums = torch.block_diag(*(torch.ones(len(s.counts), 1) for s in statistics))
        self.temperature = temperature
        _set_buffers(self, device, weight=gaussian.weight, bias=gaussian.bias, task_sums=sums)

    def logits(self, phi: Tensor) -> Tensor:
        """Log-likelihoods of phi [B, 3d] up to a common term, one a component, [B, K]."""
        return phi @ self.weight.T + self.bias

    def forward(self, phi: Tensor) -> Tensor:
        """Task posterior [B, T] of summaries [B, 3d]."""
        return (self.logits(phi) / self.temperature).softmax(dim=1) @ self.task_sums


class Network(nn.Module):
    """Backbone plus the updates of a list of tasks; weights are re-summed from the immutable base, in fp32.

    ``updates`` holds one sequence of block records a task.
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
        for index, block in enumerate(self.blocks):
            records = [blocks[index] for blocks in updates]
            block.weight = fold_all(block.weight, [record.orthogonal for record in records])
            ranks = [len(record.residual.q_down) for record in records]
            if sum(ranks):
                stacked = (torch.cat(parts) for parts in zip(*(r.residual for r in records), strict=True))
                block.adapter = Adapter(*(part.to(block.weight) for part in stacked))
                block.gate_map = gate_matrix(infos, ranks).to(block.weight)

    def from_prefix(self, tokens: Tensor, phi: Tensor, *, collect: bool = False) -> tuple[Tensor, list[Rows]]:
        """Features [f ; phi] [B, D] of prefix tokens [B, L, d] and summaries [B, 3d], each under its own gates.

        With ``collect`` also what each block's projections read (see `AdaptedBlock.forward`).
        """
        f, rows = run_suffix(self.backbone, self.blocks, tokens, self.memory(phi), collect=collect)
        return torch.cat([f, phi], dim=1), rows

    def forward(self, images: Tensor) -> Tensor:
        """Features [f ; phi] [B, D] of RGB frames uint8 [B, S, S, 3]."""
        tokens = self.backbone.prefix(images)
        return self.from_prefix(tokens, self.backbone.summary(tokens))[0]


class Classifier(nn.Module):
    """Calibrated class, task and novelty answers from the features [f ; phi]: one matrix product and a softmax.

    The components' logits are linear discriminants of ``statistics`` or, when ``heads`` [K, d + 1] are given,
    trained linear heads on f (bias last).
    """

    weight: Tensor
    bias: Tensor
    nearest_weight: Tensor
    nearest_bias: Tensor
    whitening: Tensor
    offset: Tensor
    class_sums: Tensor
    task_sums: Tensor

    def __init__(
        self,
        catalogue: Catalogue,
        statistics: Sequence[ClassStatistics],
        heads: Tensor | None,
        temperature: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        gaussian = GaussianClassifier.fit(statistics)
        weight, bias = gaussian.weight, gaussian.bias
        if heads is not None:
            weight = nn.functional.pad(heads[:, :-1], (0, weight.shape[1] - heads.shape[1] + 1))
            bias = heads[:, -1]
        self.temperature = temperature
        _set_buffers(
            self,
            device,
            weight=weight,
            bias=bias,
            nearest_weight=gaussian.weight,
            nearest_bias=gaussian.bias,
            whitening=gaussian.whitening,
            offset=gaussian.offset,
            class_sums=catalogue.class_sums(),
            task_sums=catalogue.task_sums(),
        )

    def logits(self, features: Tensor) -> Tensor:
        """Uncalibrated logits of the components [B, K] of features [B, D]."""
        return features @ self.weight.T + self.bias

    def novelty(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distance to the nearest component, divided by D: about 1 for a known class. [B]"""
        squared = (features @ self.whitening + self.offset).square().sum(dim=1)
        nearest = (features @ self.nearest_weight.T + self.nearest_bias).amax(dim=1)
        return (squared - 2 * nearest).clamp(min=0) / features.shape[1]

    def forward(self, features: Tensor) -> Outputs:
        """Calibrated outputs of features [B, D]."""
        components = (self.logits(features) / self.temperature).softmax(dim=1)
        return Outputs(
            probabilities=components @ self.class_sums,
            task_probabilities=components @ self.task_sums,
            novelty=self.novelty(features),
            features=features,
        )


class ComposedModel(nn.Module):
    """The whole: frames in, calibrated answers out, for the tasks given (at least one)."""

    def __init__(self, backbone: Backbone, tasks: Sequence[TaskRecord]) -> None:
        super().__init__()
        infos = [task.info for task in tasks]
        device = backbone.device
        phi = slice(backbone.dim, None)
        memory = DynamicMemory(
            [task.statistics.part(phi) for task in tasks],
            best_temperature([task.task_nll for task in tasks], DEFAULT_TASK_TEMPERATURE),
            device,
        )
        self.catalogue = Catalogue.of(infos)
        self.network = Network(backbone, infos, [task.blocks for task in tasks], memory)
        self.classifier = Classifier(
            self.catalogue,
            [task.statistics for task in tasks],
            task_heads(tasks),
            best_temperature([task.class_nll for task in tasks], DEFAULT_CLASS_TEMPERATURE),
            device,
        )
        self.novelty_threshold = _novelty_threshold(tasks)

    def forward(self, images: Tensor) -> Outputs:
        """Outputs of RGB frames uint8 [B, S, S, 3]."""
        outputs: Outputs = self.classifier(self.network(images))
        return outputs

    def from_prefix(self, tokens: Tensor, phi: Tensor) -> Outputs:
        """Outputs of cached prefix tokens [B, L, d] and summaries [B, 3d]."""
        outputs: Outputs = self.classifier(self.network.from_prefix(tokens, phi)[0])
        return outputs


def task_heads(tasks: Sequence[TaskRecord]) -> Tensor | None:
    """The trained heads [K, d + 1] of all tasks where the method answers with them (``sequential``), else None."""
    if tasks[-1].info.method != "sequential":
        return None
    return torch.cat([task.head for task in tasks])


def _novelty_threshold(tasks: Sequence[TaskRecord]) -> float | None:
    """The image-weighted mean of the tasks' held-back novelty quantiles; None when nothing was held back."""
    counts = [float(task.info.held_back.get("images") or 0) for task in tasks]
    if not sum(counts):
        return None
    column = NOVELTY_QUANTILES.index(NOVELTY_QUANTILE)
    return sum(n * float(task.novelty[column]) for n, task in zip(counts, tasks, strict=True)) / sum(counts)


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
    collect: bool = False,
) -> tuple[Tensor, list[Rows]]:
    """Final features f [B, d] of prefix tokens [B, L, d], and what each block's projections read if ``collect``.

    The last block is computed for the class token alone where the backbone pools by it.
    """
    collected = []
    blocks = list(blocks)
    for block in blocks:
        last = block is blocks[-1]
        tokens, rows = block(
            tokens,
            posterior,
            class_token_only=last and backbone.pools_class_token,
            collect=collect,
            pool_tokens=not backbone.pools_class_token,
        )
        if rows is not None:
            collected.append(rows)
    return backbone.feature(tokens), collected
