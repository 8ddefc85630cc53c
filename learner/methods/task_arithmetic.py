"""Task Arithmetic with LoRA (Chitale et al., arXiv 2311.02428): independent task vectors, summed, mended from a memory.

Every task is learned from the pretrained weights; the merged network is pretrained + scale * sum of the updates. A
memory of a few images a class then fine-tunes it, with the head of all classes. What the paper leaves open is decided
so: heads are trained on their own task alone and joined; fine-tuning trains new adapters of the same rank on top of
the merged weights, and starts again from them after every task. Setting ``memory_per_class`` to 0 leaves it merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from duallora_edge.errors import RunError
from duallora_edge.learner.data import PixelSet
from duallora_edge.learner.methods.base import Method
from duallora_edge.learner.methods.training import (
    Downs,
    Lesson,
    look,
    mix,
    train_adapters,
    untrained,
)
from duallora_edge.learner.network.adapters import AdaptedBlock, Adapter
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.network import Scores, fold_all
from duallora_edge.learner.network.prefix_cache import Encoded
from duallora_edge.learner.network.task_record import BlockRecord, TaskRecord, empty_adapter
from duallora_edge.learner.statistics.gaussian import GaussianClassifier
from duallora_edge.learner.statistics.subspace import empty_basis, top_directions


class NoCheckpoint:
    """Fine-tuning is short and starts again from the checkpoint of the task's own training."""

    def load(self) -> None:
        return None

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        pass


class TaskArithmetic(Method):
    """A record's orthogonal adapters hold the scaled update of the task, its residual ones the fine-tuning.

    Of the fine-tunings and heads, which are of all classes so far, only the newest task's are in use.
    """

    name = "task_arithmetic"
    summary = "task vectors added up, then fine-tuned on stored images"
    classifier = "heads"
    keeps_images = True
    removable = False  # heads and fine-tunings of later tasks know its classes

    def learn(self, lesson: Lesson) -> TaskRecord:
        """Train the task from the pretrained weights, merge, fine-tune on the memory."""
        config, dim = lesson.config, lesson.backbone.dim
        blocks, head = untrained(lesson.backbone), torch.zeros(len(lesson.task.classes), dim + 1)
        if len(lesson.task.classes) > 1:
            plain = [AdaptedBlock(block) for block in lesson.backbone.suffix]
            blocks, head = _train(lesson, plain, head, config.kl_weight)
            blocks = tuple(replace(b, orthogonal=_scaled(b.orthogonal, config.task_scale)) for b in blocks)
        memory = self._remember(lesson) if config.memory_per_class else {}
        head = torch.cat([*(task.head for task in lesson.past[-1:]), head])
        if memory and len(head) > 1:
            if not all(task.memory for task in lesson.past):
                raise RunError("The run is damaged (a task lacks its stored images); restore it from a copy.")
            merged = [AdaptedBlock(block) for block in lesson.backbone.suffix]
            for index, block in enumerate(merged):
                updates = [task.blocks[index].orthogonal for task in lesson.past] + [blocks[index].orthogonal]
                block.weight = fold_all(block.weight, updates)
            images = [task.memory for task in lesson.past] + [memory]
            tuning = replace(lesson, train=_encode(lesson, images), checkpoint=NoCheckpoint())
            tuned, head = _train(tuning, merged, head)
            blocks = tuple(replace(b, residual=new.orthogonal) for b, new in zip(blocks, tuned, strict=True))
        return self.finish(lesson, lesson.info(self.name), blocks, head, memory=memory)

    def updates(self, blocks: Sequence[Sequence[BlockRecord]]) -> Sequence[Sequence[BlockRecord]]:
        """The scaled updates of all tasks, and the newest fine-tuning, all to be folded."""
        merged = [tuple(replace(b, residual=_none(b)) for b in task) for task in blocks[:-1]]
        newest = tuple(replace(b, orthogonal=_joined(b.orthogonal, b.residual), residual=_none(b)) for b in blocks[-1])
        return [*merged, newest]

    def memory_fits(self, task: TaskRecord, backbone: Backbone) -> bool:
        """Whether the stored images are there, or none at all."""
        images, labels = task.memory.get("images"), task.memory.get("labels")
        if images is None or labels is None:
            return images is labels and super().memory_fits(task, backbone)
        size = backbone.info.size
        return (
            images.dtype == torch.uint8
            and images.shape == (len(labels), size, size, 3)
            and labels.dtype == torch.int64
            and labels.unique().tolist() == list(range(len(task.info.classes)))
            and super().memory_fits(task, backbone)
        )

    def scores(self, tasks: Sequence[TaskRecord], gaussian: GaussianClassifier) -> Scores:
        """The head of all classes that the newest task left."""
        return super().scores(tasks[-1:] if tasks[-1].info.classifier == "heads" else tasks, gaussian)

    def _remember(self, lesson: Lesson) -> dict[str, Tensor]:
        """Some training images of each class, drawn by seed and task: uint8 [n, S, S, 3] and labels int64 [n]."""
        generator = torch.Generator().manual_seed(mix(lesson.config.seed, lesson.number, 2))
        order = torch.randperm(len(lesson.train), generator=generator)
        labels = lesson.train.labels[order]
        chosen = torch.cat(
            [order[labels == k][: lesson.config.memory_per_class] for k in range(len(lesson.task.classes))]
        )
        images = torch.from_numpy(lesson.train.pixels[chosen.numpy()])
        return {"images": images, "labels": lesson.train.labels[chosen]}


def _encode(lesson: Lesson, memories: Sequence[Mapping[str, Tensor]]) -> Encoded:
    """The stored images of all tasks behind the prefix; labels count the components of all tasks."""
    labels, offset = [], 0
    for memory in memories:
        labels.append(memory["labels"] + offset)
        offset += int(memory["labels"].max()) + 1
    pixels = torch.cat([memory["images"] for memory in memories]).numpy()
    names = tuple(str(int(label)) for label in torch.cat(labels))
    return Encoded(
        lesson.backbone,
        PixelSet(pixels, names),
        [str(number) for number in range(offset)],
        precision=lesson.config.precision,
        batch_size=lesson.config.forward_batch,
        cache_bytes=None if lesson.config.cache_bytes is None else 0,
    )


def _train(
    lesson: Lesson, blocks: Sequence[AdaptedBlock], head: Tensor, kl_weight: float = 0.0
) -> tuple[tuple[BlockRecord, ...], Tensor]:
    """Train adapters of both ranks in the leading directions of the features."""
    rank = lesson.config.rank_orthogonal + lesson.config.rank_residual
    none = empty_basis(lesson.backbone.dim)
    before = look(lesson, blocks, "class")
    downs = [Downs(top_directions(q, rank), top_directions(v, rank), none) for q, v in before.moments]
    return train_adapters(lesson, blocks, downs, before.features, head, kl_weight=kl_weight)


def _scaled(adapter: Adapter, scale: float) -> Adapter:
    return adapter._replace(q_up=scale * adapter.q_up, v_up=scale * adapter.v_up)


def _none(block: BlockRecord) -> Adapter:
    return empty_adapter(block.orthogonal.q_down.shape[1])


def _joined(first: Adapter, second: Adapter) -> Adapter:
    return Adapter(*(torch.cat([a, b.to(a)]) for a, b in zip(first, second, strict=True)))
