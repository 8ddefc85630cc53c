"""The steps from which methods learn one task: the lesson, second moments, training, and what a task leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duallora_edge.learner import distributed
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.data.augment import Augment
from duallora_edge.learner.network.adapters import AdaptedBlock, Adapter, Collect, Rows
from duallora_edge.learner.network.backbone import Backbone, products
from duallora_edge.learner.network.network import DynamicMemory, Network, run_suffix
from duallora_edge.learner.network.prefix_cache import Encoded
from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.network.task_record import BlockRecord, TaskRecord, empty_adapter
from duallora_edge.learner.statistics.calibration import TEMPERATURES
from duallora_edge.learner.statistics.gaussian import ClassStatistics, GaussianClassifier
from duallora_edge.learner.statistics.subspace import empty_basis, second_moment
from duallora_edge.learner.timing import phase, timed

# The head starts at zero and the features have not moved from those before: the first gradient of the adapters is
# rounding alone, of which Adam's usual 1e-8 makes a whole step, in another direction for every number of threads.
ADAM_EPS = 1e-6

Progress = Callable[[str, int, int], None]
Moments = list[tuple[Tensor, Tensor]]
"""Second moments [d, d] of what the query and value projections of each adapted block read."""


class Checkpoint(Protocol):
    """Where training in progress is kept: tensors by name, with the number of steps done."""

    def load(self) -> tuple[int, dict[str, Tensor]] | None: ...

    def save(self, step: int, tensors: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Lesson:
    """Everything a method may look at to learn one task: what is known, and the task's images behind the prefix."""

    backbone: Backbone
    past: Sequence[TaskRecord]
    task: PreparedTask
    train: Encoded
    held: Encoded
    config: TrainConfig
    checkpoint: Checkpoint
    progress: Progress

    @property
    def number(self) -> int:
        """How many tasks were learned before."""
        return len(self.past)

    @cached_property
    def gaussian(self) -> GaussianClassifier:
        """The classes of all tasks, this one included, as Gaussians of phi."""
        with phase("statistics"):
            new = ClassStatistics.of(self.train.phi, self.train.labels, len(self.task.classes))
            return GaussianClassifier.fit([*summaries(self.past, self.backbone), new], inflation=False)

    @cached_property
    def identity(self) -> Identity | None:
        """How well the new task is recognised; None for a first task or without held-back images."""
        if not self.past or not len(self.held):
            return None
        return task_identity(self.memory(1.0, torch.device("cpu")), self.held.phi)

    def memory(self, temperature: float, device: torch.device) -> DynamicMemory:
        """The dynamic memory of all tasks, this one included."""
        classes = [*(len(record.info.classes) for record in self.past), len(self.task.classes)]
        return DynamicMemory(self.gaussian, classes, temperature, device)

    def info(self, method: str, residual: str = "none") -> TaskInfo:
        """The description of the task."""
        counts = {name: int((self.train.labels == k).sum()) for k, name in enumerate(self.task.classes)}
        accuracy = self.identity.accuracy if self.identity else None
        return TaskInfo(
            name=self.task.name,
            classes=self.task.classes,
            method=method,
            residual=residual,
            seed=self.config.seed,
            data_digest=self.task.digest,
            counts=counts,
            held_back={"images": len(self.held), "task_accuracy": accuracy},
        )


@dataclass(frozen=True)
class Identity:
    """How well the prefix tells the newest task from the earlier ones, on its held-back images.

    ``nll`` [len(TEMPERATURES)] is summed over images.
    """

    nll: Tensor
    accuracy: float


def summaries(tasks: Sequence[TaskRecord], backbone: Backbone) -> list[ClassStatistics]:
    """The part of the statistics of tasks that is of phi."""
    return [task.statistics.part(slice(backbone.dim, None)) for task in tasks]


