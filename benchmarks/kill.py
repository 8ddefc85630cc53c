"""Kill changes of a run, exports, builds and swaps at random moments inside of them, and show that nothing is lost.

    OMP_NUM_THREADS=1 python benchmarks/kill.py --kills 300

Every process is forked from this one, which has everything imported, and says in shared memory what it is doing:
inside a training step (forward, backward, optimiser, checkpoint), a commit, a rollback, the writing of a bundle, the
build of an engine, a swap, or elsewhere. It is killed (SIGKILL) a random time after it enters the place that was drawn,
and where it really was is read from that memory.

After each kill the run must open, every task in it must be a task of the run that was never killed, with the same
bytes, and no task may be missing whose commit (or be there whose rollback) had returned. In the end each killed run
must equal the one that was never killed, byte for byte. A bundle must be the old or the new one, whole, an engine whole
or not there, and what a swap was trying is given up after two deaths; nothing is left behind in the end.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import torch
import torch._dynamo
from PIL import Image

from duallora_edge.cli import main as duallora_edge
from duallora_edge.errors import SwapError
from duallora_edge.export import bundle as exporting
from duallora_edge.export import commands as export_commands
from duallora_edge.files import read_json, write_json
from duallora_edge.learner import terminal, train
from duallora_edge.learner import timing as profile
from duallora_edge.learner.methods import training
from duallora_edge.learner.run_directory import FileCheckpoint, RunDirectory
from duallora_edge.runtime.backends import engine_build as engine
from duallora_edge.runtime.backends.engine_cache import find_engine
from duallora_edge.runtime.backends.tensorrt_api import load_tensorrt
from duallora_edge.runtime.bundle import MANIFEST, Bundle
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.trial import Opening, Trial

TASKS = {"one": "ab", "two": "cd", "three": "ef"}
SETTINGS = """
min_steps: 24
epochs: 1
batch_size: 4
checkpoint_steps: 4
size: 32
prefix_blocks: -1
summaries: 1
precision: fp32
device: cpu
"""
STEP = "training step"
COMMIT, ROLLBACK, EXPORT, BUILD, SWAP, OTHER = "commit", "rollback", "export", "build", "swap", "elsewhere"
PLACES = (OTHER, STEP, f"{STEP}: suffix forward", f"{STEP}: suffix backward", f"{STEP}: optimiser",
          f"{STEP}: checkpoint", COMMIT, ROLLBACK, EXPORT, BUILD, SWAP)  # fmt: skip
# The longest time from entering a place to the kill: about as long as it takes.
LONGEST_S = {OTHER: 1.0, EXPORT: 0.3, BUILD: 4.0, SWAP: 1.5}
SHORT_S = 0.02
PATIENCE_S = 120


class Whereabouts:
    """Shared memory: the place that a process is in (one byte, so that no kill tears it), how often it entered each,
    and how many changes have returned."""

    def __init__(self) -> None:
        self._bytes = mmap.mmap(-1, 4096)
        self._counts = np.frombuffer(self._bytes, np.uint32, len(PLACES) + 1, offset=8)
        self.clear()

    def clear(self) -> None:
        self._bytes[0] = 0
        self._counts[:] = 0

    @property
    def place(self) -> str:
        return PLACES[self._bytes[0]]

    @property
    def returned(self) -> int:
        return int(self._counts[-1])

    def entered(self, place: str) -> int:
        return int(self._counts[PLACES.index(place)])

    @contextmanager
    def inside(self, place: str) -> Iterator[None]:
        before, now = self._bytes[0], PLACES.index(place)
        self._bytes[0] = now
        self._counts[now] += 1
        try:
            yield
        finally:
            self._bytes[0] = before

    def marked(self, place: str, function: Callable[..., Any], *, change: bool = False) -> Callable[..., Any]:
        """The function, whose calls are a place; a ``change`` counts when it has returned."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.inside(place):
                result = function(*arguments, **options)
            self._counts[-1] += change
            return result

        return call

    def install(self) -> None:
        """Mark the places in this process."""
        training.optimise = self.marked(STEP, training.optimise)
        FileCheckpoint.save = self.marked(f"{STEP}: checkpoint", FileCheckpoint.save)  # type: ignore[method-assign]
        RunDirectory.commit = self.marked(COMMIT, RunDirectory.commit, change=True)  # type: ignore[method-assign]
        RunDirectory.set_active_tasks = self.marked(ROLLBACK, RunDirectory.set_active_tasks, change=True)  # type: ignore[method-assign]
        exporting._write = self.marked(EXPORT, exporting._write, change=True)
        engine.build_engine = self.marked(BUILD, engine.build_engine, change=True)
        Classifier.swap = self.marked(SWAP, Classifier.swap, change=True)  # type: ignore[method-assign]
        profile._current = _Phases(self)
        train.report = lambda *_: None  # figures, which take longer than the training here


