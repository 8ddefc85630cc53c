"""The methods by name; each is one file against the interface of `base.Method`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from duallora_edge.errors import ConfigError
from duallora_edge.learner.backbone import Backbone
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.encode import Encoded, PrefixCache
from duallora_edge.learner.methods.base import Method
from duallora_edge.learner.methods.dual_lora import DualLora
from duallora_edge.learner.methods.frozen import Frozen
from duallora_edge.learner.methods.inflora import InfLora
from duallora_edge.learner.methods.joint import Joint
from duallora_edge.learner.methods.sequential import Sequential
from duallora_edge.learner.methods.task_arithmetic import TaskArithmetic
from duallora_edge.learner.model import ComposedModel
from duallora_edge.learner.recipe import Checkpoint, Lesson, Progress
from duallora_edge.learner.record import TaskRecord

METHODS: dict[str, Method] = {
    method.name: method for method in (DualLora(), InfLora(), Sequential(), TaskArithmetic(), Frozen(), Joint())
}


@torch.enable_grad()
def learn_task(
    backbone: Backbone,
    past: Sequence[TaskRecord],
    task: PreparedTask,
    config: TrainConfig,
    checkpoint: Checkpoint,
    progress: Progress,
    cache: PrefixCache | None = None,
) -> TaskRecord:
    """Learn one task after the tasks ``past`` and return its record. Nothing of ``past`` is changed.

    The same inputs give the same record bit for bit on one machine (CPU, fp32), also when training was
    interrupted and continued from ``checkpoint``. It may be called under ``torch.no_grad``. Raises `ConfigError`
    for a second task of a method that learns everything at once.
    """
    method = METHODS[config.method]
    if past and method.single_task:
        raise ConfigError(f"The method {method.name} learns all tasks at once; it cannot learn {task.name} as well.")
    encode = partial(Encoded, backbone, precision=config.precision, batch_size=config.forward_batch)
    train = encode(task.train, task.classes, partial(progress, "encode"), cache, cache_bytes=config.cache_bytes)
    # Held-back images are read once or twice: memory is kept for those that are read in every epoch.
    held = encode(task.validation, task.classes, cache=cache, cache_bytes=None if config.cache_bytes is None else 0)
    return method.learn(Lesson(backbone, past, task, train, held, config, checkpoint, progress))


def compose(backbone: Backbone, tasks: Sequence[TaskRecord]) -> ComposedModel:
    """The model that the tasks make (at least one), by the method of the last one."""
    return METHODS[tasks[-1].info.method].compose(backbone, tasks)
