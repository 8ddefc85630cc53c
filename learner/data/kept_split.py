"""Which images a task learned and which are for its test, kept by their content.

A folder grows, and a split that is drawn again would make test images of images that were learned. So every task keeps
the hashes of its images, and what is read later is divided by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from duallora_edge.errors import DataError
from duallora_edge.learner.data.cache import Bytes
from duallora_edge.learner.data.prepare import PixelSet, PreparedTask

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class KeptSplit:
    """The images of a task by split: hashes of their full-size pixels, uint8 [n, 16]."""

    train: Bytes
    validation: Bytes
    test: Bytes

    @classmethod
    def of(cls, task: PreparedTask) -> KeptSplit:
        """The split of a task as it is learned."""
        return cls(*(getattr(task, split).hashes for split in SPLITS))

    @property
    def learned(self) -> set[bytes]:
        """The hashes of what was learned: validation images calibrate, and then join the statistics."""
        return {*_rows(self.train), *_rows(self.validation)}

    @property
    def tested(self) -> set[bytes]:
        """The hashes of the test images."""
        return {*_rows(self.test)}

    def changes(self, task: PreparedTask, others: Iterable[KeptSplit], measured: int) -> str:
        """One line on how the images of a source differ from these, "" where they do not."""
        here = {row for split in SPLITS for row in _rows(getattr(task, split).hashes)}
        known = self.learned | self.tested
        gone = len(known - here)
        new = len(here.difference(known, *(split.learned | split.tested for split in others)))
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
        learned, tested = self.learned, self.tested
        return _divided(
            task,
            [
                [
                    "test" if row in tested else "train" if split == "test" and row in learned else split
                    for row in _rows(getattr(task, split).hashes)
                ]
                for split in SPLITS
            ],
        )


def keep_apart(task: PreparedTask, others: Iterable[KeptSplit], say: Callable[[str], None]) -> PreparedTask:
    """The task without test images that others learned, and without learning the test images of others.

    What is left out is said. Raises `DataError` where a class would lose all its training images.
    """
    others = list(others)
    learned = {row for split in others for row in split.learned}
    tested = {row for split in others for row in split.tested}
    if not learned and not tested:
        return task
    refused = {"train": tested, "validation": tested, "test": learned}
    apart = _divided(
        task,
        [["" if row in refused[split] else split for row in _rows(getattr(task, split).hashes)] for split in SPLITS],
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
    learned = {row for split in (own, *others) for row in split.learned}
    tested = own.tested
    new = {"test"} if task.test_given else set(SPLITS) if every else set()
    return _divided(
        task,
        [
            [
                "test" if row in tested or (split in new and row not in learned) else ""
                for row in _rows(getattr(task, split).hashes)
            ]
            for split in SPLITS
        ],
    ).test


def _divided(task: PreparedTask, target: Sequence[Sequence[str]]) -> PreparedTask:
    """The task with its images in other splits: ``target`` of each image of each split, or "" to leave it out."""
    if all(set(names) <= {split} for split, names in zip(SPLITS, target, strict=True)):
        return task  # as it is mapped from disk
    sets = [getattr(task, split) for split in SPLITS]
    train, validation, test = (
        PixelSet.joined(
            [
                images.where(np.array([name == split for name in names], dtype=bool))
                for images, names in zip(sets, target, strict=True)
            ]
        )
        for split in SPLITS
    )
    return replace(task, train=train, validation=validation, test=test)


def _rows(hashes: Bytes) -> list[bytes]:
    return [row.tobytes() for row in hashes]
