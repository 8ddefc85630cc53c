"""Folders of FiftyOne (FiftyOneImageClassificationDataset): images in ``data/`` and their classes in labels.json."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from duallora_edge.errors import DataError
from duallora_edge.files import read_json
from duallora_edge.learner.data.class_names import ClassNames
from duallora_edge.learner.data.folders import checked_name, files_and_folders, is_file, is_image_name
from duallora_edge.learner.data.images import ImageFile, ImageSet
from duallora_edge.learner.data.split import Found, FoundTask

MAX_BYTES = 256 * 2**20


def find_in_fiftyone(root: Path, task_name: str) -> Found | None:
    """List the images of a FiftyOne folder. None for another folder.

    Images without a class and classes of images that are not there are ignored. Raises `DataError` when labels.json
    cannot be read, names several classes for one image, or an unknown class number.
    """
    file, data = root / "labels.json", root / "data"
    if not is_file(file) or files_and_folders(root, file.name)[1] != [data.name]:
        return None
    try:
        value = read_json(file, MAX_BYTES)
        names = ClassNames([str(name) for name in value.get("classes") or []], str(file))
        classes = {key: _class(label, names, f"{key[:80]!r} in {file}") for key, label in value["labels"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)[:200]
        raise DataError(f"{file} cannot be read as FiftyOne writes it ({reason}); export the dataset again.") from error
    ignored: Counter[str] = Counter()
    images: list[ImageFile] = []
    labels: list[str] = []
    for path in _images(data):
        key = path.relative_to(data).as_posix()
        found = next((name for name in (os.path.splitext(key)[0], key) if name in classes), None)  # noqa: PTH122
        label = None if found is None else classes.pop(found)
        if label is None:
            ignored["images without a class"] += 1
        else:
            images.append(ImageFile(path))
            labels.append(label)
    ignored["classes of images that are missing"] += sum(label is not None for label in classes.values())
    if not images:
        raise DataError(f"None of the images that {file} names is in {data}; put them there.")
    notes = [f"ignored: {count} {what}" for what, count in sorted(ignored.items()) if count]
    task = FoundTask(task_name, ImageSet(tuple(images), tuple(labels)), None, None)
    return Found("FiftyOne folder", (task,), False, (*notes, *names.notes()))


def _images(folder: Path) -> list[Path]:
    """The image files below a folder, sorted; links to folders are not followed, as they may form a loop."""
    return sorted(Path(parent) / name for parent, _, names in os.walk(folder) for name in names if is_image_name(name))


def _class(label: object, names: ClassNames, where: str) -> str | None:
    """The class of an image: a number, a name, a dict with the name as ``label``, or None."""
    if isinstance(label, dict):
        label = label["label"]
    if label is None:
        return None
    if isinstance(label, list):
        raise DataError(f"{where} has a list of labels, but one image has one class here; export a single label field.")
    if isinstance(label, int) and not isinstance(label, bool):
        return names.of_number(label, where)
    if not isinstance(label, str) or not label:
        raise DataError(f"{where} has the label {str(label)[:40]!r}, which names no class; correct it.")
    return checked_name(label)
