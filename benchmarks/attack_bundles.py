"""Hostile bundles: mutated manifests and golden files, and swaps of which every tenth is an attack, under load.

    python benchmarks/attack_bundles.py manifests BUNDLE --count 100000
    python benchmarks/attack_bundles.py golden BUNDLE --count 2000
    python benchmarks/attack_bundles.py swaps BUNDLE --calls 20000 --swaps 200 --threads 16

The first two print how many of the mutated files were read or refused with a `BundleError`; anything else is counted as
untyped and makes the exit code 1. The third calls one classifier from many threads while other bundles, good and
hostile, are swapped in, and counts wrong answers and lost calls; every good bundle is new, so that it is tried first.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx

from duallora_edge.errors import BundleError, SwapError
from duallora_edge.runtime import Classifier, trial
from duallora_edge.runtime.bundle import GOLDEN, MANIFEST, MODEL, Bundle, Content, FileRecord
from duallora_edge.runtime.graph_weights import WEIGHTS
from duallora_edge.runtime.process_memory import read_pss

ODD: list[Any] = [
    None, True, -1, 0, 1, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "\x00", "\x1b[2J", "\u202e", "../x",
    "a" * 5000, [], {}, [[]], [0] * 1000, {"": {}}, "\ud800", "N", "/", 2**31,
]  # fmt: skip


PAUSE_S = 0.15  # sixteen threads make a hundred calls a second, as three cameras do
WHOLE = 20  # every so many accepted manifests, the bundle is opened as a whole


class Outcomes:
    """Counts of what became of inputs, and the slowest and largest of them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.untyped: list[str] = []
        self.peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def add(self, work: Callable[[], object], allowed: type[Exception]) -> bool:
        """Do the work; whether it ended without an error."""
        start = time.perf_counter()
        try:
            work()
            outcome = "accepted"
        except allowed:
            outcome = "refused"
        except BaseException as error:
            outcome = "untyped"
            self.untyped.append(f"{type(error).__name__}: {str(error)[:200]}")
        self.slowest_s = max(self.slowest_s, time.perf_counter() - start)
        self.counts[outcome] += 1
        return outcome == "accepted"

    def show(self, what: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = ", ".join(f"{number} {outcome}" for outcome, number in sorted(self.counts.items()))
        click.echo(
            f"{what}: {found}; slowest {1000 * self.slowest_s:.1f} ms, peak memory {peak / 1e3:.0f} MB "
            f"({(peak - self.peak_before) / 1e3:.0f} MB more than before)"
        )
        for text in self.untyped[:10]:
            click.echo(f"  {text}", err=True)
        if self.untyped:
            sys.exit(1)


def mutated_json(rng: random.Random, document: Any) -> Any:
    """A copy in which one to three values were replaced, removed, doubled, or given to another key."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        parents: list[Any] = []
        stack = [document]
        while stack:
            value = stack.pop()
            if isinstance(value, (dict, list)) and value:
                parents.append(value)
                stack += value.values() if isinstance(value, dict) else value
        if not parents:
            break
        parent = rng.choice(parents)
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = rng.choice(keys)
        action = rng.choice(("replace", "remove", "double", "move", "wrap"))
        if action == "replace":
            parent[key] = copy.deepcopy(rng.choice(ODD))
        elif action == "remove":
            del parent[key]
        elif action == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif action == "move":
            parent[rng.choice(keys)] = copy.deepcopy(parent[key])
        else:
            parent[key] = [parent[key]]
    return document


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """A copy with bits flipped, a part cut out, doubled or overwritten, or the end missing."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64, 1024))
        action = rng.choice(("flip", "cut", "double", "overwrite", "end"))
        if action == "flip" and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif action == "cut":
            del data[start : start + length]
        elif action == "double":
            data[start:start] = data[start : start + length]
        elif action == "overwrite":
            data[start : start + length] = rng.randbytes(min(length, 16))
        elif rng.random() < 0.2:
            del data[start:]
    return bytes(data)


@click.group()
def main() -> None:
    """Attack the reader of bundles, and a classifier that swaps them."""


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--count", default=100_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def manifests(bundle: Path, count: int, seed: int) -> None:
    """Mutated manifests, half of them as JSON, half as text; of what is accepted some are opened as a whole."""
    rng, outcomes, opened = random.Random(seed), Outcomes(), Outcomes()
    content = (bundle / MANIFEST).read_bytes()
    document = json.loads(content)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(bundle, Path(name) / "bundle"))
        for number in range(count):
            changed = mutated_bytes(rng, content)
            if number % 2:
                changed = json.dumps(mutated_json(rng, document)).encode()
            (folder / MANIFEST).write_bytes(changed)
            if outcomes.add(lambda: Bundle.peek(folder), BundleError) and outcomes.counts["accepted"] % WHOLE == 0:
                opened.add(lambda: Bundle.open(folder).golden(), BundleError)
    outcomes.show(f"{count} manifests")
    opened.show(f"  every {WHOLE}th of the accepted ones, opened as a whole")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--count", default=2_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def golden(bundle: Path, count: int, seed: int) -> None:
    """Mutated golden files whose hash was put right."""
    rng, outcomes = random.Random(seed), Outcomes()
    opened = Bundle.open(bundle)
    for _ in range(count):
        changed = mutated_bytes(rng, opened.content(GOLDEN).read())
        outcomes.add(replace(opened, contents={GOLDEN: Content(changed)}).golden, BundleError)
    outcomes.show(f"{count} golden files")


