"""The recipe that learns one task, from its decoded images to a `TaskRecord`.

Read top to bottom: encode the images with the frozen prefix, decide how the residual adapter is gated, choose the
down-projections, train the up-projections, then collect bases, statistics and calibration in the finished network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora_edge.learner.adapters import AdaptedBlock, Adapter, Rows
from duallora_edge.learner.backbone import Backbone
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.data.augment import Augment
from duallora_edge.learner.encode import Encoded
from duallora_edge.learner.gaussian import ClassStatistics
from duallora_edge.learner.model import (
    DEFAULT_TASK_TEMPERATURE,
    NOVELTY_QUANTILES,
    Catalogue,
    Classifier,
    DynamicMemory,
    Network,
    best_temperature,
    fold_all,
    run_suffix,
)
from duallora_edge.learner.record import TEMPERATURES, BlockRecord, TaskInfo, TaskRecord, empty_adapter
from duallora_edge.learner.subspace import (
    constrained_directions,
    empty_basis,
    inside_directions,
    new_directions,
    second_moment,
    top_directions,
    union,
)

RELIABLE_IDENTITY = 0.9

Progress = Callable[[str, int, int], None]


class Checkpoint(Protocol):
    """Where training in progress is kept: tensors by name, with the number of steps done."""

    def load(self) -> tuple[int, dict[str, Tensor]] | None: ...

    def save(self, step: int, tensors: dict[str, Tensor]) -> None: ...


def learn_task(
    backbone: Backbone,
    past: Sequence[TaskRecord],
    task: PreparedTask,
    config: TrainConfig,
    checkpoint: Checkpoint,
    progress: Progress,
) -> TaskRecord:
    """Learn one task after the tasks ``past`` and return its record. Nothing of ``past`` is changed.

    The same inputs give the same record bit for bit on one machine (CPU, fp32), also when training was
    interrupted and continued from ``checkpoint``.
    """
    train = Encoded(backbone, task.train, task.classes, partial(progress, "encode"))
    held = Encoded(backbone, task.validation, task.classes)
    phi_statistics = ClassStatistics.of(train.phi, train.labels, len(task.classes))
    memory = [*(record.statistics.part(slice(backbone.dim, None)) for record in past), phi_statistics]
    identity = _task_identity(memory, held) if past and len(held) else None
    trains = config.method != "frozen" and len(task.classes) > 1
    info = TaskInfo(
        name=task.name,
        classes=task.classes,
        method=config.method,
        residual=_residual_mode(config, past, identity, len(held)) if trains else "none",
        seed=config.seed,
        data_digest=task.digest,
        counts={name: int((train.labels == k).sum()) for k, name in enumerate(task.classes)},
        held_back={"images": len(held), "task_accuracy": identity.accuracy if identity else None},
    )
    if trains:
        blocks, head = _train(backbone, past, info, train, config, checkpoint, progress)
    else:
        blocks, head = _untrained(backbone, len(task.classes))
    task_nll = identity.nll if identity else torch.zeros(len(TEMPERATURES))
    temperature = best_temperature([*(record.task_nll for record in past), task_nll], DEFAULT_TASK_TEMPERATURE)
    network = Network(
        backbone,
        [*(record.info for record in past), info],
        [*(record.blocks for record in past), blocks],
        DynamicMemory(memory, temperature, backbone.device),
    )
    return _finish(network, past, info, blocks, head, train, held, task_nll, config.energy)


@dataclass(frozen=True)
class _Identity:
    """How well the prefix tells the newest task from the earlier ones, on its held-back images."""

    nll: Tensor
    accuracy: float


def _task_identity(memory: Sequence[ClassStatistics], held: Encoded) -> _Identity:
    model = DynamicMemory(memory, 1.0, torch.device("cpu"))
    logits = model.logits(held.phi).double()
    sums = model.task_sums.double()
    posteriors = [(logits / t).softmax(dim=1) @ sums for t in TEMPERATURES]
    nll = torch.stack([-p[:, -1].clamp(min=1e-12).log().sum() for p in posteriors])
    # The least temperature all but picks the task of the likeliest class, whatever temperature is chosen later.
    correct = posteriors[0].argmax(dim=1) == len(memory) - 1
    return _Identity(nll, float(correct.double().mean()))


def _residual_mode(config: TrainConfig, past: Sequence[TaskRecord], new: _Identity | None, count: int) -> str:
    """``isolated`` while the task identity is reliable on held-back images of the tasks so far, else ``previous``."""
    if config.method != "dual_lora" or config.rank_residual == 0:
        return "none"
    if config.residual != "auto":
        return config.residual
    measured = [(task.info.held_back["images"], task.info.held_back["task_accuracy"]) for task in past]
    measured.append((count, new.accuracy if new else None))
    known = [(n, accuracy) for n, accuracy in measured if n and accuracy is not None]
    if not known:
        return "isolated"
    reliable = sum(n * accuracy for n, accuracy in known) / sum(n for n, _ in known) >= RELIABLE_IDENTITY
    return "isolated" if reliable else "previous"


def _untrained(backbone: Backbone, classes: int) -> tuple[tuple[BlockRecord, ...], Tensor]:
    """Records without adapters. A task of one class has no gradient to learn from: its statistics are learned."""
    empty = empty_adapter(backbone.dim)
    none = empty_basis(backbone.dim)
    return tuple(BlockRecord(empty, empty, none, none) for _ in backbone.suffix), torch.zeros(classes, backbone.dim + 1)


def _training_blocks(backbone: Backbone, past: Sequence[TaskRecord]) -> list[AdaptedBlock]:
    """The suffix in which a new task is trained: every orthogonal update, and the residuals that will be open.

    Residuals of mode ``previous`` have gate P(task >= s) = 1 for images of a newer task; isolated ones have 0.
    """
    blocks = [AdaptedBlock(block) for block in backbone.suffix]
    for index, block in enumerate(blocks):
        records = [task.blocks[index] for task in past]
        on = [task.blocks[index].residual for task in past if task.info.residual == "previous"]
        block.weight = fold_all(block.weight, [*(record.orthogonal for record in records), *on])
    return blocks


@torch.no_grad()
def _moments(backbone: Backbone, blocks: Sequence[AdaptedBlock], train: Encoded) -> list[tuple[Tensor, Tensor]]:
    """Second moments [d, d] of what the query and value projections of each block read, before training."""
    totals: list[tuple[Tensor, Tensor]] = []
    for _, tokens, _ in train.batches():
        _, rows = run_suffix(backbone, blocks, tokens, collect=True)
        totals = add_moments(totals, rows)
    return totals


def add_moments(totals: list[tuple[Tensor, Tensor]], rows: Sequence[Rows]) -> list[tuple[Tensor, Tensor]]:
    """Running second moments, (query, value) a block, with one more batch of rows."""
    new = [(second_moment(r.q).cpu(), second_moment(r.v).cpu()) for r in rows]
    return [(q + a, v + b) for (q, v), (a, b) in zip(totals, new, strict=True)] if totals else new


def _directions(
    moments: tuple[Tensor, Tensor], past: Sequence[BlockRecord], info: TaskInfo, config: TrainConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The fixed down-projections of one block: orthogonal for query and value, residual shared by both.

    Fixing them keeps the constraint exact under any optimiser: an update (x A^T) B cannot reach what A is
    orthogonal to. ``sequential`` spends both ranks on unconstrained leading directions.
    """
    q, v = moments
    dim = q.shape[0]
    if info.method == "sequential":
        rank = config.rank_orthogonal + config.rank_residual
        return top_directions(q, rank), top_directions(v, rank), empty_basis(dim)
    q_basis = torch.cat([empty_basis(dim), *(record.q_basis.double() for record in past)])
    v_basis = torch.cat([empty_basis(dim), *(record.v_basis.double() for record in past)])
    both = q / q.trace() + v / v.trace()
    residual = empty_basis(dim)
    if info.residual == "isolated":
        residual = top_directions(both, config.rank_residual)
    elif info.residual == "previous" and past:
        newest = union(past[-1].q_basis.double(), past[-1].v_basis.double())
        residual = inside_directions(both, newest, config.rank_residual)
    return (
        constrained_directions(q, q_basis, config.rank_orthogonal),
        constrained_directions(v, v_basis, config.rank_orthogonal),
        residual,
    )


