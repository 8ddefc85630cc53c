"""What a training tells while it works, at few enough of its steps to cost almost nothing; it changes nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from duallora_edge.learner import distributed
from duallora_edge.learner.callbacks import Point
from duallora_edge.learner.methods.lesson import Lesson
from duallora_edge.learner.network.adapters import AdaptedBlock
from duallora_edge.learner.network.backbone import autocast
from duallora_edge.learner.network.network import run_suffix
from duallora_edge.learner.timing import timed

# Steps of a task that become points of its history, and how many of these measure the accuracy.
POINTS = 100
VALIDATIONS = 4
# All measurements of a task together take at most one validation image for so many images that are trained. A trained
# image costs about three times as much.
TRAINED_PER_VALIDATED = 8


class Watcher:
    """Tells the callback of a lesson about the points of a training of ``steps`` steps.

    ``accuracy`` measures the share of right answers, None without validation images. The points depend on nothing but
    ``steps``, so that a training that continues from a checkpoint comes to the same ones.
    """

    def __init__(self, lesson: Lesson, steps: int, accuracy: Callable[[int], float | None]) -> None:
        self.lesson, self.steps, self.accuracy = lesson, steps, accuracy
        self.images, self.since = 0, time.monotonic()

    def step(self, step: int, images: int, loss: Tensor, rate: float) -> None:
        """Step number ``step``, counted from 1, has trained ``images`` images of all processes.

        ``loss`` is the share of the images of this process in the mean loss of the batch, ``rate`` the learning rate.
        """
        self.images += images
        if not self._passes(step, POINTS):
            return
        total = loss.to(self.lesson.backbone.device, copy=True)
        distributed.all_reduce(total)
        value = float(total)  # waits for a GPU
        speed = self.images / (time.monotonic() - self.since)
        accuracy = None
        if self._passes(step, VALIDATIONS):
            accuracy = self.accuracy(self.steps * self.lesson.config.batch_size // TRAINED_PER_VALIDATED // VALIDATIONS)
        self.lesson.callback.trained(Point(self.lesson.task.name, step, self.steps, value, rate, speed, accuracy))
        self.images, self.since = 0, time.monotonic()

    def _passes(self, step: int, parts: int) -> bool:
        """Whether the end of one of so many equal parts of the training lies in this step."""
        return step * parts // self.steps > (step - 1) * parts // self.steps


@timed("validation")
@torch.no_grad()
def validation_accuracy(
    lesson: Lesson, blocks: Sequence[AdaptedBlock], logits: Callable[[Tensor], Tensor], limit: int
) -> float | None:
    """Share of at most ``limit`` validation images (at least one) that the head gets right; None where there are none.

    Args:
        lesson: has the images, behind the frozen prefix.
        blocks: the suffix as it is now.
        logits: the head: logits [B, K] of features f [B, d], for the classes of the task.
        limit: more images are thinned out evenly.
    """
    images, device = lesson.validation, lesson.backbone.device
    right = torch.zeros((), device=device)
    stride = math.ceil(len(images) / max(limit, 1))
    for indices, tokens, _ in images.batches(stride):
        with autocast(lesson.config.precision, device):
            f = run_suffix(lesson.backbone, blocks, tokens)[0].float()
            found = logits(f).argmax(dim=1)
        right += (found == images.labels[indices].to(device)).sum()
    distributed.all_reduce(right)
    return float(right) / math.ceil(len(images) / stride) if len(images) else None
