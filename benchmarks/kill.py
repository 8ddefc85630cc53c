"""Kill changes of a run, exports, builds and swaps at random moments inside of them, and show that nothing is lost.

    OMP_NUM_THREADS=1 python benchmarks/kill.py --kills 300
    OMP_NUM_THREADS=1 python benchmarks/kill.py --kills 300 --field

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

import io
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import torch
import torch._dynamo
from PIL import Image

from duallora_edge.cli import main as duallora_edge
from duallora_edge.errors import StoreError, SwapError
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
from duallora_edge.runtime.field.channel import Channel
from duallora_edge.runtime.field.delta import apply_delta
from duallora_edge.runtime.field.keeping import Keeper, kept_frames
from duallora_edge.runtime.field.store import Store
from duallora_edge.runtime.field.update import update
from duallora_edge.runtime.service.pipeline import Pipeline
from duallora_edge.runtime.service.slot_keeper import SlotKeeper, Terms, open_slot
from duallora_edge.runtime.sources import open_source
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
UPDATE, TRIAL, REVERT, APPLY, TEACH, KEEP = "update", "trial", "revert", "apply", "teach", "keep"
FIELD = (UPDATE, TRIAL, REVERT, APPLY, TEACH, KEEP)
PLACES = (OTHER, STEP, f"{STEP}: suffix forward", f"{STEP}: suffix backward", f"{STEP}: optimiser",
          f"{STEP}: checkpoint", COMMIT, ROLLBACK, EXPORT, BUILD, SWAP, *FIELD)  # fmt: skip
# The longest time from entering a place to the kill: about as long as it takes.
LONGEST_S = {
    OTHER: 1.0, EXPORT: 0.3, BUILD: 4.0, SWAP: 1.5,
    UPDATE: 0.5, TRIAL: 1.0, REVERT: 0.01, APPLY: 0.2, TEACH: 0.2, KEEP: 0.1,
}  # fmt: skip
SHORT_S = 0.02
PATIENCE_S = 120
FRAMES, VERSIONS, KEEP_MB = 10, 12, 0.02


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


class Field:
    """The life of a device: updates, trials, reverts, deltas applied, classes taught and frames kept; killed anywhere.

    Whenever it is killed, a good bundle answers whose version is below the one before only where somebody reverted, a
    class is taught from all its frames or not at all, and what was applied and kept is whole.
    """

    name, targets = "field", FIELD

    def __init__(self, folder: Path, whole: Path, whereabouts: Whereabouts) -> None:
        """Publishes the states of a run after two and three tasks, and more versions of the latter."""
        self.whereabouts = whereabouts
        self.frames = [np.full((64, 64, 3), 5 * index, np.uint8) for index in range(FRAMES)]
        older, self.older, self.delta = folder / "older", folder / "version-1", folder / "1-2.delta"
        shutil.copytree(whole, older)
        call("rollback", older)
        call("export", older, "-o", self.older, "--bundle-version", "1")
        call("export", whole, "--delta-from", self.older, "-o", self.delta)
        newer = apply_delta(self.older, self.delta, folder / "version-2").path
        channel = Channel.create(folder / "channel-0", folder / "keys")
        self.channels: list[Path] = []
        self.digests: list[str] = []
        for version in range(1, VERSIONS + 1):
            bundle = self.older if version == 1 else newer
            if version > 2:
                bundle = folder / f"version-{version}"
                shutil.copytree(newer, bundle)
                write_json(bundle / MANIFEST, read_json(bundle / MANIFEST) | {"bundle_version": version})
            channel.publish(bundle, [self.delta] if version == 2 else [])
            self.digests.append(Bundle.open(bundle).digest)
            self.channels.append(folder / f"channel-{version}")
            shutil.copytree(channel.path, self.channels[-1])

    def begin(self, folder: Path) -> None:
        folder.mkdir()

    def work(self, folder: Path) -> None:
        os.environ["DUALLORA_EDGE_CACHE"] = str(folder / "cache")
        store, inside = Store.create(folder / "store"), self.whereabouts.inside
        for version, (channel, digest) in enumerate(zip(self.channels, self.digests, strict=True), start=1):
            slots = store.read()
            if digest in slots.refused or version <= slots.lowest:
                continue
            with inside(UPDATE), suppress(StoreError):  # it is there already, or is being tried
                update(store, str(channel), channel / "metadata" / "1.root.json")
            with inside(TRIAL):
                self.answer(store, folder)
            with inside(APPLY):
                if not (folder / "applied").exists():
                    apply_delta(self.older, self.delta, folder / "applied")
            with inside(KEEP), closing(Keeper(folder / "keep", KEEP_MB, interval_s=0)) as keeper:
                rng = np.random.default_rng()
                for frame in self.frames:
                    keeper.add(frame, replace(self.last, novelty=rng.random(), features=rng.normal(size=64)))
            if version % 3 == 0:
                with inside(REVERT), suppress(StoreError):  # the version before was given up
                    store.revert()

    def answer(self, store: Store, folder: Path) -> None:
        """Answer until nothing is left to try, and teach a class of its own to each version."""
        with ExitStack() as stack:
            classifier = open_slot(store, lambda path: Classifier.load(path, "cpu", 1, taught=store.taught))
            keeper = stack.enter_context(SlotKeeper(classifier, store, print, Terms(10, 0.0), interval_s=0.01))
            while any(slot.state in ("verified", "trial") for slot in store.read().slots.values()):
                self.last = classifier(self.frames[0])
                assert not keeper.is_stuck
            self.last = classifier(self.frames[0])
            with self.whereabouts.inside(TEACH):
                classifier.teach(f"class {self.last.bundle_version}", self.frames)

    def check(self, folder: Path, returned: int) -> None:
        if (folder / "store" / "slots.json").exists():
            self.check_store(folder)
        for name in (folder / "store" / "taught").glob("[!.]*"):
            if (count := len(list(name.glob("[!.]*")))) != FRAMES:
                raise SystemExit(f"{name} is taught from {count} frames")
        if (folder / "applied").exists() and Bundle.open(folder / "applied").digest != self.digests[1]:
            raise SystemExit(f"{folder}: another bundle was applied")
        if (folder / "keep" / "kept.db").exists():
            kept = list(kept_frames(folder / "keep"))
            for frame in kept:
                Image.open(io.BytesIO(frame.jpeg)).load()
            if sum(len(frame.jpeg) + frame.features.nbytes for frame in kept) > KEEP_MB * 1e6:
                raise SystemExit(f"{folder}: more is kept than allowed")

    def check_store(self, folder: Path) -> None:
        slots, before = Store(folder / "store").read(), folder / "answered"
        if not slots.active:
            if before.exists():
                raise SystemExit(f"{folder}: no bundle answers any more")
            return
        good = slots.slots[slots.active]
        if good.state != "good" or Bundle.open(folder / "store" / slots.active).digest != good.digest:
            raise SystemExit(f"{folder}: what answers is {good}")
        highest = int(before.read_text()) if before.exists() else 0
        if good.bundle_version < highest and self.digests[highest - 1] not in slots.refused:
            raise SystemExit(f"{folder}: version {good.bundle_version} answers after {highest}")
        before.write_text(str(good.bundle_version))

    def check_end(self, folder: Path) -> None:
        self.check(folder, 1)
        if not (folder / "answered").exists():
            raise SystemExit(f"{folder}: no version became good")
        wanted = {"slots.json", "slots.lock", "receiving.lock", "a", "b", "trusted", "taught"}
        if names := {path.name for path in (folder / "store").glob("[!.]*")} - wanted:
            raise SystemExit(f"{folder}: left behind {names}")
        if names := {path.name for path in (folder / "store").rglob(".*.tmp")}:
            click.echo(f"  {len(names)} unfinished small files are left")
        if names := {path.name for path in (folder / "store" / ".download").iterdir()} - {".lock"}:
            raise SystemExit(f"{folder}: left behind {names}")


def swaps_under_load(folder: Path, whole: Path, count: int) -> None:
    """So many bundles come into a store whose classifier answers a pipeline and two more threads all the time."""
    bundle = folder / "bundle"
    call("export", whole, "-o", bundle, "--bundle-version", "1")
    store = Store.create(folder / "store")
    store.put(Bundle.open(bundle))
    frame = np.full((64, 64, 3), 90, np.uint8)
    ends, answers, problems = threading.Event(), Counter[str](), list[str]()

    def ask(name: str) -> None:
        version = 0
        while not ends.is_set():
            found = classifier(frame).bundle_version
            if found < version:
                problems.append(f"version {found} after {version}")
            answers[name], version = answers[name] + 1, found

    def watch(pipeline: Pipeline) -> None:
        for number, answer in enumerate(pipeline):
            if answer.frame.sequence != number:
                problems.append(f"frame {answer.frame.sequence} in the place of {number}")
            answers["pipeline"] += 1
            if ends.is_set():
                return

    with ExitStack() as stack:
        classifier = open_slot(store, lambda path: Classifier.load(path, "cpu", 1))
        stack.enter_context(SlotKeeper(classifier, store, lambda text: None, Terms(10, 0.0), interval_s=0.01))
        pipeline = stack.enter_context(Pipeline(open_source([frame], live=False, loop=True), classifier))
        threads = [threading.Thread(target=ask, args=(f"thread {i}",)) for i in range(2)]
        threads.append(threading.Thread(target=watch, args=(pipeline,)))
        for thread in threads:
            thread.start()
        for version in range(1, count + 2):
            if version > 1:
                write_json(bundle / MANIFEST, read_json(bundle / MANIFEST) | {"bundle_version": version})
                store.put(Bundle.open(bundle))
            deadline = time.monotonic() + PATIENCE_S
            while (slots := store.read()).lowest < version:
                if time.monotonic() > deadline or slots.refused:
                    problems.append(f"version {version} did not become good: {slots}")
                    break
                time.sleep(0.005)
        ends.set()
        for thread in threads:
            thread.join()
        health = classifier.health()
    click.echo(
        f"{health.swaps} swaps under load: {dict(answers)}, {health.failures} failures, {len(problems)} problems"
    )
    if problems or health.failures:
        raise SystemExit("\n".join(problems[:10]))


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
@click.option("--field", is_flag=True, help="Kill the life of a device instead, then swap bundles under load.")
@click.option("--swaps", default=50, show_default=True, type=click.IntRange(1), help="So many swaps, with --field.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the counts to this file.")
def main(kills: int, seed: int, field: bool, swaps: int, json_path: Path | None) -> None:
    torch.set_num_threads(1)
    rng, whereabouts = random.Random(seed), Whereabouts()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DUALLORA_EDGE_CACHE"] = str(folder / "cache")
        counts = Counter[tuple[str, str]]()
        ends = Counter[str]()
        waiting = scenarios(folder, whereabouts, field)
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
        if field:
            load, log = partial(swaps_under_load, folder / "load", folder / "whole" / "run", swaps), folder / "log"
            finish(forked(whereabouts, load, log), log)
            click.echo(log.read_text().splitlines()[-1])
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


def scenarios(folder: Path, whereabouts: Whereabouts, field: bool) -> list[Scenario]:
    """What is killed, training first; the runs that are never killed are made here."""
    write_images(folder / "images")
    (folder / "train.yaml").write_text(f"task_order: [{', '.join(TASKS)}]\n{SETTINGS}")
    whole, log = folder / "whole" / "run", folder / "log"
    training = Training(folder, whole)
    training.begin(folder / "whole")
    finish(forked(whereabouts, partial(training.work, folder / "whole"), log), log)
    if field:
        return [Field(folder, whole, whereabouts)]
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