class _Phases(profile.Profile):
    """The phases of training steps as places."""

    def __init__(self, whereabouts: Whereabouts) -> None:
        super().__init__(torch.device("cpu"))
        self.whereabouts = whereabouts

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        place = f"{STEP}: {name}"
        if place in PLACES and self.whereabouts.place == STEP:
            with self.whereabouts.inside(place):
                yield
        else:
            yield


class Scenario(Protocol):
    """Something that is killed. ``targets``: the places at which kills are aimed."""

    name: str
    targets: Sequence[str]

    def begin(self, folder: Path) -> None:
        """Make the state that `work` starts from, in a folder that does not exist yet."""

    def work(self, folder: Path) -> None:
        """In a process of its own; begins anew or continues what was killed."""

    def check(self, folder: Path, returned: int) -> None:
        """After a kill, when so many changes had returned since `begin`. Raises `SystemExit` when something is lost."""

    def check_end(self, folder: Path) -> None:
        """After `work` came to its end. Raises `SystemExit` when the end is another than without a kill."""


class Training:
    """Learning a stream of tasks; killed in steps and commits."""

    name = "train"
    targets = (*PLACES[1:6], COMMIT, COMMIT, OTHER)

    def __init__(self, inputs: Path, whole: Path) -> None:
        self.inputs, self.whole = inputs, whole

    def begin(self, folder: Path) -> None:
        folder.mkdir()

    def work(self, folder: Path) -> None:
        images, config = self.inputs / "images", self.inputs / "train.yaml"
        call("train", "--data", images, "--run", folder / "run", "--config", config, "--no-evaluate")

    def check(self, folder: Path, returned: int) -> None:
        if RunDirectory.exists(folder / "run"):
            found = committed(folder / "run")
            if len(found) < returned or found != committed(self.whole)[: len(found)]:
                raise SystemExit(f"{folder}: {returned} commits had returned, {len(found)} tasks are there")
        elif returned:
            raise SystemExit(f"{folder}: the run is gone")

    def check_end(self, folder: Path) -> None:
        compare(folder / "run", self.whole)


class Undoing:
    """Rollback of the last task, or removal of the first; killed inside."""

    targets = (ROLLBACK,)

    def __init__(self, words: Sequence[str], whole: Path, undone: Path) -> None:
        self.name, self.words, self.whole, self.undone = words[0], words, whole, undone

    def begin(self, folder: Path) -> None:
        shutil.copytree(self.whole, folder / "run")

    def work(self, folder: Path) -> None:
        # One that was killed after HEAD was replaced is not undone again; opening the run for a change finishes it.
        if len(RunDirectory.open(folder / "run").active_tasks()) == len(TASKS):
            call(self.words[0], folder / "run", *self.words[1:])
        with RunDirectory.open(folder / "run").locked():
            pass

    def check(self, folder: Path, returned: int) -> None:
        found = committed(folder / "run")
        if found not in ([] if returned else [committed(self.whole)]) + [committed(self.undone)]:
            raise SystemExit(f"{folder}: {found} is neither the state before nor the one after")

    def check_end(self, folder: Path) -> None:
        compare(folder / "run", self.undone)


class Exporting:
    """A bundle that is replaced; killed while it is written."""

    name, targets = "export", (EXPORT,)

    def __init__(self, whole: Path, bundle: Path) -> None:
        self.whole, self.bundle = whole, bundle

    def begin(self, folder: Path) -> None:
        shutil.copytree(self.bundle, folder / "bundle")

    def work(self, folder: Path) -> None:
        call("export", self.whole, "-o", folder / "bundle", "--bundle-version", "2")

    def check(self, folder: Path, returned: int) -> None:
        version = Bundle.open(folder / "bundle").manifest.bundle_version
        if version not in ((2,) if returned else (1, 2)):
            raise SystemExit(f"{folder}: the bundle has version {version}")

    def check_end(self, folder: Path) -> None:
        self.check(folder, 1)
        if names := [path.name for path in folder.iterdir() if path.name != "bundle"]:
            raise SystemExit(f"{folder}: left behind {names}")


