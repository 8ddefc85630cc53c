"""Task Arithmetic with LoRA (Chitale et al., arXiv 2311.02428): task vectors learned alone, summed, then fine-tuned.

Every task is learned from the pretrained weights; the merged network is pretrained + scale * sum of the updates. It is
then fine-tuned on a few kept images of each class, with one head of all classes. The paper leaves some questions open;
here heads are trained on their own task alone and joined, and fine-tuning trains new adapters of the same rank on top
of the merged weights, from which it starts again after every task. Without kept images there is no fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from duallora_edge.errors import RunError
from duallora_edge.learner.callbacks import Callbacks, Point
from duallora_edge.learner.data import PixelSet
from duallora_edge.learner.methods.base import Method
from duallora_edge.learner.methods.lesson import Lesson
from duallora_edge.learner.methods.losses import Loss, cross_entropy, kl_distillation_loss
from duallora_edge.learner.methods.scoring import ClassifierData
from duallora_edge.learner.methods.training import derive_seed, leading_directions, train_adapters, untrained
from duallora_edge.learner.network.adapters import AdaptedBlock, Adapter
from duallora_edge.learner.network.answers import Scores
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.features import suffix_features
from duallora_edge.learner.network.network import fold_all
from duallora_edge.learner.network.prefix_cache import Encoded
from duallora_edge.learner.network.task_record import BlockRecord, KeptImages, TaskRecord, empty_adapter


class NoCheckpoint:
    """Fine-tuning is short, and starts again from the checkpoint of the task's own training."""

    def load(self) -> None:
        return None

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        pass


class FineTuning(Callbacks):
    """Hears of the fine-tuning, but for points: the history is that of the task's own training."""

    def trained(self, point: Point) -> None:
        pass


class TaskArithmetic(Method):
    """The orthogonal adapters of a record hold the scaled update of the task, the residual ones the fine-tuning.

    Heads and fine-tunings are those of all classes so far; only the ones of the newest task are in use.
    """

    name = "task_arithmetic"
    summary = "task vectors added up, then fine-tuned on stored images"
    classifier = "heads"
    keeps_images = True
    removable = False  # heads and fine-tunings of later tasks know its classes

    def learn(self, lesson: Lesson) -> TaskRecord:
        """Train the task from the pretrained weights, merge, fine-tune on the kept images."""
        config = lesson.config
        blocks, head = untrained(lesson)
        if len(lesson.task.classes) > 1:
            plain = [AdaptedBlock(block) for block in lesson.backbone.suffix]
            blocks, head = _train(lesson, plain, head, partial(kl_distillation_loss, weight=config.kl_weight))
            blocks = tuple(replace(b, orthogonal=_scaled(b.orthogonal, config.task_scale)) for b in blocks)
        kept = _draw(lesson) if config.kept_images_per_class else None
        head = torch.cat([*(task.head for task in lesson.past[-1:]), head])
        if kept and len(head) > 1:
            merged = [AdaptedBlock(block) for block in lesson.backbone.suffix]
            for index, block in enumerate(merged):
                updates = [task.blocks[index].orthogonal for task in lesson.past] + [blocks[index].orthogonal]
                block.weight = fold_all(block.weight, updates)
            images = _encode(lesson, [*(task.kept_images for task in lesson.past), kept])
            tuning = replace(lesson, train=images, checkpoint=NoCheckpoint(), callback=FineTuning([lesson.callback]))
            tuned, head = _train(tuning, merged, head, cross_entropy)
            blocks = tuple(replace(b, residual=new.orthogonal) for b, new in zip(blocks, tuned, strict=True))
        return self.finish(lesson, blocks, head, kept_images=kept)

    def updates(self, blocks: Sequence[Sequence[BlockRecord]]) -> Sequence[Sequence[BlockRecord]]:
        """The scaled updates of all tasks, and the newest fine-tuning, all to be folded."""
        merged = [tuple(replace(b, residual=_none(b)) for b in task) for task in blocks[:-1]]
        newest = tuple(replace(b, orthogonal=_joined(b.orthogonal, b.residual), residual=_none(b)) for b in blocks[-1])
        return [*merged, newest]

    def is_complete(self, task: TaskRecord, backbone: Backbone) -> bool:
        """Whether kept images have the size of the backbone's input; a task may also have no kept images."""
        size = backbone.info.size
        fits = task.kept_images is None or task.kept_images.images.shape[1:] == (size, size, 3)
        return fits and super().is_complete(replace(task, kept_images=None), backbone)

    def scores(self, classifier: str, data: ClassifierData) -> Scores:
        """Linear heads have all classes so far, so that the newest one is enough."""
        return super().scores(classifier, replace(data, heads=data.heads[-1:]) if classifier == "heads" else data)


def _draw(lesson: Lesson) -> KeptImages:
    """Some training images of each class, drawn by seed and task."""
    generator = torch.Generator().manual_seed(derive_seed(lesson.config.seed, lesson.number, 2))
    order = torch.randperm(lesson.train.images, generator=generator)
    labels = lesson.train.labels[order]
    chosen = torch.cat(
        [order[labels == k][: lesson.config.kept_images_per_class] for k in range(len(lesson.task.classes))]
    )
    images = torch.from_numpy(lesson.train.pixels[chosen.numpy()])
    return KeptImages(images, lesson.train.labels[chosen])


def _encode(lesson: Lesson, kept: Sequence[KeptImages | None]) -> Encoded:
    """The kept images of all tasks behind the prefix; labels count the components of all tasks."""
    labels, images, offset = [], [], 0
    for part in kept:
        if part is None:
            raise RunError("The run is damaged (a task lacks its kept images); restore it from a copy.")
        labels.append(part.labels + offset)
        images.append(part.images)
        offset += int(part.labels.max()) + 1
    names = tuple(str(int(label)) for label in torch.cat(labels))
    return Encoded(
        lesson.backbone,
        PixelSet(torch.cat(images).numpy(), names),
        [str(number) for number in range(offset)],
        precision=lesson.config.precision,
        batch_size=lesson.config.forward_batch,
        cache_bytes=None if lesson.config.cache_bytes is None else 0,
    )


def _train(
    lesson: Lesson, blocks: Sequence[AdaptedBlock], head: Tensor, loss: Loss
) -> tuple[tuple[BlockRecord, ...], Tensor]:
    """Train adapters of both ranks together in the leading directions of the features."""
    features, moments = suffix_features(lesson.backbone, blocks, lesson.train, lesson.config.precision, "class")
    downs = [leading_directions(lesson, q, v) for q, v in moments]
    return train_adapters(lesson, blocks, downs, features, loss, head)


def _scaled(adapter: Adapter, scale: float) -> Adapter:
    return adapter._replace(q_up=scale * adapter.q_up, v_up=scale * adapter.v_up)


def _none(block: BlockRecord) -> Adapter:
    return empty_adapter(block.orthogonal.q_down.shape[1])


def _joined(first: Adapter, second: Adapter) -> Adapter:
    return Adapter(*(torch.cat([a, b.to(a)]) for a, b in zip(first, second, strict=True)))
