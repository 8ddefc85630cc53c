"""What a training says: one line that is updated on a terminal of any width, lines now and then elsewhere."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from duallora_edge.learner import terminal
from duallora_edge.learner.callbacks import Point
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.report.metrics import BINS, Cell, Metrics, TaskClasses
from duallora_edge.learner.terminal import TerminalCallback

POINT = Point("photos", 137, 384, 0.4123, 8.1e-4, 412.3, 0.931)


def cell(correct: int) -> Cell:
    """400 test images, answered with a confidence of 1."""
    last = (0,) * (BINS - 1)
    return Cell(400, correct, correct, 400, (*last, 400), (*last, correct), (*map(float, last), 400.0))


def callback_on(
    monkeypatch: pytest.MonkeyPatch, width: int | None, *, summary_follows: bool = False
) -> tuple[TerminalCallback, io.StringIO]:
    """A callback on a terminal of this width, or on a pipe."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=width is not None, width=width, color_system=None)
    monkeypatch.setattr(terminal, "Console", lambda **_: console)
    monkeypatch.setattr(terminal, "PLAIN_INTERVAL", -1.0)
    return TerminalCallback(summary_follows=summary_follows), output


@pytest.mark.parametrize(
    ("width", "facts"),
    [
        (120, "loss 0.412  valid. 93.1 %  412 images/s  rate 8.1e-4"),
        (80, "loss 0.412  valid. 93.1 %  412 images/s  rate 8.1e-4"),
        (60, "loss 0.412  valid. 93.1 %"),
        (40, "loss 0.412"),
        (30, ""),
    ],
)
def test_the_line_of_a_training_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int, facts: str) -> None:
    callback, output = callback_on(monkeypatch, width)
    callback.progress("train", 136, 384)
    callback.trained(POINT)
    callback.progress("train", 137, 384)
    callback.trained(replace(POINT, step=138, validation_accuracy=None))  # the last measurement stays
    callback.progress("train", 138, 384)
    callback.line.refresh()
    callback.say("done")
    assert not callback.line.tasks
    shown = [line for line in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", output.getvalue()) if line.strip()]
    assert shown.pop() == "done" and max(map(len, shown)) <= width
    assert all(line.startswith("  training ") for line in shown)
    assert shown[-1].startswith("  training 138/384 ") and shown[-1].rstrip().endswith(facts)
    assert ("loss" in shown[-1]) == bool(facts)


@pytest.mark.parametrize(("summary_follows", "told"), [(False, ["first", "last"]), (True, ["first"])])
def test_the_last_state_is_left_to_the_summary(
    monkeypatch: pytest.MonkeyPatch, summary_follows: bool, told: list[str]
) -> None:
    callback, output = callback_on(monkeypatch, None, summary_follows=summary_follows)
    tasks = TaskClasses("first", ("a", "b")), TaskClasses("last", ("c", "d"))
    rows = (cell(300),), (cell(260), cell(380))
    callback.start(TrainConfig(), ("first", "last"))
    callback.measured(Metrics(tasks[:1], rows[:1]))
    callback.measured(Metrics(tasks, rows))
    lines = {
        "first": "  after 1 task: 75.0 % (70.5 to 79.0) of 400 test images",
        "last": "  after 2 tasks: 80.0 % (77.1 to 82.6) of 800 test images",
    }
    assert output.getvalue().splitlines() == [lines[name] for name in told]


def test_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    callback, output = callback_on(monkeypatch, None)
    callback.progress("train", 136, 384)
    callback.trained(replace(POINT, validation_accuracy=None))
    callback.progress("train", 137, 384)
    callback.trained(POINT)
    callback.progress("train", 138, 384)
    callback.progress("encode", 1, 2)
    callback.progress("train", 1, 120)
    assert output.getvalue().splitlines() == [
        "  training 136/384",
        "  training 137/384, loss 0.412, 412 images/s, rate 8.1e-4",
        "  training 138/384, loss 0.412, valid. 93.1 %, 412 images/s, rate 8.1e-4",
        "  frozen prefix 1/2",
        "  training 1/120",
    ]
