"""What a training says on the terminal while it works."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from duallora_edge.learner.callbacks import Callback, Point
from duallora_edge.learner.report.definitions import DEFINITIONS, span
from duallora_edge.learner.report.intervals import is_too_wide
from duallora_edge.learner.report.metrics import Metrics
from duallora_edge.text import escaped

if TYPE_CHECKING:
    from duallora_edge.learner.config import TrainConfig

STAGES = {
    "decode": "reading images",
    "collect": "taking images",
    "teacher": "backbone at its own size",
    "adapt": "base adaptation",
    "encode": "frozen prefix",
    "train": "training",
}
PLAIN_INTERVAL = 10.0


class FactsColumn(ProgressColumn):
    """How a training goes, as far as it fits into the line; a bar where nothing is known yet."""

    def __init__(self) -> None:
        super().__init__()
        self.bar = BarColumn(bar_width=None)  # what the line has left

    def render(self, task: Task) -> RenderableType:
        facts = task.fields["facts"]
        return Text(facts, no_wrap=True) if facts else self.bar.render(task)


class TerminalCallback(Callback):
    """Lines and progress on standard error: a line that is updated on a terminal, one every few seconds elsewhere.

    ``summary_follows``: the accuracy of the last state is left to the summary that the caller prints.
    """

    def __init__(self, *, summary_follows: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self.line = Progress(
            TextColumn("  {task.description}"), TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(compact=True), FactsColumn(), console=self.console, transient=True,
        )  # fmt: skip
        self.stage = ""
        self.last = time.monotonic()
        self.facts: list[str] = []
        self.validation: list[str] = []
        self.summary_follows = summary_follows
        self.last_task: str | None = None

    def start(self, config: TrainConfig, tasks: tuple[str, ...]) -> None:
        self.last_task = tasks[-1] if self.summary_follows else None

    def say(self, text: str) -> None:
        self._finish()
        self.console.print(escaped(text), markup=False, soft_wrap=True)

    def trained(self, point: Point) -> None:
        if point.validation_accuracy is not None:
            self.validation = [f"valid. {100 * point.validation_accuracy:.1f} %"]
        rate = f"rate {point.learning_rate:.1e}".replace("e-0", "e-")
        self.facts = [f"loss {point.loss:.3g}", *self.validation, f"{point.images_per_second:.0f} images/s", rate]

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage != "train":
            self.facts, self.validation = [], []
        if self.console.is_terminal:
            if stage != self.stage:
                self._finish()
                self.line.start()
                self.line.add_task(STAGES[stage], total=total, facts="")
                self.stage = stage
            self.line.update(self.line.task_ids[0], completed=done, total=total, facts=self._fitting(stage, total))
        elif time.monotonic() - self.last > PLAIN_INTERVAL:
            self.last = time.monotonic()
            self.console.print(", ".join([f"  {STAGES[stage]} {done}/{total}", *self.facts]), soft_wrap=True)

    def measured(self, metrics: Metrics) -> None:
        cell, tasks = metrics.last, len(metrics.tasks)
        interval = cell.interval("correct")
        if interval is None or metrics.tasks[-1].name == self.last_task:
            return
        state = f"  after {tasks} task{'s' if tasks > 1 else ''}: "
        if is_too_wide(interval):
            self.say(f"{state}{cell.n} test images are too few to tell ({span(interval)} %)")
        else:
            found = DEFINITIONS["last_accuracy"].format(cell.accuracy)
            self.say(f"{state}{found} ({span(interval)}) of {cell.n} test images")

    def _fitting(self, stage: str, total: int) -> str:
        """The facts that fit beside the other columns, which are separated by one space; the last ones go first."""
        room = self.console.width - len(f"  {STAGES[stage]} {total}/{total} 0:00:00 ")
        facts = list(self.facts)
        while facts and len("  ".join(facts)) > room:
            facts.pop()
        return "  ".join(facts)

    def _finish(self) -> None:
        if self.stage:
            self.line.remove_task(self.line.task_ids[0])
            self.line.stop()
            self.stage = ""