class Building:
    """An engine of TensorRT-RTX, built ahead of time; killed inside."""

    name, targets = "build", (BUILD,)

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle

    def begin(self, folder: Path) -> None:
        folder.mkdir()

    def work(self, folder: Path) -> None:
        os.environ["DUALLORA_EDGE_CACHE"] = str(folder)
        engine.build_engine(Bundle.open(self.bundle), "sm86")

    def check(self, folder: Path, returned: int) -> None:
        """Whether there is one or none, what can be found is whole: `find_engine` raises otherwise."""
        before = os.environ["DUALLORA_EDGE_CACHE"]
        os.environ["DUALLORA_EDGE_CACHE"] = str(folder)
        found = find_engine(engine.engine_key(Bundle.open(self.bundle), load_tensorrt(("tensorrt_rtx",)), "sm86"))
        os.environ["DUALLORA_EDGE_CACHE"] = before
        if returned and found is None:
            raise SystemExit(f"{folder}: the engine is gone")

    def check_end(self, folder: Path) -> None:
        self.check(folder, 1)
        if names := [path.name for path in (folder / "engines").iterdir() if path.name.startswith(".")]:
            raise SystemExit(f"{folder}: left behind {names}")


class Swapping:
    """A bundle that was never loaded takes the place of another; killed inside, in its trial or its loading."""

    name, targets = "swap", (SWAP,)

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle

    def begin(self, folder: Path) -> None:
        shutil.copytree(self.bundle, folder / "new")
        write_json(folder / "new" / MANIFEST, read_json(folder / "new" / MANIFEST) | {"bundle_version": 3})

    def work(self, folder: Path) -> None:
        os.environ["DUALLORA_EDGE_CACHE"] = str(folder / "cache")
        classifier = Classifier.load(self.bundle, "cpu", 1, trial=False)
        classifier._trial = Trial(Opening("cpu", 1))
        try:
            classifier.swap(folder / "new")
        except SwapError as error:
            if "the process died 2 times" not in str(error):
                raise

    def check(self, folder: Path, returned: int) -> None:
        states = [read_json(path)["state"] for path in (folder / "cache" / "trials").glob("*.json")]
        if len(states) > 1 or (returned and states != ["good"]):
            raise SystemExit(f"{folder}: remembered {states}")

    def check_end(self, folder: Path) -> None:
        states = [read_json(path)["state"] for path in (folder / "cache" / "trials").glob("*.json")]
        if states not in (["good"], ["trying"]):  # given up: it is still what was being tried
            raise SystemExit(f"{folder}: remembered {states}")


def call(*words: str | Path) -> None:
    """The command line in this process. Raises `SystemExit` when it fails."""
    try:
        duallora_edge([str(word) for word in words])
    except SystemExit as stopped:
        if stopped.code:
            raise


def committed(run: Path) -> list[str]:
    """Ids of the tasks of a run, whose files are all read and checked."""
    opened = RunDirectory.open(run)
    opened.records()
    return [task.id for task in opened.active_tasks()]


def compare(run: Path, expected: Path) -> None:
    """Raises `SystemExit` unless both have the same names, and the same bytes but for reports and the process id."""
    found, wanted = (
        {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and path.name != ".lock" and path.parent.name != "reports"
        }
        for root in (run, expected)
    )
    if found != wanted:
        names = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
        raise SystemExit(f"{run} is not the run that was never killed: {', '.join(sorted(names))}")


def write_images(folder: Path) -> None:
    """Three tasks of two classes of noisy squares, each in its place."""
    rng = np.random.default_rng(0)
    for task, (name, classes) in enumerate(TASKS.items()):
        for k, label in enumerate(classes):
            for index in range(10):
                pixels = rng.integers(0, 80, (64, 64, 3), dtype=np.uint8)
                pixels[8 * task : 8 * task + 30, 30 * k : 30 * k + 30, task] += 150
                path = folder / name / ("test" if index > 7 else "train") / label / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


def forked(whereabouts: Whereabouts, work: Callable[[], None], log: Path) -> int:
    """Start ``work`` in a process of its own; returns its id."""
    whereabouts.clear()
    if pid := os.fork():
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        whereabouts.install()
        work()
        code = 0
    finally:
        os._exit(code)


def finish(pid: int, log: Path) -> None:
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"it failed:\n{log.read_text()}")


