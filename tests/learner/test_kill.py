"""Training that is killed, again and again, ends where it would have ended."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from duallora_edge.cli import main
from duallora_edge.errors import RunError
from duallora_edge.learner.history import HISTORY
from duallora_edge.learner.run_directory import RunDirectory

KILLS = 5
PROGRAM = """
from duallora_edge.cli import main
main(arguments)
"""


def spawn(processes: ForkServerContext, *arguments: str) -> BaseProcess:
    """The command line in a process of its own."""
    process = processes.Process(target=exec, args=(PROGRAM, {"arguments": list(arguments)}))
    process.start()
    return process


def start(processes: ForkServerContext, run: Path, data: Path, steps: int) -> BaseProcess:
    (run.parent / "train.yaml").write_text(f"summaries: 1\ncheckpoint_steps: 3\nmin_steps: {steps}\nepochs: 1\n")
    flags = ["--config", str(run.parent / "train.yaml"), "--precision", "fp32", "--device", "cpu"]
    return spawn(processes, "train", "--data", str(data), "--run", str(run), *flags)


def kill(process: BaseProcess) -> None:
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_killed_training_ends_in_the_same_state(
    processes: ForkServerContext, tmp_path: Path, image_stream: Path
) -> None:
    spawn(processes, "--version").join()  # the imports shall not count
    begun = time.monotonic()
    whole = start(processes, tmp_path / "whole", image_stream, 24)
    whole.join()
    length = time.monotonic() - begun
    assert whole.exitcode == 0
    moments = random.Random(0)
    for _ in range(KILLS):
        process = start(processes, tmp_path / "killed", image_stream, 24)
        process.join(moments.uniform(0.1, 0.7) * length)
        kill(process)
        if RunDirectory.exists(tmp_path / "killed"):
            with pytest.raises(SystemExit) as stopped:
                main(["status", str(tmp_path / "killed")])
            assert not stopped.value.code
    last = start(processes, tmp_path / "killed", image_stream, 24)
    last.join()
    assert last.exitcode == 0
    whole_run, killed = RunDirectory.open(tmp_path / "whole"), RunDirectory.open(tmp_path / "killed")
    assert len(killed.active_tasks()) == 2 and killed.digest() == whole_run.digest()
    left = {path.relative_to(killed.path) for path in killed.path.rglob("*")}
    assert left == {path.relative_to(whole_run.path) for path in whole_run.path.rglob("*")}
    assert history(killed.path) == history(whole_run.path) and len(history(killed.path)) == 2 * 24


def history(run: Path) -> list[dict[str, object]]:
    """The lines of the history but for the speed."""
    lines = map(json.loads, (run / HISTORY).read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def test_the_lock_names_its_process_and_dies_with_it(
    processes: ForkServerContext, tmp_path: Path, image_stream: Path
) -> None:
    process = start(processes, tmp_path / "run", image_stream, 100_000)
    try:
        deadline = time.monotonic() + 60
        while not RunDirectory.exists(tmp_path / "run") or RunDirectory.open(tmp_path / "run").training_steps() is None:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.05)
        run = RunDirectory.open(tmp_path / "run")
        with pytest.raises(RunError, match=f"Process {process.pid} is writing to"), run.locked():
            pass
    finally:
        kill(process)
    with run.locked():
        assert run.training_steps()
