"""What a training says: one line that is updated on a terminal of any width, lines now and then elsewhere."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from duallora_edge.learner import terminal
from duallora_edge.learner.callbacks import Point
from duallora_edge.learner.terminal import TerminalCallback

POINT = Point("photos", 137, 384, 0.4123, 8.1e-4, 412.3, 0.931)


def callback_on(monkeypatch: pytest.MonkeyPatch, width: int | None) -> tuple[TerminalCallback, io.StringIO]:
    """A callback on a terminal of this width, or on a pipe."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=width is not None, width=width, color_system=None)
    monkeypatch.setattr(terminal, "Console", lambda **_: console)
    monkeypatch.setattr(terminal, "PLAIN_INTERVAL", -1.0)
    return TerminalCallback(), output


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
