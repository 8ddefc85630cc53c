"""What a stream of tasks left behind: accuracy, forgetting, task identity and calibration.

Notation. T tasks were learned one after the other. ``a_{k,i}`` is the accuracy on the test images of task i
measured with the model as it was after task k (i <= k), choosing among *all* classes known after task k and
without being told the task. ``b_{k,i}`` is the same with the choice limited to the classes of task i.

Images are reduced to counts (`Cell`) at once: what is stored says nothing about a single image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt

from duallora_edge.errors import RunError
from duallora_edge.learner.report.intervals import (
    Interval,
    calibration_interval,
    difference,
    independent,
    mean_of_independent,
    mean_of_same,
    wilson,
)

BINS = 15
SCHEMA = 1
_EDGES = np.linspace(0.0, 1.0, BINS + 1)
_NO_COUNTS = (0,) * BINS
_NO_SUMS = (0.0,) * BINS


@dataclass(frozen=True, eq=False)
class Predictions:
    """What one state of the model answered on the test images of one task.

    Attributes:
        labels: true classes, int64 ``[n]``, columns of ``probabilities``.
        probabilities: float32 ``[n, C_k]``, one column for each class known to the state.
        task: index of the true task, a column of ``task_probabilities``.
        task_probabilities: float32 ``[n, T_k]``, one column for each task known to the state.
        novel: whether the state calls the image novel, bool ``[n]``; None: not asked.
        scenes: images of one number were taken together, int64 ``[n]``; None: none were.

    Raises ``ValueError`` for shapes or values that do not fit.
    """

    labels: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]
    task: int
    task_probabilities: npt.NDArray[np.float32]
    novel: npt.NDArray[np.bool_] | None = None
    scenes: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        (n,) = self.labels.shape
        for name, array in (("probabilities", self.probabilities), ("tasks", self.task_probabilities)):
            if array.ndim != 2 or array.shape[0] != n or array.shape[1] == 0:
                raise ValueError(f"{name} must be [{n}, at least 1], not {list(array.shape)}")
            # NaN fails both comparisons; the tolerance is for float16 and summed components
            if not np.all((array >= 0) & (array <= 1.01)):
                raise ValueError(f"{name} must be probabilities")
        for name, each in (("novel", self.novel), ("scenes", self.scenes)):
            if each is not None and each.shape != (n,):
                raise ValueError(f"{name} must be [{n}], not {list(each.shape)}")
        if n and not 0 <= self.labels.min() <= self.labels.max() < self.probabilities.shape[1]:
            raise ValueError("labels must be columns of probabilities")
        if not 0 <= self.task < self.task_probabilities.shape[1]:
            raise ValueError("task must be a column of task_probabilities")


@dataclass(frozen=True)
class Cell:
    """Counts over the test images of one task, answered by one state of the model.

    ``Cell()`` stands for a task without test images, and for a state that was not measured. Cells add up, so
    accuracy and calibration over several tasks are those of the sum.

    Attributes:
        n: test images.
        correct: right class among all classes.
        correct_task_given: right class among the classes of the image's task.
        task_correct: the most probable task is the image's own.
        bin_count: images by the confidence of the answer, in `BINS` bins ``(m / BINS, (m + 1) / BINS]``.
        bin_correct: of these, right answers.
        bin_confidence: sum of their confidences.
        novel: called novel, although their classes are known.
        novel_before: called novel by the state before the task was learned. It is counted in the first state that knows
            the task, if no earlier task knew a class of it, and 0 elsewhere.
        independent: as many independent images would tell as much (see `intervals.independent`), by default ``n``.
    """

    n: int = 0
    correct: int = 0
    correct_task_given: int = 0
    task_correct: int = 0
    bin_count: tuple[int, ...] = _NO_COUNTS
    bin_correct: tuple[int, ...] = _NO_COUNTS
    bin_confidence: tuple[float, ...] = _NO_SUMS
    novel: int = 0
    novel_before: int = 0
    independent: float = -1.0

    def __post_init__(self) -> None:
        if self.independent < 0:
            object.__setattr__(self, "independent", float(self.n))
        if not (type(self.independent) is float and min(self.n, 1) <= self.independent <= self.n):
            raise ValueError(f"there are {self.independent} independent ones among {self.n} images")
        counts = (self.n, self.correct, self.correct_task_given, self.task_correct, self.novel, self.novel_before)
        if not all(type(count) is int and 0 <= count <= self.n for count in counts):
            raise ValueError(f"counts must be whole numbers of at most n = {self.n}")
        if not len(self.bin_count) == len(self.bin_correct) == len(self.bin_confidence) == BINS:
            raise ValueError(f"there must be {BINS} bins")
        for count, correct, confidence in zip(self.bin_count, self.bin_correct, self.bin_confidence, strict=True):
            if not (type(count) is type(correct) is int and 0 <= correct <= count):
                raise ValueError("a bin has more right answers than images")
            if not 0 <= confidence <= count * (1 + 1e-9):
                raise ValueError("the sum of confidences does not fit its bin")
        if sum(self.bin_count) != self.n or sum(self.bin_correct) != self.correct:
            raise ValueError("the bins do not add up to the counts")

    @classmethod
    def from_predictions(cls, predictions: Predictions, task_classes: Sequence[int]) -> Cell:
        """Reduce the answers on one task. ``task_classes`` are the columns of the classes of that task."""
        labels, probabilities = predictions.labels, predictions.probabilities
        columns = np.asarray(task_classes, dtype=np.int64)
        if not np.isin(labels, columns).all():
            raise ValueError("a label is not among the classes of its task")
        right = probabilities.argmax(axis=1) == labels
        confidence = np.minimum(probabilities.max(axis=1).astype(np.float64), 1.0)
        bins = np.clip(np.searchsorted(_EDGES, confidence, side="left") - 1, 0, BINS - 1)
        return cls(
            n=len(labels),
            correct=int(right.sum()),
            correct_task_given=int((columns[probabilities[:, columns].argmax(axis=1)] == labels).sum()),
            task_correct=int((predictions.task_probabilities.argmax(axis=1) == predictions.task).sum()),
            novel=0 if predictions.novel is None else int(predictions.novel.sum()),
            independent=-1.0 if predictions.scenes is None else independent(right, predictions.scenes),
            bin_count=tuple(np.bincount(bins, minlength=BINS).tolist()),
            bin_correct=tuple(np.bincount(bins[right], minlength=BINS).tolist()),
            bin_confidence=tuple(np.bincount(bins, weights=confidence, minlength=BINS).tolist()),
        )

    def __add__(self, other: Cell) -> Cell:
        return Cell(
            self.n + other.n,
            self.correct + other.correct,
            self.correct_task_given + other.correct_task_given,
            self.task_correct + other.task_correct,
            tuple(map(add, self.bin_count, other.bin_count)),
            tuple(map(add, self.bin_correct, other.bin_correct)),
            tuple(map(add, self.bin_confidence, other.bin_confidence)),
            self.novel + other.novel,
            self.novel_before + other.novel_before,
            self.independent + other.independent,
        )

    @property
    def accuracy(self) -> float | None:
        """Share of right answers among all classes, 0..1; None without images."""
        return self.correct / self.n if self.n else None

    @property
    def accuracy_task_given(self) -> float | None:
        """Share of right answers among the classes of the image's task, 0..1; None without images."""
        return self.correct_task_given / self.n if self.n else None

    @property
    def task_accuracy(self) -> float | None:
        """Share of images whose task was found, 0..1; None without images."""
        return self.task_correct / self.n if self.n else None

    @property
    def confidence_deciles(self) -> tuple[float, ...]:
        """The nine deciles of the confidence, 0..1, interpolated within the bins; empty without images."""
        if not self.n:
            return ()
        shares = np.concatenate([[0.0], np.cumsum(self.bin_count) / self.n])
        return tuple(np.interp(np.arange(1, 10) / 10, shares, _EDGES).tolist())

    @property
    def false_novelty(self) -> float | None:
        """Share of images that are called novel although their classes are known, 0..1; None without images."""
        return self.novel / self.n if self.n else None

    def interval(self, counted: str) -> Interval | None:
        """The interval of the share of images that the attribute ``counted`` counts; None without images."""
        return wilson(getattr(self, counted) / self.n * self.independent, self.independent) if self.n else None

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error (Guo et al. 2017), 0..1; None without images.

        ``sum_m n_m / n * |correct_m / n_m - confidence_m / n_m|``, where ``n_m`` cancels.
        """
        if not self.n:
            return None
        gaps = zip(self.bin_correct, self.bin_confidence, strict=True)
        return sum(abs(correct - confidence) for correct, confidence in gaps) / self.n

    def to_json(self) -> dict[str, Any]:
        """The counts under their names."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cell:
        """The cell that `to_json` wrote. Raises ``TypeError`` or ``ValueError`` when it is not one."""
        entries: dict[str, Any] = {
            key: tuple(entry) if isinstance(entry, list) else entry for key, entry in value.items()
        }
        return cls(**entries)


