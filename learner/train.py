"""One call of `train` or `evaluate`: from configuration to run, images, tasks and report."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from duallora_edge import interrupts
from duallora_edge.errors import ConfigError, DataError, RunError
from duallora_edge.learner import distributed, memory_budget
from duallora_edge.learner.config import PER_CALL, SOURCE, TrainConfig
from duallora_edge.learner.data import ImageFile, PreparedStream, PreparedTask, Stream, open_stream, prepare
from duallora_edge.learner.evaluate import Tests, evaluate_run, report
from duallora_edge.learner.methods import METHODS, learn_task
from duallora_edge.learner.network.backbone import Backbone, load_backbone
from duallora_edge.learner.network.backbone_info import BackboneInfo
from duallora_edge.learner.network.prefix_cache import PrefixCache
from duallora_edge.learner.report.metrics import Metrics, Row
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.timing import phase, start_task, timed
from duallora_edge.runtime.preprocess import Preprocessing


class Listener:
    """What a session tells while it works. The base class is silent."""

    def say(self, text: str) -> None:
        """One line for the user."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Progress of the stage in work."""

    def learned(self, task: str, seconds: float) -> None:
        """A task was learned and committed."""

    def row(self, state: int, row: Row) -> None:
        """The state after ``state`` tasks was measured."""


def _progress(listener: Listener, stage: str, done: int, total: int) -> None:
    interrupts.check()
    listener.progress(stage, done, total)


def pick_device(name: str) -> torch.device:
    """The device for ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``. Raises `ConfigError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("No CUDA device is available; leave out --device or use --device cpu.")
    if device.type == "cuda" and distributed.world_size() > 1:
        if ":" in name:
            raise ConfigError(f"Several processes cannot share {name}; use --device cuda, which gives each its own.")
        if distributed.local_world_size() > torch.cuda.device_count():
            raise ConfigError(
                f"{distributed.local_world_size()} processes need as many CUDA devices, this machine has "
                f"{torch.cuda.device_count()}; use --nproc-per-node {torch.cuda.device_count()} or --device cpu."
            )
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """``bf16`` for ``auto`` where the hardware multiplies bf16 natively, else ``fp32``."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def new_backbone(config: TrainConfig, listener: Listener) -> Backbone:
    """The backbone that a configuration names."""
    listener.say(f"Backbone {config.backbone}")
    return load_backbone(
        config.backbone,
        weights=Path(config.weights) if config.weights else None,
        size=config.size,
        prefix_blocks=config.prefix_blocks,
        summaries=config.summaries,
    )


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


def check_apart(run: Path, config: TrainConfig) -> None:
    """Raises `DataError` when the run would share a folder with what it learns from; links are followed."""
    data = "" if config.data.startswith("torchvision:") else config.data
    for what, name in (("The images", data), ("The weights", config.weights), ("The data sets", config.data_root)):
        if name and _inside(Path(name), run):
            raise DataError(f"{what} in {name} lie inside the run {run}; give another folder with --run.")
    if data and Path(data).is_dir() and _inside(run, Path(data)):
        raise DataError(f"The run {run} lies inside the images in {data}; give another folder with --run.")


def _check_images_apart(run: Path, stream: Stream) -> None:
    """Raises `DataError` when an image of the stream, which a manifest may take from anywhere, lies in the run."""
    paths = {
        image.path if image.path.is_symlink() else image.path.parent
        for task in stream.tasks
        for image in (*task.train.images, *task.validation.images, *task.test.images)
        if isinstance(image, ImageFile)
    }
    for path in sorted(paths):
        if _inside(path, run):
            raise DataError(f"Images of {stream.source} lie inside the run {run} ({path}); give another --run.")


def _inside(path: Path, folder: Path) -> bool:
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # a null byte: no such file exists
        return False


@timed("decode")
def read_images(
    config: TrainConfig, info: BackboneInfo, listener: Listener, apart_from: Path | None = None
) -> PreparedStream:
    """List, check and decode the images that a configuration names, at the input size of the backbone.

    Raises `DataError` when one of them lies in the folder ``apart_from``.
    """
    if not config.data:
        raise ConfigError("Name the images with --data DIR.")
    open_source = partial(
        open_stream,
        config.data,
        classes_per_task=config.classes_per_task,
        class_order=config.class_order,
        task_order=config.task_order,
        task_name=config.task_name,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
        data_root=Path(config.data_root) if config.data_root else None,
    )
    stream = distributed.main_first(open_source)
    if apart_from is not None:
        _check_images_apart(apart_from, stream)
    listener.say(stream.describe())
    preprocessing = Preprocessing(info.size, config.resize, info.interpolation)
    on_progress = partial(_progress, listener, "decode")
    prepared = distributed.main_first(lambda: prepare(stream, preprocessing, on_progress=on_progress))
    if config.develop:
        listener.say("Measuring on a fifth of the training images; the test images are left alone")
        return prepared.for_development(config.seed)
    return prepared


