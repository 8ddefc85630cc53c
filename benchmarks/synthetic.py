"""Random weights and random images, on which cost does not depend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor

from duallora_edge.learner.data import PixelSet, PreparedTask
from duallora_edge.learner.network.backbone import Backbone, load_backbone, spaced_blocks
from duallora_edge.learner.network.backbone_info import BackboneInfo

CLASSES = 10


class NoCheckpoint:
    """Training that keeps nothing on the way."""

    def load(self) -> None:
        return None

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        pass


def make_backbone(name: str, size: int, weights: Path | None, prefix_blocks: int | None = None) -> Backbone:
    """The backbone with real weights, or with random ones, on which speed does not depend."""
    if weights is not None:
        return load_backbone(name, weights=weights, size=size, prefix_blocks=prefix_blocks)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, img_size=size)
    prefix, half = prefix_blocks or len(model.blocks) // 2, (0.5, 0.5, 0.5)
    info = BackboneInfo(name, "0" * 64, size, half, half, "bicubic", prefix, spaced_blocks(prefix, 1))
    return Backbone(model, info, size)


def make_task(size: int, images: int, number: int = 0) -> PreparedTask:
    """A task of random images; a tenth as many are held back."""
    rng = np.random.default_rng(number)

    def draw(count: int) -> PixelSet:
        labels = tuple(f"{number}-{i % CLASSES}" for i in range(count))
        return PixelSet(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), labels)

    return PreparedTask(f"task-{number}", draw(images), draw(max(images // 10, CLASSES)), draw(0), str(number))