# -- swaps under load -----------------------------------------------------------------------------------------


def attempt(path: str, digest: str, opening: str) -> dict[str, Any]:
    """A trial in the child, in which bundles of some names misbehave as a hostile graph would in a library."""
    kind = Path(path).name.rpartition("-")[2]
    if kind == "crash":
        os.abort()
    if kind == "hang":
        time.sleep(3600)
    if kind == "memory":
        np.ones(2**29)  # 4 GB
    return trial.attempt(path, digest, opening)


def seal(folder: Path, **changes: Any) -> None:
    """Put the hashes in the manifest right, and change keys of it."""
    document = json.loads((folder / MANIFEST).read_bytes())
    for name in document["files"]:
        document["files"][name] = vars(FileRecord.of((folder / name).read_bytes()))
    (folder / MANIFEST).write_text(json.dumps(document | changes))


def hostile(folder: Path, kind: str) -> None:
    """Make an attack of a good bundle."""
    model = folder / MODEL
    if kind == "altered":
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 1
        model.write_bytes(content)
    elif kind == "wrong":  # a fiftieth of the weights is gone, everything else is in order
        weights = folder / WEIGHTS
        content = bytearray(weights.read_bytes())
        middle, size = len(content) // 2, len(content) // 50
        content[middle : middle + size] = bytes(size)
        weights.write_bytes(content)
        seal(folder)
    elif kind == "external":
        graph = onnx.load(model, load_external_data=False)
        weight = graph.graph.initializer[0]
        weight.ClearField("raw_data")
        del weight.external_data[:]
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="/etc/hostname")
        model.write_bytes(graph.SerializeToString())
        seal(folder)
    elif kind == "link":
        model.unlink()
        model.symlink_to("/dev/zero")
    elif kind == "pipe":
        model.unlink()
        os.mkfifo(model)
    elif kind == "nonsense":
        (folder / MANIFEST).write_bytes(b"[" * 100_000)


KINDS = ("altered", "wrong", "external", "link", "pipe", "nonsense", "crash", "hang", "memory")


class Caller(threading.Thread):
    """Calls the classifier with a frame every `PAUSE_S`, ``calls`` times and until ``done``; checks every answer."""

    def __init__(
        self, classifier: Classifier, frames: list[Any], known: dict[str, list[str]], calls: int, done: threading.Event
    ) -> None:
        super().__init__(daemon=True)
        self._classifier, self._frames, self._known = classifier, frames, known
        self._calls, self._done = calls, done
        self.wrong = self.lost = self.answers = 0

    def run(self) -> None:
        while self.answers + self.lost < self._calls or not self._done.is_set():
            index = self.answers % len(self._frames)
            try:
                prediction = self._classifier(self._frames[index])
            except Exception as error:
                self.lost += 1
                click.echo(f"lost: {type(error).__name__}: {error}", err=True)
            else:
                self.answers += 1
                self.wrong += prediction.label != self._known[prediction.bundle][index]
            time.sleep(PAUSE_S)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--calls", default=20_000, show_default=True, help="At least; they go on as long as the swaps.")
