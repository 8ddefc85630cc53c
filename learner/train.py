"""Learning the tasks that a run does not know yet: from settings to backbone, images, tasks and report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from duallora_edge.errors import ConfigError, DataError, RunError
from duallora_edge.files import write_atomic
from duallora_edge.learner import distributed, memory_budget
from duallora_edge.learner.adapt import base_for
from duallora_edge.learner.callbacks import Callback, Callbacks
from duallora_edge.learner.config import PER_CALL, SOURCE, TrainConfig
from duallora_edge.learner.data import PreparedStream, PreparedTask
from duallora_edge.learner.data.class_counts import concerns, describe_counts
from duallora_edge.learner.data.kept_split import keep_apart
from duallora_edge.learner.device import pick_device, pick_precision
from duallora_edge.learner.evaluate import Tests, add_tests, evaluate_run, report
from duallora_edge.learner.history import History
from duallora_edge.learner.methods import METHODS, learn_task
from duallora_edge.learner.network.backbone import Backbone, load_backbone, relative_work
from duallora_edge.learner.network.base_adaptation import BaseAdaptation, read_base
from duallora_edge.learner.network.prefix_cache import PrefixCache
from duallora_edge.learner.reading import check_apart, read_images
from duallora_edge.learner.report.metrics import Metrics
from duallora_edge.learner.report.picture_sheet import ClassPictures, each, sheet_png
from duallora_edge.learner.run_directory import PICTURES, RunDirectory, StoredTask
from duallora_edge.learner.timing import phase, start_task


def new_backbone(config: TrainConfig, callback: Callback) -> Backbone:
    """The backbone that a configuration names."""
    callback.say(f"Backbone {config.backbone}")
    return distributed.main_first(
        lambda: load_backbone(
            config.backbone,
            weights=Path(config.weights) if config.weights else None,
            size=config.size,
            prefix_blocks=config.prefix_blocks,
            summaries=config.summaries,
        )
    )


# Points of accuracy by which a smaller input was worse (benchmarks/RESULTS.md, "The input size").
_LOST = {(128, 96): 3.6}


def describe_size(backbone: Backbone) -> str:
    """One line on what the input size costs beside the native and a smaller one."""
    size, native = backbone.info.size, backbone.native_size
    text = f"Input {size} px"
    if native != size:
        text += f" (the backbone's own size of {native} px takes {relative_work(backbone, native):.1f} times the work)"
    smaller = 3 * size // 4 // backbone.patch_size * backbone.patch_size
    if smaller:
        text += f"; --size {smaller} would take {relative_work(backbone, smaller):.2f} of it and cost accuracy"
        lost = _LOST.get((size, smaller))
        if lost and native > size:
            text += f" ({lost} points with a ViT-Ti on CIFAR-100)"
    return text


def _apply(found: tuple[BaseAdaptation, bytes], backbone: Backbone) -> bytes:
    """Fold a base adaptation into the backbone; returns the content of its file."""
    base, content = found
    backbone.adapt(base, hashlib.sha256(content).hexdigest())
    return content


def open_run(path: Path, config: TrainConfig, given: Sequence[str]) -> RunDirectory:
    """Open the run at ``path``. Settings in ``given`` must not contradict those it was made with."""
    run = RunDirectory.open(path)
    values, stored = config.to_json(), run.config.to_json()
    if config.precision == "auto":  # what was chosen when the run was made
        values["precision"] = stored["precision"]
    changed = [key for key in given if key not in PER_CALL and values[key] != stored[key]]
    if changed:
        texts = [f"{key} is {stored[key]!r}, not {values[key]!r}" for key in changed]
        raise ConfigError(f"The run {path} was made with other settings: {'; '.join(texts)}. Use a new --run.")
    return run


def train_run(
    path: Path,
    config: TrainConfig,
    given: Sequence[str],
    callback: Callback,
    cache: PrefixCache | None = None,
    *,
    again: str | None = None,
    evaluate: bool = True,
) -> Metrics:
    """Learn the tasks of ``config.data`` that the run does not know yet, evaluate, and write the report.

    The task ``again`` is learned before them from the images that are there now, unless the run knows it from these. As
    the newest task it takes the place of its old version, in one step; its classes and statistics are counted once.

    ``given`` names the settings that the user set; the others come from the run. Without data the images of the
    last call are used, or those of the task ``again``. Interrupted at any moment, the same call continues. ``cache``
    shares what the frozen prefix makes of the images with other runs. Returns the metrics of the run; without
    ``evaluate`` states stay unmeasured.

    Several processes (`distributed.process_group`) learn it together when all of them see the folder of the run.
    """
    run = open_run(path, config, given) if again is not None or RunDirectory.exists(path) else None
    if run is not None and again is not None:
        run.find(again)  # before the images are read
    if not config.data:
        if run is None:
            raise ConfigError("Name the images to learn from with --data DIR.")
        config = replace(config, **_known_source(run, again))
    check_apart(path, config)
    device = pick_device(config.device)
    free_precision = run is None and config.precision == "auto"
    if run is None:
        backbone = new_backbone(config, callback)
        callback.say(describe_size(backbone))
        config = replace(config, precision=pick_precision(config.precision, device))
    else:
        backbone = run.backbone(config.weights)
        config = replace(run.config, **{key: getattr(config, key) for key in PER_CALL if key != "weights"})
    base = None
    if run is None and config.base not in ("auto", "all", "none"):
        base = _apply(distributed.on_main(lambda: read_base(Path(config.base))), backbone)
    stream = read_images(config, backbone.info, callback, apart_from=path)
    callback.say(stream.health.table())
    _say_counts(stream, run, callback)
    frames = [task.train.pixels for task in (stream.tasks if config.base == "all" else stream.tasks[:1])]
    if METHODS[config.method].single_task:
        stream = stream.merged()
    names = tuple(task.name for task in stream.tasks)
    if again is not None and again not in names:
        raise DataError(
            f"{config.data} holds no task {again!r} to learn again, but {', '.join(names) or 'none'}; "
            "name the folder of its images with --data, or one folder and --task-name."
        )
    if config.memory_budget is not None and distributed.world_size() > 1:
        raise ConfigError("A memory budget is for one process; leave it out, or start without torchrun.")
    learned = len(run.active_tasks()) if run else 0
    plan = memory_budget.fit_budget(config, backbone.to(device), stream, path, learned, free_precision=free_precision)
    if plan:
        config = plan.apply(config)
        callback.say(plan.describe(config.batch_size))
    if run is None:
        # Only now, so that images that cannot be used do not leave an empty run behind.
        if base is None and frames:
            base = _apply(base_for(backbone, frames, config, callback), backbone)
        run = RunDirectory.create(path, config, backbone.info, base)
    with run.locked():
        known = _check_known(run, stream, again)
        replaced = run.find_removable(again) if again is not None and again not in known else None
        # Until it is learned again, that task has the source of its old version.
        run.remember_source([name for name in names if known.get(name, name != again)], config)
        if distributed.is_main():
            callback = Callbacks([History(path), callback])
        callback.start(config, names)
        if plan:
            memory_budget.remember(plan, config.batch_size, path)
        backbone.to(device)
        tests = None
        if evaluate:
            test_bytes = None if config.cache_bytes is None else 0  # read once a state
            tests = Tests(backbone, config.precision, cache, batch_size=config.forward_batch, cache_bytes=test_bytes)
            add_tests(run, tests, callback, skip=set(names) - set(known))
        metrics = None
        if known and not replaced:
            metrics = evaluate_run(run, tests, reuse=True, on_state=callback.measured)
        # New tasks come after the one that is learned again, as if it had been removed before.
        for task in sorted(stream.tasks, key=lambda task: task.name != again):
            if task.name in known:
                callback.say(
                    f"Task {task.name} is already learned from these images"
                    if known[task.name]
                    else f"Task {task.name} stays as it was learned from other images; --again {task.name!r} changes it"
                )
                continue
            start_task(task.name)
            splits = {entry: run.read_split(entry) for entry in run.active_tasks()}
            if replaced and task.name == again:
                task = splits.pop(replaced).extend(task)
            task = keep_apart(task, splits.values(), callback.say)
            _learn(run, backbone, task, config, callback, cache, replaced if task.name == again else None)
            if task.name == again:
                run.remember_source([again], config)
            if tests:
                tests.add(task.name, task.test, task.classes)
            metrics = evaluate_run(run, tests, reuse=True, on_state=callback.measured)
        if metrics is None:
            raise DataError(f"{config.data} holds no task.")
        report(run, metrics, callback)
        if config.pictures:
            _write_pictures(run, stream)
    callback.end(metrics)
    return metrics


def _say_counts(stream: PreparedStream, run: RunDirectory | None, callback: Callback) -> None:
    """Say how many images each class has, and what that makes likely."""
    before = {name for task in run.active_tasks() for name in run.read_info(task).classes} if run else set()
    alone = len(before.union(*(task.classes for task in stream.tasks))) == 1
    for task in stream.tasks:
        where = f"{task.name}: " if len(stream.tasks) > 1 else ""
        callback.say(f"  {where}{describe_counts(task.counts)}")
        for line in concerns(task.counts, alone=alone):
            callback.say(f"  {where}{line}")


@distributed.main_only
def _write_pictures(run: RunDirectory, stream: PreparedStream) -> None:
    """Write the picture sheet of the tasks of this call; no test image is on it."""
    number = each(sum(len(task.classes) for task in stream.tasks))
    pictures = []
    for task in stream.tasks:
        labels, counts = np.array(task.train.labels), task.counts
        for name in task.classes:
            first = np.flatnonzero(labels == name)[:number]
            pictures.append(ClassPictures(task.name, name, counts[name], task.train.pixels[first]))
    write_atomic(run.path / PICTURES, sheet_png(pictures))


def _learn(
    run: RunDirectory,
    backbone: Backbone,
    task: PreparedTask,
    config: TrainConfig,
    callback: Callback,
    cache: PrefixCache | None,
    replaced: StoredTask | None,
) -> None:
    """Learn and commit one task, after all active ones but ``replaced``, whose place it takes."""
    others = [entry for entry in run.active_tasks() if entry != replaced]
    past = run.records(others)
    if past and past[-1].info.method != config.method:
        raise RunError(f"The run {run.path} was trained with {past[-1].info.method}; use a new --run.")
    number = len(past) + 1
    callback.say(
        f"Task {number} {task.name}{', again' if replaced else ''}: "
        f"{len(task.classes)} class{'es' if len(task.classes) > 1 else ''}, "
        f"{len(task.train)} images to learn from, {len(task.validation)} for validation, {len(task.test)} for the test"
    )
    if len(task.classes) == 1 and METHODS[config.method].trains:
        callback.say("  one class gives no gradient: its statistics are learned, no adapter")
    checkpoint = run.checkpoint(_training_key(run.digest(others), task, config))
    started = time.monotonic()
    record = learn_task(backbone, past, task, config, checkpoint, callback, cache)
    with phase("checkpoint"):
        run.commit(record, replaced)
        kept = run.delete_dropped()
    for folder in kept:
        callback.say(f"{folder} stays: it holds files that the task did not write.")
    callback.learned(task.name, time.monotonic() - started)
    residual = "" if record.info.residual == "none" else f", residual {record.info.residual}"
    callback.say(f"  learned in {time.monotonic() - started:.0f} s{residual}")


def _training_key(state: str, task: PreparedTask, config: TrainConfig) -> str:
    """Identifies one training exactly: a checkpoint of another configuration, state or task is not continued.

    ``state`` is the digest of the tasks that it comes after.
    """
    without = (*SOURCE, "weights", "memory_budget", "cache_bytes")  # what changes no result
    settings = {key: value for key, value in config.to_json().items() if key not in without}
    text = json.dumps([settings, state, task.name, task.digest, list(task.classes)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _known_source(run: RunDirectory, again: str | None) -> dict[str, Any]:
    """Where the images of the last call lie, or those of the task ``again``, as settings of `TrainConfig`."""
    sources = run.sources()
    if again is not None:
        sources = {name: settings for name, settings in sources.items() if name == again}
    if not sources:
        raise ConfigError(
            f"The run {run.path} knows no images{f' of {again!r}' if again else ' yet'}; name them with --data DIR."
        )
    return list(sources.values())[-1]


@distributed.main_only
def _check_known(run: RunDirectory, stream: PreparedStream, again: str | None) -> dict[str, bool]:
    """The names of the tasks that are learned and stay, and whether they were learned from the same images.

    The task ``again`` stays only if it was. Raises `DataError` for other images where no task is to be learned again;
    where one is, others may have changed as well, and have their turn in later calls.
    """
    learned = {info.name: info.data_digest for info in map(run.read_info, run.active_tasks())}
    same = {task.name: learned[task.name] == task.digest for task in stream.tasks if task.name in learned}
    for name in same:
        if again is None and not same[name]:
            raise DataError(
                f"The run {run.path} learned a task {name!r} from other images; learn it again from all of its images "
                f"with --again {name!r}, or give a folder of the new images alone and another name with --task-name "
                "(or rename the task's folder)."
            )
    return {name: value for name, value in same.items() if value or name != again}