def train_run(
    path: Path,
    config: TrainConfig,
    given: Sequence[str],
    listener: Listener,
    cache: PrefixCache | None = None,
    *,
    evaluate: bool = True,
) -> Metrics:
    """Learn the tasks of ``config.data`` that the run does not know yet, evaluate, and write the report.

    ``given`` names the settings that the user set; the others come from the run. Without data the images of the
    last call are used. Interrupted at any moment, the same call continues. ``cache`` shares what the frozen prefix
    makes of the images with other runs. Returns the metrics of the run; without ``evaluate`` states stay unmeasured.

    Several ranks (`distributed.process_group`) learn it together; the folder of the run must be one that all of them see.
    """
    run = distributed.on_main(lambda: open_run(path, config, given) if RunDirectory.exists(path) else None)
    if not config.data:
        if run is None:
            raise ConfigError("Name the images to learn from with --data DIR.")
        config = replace(config, **distributed.on_main(partial(_last_source, run)))
    distributed.on_main(partial(check_apart, path, config))
    device = pick_device(config.device)
    free: set[str] = set()
    if run is None:
        if config.precision == "auto":
            free.add("precision")
        if config.summaries is None and cache is None:  # a cache holds the summaries of several runs
            free.add("summaries")
        backbone = distributed.main_first(partial(new_backbone, config, listener))
        config = replace(config, precision=distributed.broadcast(pick_precision(config.precision, device)))
    else:
        backbone = distributed.main_first(partial(run.backbone, config.weights))
        config = replace(run.config, **{key: getattr(config, key) for key in PER_CALL if key != "weights"})
    stream = read_images(config, backbone.info, listener, apart_from=path)
    listener.say(stream.health.table())
    if METHODS[config.method].single_task:
        stream = stream.merged()
    if config.memory_budget is not None and distributed.world_size() > 1:
        raise ConfigError("A memory budget is for one process; leave it out, or start without torchrun.")
    learned = len(distributed.on_main(run.head)) if run else 0
    plan = memory_budget.fit_budget(config, backbone.to(device), stream, path, learned, free=free)
    if plan:
        config = plan.apply(config)
        listener.say(plan.describe(config.batch_size))
    # Only now, so that images that cannot be used do not leave an empty run behind.
    run = run or distributed.on_main(partial(RunDirectory.create, path, config, backbone.info))
    with distributed.held_by_main(run.locked()):
        known = distributed.on_main(partial(_check_known, run, stream))
        distributed.on_main(partial(run.remember_source, [task.name for task in stream.tasks], config))
        if plan:
            memory_budget.remember(plan, config.batch_size, path)
        backbone.to(device)
        tests = None
        if evaluate:
            test_bytes = None if config.cache_bytes is None else 0  # read once a state
            tests = Tests(backbone, config.precision, cache, batch_size=config.forward_batch, cache_bytes=test_bytes)
            add_tests(run, tests, listener, skip={task.name for task in stream.tasks} - known)
        metrics = evaluate_run(run, tests, reuse=True, on_row=listener.row) if known else None
        for task in stream.tasks:
            if task.name in known:
                listener.say(f"Task {task.name} is already learned")
                continue
            start_task(task.name)
            _learn(run, backbone, task, config, listener, cache)
            if tests:
                tests.add(task, task.classes)
            metrics = evaluate_run(run, tests, reuse=True, on_row=listener.row)
        if metrics is None:
            raise DataError(f"{config.data} holds no task.")
        distributed.on_main(partial(report, run, metrics))
    return metrics


def measure_run(run: RunDirectory, data: str | None, device: str, weights: str | None, listener: Listener) -> Metrics:
    """Measure every state of a run again and write the report; ``data`` replaces the remembered source."""
    with run.locked():
        backbone = run.backbone(weights).to(pick_device(device))
        tests = Tests(backbone, run.config.precision)
        add_tests(run, tests, listener, data=data)
        metrics = evaluate_run(run, tests, reuse=False, on_row=listener.row)
        report(run, metrics)
    return metrics