def _train(
    backbone: Backbone,
    past: Sequence[TaskRecord],
    info: TaskInfo,
    train: Encoded,
    config: TrainConfig,
    checkpoint: Checkpoint,
    progress: Progress,
) -> tuple[tuple[BlockRecord, ...], Tensor]:
    """Train the up-projections and a linear head with cross-entropy over the task's own classes."""
    blocks = _training_blocks(backbone, past)
    moments = _moments(backbone, blocks, train)
    ranks: list[tuple[int, int]] = []
    adapters: list[Adapter] = []
    for index, block in enumerate(blocks):
        q, v, residual = _directions(moments[index], [task.blocks[index] for task in past], info, config)
        ranks.append((len(q), len(v)))
        q_down, v_down = (torch.cat([own, residual]).float().to(backbone.device) for own in (q, v))
        adapters.append(
            Adapter(q_down, nn.Parameter(torch.zeros_like(q_down)), v_down, nn.Parameter(torch.zeros_like(v_down)))
        )
        block.adapter = adapters[-1]
    head = nn.Parameter(torch.zeros(len(info.classes), backbone.dim + 1, device=backbone.device))
    _optimise(
        backbone,
        blocks,
        [head, *(a.q_up for a in adapters), *(a.v_up for a in adapters)],
        train,
        config,
        len(past),
        checkpoint,
        progress,
    )
    none = empty_basis(backbone.dim)
    records = []
    for (q_rank, v_rank), adapter in zip(ranks, adapters, strict=True):
        a = Adapter(*(part.detach().cpu() for part in adapter))
        orthogonal = Adapter(a.q_down[:q_rank], a.q_up[:q_rank], a.v_down[:v_rank], a.v_up[:v_rank])
        residual_part = Adapter(a.q_down[q_rank:], a.q_up[q_rank:], a.v_down[v_rank:], a.v_up[v_rank:])
        records.append(BlockRecord(orthogonal, residual_part, none, none))
    return tuple(records), head.detach().cpu()


