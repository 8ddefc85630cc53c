"""Several processes learn one run: the result of one process, errors told once, ranks that die, and resuming."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import TCPStore

from duallora_edge.errors import ConfigError
from duallora_edge.learner import distributed
from duallora_edge.learner.device import pick_device
from duallora_edge.learner.history import HISTORY
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.adapters import Adapter
from duallora_edge.learner.run_directory import RunDirectory

LOST = "Another process of this training ended or did not answer in time; run the same command again"
SETTINGS = "summaries: 1\ncheckpoint_steps: 3\nmin_steps: 15\nepochs: 1\nbatch_size: 16\nviews: 0\n"
PROGRAM = """
import os
os.environ.update(environment)
os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
import torch
torch.set_num_threads(1)
from duallora_edge.cli import main
main(arguments)
"""


@dataclass
class Started:
    """Processes that train together, where they meet, and the files of their standard errors."""

    store: TCPStore
    processes: list[BaseProcess]
    errors: list[Path]

    def join(self, seconds: float = 120) -> list[int | None]:
        """Their exit codes; a process that does not end in time has None."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        return "".join(path.read_text() for path in self.errors)

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)


Start = Callable[..., Started]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, processes: ForkServerContext) -> Start:
    """``start(run, data, count, *flags, caches=None, **environment)``: `train` in processes as of torchrun.

    ``caches`` names the folder of decoded images of each rank. Reports have no plots.
    """

    def run(
        path: Path, data: Path, count: int, *flags: str, caches: Sequence[Path] = (), **environment: str
    ) -> Started:
        folder = tmp_path_factory.mktemp("ranks")
        (folder / "settings.yaml").write_text(SETTINGS)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's own outlives its ranks
        started = Started(store, [], [])
        for rank in range(count):
            words = ["train", "--data", str(data), "--run", str(path), "--config", str(folder / "settings.yaml")]
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            marks = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            variables = {
                "environment": {
                    **{name: str(value) for name, value in numbers.items()},
                    **address,
                    **marks,
                    "DUALLORA_EDGE_CACHE": str(caches[rank] if caches else os.environ["DUALLORA_EDGE_CACHE"]),
                    **environment,
                },
                "errors": str(folder / f"{rank}.txt"),
                "arguments": [*words, "--precision", "fp32", "--device", "cpu", *flags],
            }
            process = processes.Process(target=exec, args=(PROGRAM, variables))
            process.start()
            started.processes.append(process)
            started.errors.append(folder / f"{rank}.txt")
        return started

    return run


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, image_stream: Path, start: Start) -> dict[int, Path]:
    """The same stream learned by one process and by two; read only."""
    folder = tmp_path_factory.mktemp("learned")
    for count in (1, 2):
        started = start(folder / str(count), image_stream, count)
        assert started.join() == [0] * count, started.said()
    return {count: folder / str(count) for count in (1, 2)}


def files(run: Path) -> set[Path]:
    return {path.relative_to(run) for path in run.rglob("*")}


def probabilities(path: Path, images: Path) -> torch.Tensor:
    run = RunDirectory.open(path)
    backbone = run.backbone()
    frames = [Image.open(p).resize((backbone.info.size,) * 2) for p in sorted(images.rglob("test/*/*.png"))]
    with torch.no_grad():
        model = compose(backbone, run.records())
        return model(torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))).probabilities


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / HISTORY).read_text().splitlines()]


def checkpointed(run: Path, started: Started) -> None:
    """Wait until training is under way."""
    deadline = time.monotonic() + 60
    while not RunDirectory.exists(run) or RunDirectory.open(run).training_steps() is None:
        assert time.monotonic() < deadline and all(p.is_alive() for p in started.processes), started.said()
        time.sleep(0.02)


def test_two_ranks_give_the_result_of_one(learned: dict[int, Path], image_stream: Path) -> None:
    """Up to rounding, which Adam magnifies in numbers that hardly matter: tight for one task, loose after two."""
    one, two = (RunDirectory.open(learned[count]) for count in (1, 2))
    assert files(one.path) == files(two.path)
    assert (one.path / "run.yaml").read_bytes() == (two.path / "run.yaml").read_bytes()
    for a, b, bound in zip(one.records(), two.records(), (1e-3, 0.05), strict=True):
        torch.testing.assert_close(b.head, a.head, rtol=bound, atol=1e-6)
        for block, other in zip(a.blocks, b.blocks, strict=True):
            for name in ("orthogonal", "residual"):
                updates = (Adapter.product(getattr(part, name)) for part in (block, other))
                for update, same in zip(*updates, strict=True):
                    assert float((update - same).abs().max()) <= bound * float(update.abs().max())
    assert one.records()[0].info == two.records()[0].info
    for line, other in zip(*(history(run.path) for run in (one, two)), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.05)  # of all images, not of those of a rank
        assert line["validation_accuracy"] == other["validation_accuracy"]
    expected, found = (probabilities(run.path, image_stream) for run in (one, two))
    assert float((expected - found).abs().max()) < 1e-4


