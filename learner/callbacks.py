"""What learning and measuring tell while they work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duallora_edge import interrupts

if TYPE_CHECKING:
    from torch import Tensor

    from duallora_edge.learner.config import TrainConfig
    from duallora_edge.learner.report.metrics import Metrics


@dataclass(frozen=True)
class Point:
    """The training of a task at one of at most a hundred of its steps, which its history consists of.

    Attributes:
        task: The name of the task.
        step: The number of the step, counted from 1.
        steps: The number of steps of this task.
        loss: The mean loss of the batch before the step.
        learning_rate: The learning rate of the step.
        images_per_second: The images and views trained per second since the point before, the measuring left out.
        validation_accuracy: The share of validation images that the head in training gets right among the classes of
            its task, 0..1. It is measured at a few of the points and None at the others, and evenly spaced images are
            taken where there are many of them.
    """

    task: str
    step: int
    steps: int
    loss: float
    learning_rate: float
    images_per_second: float
    validation_accuracy: float | None


class Callback:
    """Override what you want to hear; every method of this class does nothing.

    Methods are called in the process and thread that learns, so they should return soon. An exception ends the
    learning as an interrupt does: what was committed stays.
    """

    def start(self, config: TrainConfig, tasks: tuple[str, ...]) -> None:
        """Learning starts: the resolved settings, and the names of the tasks in the data."""

    def step(self, step: int, steps: int, loss: Tensor, rate: float) -> None:
        """One optimiser step of the current task is done: number ``step`` of ``steps``, counted from 1.

        Args:
            step: The number of the step.
            steps: The number of steps of this task.
            loss: The mean loss of the batch before the step, a detached scalar on the device of the training.
                Reading it (``float(loss)``) waits for a GPU, so do not read it in every step. Of several processes
                each sees the share of its own images.
            rate: The learning rate of the step.
        """

    def trained(self, point: Point) -> None:
        """The training of a task has come to a point of its history; after a kill it may come to it again."""

    def learned(self, task: str, seconds: float) -> None:
        """A task was learned and committed."""

    def measured(self, metrics: Metrics) -> None:
        """A state was measured: the metrics of the run as it was after the last of their tasks."""

    def end(self, metrics: Metrics) -> None:
        """Learning or measuring is done, and the report is written."""

    def say(self, text: str) -> None:
        """One line for the user."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Progress of ``stage``: ``decode``, ``collect``, ``teacher`` and ``encode`` in images, ``adapt`` and ``train``
        in steps."""


class Callbacks(Callback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = tuple(callbacks)

    def start(self, config: TrainConfig, tasks: tuple[str, ...]) -> None:
        for callback in self.callbacks:
            callback.start(config, tasks)

    def step(self, step: int, steps: int, loss: Tensor, rate: float) -> None:
        for callback in self.callbacks:
            callback.step(step, steps, loss, rate)

    def trained(self, point: Point) -> None:
        for callback in self.callbacks:
            callback.trained(point)

    def learned(self, task: str, seconds: float) -> None:
        for callback in self.callbacks:
            callback.learned(task, seconds)

    def measured(self, metrics: Metrics) -> None:
        for callback in self.callbacks:
            callback.measured(metrics)

    def end(self, metrics: Metrics) -> None:
        for callback in self.callbacks:
            callback.end(metrics)

    def say(self, text: str) -> None:
        for callback in self.callbacks:
            callback.say(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        for callback in self.callbacks:
            callback.progress(stage, done, total)


def report_progress(callback: Callback, stage: str, done: int, total: int) -> None:
    """Tell progress, and notice here that the user interrupted it."""
    interrupts.check()
    callback.progress(stage, done, total)