def _optimise(
    backbone: Backbone,
    blocks: Sequence[AdaptedBlock],
    parameters: Sequence[Tensor],
    train: Encoded,
    config: TrainConfig,
    task: int,
    checkpoint: Checkpoint,
    progress: Progress,
) -> None:
    """Adam with a cosine rate over shuffled epochs; the order of images depends on seed, task and epoch alone."""
    labels = train.labels
    epoch_steps = math.ceil(len(labels) / config.batch_size)
    total = max(config.epochs * epoch_steps, config.min_steps)
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    start = _restore(checkpoint, optimizer, parameters)
    device, head = backbone.device, parameters[0]
    augment = Augment(config.augment, horizontal_flip=config.flip)
    order, generator = torch.empty(0, dtype=torch.long), torch.Generator()
    for step in range(start, total):
        epoch, position = divmod(step, epoch_steps)
        if position == 0 or step == start:
            order = torch.randperm(len(labels), generator=generator.manual_seed(_mix(config.seed, task, epoch)))
        batch = order[position * config.batch_size :][: config.batch_size]
        view = None
        if config.augment != "none" or config.flip:
            view = partial(augment, generator=torch.Generator().manual_seed(_mix(config.seed, task, step, 1)))
        tokens = train.batch(batch, view)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            f, _ = run_suffix(backbone, blocks, tokens)
        loss = F.cross_entropy(F.linear(f.float(), head[:, :-1], head[:, -1]), labels[batch].to(device))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % config.checkpoint_steps == 0:
            _save(checkpoint, step + 1, optimizer, parameters)
        progress("train", step + 1, total)


