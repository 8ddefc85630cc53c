"""The images of a run: where they may lie, what they are, and decoded at the input size of the backbone."""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from duallora_edge.errors import ConfigError, DataError
from duallora_edge.learner import distributed
from duallora_edge.learner.callbacks import Callback, report_progress
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import ImageFile, PreparedStream, Stream, open_stream, prepare
from duallora_edge.learner.network.backbone_info import BackboneInfo
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.timing import timed
from duallora_edge.runtime.preprocess import Preprocessing


@distributed.main_only
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
    config: TrainConfig, info: BackboneInfo, callback: Callback, apart_from: Path | None = None
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
        crop_boxes=config.crop_boxes,
    )
    stream = distributed.main_first(open_source)
    if apart_from is not None:
        _check_images_apart(apart_from, stream)
    callback.say(stream.describe())
    preprocessing = Preprocessing(info.size, config.resize, info.interpolation)
    on_progress = partial(report_progress, callback, "decode")
    prepared = distributed.main_first(lambda: prepare(stream, preprocessing, on_progress=on_progress))
    if config.develop:
        callback.say("Measuring on a fifth of the training images; the test images are left alone")
        return prepared.for_development(config.seed)
    return prepared


def source_groups(run: RunDirectory, names: Collection[str]) -> list[dict[str, Any]]:
    """The different sources (settings of `TrainConfig`) of the named tasks, in the order they were used.

    Tasks whose source is not known (sources.json was lost) make an empty group.
    """
    sources = run.sources()
    groups: list[dict[str, Any]] = [] if set(names) <= set(sources) else [{}]
    for name, settings in sources.items():
        if name in names and settings not in groups:
            groups.append(settings)
    return groups