@timed("statistics")
def task_identity(memory: DynamicMemory, phi: Tensor) -> Identity:
    """Measure the identity of the newest task on summaries ``phi`` of its images."""
    logits = memory.logits(phi).double()
    sums = memory.task_sums.double()
    posteriors = [(logits / t).softmax(dim=1) @ sums for t in TEMPERATURES]
    nll = torch.stack([-p[:, -1].clamp(min=1e-12).log().sum() for p in posteriors])
    # The least temperature all but picks the task of the likeliest class, whatever temperature is chosen later.
    correct = posteriors[0].argmax(dim=1) == sums.shape[1] - 1
    return Identity(nll, float(correct.double().mean()))


def past_bases(past: Sequence[TaskRecord], index: int, dim: int) -> tuple[Tensor, Tensor]:
    """The bases [k, d] of query and value that all earlier tasks together left in one block."""
    blocks = [task.blocks[index] for task in past]
    none = empty_basis(dim)
    q = torch.cat([none, *(block.q_basis.double() for block in blocks)])
    v = torch.cat([none, *(block.v_basis.double() for block in blocks)])
    return q, v


def untrained(backbone: Backbone) -> tuple[BlockRecord, ...]:
    """Records without adapters."""
    empty = empty_adapter(backbone.dim)
    none = empty_basis(backbone.dim)
    return tuple(BlockRecord(empty, empty, none, none) for _ in backbone.suffix)


@timed("bases")
def add_moments(totals: Moments, rows: Sequence[Rows]) -> Moments:
    """Running second moments with one more batch of rows."""
    new = [(second_moment(r.q).cpu(), second_moment(r.v).cpu()) for r in rows]
    return [(q + a, v + b) for (q, v), (a, b) in zip(totals, new, strict=True)] if totals else new


def over_ranks(moments: Moments, backbone: Backbone) -> Moments:
    """The sums of moments over the ranks, float64, in one all-reduce; a rank may have none."""
    if distributed.world_size() == 1:
        return moments
    totals = torch.zeros(len(backbone.suffix), 2, backbone.dim, backbone.dim, dtype=torch.float64)
    for total, pair in zip(totals, moments, strict=False):
        total.copy_(torch.stack(pair))
    distributed.all_reduce(totals)
    return [(q, v) for q, v in totals]


@dataclass(frozen=True)
class Before:
    """The task's training images in the network before training: second moments, and features f [n, d]."""

    moments: Moments
    features: Tensor


@torch.no_grad()
def look(lesson: Lesson, blocks: Sequence[AdaptedBlock], collect: Collect) -> Before:
    """One pass over the training images through the suffix ``blocks`` as they are."""
    moments: Moments = []
    features = []
    for _, tokens, _ in lesson.train.batches():
        with phase("suffix forward"), products(lesson.config.precision, lesson.backbone.device):
            f, rows = run_suffix(lesson.backbone, blocks, tokens, collect=collect)
        moments = add_moments(moments, rows)
        features.append(f.float().cpu())
    known = torch.cat(features) if features else torch.zeros(0, lesson.backbone.dim)
    return Before(over_ranks(moments, lesson.backbone), distributed.all_gather(known, lesson.train.counts))


@dataclass(frozen=True)
class Downs:
    """The fixed down-projections of one block, orthonormal rows each: [r, d] for query and value, and [r', d] for
    the residual that both share."""

    q: Tensor
    v: Tensor
    residual: Tensor


