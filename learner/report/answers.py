"""What one state answered on the test images: who is taken for whom, and the images that are worth a look."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from duallora_edge.learner.report.intervals import Interval, difference, wilson
from duallora_edge.learner.report.metrics import Cell, Metrics, Predictions

MOST = 24  # mistakes that are kept as pictures, and as many images called novel
SIDE = 96  # pixels of a picture at most
_QUALITY = 75  # of the JPEG

Frames = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.uint8]]
"""Frames uint8 [B, S, S, 3] of test images by their numbers [B]."""


@dataclass(frozen=True)
class Example:
    """A test image: indices of its task, of its class and of the answer, the confidence 0..1, and a JPEG file."""

    task: int
    label: int
    answer: int
    confidence: float
    jpeg: bytes

    @property
    def uri(self) -> str:
        """The picture for a page that needs no other file."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


@dataclass(frozen=True)
class Answers:
    """The answers of one state on all test images. Classes are indices into `Metrics.classes`.

    Attributes:
        counts: images by (task, class, answer).
        mistakes: the wrong answers of highest confidence, at most `MOST`, the most confident first.
        novel: likewise images that were called novel although their class is known.
        right_before: right answers of the state before by (task, class); None where they are not known.
    """

    counts: Mapping[tuple[int, int, int], int]
    mistakes: tuple[Example, ...] = ()
    novel: tuple[Example, ...] = ()
    right_before: Mapping[tuple[int, int], int] | None = None

    @classmethod
    def of_task(cls, predictions: Predictions, frames: Frames | None) -> Answers:
        """The answers on the test images of one task, with pictures where ``frames`` are given."""
        answers, labels = predictions.probabilities.argmax(axis=1), predictions.labels
        counts = Counter((predictions.task, *pair) for pair in zip(labels.tolist(), answers.tolist(), strict=True))
        if frames is None:
            return cls(counts)
        confidence = np.minimum(predictions.probabilities.max(axis=1), 1.0)

        def examples(chosen: npt.NDArray[np.bool_]) -> tuple[Example, ...]:
            numbers = np.flatnonzero(chosen)
            numbers = numbers[np.argsort(-confidence[numbers], kind="stable")[:MOST]]
            return tuple(
                Example(predictions.task, int(labels[i]), int(answers[i]), float(confidence[i]), _jpeg(frame))
                for i, frame in zip(numbers, frames(numbers), strict=True)
            )

        novel = () if predictions.novel is None else examples(predictions.novel)
        return cls(counts, examples(answers != labels), novel)

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """The answers on the test images of several tasks."""
        counts = {key: images for part in parts for key, images in part.counts.items()}
        mistakes, novel = (_most_confident(getattr(part, name) for part in parts) for name in ("mistakes", "novel"))
        return cls(counts, mistakes, novel)

    @property
    def totals(self) -> Counter[tuple[int, int]]:
        """Images by (task, class)."""
        totals: Counter[tuple[int, int]] = Counter()
        for (task, label, _), images in self.counts.items():
            totals[task, label] += images
        return totals

    @property
    def right(self) -> dict[tuple[int, int], int]:
        """Right answers by (task, class), for all that have test images."""
        return {(task, label): self.counts.get((task, label, label), 0) for task, label, _ in self.counts}

    def after(self, before: Answers | None) -> Answers:
        """The same beside the answers of the state before."""
        return replace(self, right_before=None if before is None else before.right)

    def to_json(self) -> dict[str, Any]:
        """Lists of whole numbers, and the pictures in base64."""
        before = self.right_before
        return {
            "counts": [[*key, images] for key, images in sorted(self.counts.items())],
            "right_before": None if before is None else [[*key, images] for key, images in sorted(before.items())],
            "mistakes": [_example_json(example) for example in self.mistakes],
            "novel": [_example_json(example) for example in self.novel],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Answers:
        """The inverse of `to_json`. Raises ``KeyError``, ``TypeError`` or ``ValueError`` when it is something else."""
        before = value["right_before"]
        return cls(
            {(int(task), int(label), int(answer)): int(n) for task, label, answer, n in value["counts"]},
            tuple(map(_example, value["mistakes"])),
            tuple(map(_example, value["novel"])),
            None if before is None else {(int(task), int(label)): int(n) for task, label, n in before},
        )

    def fits(self, metrics: Metrics) -> bool:
        """Whether these are answers on the test images that the last row of the metrics counts."""
        images, right = [0] * len(metrics.tasks), [0] * len(metrics.tasks)
        classes = range(len(metrics.classes))
        for (task, label, answer), n in self.counts.items():
            if task not in range(len(images)) or label not in classes or answer not in classes or n < 1:
                return False
            images[task] += n
            right[task] += n * (label == answer)
        return (
            images == [cell.n for cell in metrics.rows[-1]]
            and right == [cell.correct for cell in metrics.rows[-1]]
            and all((one.task, one.label, one.answer) in self.counts for one in (*self.mistakes, *self.novel))
            and all(0 <= one.confidence <= 1 for one in (*self.mistakes, *self.novel))
        )

    def confusion(self, metrics: Metrics) -> npt.NDArray[np.int64]:
        """Images by class (row) and answer (column), int64 [C, C]."""
        matrix = np.zeros((len(metrics.classes), len(metrics.classes)), np.int64)
        for (_, label, answer), images in self.counts.items():
            matrix[label, answer] += images
        return matrix


def _example_json(example: Example) -> dict[str, Any]:
    return {**vars(example), "jpeg": base64.b64encode(example.jpeg).decode()}


def _example(value: Mapping[str, Any]) -> Example:
    task, label, answer = (int(value[key]) for key in ("task", "label", "answer"))
    return Example(task, label, answer, float(value["confidence"]), base64.b64decode(value["jpeg"], validate=True))


def _most_confident(parts: Iterable[Sequence[Example]]) -> tuple[Example, ...]:
    return tuple(sorted((e for part in parts for e in part), key=lambda e: -e.confidence)[:MOST])


def _jpeg(frame: npt.NDArray[np.uint8]) -> bytes:
    picture, file = Image.fromarray(frame), io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return file.getvalue()


class Pair(NamedTuple):
    """Images of a class of a task that got one wrong answer; ``of`` images has the class."""

    task: int
    label: str
    answer: str
    answer_task: int
    images: int
    of: int


class ClassResult(NamedTuple):
    """The right answers among the images of a class of a task, and the wrong answer that most of the others got."""

    task: int
    name: str
    n: int
    right: int
    interval: Interval
    taken_for: Pair | None


class Change(NamedTuple):
    """Accuracy of a task or class before and after the last task was learned, and the interval of the difference."""

    name: str
    before: float
    now: float
    interval: Interval

    @property
    def is_told(self) -> bool:
        """Whether it is more than the number of test images leaves open."""
        return not self.interval[0] <= 0 <= self.interval[1]


def confused_pairs(metrics: Metrics, answers: Answers) -> list[Pair]:
    """Who is taken for whom, most images first. The task of an answer is the first one that knows the class."""
    names, first = metrics.classes, list(metrics.first_tasks.values())
    totals = answers.totals
    pairs = [
        Pair(task, names[label], names[answer], first[answer], images, totals[task, label])
        for (task, label, answer), images in answers.counts.items()
        if label != answer
    ]
    return sorted(pairs, key=lambda pair: (-pair.images, -pair.images / pair.of, pair))


def by_class(metrics: Metrics, answers: Answers) -> list[ClassResult]:
    """The classes of all tasks, those that are surely poor first: by the upper end of the interval."""
    worst: dict[tuple[int, str], Pair] = {}
    for pair in confused_pairs(metrics, answers):
        worst.setdefault((pair.task, pair.label), pair)
    right, results = answers.right, []
    for (task, label), n in answers.totals.items():
        name, count = metrics.classes[label], right[task, label]
        interval = _interval(count, n, metrics.rows[-1][task])
        results.append(ClassResult(task, name, n, count, interval, worst.get((task, name))))
    return sorted(results, key=lambda one: (one.interval[1], one.right / one.n, one.task, one.name))


def changes(metrics: Metrics, answers: Answers | None) -> tuple[list[Change], list[Change]]:
    """What learning the last task changed for the tasks before it, and for their classes where that is known.

    Both begin with the largest loss.
    """
    if len(metrics.tasks) < 2:
        return [], []
    # Of other test images nothing can be told.
    rows = {
        task: (before, now)
        for task, (before, now) in enumerate(zip(metrics.rows[-2], metrics.rows[-1], strict=False))
        if before.n == now.n > 0
    }
    tasks = [
        _change(metrics.tasks[task].name, (before.correct, before.n, before), (now.correct, now.n, now))
        for task, (before, now) in rows.items()
    ]
    classes = []
    if answers is not None and answers.right_before is not None:
        totals, right = answers.totals, answers.right
        for key, count in answers.right_before.items():
            if key[0] in rows and key in totals and 0 <= count <= totals[key]:
                before, now = rows[key[0]]
                name = metrics.classes[key[1]]
                if metrics.shares_classes:
                    name = f"{name} ({metrics.tasks[key[0]].name})"
                classes.append(_change(name, (count, totals[key], before), (right[key], totals[key], now)))
    return sorted(tasks, key=_gain), sorted(classes, key=_gain)


def _gain(change: Change) -> float:
    return change.now - change.before


def _change(name: str, before: tuple[int, int, Cell], now: tuple[int, int, Cell]) -> Change:
    """The change between two shares, each as right answers, images and the cell that these are of."""
    first, second = before[0] / before[1], now[0] / now[1]
    return Change(name, first, second, difference(second, _interval(*now), first, _interval(*before)))


def _interval(right: int, n: int, cell: Cell) -> Interval:
    """The interval of a share of ``n`` images that are as far from independent as those of the cell."""
    share = cell.independent / cell.n
    return wilson(share * right, share * n) or (0.0, 1.0)
