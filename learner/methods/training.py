"""Training adapters: the steps that most methods share, and checkpoints from which they continue bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora_edge.learner import distributed
from duallora_edge.learner.callbacks import report_progress
from duallora_edge.learner.methods.lesson import Checkpoint, Lesson
from duallora_edge.learner.methods.losses import Loss, cross_entropy
from duallora_edge.learner.methods.watching import Watcher, validation_accuracy
from duallora_edge.learner.network.adapters import AdaptedBlock, Adapter
from duallora_edge.learner.network.backbone import Backbone, autocast
from duallora_edge.learner.network.network import run_suffix
from duallora_edge.learner.network.task_record import BlockRecord, TaskRecord, empty_adapter
from duallora_edge.learner.statistics.subspace import empty_basis, top_directions
from duallora_edge.learner.timing import phase, timed

# The head starts at zero and the features have not moved yet, so the first gradient of the adapters is nothing but
# rounding. With its usual epsilon of 1e-8 Adam makes a whole step of it, in a direction that depends on the number of
# threads.
ADAM_EPS = 1e-6


@dataclass(frozen=True)
class DownProjections:
    """The fixed down-projections of one block, orthonormal rows: query [r, d], value [r, d], and the residual [r', d]
    that query and value share."""

    q: Tensor
    v: Tensor
    residual: Tensor


def past_bases(past: Sequence[TaskRecord], index: int, dim: int) -> tuple[Tensor, Tensor]:
    """The bases [k, d] of query and value that all earlier tasks together left in one block."""
    blocks = [task.blocks[index] for task in past]
    none = empty_basis(dim)
    q = torch.cat([none, *(block.q_basis.double() for block in blocks)])
    v = torch.cat([none, *(block.v_basis.double() for block in blocks)])
    return q, v


def leading_directions(lesson: Lesson, q: Tensor, v: Tensor) -> DownProjections:
    """Unconstrained down-projections of one block, both ranks together and no residual: the leading directions of the
    second moments, float64 [d, d], of what its query and value projections read."""
    rank = lesson.config.rank_orthogonal + lesson.config.rank_residual
    return DownProjections(top_directions(q, rank), top_directions(v, rank), empty_basis(lesson.backbone.dim))


def unadapted_blocks(backbone: Backbone) -> tuple[BlockRecord, ...]:
    """Block records without adapters and without bases."""
    empty = empty_adapter(backbone.dim)
    none = empty_basis(backbone.dim)
    return tuple(BlockRecord(empty, empty, none, none) for _ in backbone.suffix)


def untrained(lesson: Lesson) -> tuple[tuple[BlockRecord, ...], Tensor]:
    """What a task adds of which only statistics are learned: blocks without adapters and a head [K, d + 1] of zeros."""
    return unadapted_blocks(lesson.backbone), torch.zeros(len(lesson.task.classes), lesson.backbone.dim + 1)


def train_adapters(
    lesson: Lesson,
    blocks: Sequence[AdaptedBlock],
    downs: Sequence[DownProjections],
    features_before: Tensor,
    loss: Loss = cross_entropy,
    head: Tensor | None = None,
) -> tuple[tuple[BlockRecord, ...], Tensor]:
    """Train the up-projections of new adapters and a linear head on the training images of a lesson.

    Args:
        lesson: images, labels and configuration; its checkpoint is continued.
        blocks: the suffix in which to train; they have the new adapters afterwards.
        downs: the down-projections of each block, which stay as they are.
        features_before: features f, float32 [n, d], of the images before training, for the ``loss``.
        loss: what is minimised (see `losses`).
        head: where the head [K, d + 1], bias last, starts; zero by default.

    Returns:
        The adapters of each block, without bases, and the trained head.
    """
    downs = distributed.broadcast(downs)
    adapters: list[Adapter] = []
    for block, down in zip(blocks, downs, strict=True):
        q_down, v_down = (torch.cat([own, down.residual]).float().to(block.weight) for own in (down.q, down.v))
        block.adapter = Adapter(
            q_down, nn.Parameter(torch.zeros_like(q_down)), v_down, nn.Parameter(torch.zeros_like(v_down))
        )
        adapters.append(block.adapter)
    backbone, device, labels = lesson.backbone, lesson.backbone.device, lesson.train.labels
    start = torch.zeros(len(lesson.task.classes), backbone.dim + 1) if head is None else head
    trained = nn.Parameter(start.clone().to(device))

    def loss_of(batch: Tensor, tokens: Tensor) -> Tensor:
        f = run_suffix(backbone, blocks, tokens, recompute=lesson.config.recompute)[0].float()
        return loss(head_logits(f, trained), labels[batch].to(device), f, features_before[batch].to(device))

    def accuracy(limit: int) -> float | None:
        return validation_accuracy(lesson, blocks, lambda f: head_logits(f, trained), limit)

    optimise(lesson, [trained, *(a.q_up for a in adapters), *(a.v_up for a in adapters)], loss_of, accuracy)
    records = [_block_record(adapter, down) for adapter, down in zip(adapters, downs, strict=True)]
    return tuple(records), trained.detach().cpu()


def _block_record(adapter: Adapter, down: DownProjections) -> BlockRecord:
    """The orthogonal and the residual part of what was trained as one adapter."""
    q, v = len(down.q), len(down.v)
    a = Adapter(*(part.detach().cpu() for part in adapter))
    none = empty_basis(a.q_down.shape[1])
    return BlockRecord(
        orthogonal=Adapter(a.q_down[:q], a.q_up[:q], a.v_down[:v], a.v_up[:v]),
        residual=Adapter(a.q_down[q:], a.q_up[q:], a.v_down[v:], a.v_up[v:]),
        q_basis=none,
        v_basis=none,
    )


def head_logits(f: Tensor, head: Tensor) -> Tensor:
    """Logits [B, K] of features [B, d] by a linear head [K, d + 1] with the bias last."""
    return F.linear(f, head[:, :-1], head[:, -1])


def optimise(
    lesson: Lesson,
    parameters: Sequence[Tensor],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    accuracy: Callable[[int], float | None],
) -> None:
    """Adam with a cosine rate over shuffled epochs; ``loss_of`` takes image numbers [B] and tokens [B, L, d].

    ``accuracy`` is what a `Watcher` measures meanwhile.

    An epoch takes as many images and views as there are images.

    The order of the images depends only on seed, task and epoch, and checkpoints have the whole state, so that an
    interrupted training ends in the same bytes. Several processes take neighbouring images of each batch and weight
    their mean losses by the number of images, so that their gradients sum up to that of the batch.
    """
    config, train = lesson.config, lesson.train
    epoch_steps = math.ceil(train.images / config.batch_size)
    total = max(config.epochs * epoch_steps, config.min_steps)
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, eps=ADAM_EPS, fused=True)
    start = restore_progress(lesson.checkpoint, optimizer, parameters)
    train.share_tokens()
    order, generator = torch.empty(0, dtype=torch.long), torch.Generator()
    micro = config.micro_batch or config.batch_size
    watcher = Watcher(lesson, total, accuracy)
    for step in range(start, total):
        epoch, position = divmod(step, epoch_steps)
        if position == 0 or step == start:
            order = torch.randperm(
                len(train), generator=generator.manual_seed(derive_seed(config.seed, lesson.number, epoch))
            )
        batch = order[position * config.batch_size :][: config.batch_size]
        own = batch[distributed.own_rows(len(batch))]
        rate = cosine_rate(config.learning_rate, step, total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if len(own):
            tokens = train.batch(own)
            micro, loss = accumulate_gradients(lesson, optimizer, loss_of, own, tokens, len(batch), micro)
        else:
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros(())
        distributed.all_reduce_gradients(parameters)
        with phase("optimiser"):
            optimizer.step()
        watcher.step(step + 1, len(batch), loss, rate)  # before the checkpoint, from which no earlier point is told
        if (step + 1) % config.checkpoint_steps == 0:
            save_progress(lesson.checkpoint, step + 1, optimizer, parameters)
        report_progress(lesson.callback, "train", step + 1, total)
        lesson.callback.step(step + 1, total, loss, rate)


def accumulate_gradients(
    lesson: Lesson,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    own: Tensor,
    tokens: Tensor,
    batch_size: int,
    micro: int,
) -> tuple[int, Tensor]:
    """The gradients of the images ``own`` of a batch, in parts of ``micro`` images.

    Returns the size of the parts and the detached loss, which is the share of these images in the loss of the batch.

    Each part is weighted by its share of the ``batch_size`` images, so that the sum over all parts of all processes is
    the gradient of the mean loss of the batch, up to rounding. Where CUDA lacks the memory for a part, everything is
    done again in parts of half the size; raises when a single image is too much.
    """
    while True:
        optimizer.zero_grad(set_to_none=True)
        whole = torch.zeros((), device=lesson.backbone.device)
        try:
            for part, part_tokens in zip(own.split(micro), tokens.split(micro), strict=True):
                with phase("suffix forward"), autocast(lesson.config.precision, lesson.backbone.device):
                    loss = loss_of(part, part_tokens)
                if len(part) < batch_size:
                    loss = loss * (len(part) / batch_size)
                with phase("suffix backward"):
                    loss.backward()
                whole += loss.detach()
            return micro, whole
        except torch.cuda.OutOfMemoryError:
            micro = min(micro, len(own)) // 2
            if not micro:
                raise
        # Not in the handler, whose traceback still refers to the tensors that did not fit.
        torch.cuda.empty_cache()


def cosine_rate(rate: float, step: int, steps: int) -> float:
    """A rate that falls from ``rate`` to 0 like half a cosine; ``step`` counts from 0."""
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from several numbers (SeedSequence keeps nearby seeds independent)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@timed("checkpoint")
def save_progress(checkpoint: Checkpoint, step: int, optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> None:
    """Write the state after ``step`` steps, on rank 0."""
    if not distributed.is_main():
        return
    tensors = {}
    for index, parameter in enumerate(parameters):
        tensors[f"{index}.value"] = parameter.detach().cpu()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{index}.{key}"] = optimizer.state[parameter][key].cpu()
    checkpoint.save(step, tensors)


def restore_progress(
    checkpoint: Checkpoint, optimizer: torch.optim.Adam, parameters: Sequence[Tensor], *, alone: bool = False
) -> int:
    """Continue from a checkpoint where it fits; returns the steps done. ``alone``: other processes do not take part."""
    saved = checkpoint.load() if alone else distributed.on_main(checkpoint.load)
    if saved is None:
        return 0
    step, tensors = saved
    if not _fits(step, tensors, parameters):
        return 0  # this costs repeated work, never a wrong result
    for index, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"{index}.value"])
        moments = {key: tensors[f"{index}.{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}
    return step


def _fits(step: int, tensors: dict[str, Tensor], parameters: Sequence[Tensor]) -> bool:
    """Whether a checkpoint has the names, shapes and dtypes of these parameters, and finite numbers."""
    wanted = {
        f"{index}.{part}": parameter
        for index, parameter in enumerate(parameters)
        for part in ("value", "exp_avg", "exp_avg_sq")
    }
    return (
        step > 0
        and tensors.keys() == wanted.keys()
        and all(tensors[name].shape == parameter.shape for name, parameter in wanted.items())
        and all(tensors[name].dtype == parameter.dtype for name, parameter in wanted.items())
        and all(bool(torch.isfinite(value).all()) for value in tensors.values())
    )