def train_adapters(
    lesson: Lesson,
    blocks: Sequence[AdaptedBlock],
    downs: Sequence[Downs],
    before: Tensor,
    head: Tensor | None = None,
    *,
    distillation: float = 0.0,
    kl_weight: float = 0.0,
) -> tuple[tuple[BlockRecord, ...], Tensor]:
    """Train the up-projections and a linear head [K, d + 1] with cross-entropy over the lesson's labels.

    ``before`` [n, d] are the features of the images before training, towards which the loss may pull: with the
    weight w of ``distillation`` it is CE + w (1 - cosine), which keeps directions that the task's own few classes do
    not need and later classes may; with ``kl_weight`` w it is (1 - w) CE + w KL(softmax(before) ||
    softmax(f)) instead, as in arXiv 2311.02428. ``head`` is where the head starts, zero by default.
    """
    downs = distributed.broadcast(downs)
    adapters: list[Adapter] = []
    for block, down in zip(blocks, downs, strict=True):
        q_down, v_down = (torch.cat([own, down.residual]).float().to(block.weight) for own in (down.q, down.v))
        adapters.append(
            Adapter(q_down, nn.Parameter(torch.zeros_like(q_down)), v_down, nn.Parameter(torch.zeros_like(v_down)))
        )
    backbone, device, labels = lesson.backbone, lesson.backbone.device, lesson.train.labels
    start = torch.zeros(len(lesson.task.classes), backbone.dim + 1) if head is None else head
    trained = nn.Parameter(start.clone().to(device))

    for block, adapter in zip(blocks, adapters, strict=True):
        block.adapter = adapter

    def loss(batch: Tensor, tokens: Tensor) -> Tensor:
        f = run_suffix(backbone, blocks, tokens, recompute=lesson.config.recompute)[0].float()
        value = F.cross_entropy(linear(f, trained), labels[batch].to(device))
        target = before[batch].to(device)
        if kl_weight:
            kl = F.kl_div(f.log_softmax(dim=1), target.log_softmax(dim=1), reduction="batchmean", log_target=True)
            return (1 - kl_weight) * value + kl_weight * kl
        if distillation:
            value = value + distillation * (1 - F.cosine_similarity(f, target)).mean()
        return value

    optimise(lesson, [trained, *(a.q_up for a in adapters), *(a.v_up for a in adapters)], loss)
    none = empty_basis(backbone.dim)
    records = []
    for down, adapter in zip(downs, adapters, strict=True):
        a = Adapter(*(part.detach().cpu() for part in adapter))
        q, v = len(down.q), len(down.v)
        orthogonal = Adapter(a.q_down[:q], a.q_up[:q], a.v_down[:v], a.v_up[:v])
        residual = Adapter(a.q_down[q:], a.q_up[q:], a.v_down[v:], a.v_up[v:])
        records.append(BlockRecord(orthogonal, residual, none, none))
    return tuple(records), trained.detach().cpu()


def linear(f: Tensor, head: Tensor) -> Tensor:
    """Logits [B, K] of features [B, d] by a head [K, d + 1] with the bias last."""
    return F.linear(f, head[:, :-1], head[:, -1])


