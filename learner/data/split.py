"""Dividing what was found: classes into tasks, and images into training, validation and test."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from duallora_edge.errors import ConfigError, DataError
from duallora_edge.learner.data.images import ImageSet, TaskData
from duallora_edge.learner.data.scenes import scenes

MIN_TO_SPLIT = 5
# What splits are called, in lower case, and which they are.
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip


def split_of(name: str) -> str:
    """The split that a name such as ``instances_train2017`` tells, else ``""``."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")


@dataclass(frozen=True)
class FoundTask:
    """A task as its source gives it. ``None``: the source does not have this split and one is to be made."""

    name: str
    train: ImageSet
    validation: ImageSet | None
    test: ImageSet | None

    @classmethod
    def of(cls, name: str, sets: Mapping[str, ImageSet]) -> FoundTask:
        """A task from its images by split; those of no split (``""``), or of ``train`` alone, are to be divided.

        Without images for the validation a part of the others becomes it.
        """
        if len(sets) == 1 and not sets.keys().isdisjoint(("", "train")):
            return cls(name, next(iter(sets.values())), None, None)
        return cls(name, sets.get("train", ImageSet()), sets.get("val") or None, sets.get("test", ImageSet()))


@dataclass(frozen=True)
class Found:
    """What a source holds. ``is_stream``: the source itself says which images belong to which task."""

    layout: str
    tasks: tuple[FoundTask, ...]
    is_stream: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splits:
    """How much is held back from the training images where the source does not say it."""

    validation_fraction: float
    test_fraction: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, not {value}.")

    def apply(self, task: FoundTask) -> TaskData:
        """Make the splits the source lacks. Raises `DataError` for a class without a training image."""
        notes = []
        train, validation, test = task.train, task.validation, task.test
        if test is None:
            train, test = hold_back(train, self.test_fraction, self.seed, "test")
            notes.append(f"no test images given: {len(test)} of {len(task.train)} images became the test set")
        if validation is None:
            train, validation = hold_back(train, self.validation_fraction, self.seed, "validation")
        if not len(train):
            raise DataError(f"Task {task.name!r} has no training images; add some or leave the task out.")
        for split, images in (("validation", validation), ("test", test)):
            if unknown := sorted(set(images.classes) - set(train.classes)):
                raise DataError(
                    f"Task {task.name!r} has {split} images but no training images of {some(unknown)}; "
                    f"add training images or remove the class."
                )
        return TaskData(
            task.name, train, validation, test, tuple(notes), task.test is not None, task.validation is not None
        )


def hold_back(images: ImageSet, fraction: float, seed: int, purpose: str) -> tuple[ImageSet, ImageSet]:
    """Divide ``images`` into ``(rest, held)``: about ``fraction`` of each class, at least one, is held.

    A class with fewer than `MIN_TO_SPLIT` images gives none, and every class keeps one. Held is one run of neighbours
    in the order of the names, from a place that a hash of seed and class decides (past the end it goes on at the
    start); `scenes` are held as a whole, unless they are more than twice what is to be held and a third of the class.
    Held singly, the twins of an image in the training images would make every calibration too sure of itself. The
    choice does not depend on the order of the files or the machine.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(images.labels):
        members[label].append(index)

    held: set[int] = set()
    for label, indices in members.items():
        if fraction > 0 and len(indices) >= MIN_TO_SPLIT:
            wanted = min(max(1, round(fraction * len(indices))), len(indices) - 1)
            ordered = sorted(indices, key=lambda index: _natural(images.images[index].name))
            digest = hashlib.sha256(f"{seed}:{purpose}:{label}".encode()).digest()
            start = int.from_bytes(digest[:8], "big") % len(ordered)
            ordered = ordered[start:] + ordered[:start]
            held.update(_whole_scenes(ordered, images, wanted) or ordered[:wanted])
    rest = [index for index in range(len(images)) if index not in held]
    return images.subset(rest), images.subset(sorted(held))


def _whole_scenes(ordered: Sequence[int], images: ImageSet, wanted: int) -> list[int]:
    """The first images of a class, scene by scene, until ``wanted`` are found; none where larger scenes leave fewer."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, scene in zip(ordered, scenes([images.images[index] for index in ordered]), strict=True):
        groups[scene].append(index)
    found: list[int] = []
    for group in groups.values():
        if len(found) < wanted and len(group) <= max(2 * wanted, len(ordered) // 3):
            found += group
    return found if len(found) >= wanted else []


def _natural(name: str) -> list[str | int]:
    """A key that puts ``frame-9`` before ``frame-10``: text and numbers take turns."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]


def order_classes(classes: tuple[str, ...], class_order: str) -> list[str]:
    """Class names in the order of learning: ``"alphabetical"``, or ``"seed:N"``.

    ``seed:N`` is the legacy NumPy permutation of the sorted names that published class-incremental results
    use (N = 1993 for CIFAR-100 since iCaRL, Rebuffi et al. 2017).
    """
    names = sorted(classes)
    if class_order == "alphabetical":
        return names
    match = re.fullmatch(r"seed:(\d{1,10})", class_order)
    if match is None or int(match[1]) >= 2**32:
        raise ConfigError(f"class_order must be 'alphabetical' or 'seed:N' such as 'seed:1993', not {class_order!r}.")
    return [names[i] for i in np.random.RandomState(int(match[1])).permutation(len(names))]


def by_classes(task: FoundTask, classes_per_task: int, class_order: str, prefix: str) -> tuple[FoundTask, ...]:
    """Cut one task into tasks of ``classes_per_task`` classes; the last may be smaller.

    They are named by the positions of their classes in the order: ``<prefix>-001-010`` and so on.
    """
    if classes_per_task < 1:
        raise ConfigError(f"classes_per_task must be at least 1, not {classes_per_task}.")
    order = order_classes(task.train.classes, class_order)
    digits = max(3, len(str(len(order))))
    tasks = []
    for first in range(0, len(order), classes_per_task):
        chosen = set(order[first : first + classes_per_task])
        name = f"{prefix}-{first + 1:0{digits}d}-{first + len(chosen):0{digits}d}"
        pick = _picker(chosen)
        tasks.append(FoundTask(name, pick(task.train), _maybe(pick, task.validation), _maybe(pick, task.test)))
    return tuple(tasks)


def _picker(chosen: set[str]) -> Callable[[ImageSet], ImageSet]:
    return lambda images: images.subset(i for i, label in enumerate(images.labels) if label in chosen)


def _maybe(pick: Callable[[ImageSet], ImageSet], images: ImageSet | None) -> ImageSet | None:
    return None if images is None else pick(images)


def some(names: Sequence[str]) -> str:
    """The first five names for a message, and how many more there are."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
