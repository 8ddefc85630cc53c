"""Detection sets (COCO and YOLO): how they are recognised, and each of their boxes as an image of its class."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from duallora_edge.errors import ConfigError, DataError
from duallora_edge.files import parse_json, read_limited
from duallora_edge.learner.data.folders import checked_name, is_file, is_image_name
from duallora_edge.learner.data.health import MIN_SIDE
from duallora_edge.learner.data.images import ImageBox, ImageFile, ImageSet
from duallora_edge.learner.data.split import SPLIT_NAMES, Found, FoundTask, split_of
from duallora_edge.learner.yaml_files import read_yaml

MAX_JSON_BYTES = 256 * 2**20
MAX_LABEL_BYTES = 2**20
MAX_BOXES = 2_000_000
_MOST_FILES = 50  # JSON files of a folder that are looked into
_BLOCK = 2**20
Edges = tuple[float, float, float, float]


@dataclass(frozen=True)
class _Part:
    """Images with boxes: a JSON file (COCO) or a folder of labels (YOLO), and its split, ``""`` where none is named."""

    split: str
    labels: Path
    images: Path


@dataclass(frozen=True)
class Detection:
    """A folder in which boxes tell the classes, not folders. ``kind`` is COCO or YOLO."""

    kind: str
    root: Path
    parts: tuple[_Part, ...]


@dataclass(frozen=True)
class _Boxes:
    """The boxes of one image: class names, and edges (left, top, right, bottom) in pixels of ``size``.

    ``size`` (width, height) is 1 x 1 where the edges are shares of the image, as in YOLO.
    """

    image: Path
    size: tuple[int, int]
    boxes: tuple[tuple[str, Edges], ...]


def find_detection(root: Path) -> Detection | None:
    """What makes ``root`` a detection set, None where it is not one."""
    if parts := _coco_parts(root):
        return Detection("COCO", root, parts)
    if parts := _yolo_parts(root):
        return Detection("YOLO", root, parts)
    return None


def find_crops(found: Detection, task_name: str) -> Found:
    """Each box of a detection set as an image of its class; boxes are cut off at the edges of their image.

    Headers of images are read, no pixels. Boxes that cannot be used are left out and counted. A set of one part has no
    splits. Raises `DataError` when a file of boxes cannot be read, or no box can be used.
    """
    ignored: Counter[str] = Counter()
    names = _yolo_names(found.root) if found.kind == "YOLO" else ([], False)
    splits: dict[str, tuple[list[ImageBox], list[str]]] = {"train": ([], []), "val": ([], []), "test": ([], [])}
    total = 0
    for part in found.parts:
        images, labels = splits[part.split if part.split and len(found.parts) > 1 else "train"]
        found_boxes = (
            _read_coco(found.root, part, ignored) if found.kind == "COCO" else _read_yolo(part, *names, ignored)
        )
        for boxes in found_boxes:
            total += len(boxes.boxes)
            if total > MAX_BOXES:
                raise DataError(f"{found.root} has more than {MAX_BOXES:,} boxes; divide it into several folders.")
            for label, image in _crops(boxes, ignored):
                images.append(image)
                labels.append(label)
    if not splits["train"][0]:
        raise DataError(f"{found.root} has no usable box to learn from{_listed(ignored)}; correct the annotations.")
    learned = set(splits["train"][1])
    sets = {}
    for split, (images, labels) in splits.items():
        known = [index for index, label in enumerate(labels) if label in learned]
        ignored["boxes of classes without a training box"] += len(labels) - len(known)
        sets[split] = ImageSet(tuple(images), tuple(labels)).subset(known)
    notes = tuple(f"ignored: {count} {what}" for what, count in sorted(ignored.items()) if count)
    task = FoundTask.of(task_name, sets if len(found.parts) > 1 else {"train": sets["train"]})
    return Found(f"boxes of a {found.kind} detection set", (task,), False, notes)


def _listed(ignored: Counter[str]) -> str:
    return f" ({', '.join(f'{count} {what}' for what, count in sorted(ignored.items()))})" if ignored else ""


def _crops(boxes: _Boxes, ignored: Counter[str]) -> Iterator[tuple[str, ImageBox]]:
    """The boxes of one image that can be used."""
    if not boxes.boxes:
        return
    size = ImageFile(boxes.image).size()
    if size is None:
        ignored["boxes of images that are missing or unreadable"] += len(boxes.boxes)
        return
    if boxes.size not in ((1, 1), size):
        ignored["boxes drawn on an image of another size"] += len(boxes.boxes)
        return
    across, down = boxes.size
    for number, (label, (left, top, right, bottom)) in enumerate(boxes.boxes):
        edges = tuple(min(max(edge, 0.0), 1.0) for edge in (left / across, top / down, right / across, bottom / down))
        crop = ImageBox(boxes.image, edges, number)
        if any(last - first < MIN_SIDE for first, last in zip(*crop.corners(*size), strict=True)):
            ignored[f"boxes with a side under {MIN_SIDE} px"] += 1
        else:
            yield label, crop


# COCO


def _coco_parts(root: Path) -> tuple[_Part, ...]:
    """The JSON files with boxes: in ``annotations/``, beside the images, or in each split folder (as of Roboflow)."""
    files = [
        *sorted(islice(root.glob("*.json"), _MOST_FILES)),
        *sorted(islice(root.glob("annotations/*.json"), _MOST_FILES)),
    ]
    parts = [_Part(split_of(file.stem), file, root) for file in files if is_file(file) and _is_coco(file)]
    if instances := [part for part in parts if part.labels.name.startswith("instances_")]:
        parts = instances  # the others have the same boxes again, with key points
    if not parts:
        parts = [
            _Part(split_of(file.parent.name), file, file.parent)
            for file in sorted(islice(root.glob("*/_annotations.coco.json"), _MOST_FILES))
            if is_file(file) and _is_coco(file)
        ]
    return tuple(parts)


def _is_coco(file: Path) -> bool:
    """Whether the keys of COCO occur in a JSON file, without parsing it."""
    missing = {b'"images"', b'"annotations"', b'"bbox"'}
    tail = b""
    with contextlib.suppress(OSError), file.open("rb") as stream:  # what cannot be read is somebody else's
        for _ in range(MAX_JSON_BYTES // _BLOCK):
            block = stream.read(_BLOCK)
            missing = {key for key in missing if key not in tail + block}
            tail = block[-16:]
            if not missing or not block:
                break
    return not missing


def _read_coco(root: Path, part: _Part, ignored: Counter[str]) -> Iterator[_Boxes]:
    try:
        value = parse_json(read_limited(part.labels, MAX_JSON_BYTES))
        names = {entry["id"]: checked_name(str(entry["name"])) for entry in value["categories"]}
        boxes: dict[Any, list[tuple[str, Edges]]] = defaultdict(list)
        for entry in value["annotations"]:
            box = entry.get("bbox")
            if entry.get("iscrowd"):
                ignored["boxes around crowds"] += 1
            elif entry["category_id"] not in names:
                ignored["boxes of unnamed classes"] += 1
            elif not _are_numbers(box, 4):
                ignored["annotations without a box"] += 1
            else:
                left, top, width, height = map(float, box)
                edges = (left, top, left + width, top + height)
                boxes[entry["image_id"]].append((names[entry["category_id"]], edges))
        images = {entry["id"]: (str(entry["file_name"]), entry["width"], entry["height"]) for entry in value["images"]}
        if not all(_are_numbers([width, height], 2) and min(width, height) > 0 for _, width, height in images.values()):
            raise ValueError("an image has no width and height")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)[:200]
        raise DataError(f"{part.labels} cannot be read as COCO ({reason}); export it again.") from error
    folder = _image_folder(root, part, [name for name, _, _ in images.values()])
    for key, (name, width, height) in images.items():
        yield _Boxes(folder / _inner(name), (width, height), tuple(boxes.pop(key, ())))
    ignored["boxes of images that are missing or unreadable"] += sum(map(len, boxes.values()))


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        and all(abs(value) < 1e9 for value in values)
    )


def _image_folder(root: Path, part: _Part, names: list[str]) -> Path:
    """Where the images of a COCO file lie: beside it, or in one of the usual folders."""
    named = part.labels.stem.removeprefix("instances_")
    folders = [part.images, root / "images", root / "data", root / named, root / "images" / named]
    for folder in folders:
        if any(is_file(folder / _inner(name)) for name in names[:_MOST_FILES]):
            return folder
    raise DataError(
        f"The images that {part.labels} names are in none of {', '.join(map(str, folders))}; put them into one."
    )


def _inner(name: str) -> str:
    """A path inside a folder; one that would lead out of it names no file."""
    path = PurePosixPath(name.replace("\\", "/"))
    return "" if path.is_absolute() or ".." in path.parts or not is_image_name(path.name) else str(path)


# YOLO


def _yolo_parts(root: Path) -> tuple[_Part, ...]:
    """``images/`` beside ``labels/`` with text files, in the folder or in its splits; or splits inside these two."""
    parts: list[_Part] = []
    splits = [folder for folder in _folders(root) if folder.name.lower() in SPLIT_NAMES]
    for parent in [root, *splits]:
        images, labels = parent / "images", parent / "labels"
        if not images.is_dir() or not labels.is_dir():
            continue
        inner = [
            _Part(split, labels / folder.name, folder)
            for folder in _folders(images)
            if (split := split_of(folder.name)) and _has_texts(labels / folder.name)
        ]
        if inner:
            parts += inner
        elif _has_texts(labels):
            parts.append(_Part("" if parent == root else split_of(parent.name), labels, images))
    return tuple(parts)


def _folders(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir())


def _has_texts(folder: Path) -> bool:
    return folder.is_dir() and next(folder.glob("*.txt"), None) is not None


def _yolo_names(root: Path) -> tuple[list[str], bool]:
    """The class names in their order, and whether the labels have key points after the box."""
    try:
        for name in ("data.yaml", "data.yml", "dataset.yaml"):
            if is_file(root / name):
                value = read_yaml(root / name)
                names = value["names"]
                if isinstance(names, dict):
                    names = [names[index] for index in range(len(names))]
                if not isinstance(names, list) or not names:
                    raise ValueError("'names' must list the classes")
                return [checked_name(str(name)) for name in names], "kpt_shape" in value
        if is_file(root / "classes.txt"):
            lines = read_limited(root / "classes.txt", MAX_LABEL_BYTES).decode().splitlines()
            return [checked_name(line.strip()) for line in lines if line.strip()], False
    except (OSError, ValueError, KeyError, ConfigError) as error:
        raise DataError(
            f"The class names in {root} cannot be read ({str(error)[:300]}); list them in data.yaml."
        ) from error
    raise DataError(f"Nothing names the classes of {root}; list them as 'names' in data.yaml.")


def _read_yolo(part: _Part, names: list[str], has_key_points: bool, ignored: Counter[str]) -> Iterator[_Boxes]:
    with os.scandir(part.images) as entries:
        images = sorted(entry.name for entry in entries if is_image_name(entry.name))
    for name in images:
        labels = part.labels / f"{Path(name).stem}.txt"
        if not is_file(labels):
            ignored["images without boxes"] += 1
            continue
        try:
            lines = read_limited(labels, MAX_LABEL_BYTES).decode().splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"{labels} cannot be read ({error}); correct or delete it.") from error
        boxes = []
        for line in filter(None, map(str.split, lines)):
            box = _yolo_box(line, names, has_key_points)
            if box is None:
                ignored["lines that are not a box of a named class"] += 1
            else:
                boxes.append(box)
        yield _Boxes(part.images / name, (1, 1), tuple(boxes))


def _yolo_box(words: list[str], names: list[str], has_key_points: bool) -> tuple[str, Edges] | None:
    """Class and edges of a line: class, centre, width and height; or class and the corners of an outline."""
    try:
        index, *values = map(float, words)
    except ValueError:
        return None
    if not all(map(math.isfinite, (index, *values))) or len(values) < 4 or index not in range(len(names)):
        return None
    if len(values) > 5 and len(values) % 2 == 0 and not has_key_points:
        across, down = values[::2], values[1::2]
        return names[int(index)], (min(across), min(down), max(across), max(down))
    x, y, width, height = values[:4]
    return names[int(index)], (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