def optimise(lesson: Lesson, parameters: Sequence[Tensor], loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Adam with a cosine rate over shuffled epochs; ``loss_of`` takes image numbers [B] and tokens [B, L, d].

    The order of the images depends on seed, task and epoch alone, and checkpoints hold the whole state, so that an
    interrupted training ends in the same bytes. Several ranks take neighbouring images of each batch, and weigh their
    mean losses by how many, so that the sum of the gradients is that of the batch.
    """
    config, train = lesson.config, lesson.train
    epoch_steps = math.ceil(len(train) / config.batch_size)
    total = max(config.epochs * epoch_steps, config.min_steps)
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, eps=ADAM_EPS, fused=True)
    start = _restore(lesson.checkpoint, optimizer, parameters)
    train.share_tokens()
    augment = Augment(config.augment, horizontal_flip=config.flip)
    order, generator = torch.empty(0, dtype=torch.long), torch.Generator()
    micro = config.micro_batch or config.batch_size
    for step in range(start, total):
        epoch, position = divmod(step, epoch_steps)
        if position == 0 or step == start:
            order = torch.randperm(len(train), generator=generator.manual_seed(mix(config.seed, lesson.number, epoch)))
        batch = order[position * config.batch_size :][: config.batch_size]
        rows = distributed.own_rows(len(batch))
        own, view = batch[rows], None
        if config.augment != "none" or config.flip:
            seed = mix(config.seed, lesson.number, step, 1)
            views = torch.Generator().manual_seed(seed)
            view = partial(augment, generator=views, rows=rows, total=len(batch))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
        if len(own):
            micro = accumulate(lesson, optimizer, loss_of, own, train.batch(own, view), len(batch), micro)
        else:
            optimizer.zero_grad(set_to_none=True)
        distributed.all_reduce_gradients(parameters)
        with phase("optimiser"):
            optimizer.step()
        if (step + 1) % config.checkpoint_steps == 0:
            _save(lesson.checkpoint, step + 1, optimizer, parameters)
        lesson.progress("train", step + 1, total)


def accumulate(
    lesson: Lesson,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    own: Tensor,
    tokens: Tensor,
    batch_size: int,
    micro: int,
) -> int:
    """The gradients of the images ``own`` of a batch, in parts of ``micro`` images; returns the size of the parts.

    The parts are weighed by their share of the ``batch_size`` images, so that the sum over all parts, of all ranks, is
    the gradient of the mean loss of the batch up to rounding. Where CUDA has too little memory for a part, all is done
    again in halves; raises when one image is too much.
    """
    while True:
        optimizer.zero_grad(set_to_none=True)
        try:
            for part, part_tokens in zip(own.split(micro), tokens.split(micro), strict=True):
                with phase("suffix forward"), products(lesson.config.precision, lesson.backbone.device):
                    loss = loss_of(part, part_tokens)
                if len(part) < batch_size:
                    loss = loss * (len(part) / batch_size)
                with phase("suffix backward"):
                    loss.backward()
            return micro
        except torch.cuda.OutOfMemoryError:
            micro = min(micro, len(own)) // 2
            if not micro:
                raise
        # Outside of the handler, whose traceback still holds what did not fit.
        torch.cuda.empty_cache()


def mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers (SeedSequence keeps nearby seeds independent)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@timed("checkpoint")
def _save(checkpoint: Checkpoint, step: int, optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> None:
    if not distributed.is_main():
        return
    tensors = {}
    for index, parameter in enumerate(parameters):
        tensors[f"{index}.value"] = parameter.detach().cpu()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{index}.{key}"] = optimizer.state[parameter][key].cpu()
    checkpoint.save(step, tensors)


def _restore(checkpoint: Checkpoint, optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> int:
    saved = distributed.on_main(checkpoint.load)
    if saved is None:
        return 0
    step, tensors = saved
    if not _fits(step, tensors, parameters):
        return 0  # it costs repeated work, never a wrong result
    for index, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"{index}.value"])
        moments = {key: tensors[f"{index}.{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}
    return step


def _fits(step: int, tensors: dict[str, Tensor], parameters: Sequence[Tensor]) -> bool:
    """Whether a checkpoint is of these parameters, and of finite numbers."""
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


@torch.no_grad()
def collect_features(
    network: Network, encoded: Encoded, precision: str, collect: Collect = "none"
) -> tuple[Tensor, Moments]:
    """Features [n, D] of all images under the gates of inference, and the second moments of the projections."""
    features: list[Tensor] = []
    moments: Moments = []

    def run(tokens: Tensor, phi: Tensor) -> tuple[Tensor, list[Rows]]:
        with products(precision, network.backbone.device):
            batch, rows = network.from_prefix(tokens, phi, collect=collect)
        return batch.float().cpu(), rows

    for indices, tokens, phi in encoded.batches():
        if encoded.cache is not None and network.is_untouched and collect == "none":
            known = encoded.cache.features(encoded.pixels[indices.numpy()], partial(run, tokens, phi))
            features.append(known)
            continue
        batch, rows = run(tokens, phi)
        features.append(batch)
        if rows:
            moments = add_moments(moments, rows)
    size = network.backbone.dim + network.backbone.summary_dim
    known = torch.cat(features) if features else torch.zeros(0, size)
    if collect != "none":
        moments = over_ranks(moments, network.backbone)
    return distributed.all_gather(known, encoded.counts), moments
