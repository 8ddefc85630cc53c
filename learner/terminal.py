"""What a training says on the terminal while it works."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.report.definitions import DEFINITIONS, span
from duallora_edge.learner.report.intervals import is_too_wide
from duallora_edge.learner.report.metrics import Row, pool
from duallora_edge.text import escaped

STAGES = {
    "decode": "reading images",
    "collect": "taking images",
    "teacher": "backbone at its own size",
    "adapt": "base adaptation",
    "encode": "frozen prefix",
    "train": "training",
}
PLAIN_INTERVAL = 10.0


class TerminalCallback(Callback):
    """Lines and progress bars on standard error: bars on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self.bars = Progress(
            TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(), console=self.console, transient=True,
        )  # fmt: skip
        self.bar: TaskID | None = None
        self.stage = ""
        self.last = time.monotonic()

    def say(self, text: str) -> None:
        self._finish()
        self.console.print(escaped(text), markup=False, soft_wrap=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        if self.console.is_terminal:
            if stage != self.stage:
                self._finish()
                self.bars.start()
                self.bar, self.stage = self.bars.add_task(STAGES[stage], total=total), stage
            if self.bar is not None:
                self.bars.update(self.bar, completed=done, total=total)
        elif time.monotonic() - self.last > PLAIN_INTERVAL:
            self.last = time.monotonic()
            self.console.print(f"  {STAGES[stage]} {done}/{total}")

    def measured(self, tasks: int, row: Row) -> None:
        cell = pool(row)
        interval = cell.interval("correct")
        if interval is None:
            return
        state = f"  after {tasks} task{'s' if tasks > 1 else ''}: "
        if is_too_wide(interval):
            self.say(f"{state}{cell.n} test images are too few to tell ({span(interval)} %)")
        else:
            found = DEFINITIONS["last_accuracy"].format(cell.accuracy)
            self.say(f"{state}{found} ({span(interval)}) of {cell.n} test images")

    def _finish(self) -> None:
        if self.bar is not None:
            self.bars.remove_task(self.bar)
            self.bars.stop()
            self.bar, self.stage = None, ""