Row = tuple[Cell, ...]
"""The cells of one state of the model: row k holds tasks 0..k."""


def pool(row: Iterable[Cell]) -> Cell:
    """All images of several cells as one cell."""
    return sum(row, Cell())


@dataclass(frozen=True)
class TaskClasses:
    """The name of a task and of its classes."""

    name: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class TaskResult:
    """One task at the end of the stream. Accuracies are 0..1; None where there is nothing to measure.

    ``learned`` is ``a_{i,i}``, ``best`` the maximum of ``a_{k,i}`` over the states before the last one, ``now`` is
    ``a_{T,i}``, with its interval of 95 %. The newest task has had no time to be forgotten: its ``forgetting_...`` are
    None.
    """

    name: str
    classes: int
    n: int
    learned: float | None
    best: float | None
    now: float | None
    now_interval: Interval | None
    learned_task_given: float | None
    now_task_given: float | None
    task_accuracy: float | None
    forgetting_from_best: float | None
    forgetting_since_learned: float | None
    forgetting_task_given: float | None


@dataclass(frozen=True)
class Metrics:
    """Everything that is said about a stream, from the counts of every state on every task.

    Attributes:
        tasks: the T tasks in the order they were learned.
        rows: T rows, row k with the k + 1 cells of the state after task k.

    Why accuracy falls even where nothing is forgotten: after each task more classes compete for the same
    image. An old image can go to a new, similar class although no weight has moved. That part of the drop is
    in ``a`` but not in ``b``, so `forgetting_task_given` isolates the drift of the network and its classifier.

    Cells without images are left out of every mean; a mean of nothing is None. Raises ``ValueError`` when the
    rows do not form the triangle.
    """

    tasks: tuple[TaskClasses, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("there must be at least one task")
        if [len(row) for row in self.rows] != [k + 1 for k in range(len(self.tasks))]:
            raise ValueError(f"there must be {len(self.tasks)} rows, row k with k + 1 cells")

    @property
    def accuracy_matrix(self) -> npt.NDArray[np.float64]:
        """``a_{k,i}`` as float64 ``[T, T]``, row k the state after task k; NaN where nothing is."""
        matrix = np.full((len(self.tasks), len(self.tasks)), np.nan)
        for k, row in enumerate(self.rows):
            matrix[k, : k + 1] = [math.nan if cell.accuracy is None else cell.accuracy for cell in row]
        return matrix

    @property
    def last(self) -> Cell:
        """All test images, answered by the last state."""
        return pool(self.rows[-1])

    @cached_property
    def first_tasks(self) -> dict[str, int]:
        """The different classes in the order in which they appear, each with the index of its first task."""
        first: dict[str, int] = {}
        for i, task in enumerate(self.tasks):
            for name in task.classes:
                first.setdefault(name, i)
        return first

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The different classes over all tasks, in the order in which they appear."""
        return tuple(self.first_tasks)

    @property
    def class_count(self) -> int:
        """Number of different classes over all tasks."""
        return len(self.classes)

    @property
    def shares_classes(self) -> bool:
        """Whether some class appears in several tasks, which makes the task of an image ambiguous."""
        return self.class_count < sum(len(task.classes) for task in self.tasks)

    @property
    def incremental_accuracy(self) -> list[float | None]:
        """``A_k`` for every k: accuracy after task k over all images of the tasks so far."""
        return [pool(row).accuracy for row in self.rows]

    @cached_property
    def unseen(self) -> Cell:
        """The test images of tasks none of whose classes an earlier task knew, on the day each was learned."""
        cells = []
        for i in range(1, len(self.tasks)):
            known = {name for task in self.tasks[:i] for name in task.classes}
            if not known.intersection(self.tasks[i].classes):
                cells.append(self.rows[i][i])
        return pool(cells)

    @cached_property
    def per_task(self) -> tuple[TaskResult, ...]:
        """The table of tasks, in the order they were learned."""
        return tuple(self._task_result(i) for i in range(len(self.tasks)))

    def _task_result(self, i: int) -> TaskResult:
        learned, now = self.rows[i][i], self.rows[-1][i]
        earlier = [row[i].accuracy for row in self.rows[i:-1]]  # empty for the newest task
        best = max((value for value in earlier if value is not None), default=None)
        is_newest = i == len(self.tasks) - 1
        return TaskResult(
            name=self.tasks[i].name,
            classes=len(self.tasks[i].classes),
            n=now.n,
            learned=learned.accuracy,
            best=best,
            now=now.accuracy,
            now_interval=now.interval("correct"),
            learned_task_given=learned.accuracy_task_given,
            now_task_given=now.accuracy_task_given,
            task_accuracy=now.task_accuracy,
            forgetting_from_best=_minus(best, now.accuracy),
            forgetting_since_learned=None if is_newest else _minus(learned.accuracy, now.accuracy),
            forgetting_task_given=(None if is_newest else _minus(learned.accuracy_task_given, now.accuracy_task_given)),
        )

    @cached_property
    def summary(self) -> dict[str, float | None]:
        """The headline numbers as fractions (0.881, not 88.1); `report.definitions` says what each means.

        The task of an image is ambiguous where tasks share classes, so that its number is None there.
        """
        since_learned = _mean(task.forgetting_since_learned for task in self.per_task)
        return {
            "last_accuracy": self.last.accuracy,
            "last_accuracy_task_mean": _mean(task.now for task in self.per_task),
            "last_accuracy_task_given": self.last.accuracy_task_given,
            "average_incremental_accuracy": _mean(self.incremental_accuracy),
            "forgetting_from_best": _mean(task.forgetting_from_best for task in self.per_task),
            "forgetting_since_learned": since_learned,
            "forgetting_task_given": _mean(task.forgetting_task_given for task in self.per_task),
            "backward_transfer": None if since_learned is None else 0.0 - since_learned,
            "task_accuracy": None if self.shares_classes else self.last.task_accuracy,
            "calibration_error": self.last.calibration_error,
            "false_novelty": self.last.false_novelty,
            "novelty_detected": self.unseen.novel_before / self.unseen.n if self.unseen.n else None,
        }

    @cached_property
    def intervals(self) -> dict[str, Interval | None]:
        """For each number of `summary` its 95 % confidence interval, as fractions; None for what was not measured."""
        last, newest = self.rows[-1], len(self.tasks) - 1
        now = [cell for cell in last if cell.n]
        since = self._forgetting([(self.rows[i][i], last[i]) for i in range(newest)], "correct")
        best = [max((row[i] for row in self.rows[i:-1]), key=lambda cell: cell.accuracy or 0.0) for i in range(newest)]
        states = [pool(row) for row in self.rows]
        pooled = self.last
        return {
            "last_accuracy": pooled.interval("correct"),
            "last_accuracy_task_mean": mean_of_independent(*_shares(now, "correct")),
            "last_accuracy_task_given": pooled.interval("correct_task_given"),
            "average_incremental_accuracy": mean_of_same(_shares(states, "correct")[1]),
            "forgetting_from_best": self._forgetting(list(zip(best, last[:newest], strict=True)), "correct"),
            "forgetting_since_learned": since,
            "forgetting_task_given": self._forgetting(
                [(self.rows[i][i], last[i]) for i in range(newest)], "correct_task_given"
            ),
            "backward_transfer": None if since is None else (-since[1], -since[0]),
            "task_accuracy": None if self.shares_classes else pooled.interval("task_correct"),
            "calibration_error": calibration_interval(
                pooled.bin_count, pooled.bin_correct, pooled.bin_confidence, pooled.independent
            ),
            "false_novelty": pooled.interval("novel"),
            "novelty_detected": self.unseen.interval("novel_before"),
        }

    @staticmethod
    def _forgetting(pairs: Sequence[tuple[Cell, Cell]], right: str) -> Interval | None:
        """The interval of the mean drop from the first to the second cell of each pair."""
        measured = [(before, after) for before, after in pairs if before.n and after.n]
        before, of_before = _shares([cell for cell, _ in measured], right)
        after, of_after = _shares([cell for _, cell in measured], right)
        drops = list(map(difference, before, of_before, after, of_after))
        return mean_of_independent([a - b for a, b in zip(before, after, strict=True)], drops)

    def to_json(self) -> dict[str, Any]:
        """The counts, and every number derived from them, without NaN."""
        return {
            "schema": SCHEMA,
            "summary": self.summary,
            "intervals": self.intervals,
            "incremental_accuracy": self.incremental_accuracy,
            "accuracy_matrix": [[cell.accuracy for cell in row] for row in self.rows],
            "per_task": [asdict(task) for task in self.per_task],
            "tasks": [{"name": task.name, "classes": list(task.classes)} for task in self.tasks],
            "rows": [[cell.to_json() for cell in row] for row in self.rows],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Metrics:
        """Read ``tasks`` and ``rows`` back; the rest follows. Raises `RunError` when they are unusable."""
        try:
            if value["schema"] != SCHEMA:
                raise ValueError(f"schema {value['schema']!r} instead of {SCHEMA}")
            tasks = tuple(TaskClasses(str(t["name"]), tuple(map(str, t["classes"]))) for t in value["tasks"])
            return cls(tasks, tuple(tuple(map(Cell.from_json, row)) for row in value["rows"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"The stored metrics are unreadable ({error}); run 'duallora-edge evaluate' to measure again."
            ) from error


def _shares(cells: Iterable[Cell], right: str) -> tuple[list[float], list[Interval]]:
    """The shares of right answers of cells that have images, and their intervals; ``right`` names their count."""
    found = [(getattr(cell, right) / cell.n, interval) for cell in cells if (interval := cell.interval(right))]
    return [share for share, _ in found], [interval for _, interval in found]


def _minus(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
