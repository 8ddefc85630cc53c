"""The profile of a call: every second in one phase, and the same training with it as without."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.timing import BEFORE, PHASES, Profile, phase, profiling, start_task, timed

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``clock(s)`` lets s seconds pass."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def tick(seconds: float) -> None:
        now[0] += seconds

    return tick


def test_a_phase_inside_another_counts_for_itself(clock: Callable[[float], None]) -> None:
    @timed("statistics")
    def inner() -> None:
        clock(4)

    with profiling(CPU) as profile:
        clock(1)
        start_task("a")
        with phase("evaluation"):
            clock(2)
            with pytest.raises(ValueError, match="stop"), phase("decode"):
                clock(8)
                raise ValueError("stop")
            inner()
            start_task("b")
            clock(16)
    assert {name: {k: v for k, v in s.items() if v} for name, s in profile.seconds.items()} == {
        BEFORE: {"rest": 1},
        "a": {"evaluation": 2, "decode": 8, "statistics": 4},
        "b": {"evaluation": 16},
    }
    assert profile.wall == 31 and profile.to_json()["sum_s"] == 31
    assert [line.split("  ")[0] for line in profile.table().splitlines()] == [*PHASES, "sum"]


def test_nothing_is_measured_outside(clock: Callable[[float], None]) -> None:
    with profiling(CPU) as profile:
        pass
    with phase("decode"):
        clock(1)
    start_task("a")
    assert profile.seconds == Profile(CPU).seconds


def test_training_with_a_profile_ends_in_the_same_state(
    tmp_path: Path, image_stream: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    quick = (
        "--rank-orthogonal",
        2,
        "--rank-residual",
        2,
        "--epochs",
        1,
        "--min-steps",
        4,
        "--precision",
        "fp32",
        "--summaries",
        1,
    )
    digests = []
    for name, flags in (("plain", ()), ("profiled", ("--profile",))):
        code, _, err = call(
            "train", "--data", image_stream, "--run", tmp_path / name, "--device", "cpu", *quick, *flags
        )
        assert code == 0 and ("suffix backward" in err) == (name == "profiled")
        digests.append(RunDirectory.open(tmp_path / name).digest())
    assert digests[0] == digests[1]
    assert not (tmp_path / "plain" / "reports" / "profile.json").exists()
    profile = json.loads((tmp_path / "profiled" / "reports" / "profile.json").read_text())
    assert [task["task"] for task in profile["tasks"]] == [BEFORE, "01-round", "02-lines"]
    assert profile["sum_s"] == pytest.approx(profile["wall_s"], rel=0.01)
    for name in ("frozen prefix", "suffix forward", "suffix backward", "optimiser", "bases", "statistics"):
        assert profile["tasks"][1]["seconds"][name] > 0
