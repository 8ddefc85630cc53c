"""The health check: which images are left out, and a report of what was found and done."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntFlag
from typing import Any

import numpy as np

from duallora_edge.errors import DataError
from duallora_edge.learner.data.fingerprint import FINGERPRINT_BYTES, Bytes, hashes, resembling
from duallora_edge.learner.data.images import TaskData

MIN_SIDE = 8
_EXAMPLES = 3


class Flag(IntFlag):
    """What decoding an image shows about it; a byte of the cache."""

    UNREADABLE = 1
    TINY = 2
    GREY = 4
    ALPHA = 8
    ROTATED = 16


# Finding -> what was done about it. These leave images out, and one image has at most one of them.
DROPPED = {
    "unreadable": "left out",
    "tiny": f"left out (a side under {MIN_SIDE} px)",
    "conflicting": "same image under several classes: left out of training",
    "in test": "looks like a test image: left out of training",
    "in training": "looks like a training image: left out of validation",
    "duplicate": "kept once",
}
CONVERTED = {
    "grey": "converted to RGB",
    "alpha": "laid over white",
    "rotated": "turned upright",
}


@dataclass(frozen=True)
class TaskHealth:
    """The findings in one task: images ``kept`` in each split, how often each finding occurs, and the first few."""

    name: str
    images: int
    kept: Mapping[str, int]
    counts: Mapping[str, int]
    examples: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class HealthReport:
    """What the check found and did, by task."""

    tasks: tuple[TaskHealth, ...]

    def table(self) -> str:
        """A short text table: images kept in each split, what was left out with examples, what was converted."""
        width = max([4, *(len(task.name) for task in self.tasks)])
        lines = [f"{'task':<{width}}  {'train':>7}  {'valid.':>7}  {'test':>7}  {'left out':>8}"]
        for task in self.tasks:
            kept = task.kept
            cells = f"{kept['train']:>7}  {kept['validation']:>7}  {kept['test']:>7}"
            lines.append(f"{task.name:<{width}}  {cells}  {task.images - sum(kept.values()):>8}")
            for finding, done in DROPPED.items():
                if count := task.counts.get(finding, 0):
                    names = ", ".join(task.examples[finding]) + (", ..." if count > _EXAMPLES else "")
                    lines.append(f"{'':<{width}}  {count} {finding}: {done} ({names})")
        for finding, done in CONVERTED.items():
            if count := sum(task.counts.get(finding, 0) for task in self.tasks):
                lines.append(f"{count} {finding}: {done}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The whole report as values that JSON knows."""
        return {"tasks": [asdict(task) for task in self.tasks]}


def judge(tasks: Sequence[TaskData], facts: Sequence[Mapping[str, Bytes]]) -> list[dict[str, list[str]]]:
    """For each task, split and image: the finding that leaves it out, or ``""``.

    ``facts``: for each task and split, ``uint8 [N, 81]`` as in `cache.Decoded`. Two images are the same when
    their full-size pixels are, and look alike when their fingerprints say so. Within a split of a task, copies in one
    class are kept once; training and validation images that look like a test image of any task go, so that the test
    stays clean, and so do validation images that look like a training image; images that a task learns under several
    class names go. Test images with several class names stay: nothing says which name is right.
    """
    usable = [rows[rows[:, -1] & (Flag.UNREADABLE | Flag.TINY) == 0] for rows in (splits["test"] for splits in facts)]
    tests = np.concatenate([np.zeros((0, FINGERPRINT_BYTES), np.uint8), *(rows[:, :-1] for rows in usable)])
    return [_judge_task(task, splits, tests) for task, splits in zip(tasks, facts, strict=True)]


def _judge_task(task: TaskData, facts: Mapping[str, Bytes], tests: Bytes) -> dict[str, list[str]]:
    labels = {"train": task.train.labels, "validation": task.validation.labels, "test": task.test.labels}
    content = {split: hashes(rows) for split, rows in facts.items()}
    broken = {split: rows[:, -1] & (Flag.UNREADABLE | Flag.TINY) for split, rows in facts.items()}
    names: dict[bytes, set[str]] = defaultdict(set)
    for split in ("train", "validation"):
        for label, image, flags in zip(labels[split], content[split], broken[split], strict=True):
            if not flags:
                names[image].add(label)
    learned = facts["train"][broken["train"] == 0][:, :-1]
    seen: set[tuple[bool, str, bytes]] = set()
    verdicts: dict[str, list[str]] = {}
    for split, rows in facts.items():
        in_test = resembling(rows, tests) if split != "test" else np.zeros(len(rows), bool)
        in_training = resembling(rows, learned) if split == "validation" else np.zeros(len(rows), bool)
        verdicts[split] = []
        for index, (label, image) in enumerate(zip(labels[split], content[split], strict=True)):
            identity = (split == "test", label, image)
            verdict = ""
            if broken[split][index] & Flag.UNREADABLE:
                verdict = "unreadable"
            elif broken[split][index]:
                verdict = "tiny"
            elif split != "test" and len(names[image]) > 1:
                verdict = "conflicting"
            elif in_test[index]:
                verdict = "in test"
            elif identity in seen:
                verdict = "duplicate"
            elif in_training[index]:
                verdict = "in training"
            seen.add(identity)
            verdicts[split].append(verdict)
    return verdicts


def report_task(task: TaskData, facts: Mapping[str, Bytes], verdicts: Mapping[str, Sequence[str]]) -> TaskHealth:
    """Count the findings of one task.

    Raises `DataError`, naming files, when a class has lost all its training images.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = defaultdict(list)
    kept = {}
    for split, images in (("train", task.train), ("validation", task.validation), ("test", task.test)):
        kept[split] = sum(not verdict for verdict in verdicts[split])
        for image, flags, verdict in zip(images.images, facts[split][:, -1], verdicts[split], strict=True):
            findings = [verdict] if verdict else [name for name in CONVERTED if flags & Flag[name.upper()]]
            for finding in findings:
                counts[finding] += 1
                if len(examples[finding]) < _EXAMPLES:
                    examples[finding].append(image.where)
    _require_classes(task, verdicts["train"])
    images_found = len(task.train) + len(task.validation) + len(task.test)
    return TaskHealth(task.name, images_found, kept, dict(counts), dict(examples))


def _require_classes(task: TaskData, verdicts: Sequence[str]) -> None:
    alive = {label for label, verdict in zip(task.train.labels, verdicts, strict=True) if not verdict}
    for name in task.train.classes:
        if name not in alive:
            members = [
                f"{image.where} ({verdict})"
                for image, label, verdict in zip(task.train.images, task.train.labels, verdicts, strict=True)
                if label == name
            ]
            more = f" and {len(members) - _EXAMPLES} more" if len(members) > _EXAMPLES else ""
            raise DataError(
                f"Class {name!r} of task {task.name!r} has no usable training image: "
                f"{', '.join(members[:_EXAMPLES])}{more}; replace these files or remove the class."
            )