def _learn(
    run: RunDirectory,
    backbone: Backbone,
    task: PreparedTask,
    config: TrainConfig,
    listener: Listener,
    cache: PrefixCache | None,
) -> None:
    past = run.records(distributed.on_main(run.head))
    if past and past[-1].info.method != config.method:
        raise RunError(f"The run {run.path} was trained with {past[-1].info.method}; use a new --run.")
    number = len(past) + 1
    listener.say(
        f"Task {number} {task.name}: {len(task.classes)} class{'es' if len(task.classes) > 1 else ''}, "
        f"{len(task.train)} images to learn from, {len(task.validation)} held back, {len(task.test)} for the test"
    )
    if len(task.classes) == 1 and METHODS[config.method].trains:
        listener.say("  one class gives no gradient: its statistics are learned, no adapter")
    checkpoint = run.checkpoint(_training_key(run, task, config))
    started = time.monotonic()
    record = learn_task(backbone, past, task, config, checkpoint, partial(_progress, listener), cache)
    record = distributed.broadcast(record)
    with phase("checkpoint"):
        distributed.on_main(partial(run.commit, record))
    listener.learned(task.name, time.monotonic() - started)
    residual = "" if record.info.residual == "none" else f", residual {record.info.residual}"
    listener.say(f"  learned in {time.monotonic() - started:.0f} s{residual}")


def _training_key(run: RunDirectory, task: PreparedTask, config: TrainConfig) -> str:
    """Identifies one training exactly: a checkpoint of another configuration, state or task is not continued."""
    without = (*SOURCE, "weights", "memory_budget", "cache_bytes")  # what changes no result
    settings = {key: value for key, value in config.to_json().items() if key not in without}
    text = json.dumps([settings, run.digest(), task.name, task.digest, list(task.classes)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _last_source(run: RunDirectory) -> dict[str, Any]:
    sources = run.sources()
    if not sources:
        raise ConfigError(f"The run {run.path} knows no images yet; name them with --data DIR.")
    return list(sources.values())[-1]


def _check_known(run: RunDirectory, stream: PreparedStream) -> set[str]:
    """Names of the tasks that are already learned, from the same images. Raises `DataError` for other images."""
    learned = {info.name: info for info in map(run.read_info, run.head())}
    for task in stream.tasks:
        if task.name in learned and learned[task.name].data_digest != task.digest:
            raise DataError(
                f"The run {run.path} learned a task {task.name!r} from other images; "
                "give the new images another name with --task-name (or rename the task's folder)."
            )
    return {task.name for task in stream.tasks if task.name in learned}


def add_tests(
    run: RunDirectory, tests: Tests, listener: Listener, *, data: str | None = None, skip: Collection[str] = ()
) -> None:
    """Read and encode the test images of the active tasks from where they were learned (or from ``data``).

    A source that is gone is said, and its tasks stay unmeasured; a ``data`` that was asked for must be readable.
    """
    infos = {info.name: info for info in map(run.read_info, distributed.on_main(run.head)) if info.name not in skip}
    for settings in distributed.on_main(partial(source_groups, run, infos)):
        if data is not None:
            settings["data"] = data
        try:
            stream = read_images(replace(run.config, **settings), run.info, listener)
        except (DataError, ConfigError) as error:
            if data is not None:
                raise
            listener.say(f"The test images from {settings.get('data')} cannot be read and are not measured: {error}")
            continue
        if METHODS[run.config.method].single_task:
            stream = stream.merged()
        for task in stream.tasks:
            if task.name in infos:
                tests.add(task, infos[task.name].classes)


def source_groups(run: RunDirectory, names: Collection[str]) -> list[dict[str, Any]]:
    """The different sources (settings of `TrainConfig`) of the named tasks, in the order they were used.

    Tasks whose source is not known (sources.json was lost) make an empty group.
    """
    sources = run.sources()
    groups: list[dict[str, Any]] = [] if set(names) <= set(sources) else [{}]
    for name, settings in sources.items():
        if isinstance(settings.get("task_order"), list):
            settings["task_order"] = tuple(settings["task_order"])
        if name in names and settings not in groups:
            groups.append(settings)
    return groups