def kill(pid: int, whereabouts: Whereabouts, target: str, number: int, delay: float, log: Path) -> str | None:
    """Kill a process some seconds after it entered a place for the n-th time; returns where it was, None at its end."""
    deadline = time.monotonic() + PATIENCE_S
    while whereabouts.entered(target) < number:
        if (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if ended[1]:
                raise SystemExit(f"it failed:\n{log.read_text()}")
            return None
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"it did nothing for {PATIENCE_S} s:\n{log.read_text()}")
        time.sleep(0.0001)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return whereabouts.place if os.WIFSIGNALED(status) else None


@click.command()
@click.option("--kills", default=300, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the counts to this file.")
def main(kills: int, seed: int, json_path: Path | None) -> None:
    torch.set_num_threads(1)
    rng, whereabouts = random.Random(seed), Whereabouts()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DUALLORA_EDGE_CACHE"] = str(folder / "cache")
        counts = Counter[tuple[str, str]]()
        ends = Counter[str]()
        waiting = scenarios(folder, whereabouts)
        current: dict[str, tuple[Path, int]] = {}  # the folder of each scenario, and what had returned there
        while counts.total() < kills:
            scenario = waiting[rng.choices(range(len(waiting)), [10, *(1 for _ in waiting[1:])])[0]]
            if scenario.name not in current:
                current[scenario.name] = folder / f"{scenario.name}-{ends[scenario.name]}", 0
                scenario.begin(current[scenario.name][0])
            place, returned = current[scenario.name]
            target, log = rng.choice(scenario.targets), folder / "log"
            pid = forked(whereabouts, partial(scenario.work, place), log)
            most = 12 if target.startswith(STEP) and target not in (STEP, f"{STEP}: checkpoint") else 1
            number = 0 if target == OTHER else rng.randint(1, most)
            delay = rng.uniform(0, LONGEST_S.get(target, SHORT_S))
            where = kill(pid, whereabouts, target, number, delay, log)
            if where is None:
                scenario.check_end(place)
                ends[scenario.name] += 1
                del current[scenario.name]
                shutil.rmtree(place)
                continue
            returned += whereabouts.returned
            scenario.check(place, returned)
            current[scenario.name] = place, returned
            counts[scenario.name, where] += 1
            click.echo(f"kill {counts.total():>4}  {scenario.name:<9} {where}")
        for scenario in waiting:
            if scenario.name in current:
                place = current[scenario.name][0]
                finish(forked(whereabouts, partial(scenario.work, place), folder / "log"), folder / "log")
                scenario.check_end(place)
                ends[scenario.name] += 1
    seconds = time.monotonic() - started
    click.echo(f"\n{kills} kills in {seconds:.0f} s; nothing committed was lost after any of them")
    for (scenario_name, where), count in sorted(counts.items()):
        click.echo(f"{count:>5}  {scenario_name:<9} {where}")
    for scenario_name, count in ends.items():
        click.echo(
            f"{count:>5}  {scenario_name:<9} came to their end, each equal to what was never killed, byte for byte"
        )
    if json_path is not None:
        rows = [{"scenario": s, "place": where, "kills": count} for (s, where), count in sorted(counts.items())]
        write_json(json_path, {"kills": kills, "seconds": seconds, "places": rows, "ends": dict(ends)})


def scenarios(folder: Path, whereabouts: Whereabouts) -> list[Scenario]:
    """What is killed, training first; the runs that are never killed are made here."""
    write_images(folder / "images")
    (folder / "train.yaml").write_text(f"task_order: [{', '.join(TASKS)}]\n{SETTINGS}")
    whole, log = folder / "whole" / "run", folder / "log"
    training = Training(folder, whole)
    training.begin(folder / "whole")
    finish(forked(whereabouts, partial(training.work, folder / "whole"), log), log)
    made: list[Scenario] = [training]
    for words in (["rollback"], ["remove", "one"]):
        undone = folder / f"whole-{words[0]}"
        undoing = Undoing(words, whole, undone / "run")
        undoing.begin(undone)
        finish(forked(whereabouts, partial(undoing.work, undone), log), log)
        made.append(undoing)
    bundle = folder / "bundle"
    export = partial(call, "export", whole, "-o", bundle, "--bundle-version", "1")
    finish(forked(whereabouts, export, log), log)
    return [*made, Exporting(whole, bundle), Building(bundle), Swapping(bundle)]


if __name__ == "__main__":
    # Imported here once, not in every process: the command, and what the first step of an optimiser imports.
    assert terminal and export_commands and torch._dynamo
    main()