@click.option("--swaps", "number_of_swaps", default=200, show_default=True)
@click.option("--threads", default=16, show_default=True)
@click.option("--seed", default=0, show_default=True)
def swaps(bundle: Path, calls: int, number_of_swaps: int, threads: int, seed: int) -> None:
    """Swap bundles, every tenth of them hostile, while many threads call."""
    rng = np.random.default_rng(seed)
    trial.QUESTION, trial.TIMEOUT_S = "attack_bundles:attempt", 30.0
    manifest = Bundle.peek(bundle).manifest
    frames = [rng.integers(0, 256, (manifest.preprocessing.size,) * 2 + (3,), np.uint8) for _ in range(32)]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["DUALLORA_EDGE_CACHE"] = str(root / "cache")

        def make(number: int, kind: str = "good") -> Path:
            """A new bundle; its name tells which class names it has, and so which labels are right."""
            folder = Path(shutil.copytree(bundle, root / f"{number:04d}-{kind}"))
            odd = "odd" if number % 2 else "even"
            classes = [f"{label}-{odd}" for label in manifest.classes]
            seal(folder, classes=classes, name=odd, bundle_version=number + 1)
            hostile(folder, kind)
            return folder

        classifier = Classifier.load(make(0), "cpu", 1)
        labels = [classifier(frame).label.rpartition("-")[0] for frame in frames]
        known = {odd: [f"{label}-{odd}" for label in labels] for odd in ("odd", "even")}
        done = threading.Event()
        callers = [Caller(classifier, frames, known, -(-calls // threads), done) for _ in range(threads)]
        for caller in callers:
            caller.start()
        _swap(classifier, make, number_of_swaps)
        done.set()
        for caller in callers:
            caller.join()
    answers, wrong, lost = (sum(getattr(caller, key) for caller in callers) for key in ("answers", "wrong", "lost"))
    click.echo(f"{answers} answers from {threads} threads: {wrong} wrong, {lost} lost; {classifier.health().swaps}")
    sys.exit(bool(wrong or lost))


def _swap(classifier: Classifier, make: Callable[..., Path], number_of_swaps: int) -> None:
    """Do the swaps, and print how long they took, with and without a trial, and what the process held meanwhile."""
    seconds: dict[str, list[float]] = {"tried first": [], "known": [], "hostile": []}
    held: list[tuple[int, int]] = []
    before = ""
    for number in range(1, number_of_swaps + 1):
        kind = KINDS[number // 10 % len(KINDS)] if number % 10 == 0 else "good"
        folder = make(number, kind)
        start = time.perf_counter()
        try:
            classifier.swap(folder, probation=5)
            if kind != "good":
                click.echo(f"a bundle that is {kind} was swapped in", err=True)
        except SwapError as error:
            if kind == "good":
                raise
            if kind not in before:
                click.echo(f"{kind}: {str(error)[:300]}")
                before += kind
        key = "tried first" if kind == "good" else "hostile"
        seconds[key].append(time.perf_counter() - start)
        if number % 20 == 1 and kind == "good":  # the same again, now that it is known
            classifier.swap(make(number + 1_000_000), probation=0)
            start = time.perf_counter()
            classifier.swap(folder, probation=5)
            seconds["known"].append(time.perf_counter() - start)
        held.append((len(os.listdir("/proc/self/fd")), read_pss().bytes or 0))  # noqa: PTH208
        for old in sorted(folder.parent.glob("[0-9]*"))[:-3]:
            shutil.rmtree(old)
    for key, times in seconds.items():
        if times:
            click.echo(f"swaps, {key}: {len(times)}, median {np.median(times):.2f} s, longest {max(times):.2f} s")
    tenth = max(1, len(held) // 10)
    for what, index, unit in (("file descriptors", 0, 1.0), ("memory (PSS) in MB", 1, 1e6)):
        values = np.array([pair[index] for pair in held]) / unit
        click.echo(f"{what}: {values[tenth : 2 * tenth].mean():.0f} early, {values[-tenth:].mean():.0f} at the end")


if __name__ == "__main__":
    main()