def _mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers (SeedSequence keeps nearby seeds independent)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _save(checkpoint: Checkpoint, step: int, optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> None:
    tensors = {}
    for index, parameter in enumerate(parameters):
        tensors[f"{index}.value"] = parameter.detach().cpu()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{index}.{key}"] = optimizer.state[parameter][key].cpu()
    checkpoint.save(step, tensors)


def _restore(checkpoint: Checkpoint, optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> int:
    saved = checkpoint.load()
    if saved is None:
        return 0
    step, tensors = saved
    for index, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"{index}.value"])
        moments = {key: tensors[f"{index}.{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


@torch.no_grad()
def _finish(
    network: Network,
    past: Sequence[TaskRecord],
    info: TaskInfo,
    blocks: tuple[BlockRecord, ...],
    head: Tensor,
    train: Encoded,
    held: Encoded,
    task_nll: Tensor,
    energy: float,
) -> TaskRecord:
    """Bases, statistics and calibration, collected in the finished network under the gates of inference."""
    features, moments = _collect(network, train, collect=info.method == "dual_lora")
    if moments:
        blocks = tuple(
            replace(
                block,
                q_basis=_extend([task.blocks[i].q_basis for task in past], moments[i][0], energy),
                v_basis=_extend([task.blocks[i].v_basis for task in past], moments[i][1], energy),
            )
            for i, block in enumerate(blocks)
        )
    classes = len(info.classes)
    statistics = ClassStatistics.of(features, train.labels, classes)
    class_nll, novelty = torch.zeros(len(TEMPERATURES)), torch.zeros(len(NOVELTY_QUANTILES))
    if len(held):
        held_features, _ = _collect(network, held, collect=False)
        infos = [*(task.info for task in past), info]
        heads = torch.cat([*(task.head for task in past), head]) if info.method == "sequential" else None
        classifier = Classifier(
            Catalogue.of(infos),
            [*(task.statistics for task in past), statistics],
            heads,
            1.0,
            torch.device("cpu"),
        )
        class_nll, accuracy = _class_nll(classifier, infos, held_features, held.labels)
        novelty = classifier.novelty(held_features).double().quantile(torch.tensor(NOVELTY_QUANTILES).double())
        info = replace(info, held_back={**info.held_back, "accuracy": accuracy})
        statistics = statistics + ClassStatistics.of(held_features, held.labels, classes)
    return TaskRecord(info, blocks, head, statistics, class_nll, task_nll, novelty)


def _collect(network: Network, encoded: Encoded, *, collect: bool) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Features [n, D] of all images, and the second moments of the adapted projections if ``collect``."""
    features: list[Tensor] = []
    moments: list[tuple[Tensor, Tensor]] = []
    for _, tokens, phi in encoded.batches():
        batch, rows = network.from_prefix(tokens, phi, collect=collect)
        features.append(batch.cpu())
        if collect:
            moments = add_moments(moments, rows)
    return torch.cat(features), moments


def _extend(past: Sequence[Tensor], moment: Tensor, energy: float) -> Tensor:
    basis = torch.cat([empty_basis(moment.shape[0]), *(rows.double() for rows in past)])
    return new_directions(moment, basis, energy)


def _class_nll(
    classifier: Classifier, infos: Sequence[TaskInfo], features: Tensor, labels: Tensor
) -> tuple[Tensor, float]:
    """Held-back NLL of the newest task's images at each temperature, summed over images, and the accuracy."""
    logits = classifier.logits(features).double()
    sums = classifier.class_sums.double()
    classes = Catalogue.of(infos).classes
    truth = torch.tensor([classes.index(name) for name in infos[-1].classes])[labels]
    nll = []
    for temperature in TEMPERATURES:
        probabilities = (logits / temperature).softmax(dim=1) @ sums
        nll.append(-probabilities.gather(1, truth[:, None]).clamp(min=1e-12).log().sum())
    correct = (logits.softmax(dim=1) @ sums).argmax(dim=1) == truth
    return torch.stack(nll), float(correct.double().mean())