def test_torchrun_gives_the_same_bytes_again(learned: dict[int, Path], tmp_path: Path, image_stream: Path) -> None:
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    words = ["train", "--data", image_stream, "--run", tmp_path / "run", "--config", tmp_path / "settings.yaml"]
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"),
            *("duallora_edge", *map(str, words), "--precision", "fp32", "--device", "cpu"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("Last accuracy, mean over tasks") == 1
    assert answer.stderr.count("Task 2 02-lines") == 1
    assert RunDirectory.open(tmp_path / "run").digest() == RunDirectory.open(learned[2]).digest()


@pytest.mark.parametrize(
    ("method", "exact"), [("frozen", True), pytest.param("task_arithmetic", False, marks=pytest.mark.slow)]
)
def test_other_methods(start: Start, tmp_path: Path, image_stream: Path, method: str, exact: bool) -> None:
    """Without training the number of ranks changes no byte."""
    for count in (1, 2):
        started = start(tmp_path / str(count), image_stream, count, "--method", method, "--views", "2", "--flip")
        assert started.join() == [0] * count, started.said()
    one, two = (RunDirectory.open(tmp_path / str(count)) for count in (1, 2))
    assert (one.digest() == two.digest()) or not exact
    expected, found = (probabilities(run.path, image_stream) for run in (one, two))
    assert float((expected - found).abs().max()) < 1e-3


@pytest.mark.parametrize(("victim", "counts"), [(0, [1]), (1, [2, 3])])
def test_a_killed_rank_ends_all_and_any_number_resumes(
    start: Start, learned: dict[int, Path], tmp_path: Path, image_stream: Path, victim: int, counts: list[int]
) -> None:
    started = start(tmp_path / "run", image_stream, 2)
    checkpointed(tmp_path / "run", started)
    started.send(victim, signal.SIGKILL)
    codes = started.join(60)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    assert started.said().count(LOST) == 1 and "Traceback" not in started.said()
    expected = probabilities(learned[1], image_stream)
    for count in counts:
        resumed = tmp_path / str(count)
        shutil.copytree(tmp_path / "run", resumed)
        again = start(resumed, image_stream, count)
        assert again.join() == [0] * count, again.said()
        assert files(resumed) == files(learned[1])
        assert float((expected - probabilities(resumed, image_stream)).abs().max()) < 1e-3
        assert count != 2 or RunDirectory.open(resumed).digest() == RunDirectory.open(learned[2]).digest()


def test_a_silent_rank_is_not_waited_for_for_ever(start: Start, tmp_path: Path, image_stream: Path) -> None:
    started = start(tmp_path / "run", image_stream, 2, DUALLORA_EDGE_TIMEOUT="2")
    checkpointed(tmp_path / "run", started)
    started.send(1, signal.SIGSTOP)
    started.processes[0].join(60)
    started.send(1, signal.SIGKILL)
    assert started.join(10) == [1, -signal.SIGKILL]
    assert started.said().count(LOST) == 1


def test_a_rank_that_is_asked_to_end_says_what_to_do(start: Start, tmp_path: Path, image_stream: Path) -> None:
    started = start(tmp_path / "run", image_stream, 2)
    checkpointed(tmp_path / "run", started)
    for rank in (0, 1):
        started.send(rank, signal.SIGTERM)
    assert started.join(60) == [1, 1]
    assert started.said().count(LOST) == 1 and "Traceback" not in started.said()


def test_an_error_of_one_rank_ends_all_and_is_told_once(
    start: Start, learned: dict[int, Path], tmp_path: Path, image_stream: Path
) -> None:
    (tmp_path / "file").touch()
    for caches in ([tmp_path / "file", tmp_path / "cache"], [tmp_path / "cache", tmp_path / "file"]):
        started = start(tmp_path / "run", image_stream, 2, caches=caches)
        assert started.join(60) == [1, 1]
        assert started.said().count("Error:") == 1 and "file/decoded" in started.said()
    assert not (tmp_path / "run").exists()
    run = RunDirectory.open(Path(shutil.copytree(learned[1], tmp_path / "locked")))
    with run.locked():
        started = start(run.path, image_stream, 2)
        assert started.join(60) == [1, 1]
    assert started.said().count("Error:") == 1 and f"Process {os.getpid()} is writing" in started.said()


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(1, 5, [5]), (2, 5, [3, 2]), (3, 2, [1, 1, 0]), (2, 0, [0, 0])],
)
def test_parts(monkeypatch: pytest.MonkeyPatch, count: int, total: int, expected: list[int]) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: count)
    parts = distributed.shards(range(total))
    assert [len(part) for part in parts] == expected
    assert [number for part in parts for number in part] == list(range(total))
    for number in range(count):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        assert torch.arange(total)[distributed.own_rows(total)].tolist() == list(parts[number])


@pytest.mark.parametrize(
    ("name", "devices", "problem"),
    [("cuda:0", 2, "Several processes cannot share cuda:0"), ("cuda", 1, "2 processes need as many CUDA devices")],
)
def test_each_process_has_a_device_of_its_own(
    monkeypatch: pytest.MonkeyPatch, name: str, devices: int, problem: str
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "local_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(ConfigError, match=problem):
        pick_device(name)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_a_timeout_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("DUALLORA_EDGE_TIMEOUT", text)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            pytest.raises(ConfigError, match="DUALLORA_EDGE_TIMEOUT must be a number of seconds"),
            distributed.process_group(),
        ):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
