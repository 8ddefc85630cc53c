"""`open_stream`: from what the user names to a stream of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from duallora_edge.errors import DataError
from duallora_edge.files import cache_folder
from duallora_edge.learner.data.boxes import find_crops, find_detection
from duallora_edge.learner.data.fiftyone import find_in_fiftyone
from duallora_edge.learner.data.folders import checked_name, find_in_folder
from duallora_edge.learner.data.images import Stream
from duallora_edge.learner.data.manifest import MANIFESTS, find_in_manifest, find_in_metadata
from duallora_edge.learner.data.other_layouts import refuse_file
from duallora_edge.learner.data.split import Found, FoundTask, Splits, by_classes
from duallora_edge.learner.data.tables import find_in_tables
from duallora_edge.learner.data.tar_shards import find_in_shards
from duallora_edge.learner.data.torchvision_sets import find_in_torchvision
from duallora_edge.text import UNSAFE

_TORCHVISION = "torchvision:"
MAX_NAME = 2000


def open_stream(
    source: str,
    *,
    classes_per_task: int | None = None,
    class_order: str = "alphabetical",
    task_order: Sequence[str] | None = None,
    task_name: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    data_root: Path | None = None,
    crop_boxes: bool = False,
) -> Stream:
    """Find out how ``source`` is laid out and list its tasks. No image is decoded here; see `prepare`.

    ``source`` is a folder (``<class>/*``, ``{train,val,test}/<class>/*`` or
    ``<task>/{train,val,test}/<class>/*``), a folder with metadata.csv or metadata.jsonl (``file_name,label``), a CSV,
    JSON or JSON lines file (``path,label[,split][,task]``), tar shards of WebDataset, a Parquet file or a folder of
    Hugging Face datasets, a folder of FiftyOne (``data/``, ``labels.json``) or ``torchvision:NAME`` (files under
    ``data_root``, by default in the cache folder).

    * ``classes_per_task`` cuts a source that is one task into tasks of so many classes, in ``class_order``
      (``"alphabetical"`` or ``"seed:N"``); ``task_name`` then is the beginning of their names.
    * ``task_order`` picks and orders the tasks of a source that is a stream; the others are left out.
    * ``crop_boxes`` makes an image of each box of a detection set (COCO or YOLO).
    * Validation images come from a ``val`` split, else ``validation_fraction`` of the training images of each
      class. Test images come from the source; where it knows no splits, ``test_fraction`` is split off.

    Raises `DataError` when the images cannot be used as they lie there, `ConfigError` for a bad setting.
    """
    splits = Splits(validation_fraction, test_fraction, seed)
    task_name = None if task_name is None else checked_name(task_name)
    found = _find(source, task_order, task_name, data_root, crop_boxes)
    tasks = found.tasks
    if classes_per_task is not None:
        if found.is_stream:
            raise DataError(f"{source} already says which images belong to which task; leave out classes_per_task.")
        tasks = by_classes(tasks[0], classes_per_task, class_order, task_name or "classes")
    for task in tasks:
        _check_names(task)
    return Stream(found.layout, source, tuple(map(splits.apply, tasks)), found.notes)


def _check_names(task: FoundTask) -> None:
    """Raise `DataError` for names that no device would accept: they are shown on terminals, and in logs."""
    for what, names in (("task", [task.name]), ("class", task.train.classes)):
        for name in names:
            if UNSAFE.search(name):
                raise DataError(f"The name {name!r} of a {what} holds control characters; rename it without them.")
            if not 0 < len(name) <= MAX_NAME:
                raise DataError(f"The name {name[:40]!r} of a {what} must have 1 to {MAX_NAME} characters; rename it.")


def _find(
    source: str, task_order: Sequence[str] | None, task_name: str | None, data_root: Path | None, crop_boxes: bool
) -> Found:
    path = Path(source)
    is_folder = not source.startswith(_TORCHVISION) and path.is_dir()
    if crop_boxes and not is_folder:
        raise DataError(f"{source} is not a folder with boxes (COCO or YOLO); leave out --crop-boxes.")
    if is_folder:
        return _find_in_folder(path, task_order, task_name or path.resolve().name or "task", crop_boxes)
    if source.startswith(_TORCHVISION):
        if task_order is not None:
            raise DataError("task_order needs a source with named tasks; a torchvision dataset has none.")
        name = source.removeprefix(_TORCHVISION)
        return find_in_torchvision(name, data_root or cache_folder() / "torchvision", task_name or name.lower())
    if not path.exists():
        raise DataError(f"{source} does not exist; name a folder of images, a list of them or torchvision:NAME.")
    suffix = path.suffix.lower() if path.is_file() else ""
    if suffix in MANIFESTS:
        return find_in_manifest(path, task_order, task_name or path.stem)
    found = _find_single_task(path, task_order, task_name or path.stem) if suffix in (".tar", ".parquet") else None
    return found or refuse_file(path)


def _find_in_folder(path: Path, task_order: Sequence[str] | None, task_name: str, crop_boxes: bool) -> Found:
    if detection := find_detection(path):
        if not crop_boxes:
            raise DataError(
                f"{path} is a {detection.kind} detection set ({detection.parts[0].labels}), whose classes belong to "
                "boxes, not to images; give --crop-boxes to learn each box as an image of its class."
            )
        if task_order is not None:
            raise DataError(f"task_order needs a source with named tasks; the detection set {path} is a single task.")
        return find_crops(detection, task_name)
    if crop_boxes:
        raise DataError(f"{path} has no boxes (COCO or YOLO) to crop; leave out --crop-boxes.")
    return (
        find_in_metadata(path, task_order, task_name)
        or _find_single_task(path, task_order, task_name)
        or find_in_folder(path, task_order, task_name)
    )


def _find_single_task(path: Path, task_order: Sequence[str] | None, task_name: str) -> Found | None:
    """Layouts of other tools that name no tasks."""
    if path.is_dir():
        found = find_in_shards(path, task_name) or find_in_tables(path, task_name) or find_in_fiftyone(path, task_name)
    else:
        found = (find_in_shards if path.suffix.lower() == ".tar" else find_in_tables)(path, task_name)
    if found and task_order is not None:
        raise DataError(f"task_order needs a source with named tasks; {path} is a single task ({found.layout}).")
    return found
