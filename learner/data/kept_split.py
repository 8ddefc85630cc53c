"""Which images a task learned and which are for its test, kept by what they show.

A folder grows, and a split that is drawn again would make test images of images that were learned. So every task keeps
the fingerprints of its images, and what is read later is divided by them, under whatever name and in whatever format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from duallora_edge.errors import DataError
from duallora_edge.learner.data.fingerprint import FINGERPRINT_BYTES, Bytes, hashes, resembling
from duallora_edge.learner.data.prepare import PixelSet, PreparedTask

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class KeptSplit:
    """The images of a task by split: their fingerprints, uint8 [n, 80]."""

    train: Bytes
    validation: Bytes
    test: Bytes

    @classmethod
    def of(cls, task: PreparedTask) -> KeptSplit:
        """The split of a task as it is learned."""
        return cls(*(getattr(task, split).fingerprints for split in SPLITS))

    @property
    def learned(self) -> Bytes:
        """What was learned: validation images calibrate, and then join the statistics."""
        return np.concatenate([self.train, self.validation])

    def changes(self, task: PreparedTask, others: Iterable[KeptSplit], measured: int) -> str:
        """One line on how the images of a source differ from these, "" where they do not."""
        here = {image for split in SPLITS for image in hashes(getattr(task, split).fingerprints)}
        known = self._hashes()
        gone = len(known - here)
        new = len(here.difference(known, *(split._hashes() for split in others)))
        if not gone and not new:
            return ""
        parts = [f"{count} {what}" for count, what in ((new, "new"), (gone, "gone")) if count]
        return (
            f"Task {task.name}: its images have changed since it was learned ({', '.join(parts)}); the split stays, "
            f"{measured} images are measured"
        )

    def extend(self, task: PreparedTask) -> PreparedTask:
        """The task, which is learned again, with the test images that it has here and none that it learned.

        New images stay where they are, and nothing is changed where the source gives the test images.
        """
        if task.test_given:
            return task
        targets = []
        for split in SPLITS:
            images = getattr(task, split).fingerprints
            learned = "train" if split == "test" else split
            target = np.where(resembling(images, self.learned), learned, split)
            targets.append(np.where(resembling(images, self.test), "test", target))
        return _divided(task, targets)

    def _hashes(self) -> set[bytes]:
        return {image for split in SPLITS for image in hashes(getattr(self, split))}


def keep_apart(task: PreparedTask, others: Iterable[KeptSplit], say: Callable[[str], None]) -> PreparedTask:
    """The task without test images that others learned, and without learning the test images of others.

    What is left out is said. Raises `DataError` where a class would lose all its training images.
    """
    others = list(others)
    learned, tested = _together(split.learned for split in others), _together(split.test for split in others)
    refused = {"train": tested, "validation": tested, "test": learned}
    apart = _divided(
        task,
        [np.where(resembling(getattr(task, split).fingerprints, refused[split]), "", split) for split in SPLITS],
    )
    if lost := sorted(set(task.classes) - set(apart.classes)):
        raise DataError(
            f"All training images of class {lost[0]!r} of task {task.name!r} are test images of earlier tasks; add "
            "others or leave the class out."
        )
    if count := len(task.test) - len(apart.test):
        say(f"  left out of the test: images that earlier tasks learned ({count})")
    if count := len(task.train) + len(task.validation) - len(apart.train) - len(apart.validation):
        say(f"  left out of training: test images of earlier tasks ({count})")
    return apart


def measurable(task: PreparedTask, own: KeptSplit, others: Iterable[KeptSplit], *, every: bool = False) -> PixelSet:
    """The images of a source that may measure a learned task.

    These are its own test images, wherever they lie now, and what the source itself gives as test images if no task
    learned it. Where the source gives none, images that are new stay out of the measurement, unless ``every`` image
    counts that no task learned.
    """
    learned = _together([own.learned, *(split.learned for split in others)])
    new = {"test"} if task.test_given else set(SPLITS) if every else set()
    targets = []
    for split in SPLITS:
        images = getattr(task, split).fingerprints
        measured = resembling(images, own.test)
        if split in new:
            measured |= ~resembling(images, learned)
        targets.append(np.where(measured, "test", ""))
    return _divided(task, targets).test


def _divided(task: PreparedTask, target: Sequence[npt.NDArray[np.str_]]) -> PreparedTask:
    """The task with its images in other splits: ``target`` of each image of each split, or "" to leave it out."""
    if all((names == split).all() for split, names in zip(SPLITS, target, strict=True)):
        return task  # as it is mapped from disk
    sets = [getattr(task, split) for split in SPLITS]
    train, validation, test = (
        PixelSet.joined([images.where(names == split) for images, names in zip(sets, target, strict=True)])
        for split in SPLITS
    )
    return replace(task, train=train, validation=validation, test=test)


def _together(parts: Iterable[Bytes]) -> Bytes:
    return np.concatenate([np.zeros((0, FINGERPRINT_BYTES), np.uint8), *parts])
