"""Learning one task with the method of a run, and the model that the tasks of a run make together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch

from duallora_edge.errors import ConfigError, RunError
from duallora_edge.learner.callbacks import Callback, report_progress
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.methods import METHODS
from duallora_edge.learner.methods.lesson import Checkpoint, Lesson
from duallora_edge.learner.methods.training import derive_seed
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.prefix_cache import Encoded, PrefixCache
from duallora_edge.learner.network.task_record import TaskRecord

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_DAMAGED, _REMEDY = "The run is damaged", "restore it from a copy."


@torch.enable_grad()
def learn_task(
    backbone: Backbone,
    past: Sequence[TaskRecord],
    task: PreparedTask,
    config: TrainConfig,
    checkpoint: Checkpoint,
    callback: Callback,
    cache: PrefixCache | None = None,
) -> TaskRecord:
    """Learn one task after the tasks ``past`` and return its record. Nothing of ``past`` is changed.

    The same inputs give the same record bit for bit on one machine (CPU, fp32), also when training was
    interrupted and continued from ``checkpoint``. It may be called under ``torch.no_grad``. Raises `ConfigError`
    for a second task of a method that learns everything at once, and `RunError` when ``past`` does not fit or what
    was learned is not finite.
    """
    method = METHODS[config.method]
    if past and method.single_task:
        raise ConfigError(f"The method {method.name} learns all tasks at once; it cannot learn {task.name} as well.")
    _check_fit(backbone, past)
    encode = partial(Encoded, backbone, precision=config.precision, batch_size=config.forward_batch)
    train = encode(
        task.train,
        task.classes,
        partial(report_progress, callback, "encode"),
        cache,
        cache_bytes=config.cache_bytes,
        views=config.views,
        flip=config.flip,
        seed=derive_seed(config.seed, len(past), 0, 1),
    )
    # Validation images are read only once or twice, so memory is left to those that are read in every epoch.
    validation = encode(
        task.validation, task.classes, cache=cache, cache_bytes=None if config.cache_bytes is None else 0
    )
    try:
        record = method.learn(Lesson(backbone, past, task, train, validation, config, checkpoint, callback))
        useful = record.is_finite
    except LinAlgError:  # numbers that are not finite, or a matrix that is not a covariance
        useful = False
    if not useful:
        raise RunError(
            f"Task {task.name!r} cannot be learned: its training diverged or the statistics of earlier tasks are "
            "damaged; lower --learning-rate or restore the run from a copy."
        )
    return record


def compose(backbone: Backbone, tasks: Sequence[TaskRecord]) -> ComposedModel:
    """The model that the tasks make (at least one), by the method of the last one.

    Raises `RunError` when they do not fit each other or the backbone.
    """
    _check_fit(backbone, tasks)
    try:
        model = METHODS[tasks[-1].info.method].compose(backbone, tasks)
    except LinAlgError as error:
        raise RunError(f"{_DAMAGED} (its statistics are not those of images); {_REMEDY}") from error
    if not all(bool(torch.isfinite(value).all()) for value in model.buffers()):
        raise RunError(f"{_DAMAGED} (its answers would not be numbers); {_REMEDY}")
    return model


def _check_fit(backbone: Backbone, tasks: Sequence[TaskRecord]) -> None:
    """Raise `RunError` unless the tasks are of one run on this backbone. Each alone was checked when it was read."""
    sizes = (len(backbone.suffix), backbone.dim, backbone.dim + backbone.summary_dim)
    names = Counter(task.info.name for task in tasks)
    for task in tasks:
        info, last = task.info, tasks[-1]
        problem = ""
        if info.method not in METHODS:
            problem = f"its method {info.method!r} is not known here"
        elif (len(task.blocks), task.head.shape[1] - 1, task.statistics.means.shape[1]) != sizes:
            problem = "it was learned on another backbone"
        elif (info.method, info.classifier) != (last.info.method, last.info.classifier):
            problem = "it was learned with another method than the last one"
        elif any(
            len(b.residual.q_down) != len(b.residual.v_down) for b in METHODS[info.method].updates([task.blocks])[0]
        ):
            problem = "one gate cannot open adapters of different ranks"
        elif names[info.name] > 1:
            problem = "another task has the same name"
        elif bool(task.kept_images) != bool(last.kept_images) or not METHODS[info.method].is_complete(task, backbone):
            problem = "it lacks something that its method needs, or has something else"
        if problem:
            raise RunError(f"{_DAMAGED} (task {info.name!r}: {problem}); {_REMEDY}")
