"""A store beside a classifier: new bundles are tried and kept, or given up, and a revert is followed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from duallora_edge.errors import StoreError
from duallora_edge.files import read_json, write_json
from duallora_edge.runtime import Classifier
from duallora_edge.runtime.bundle import MANIFEST, Bundle
from duallora_edge.runtime.field.store import MAX_TRIES, Store
from duallora_edge.runtime.service.slot_keeper import SlotKeeper, Terms, open_slot

RED = np.full((20, 30, 3), (250, 5, 5), np.uint8)
QUICK = Terms(answers=3, seconds=0.05)
Make = Callable[..., Bundle]


@pytest.fixture
def make(make_bundle: Callable[..., Path]) -> Make:
    """``make(version, novelty_threshold=...)``: a bundle."""

    def made(version: int, **more: object) -> Bundle:
        folder = make_bundle(f"v{version}", **more)
        write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"bundle_version": version})
        return Bundle.open(folder)

    return made


@pytest.fixture
def store(tmp_path: Path, make: Make) -> Store:
    """A store in which version 1 is good."""
    made, bundle = Store.create(tmp_path / "store"), make(1)
    name = made.put(bundle)
    made.begin_trial(name)
    made.end_trial(name, bundle.digest)
    return made


def load(path: Path) -> Classifier:
    return Classifier.load(path, "cpu", 1, trial=False)


@contextmanager
def kept(store: Store, terms: Terms = QUICK) -> Iterator[tuple[Classifier, list[str]]]:
    classifier, lines = open_slot(store, load), list[str]()
    with SlotKeeper(classifier, store, lines.append, terms, interval_s=0.02):
        yield classifier, lines


def until(condition: Callable[[], bool], call: Callable[[], object] = lambda: None) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        call()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def states(store: Store) -> tuple[str, str, str]:
    slots = store.read()
    return slots.slots["a"].state, slots.slots["b"].state, slots.active


def test_a_new_bundle_is_tried_and_good_and_taken_back(store: Store, make: Make) -> None:
    with kept(store) as (classifier, lines):
        store.put(make(2))
        until(lambda: states(store) == ("good", "good", "b"), lambda: classifier(RED))
        assert classifier(RED).bundle_version == 2
        store.revert()
        until(lambda: classifier(RED).bundle_version == 1)
    assert ["is tried" in lines[0], lines[1], "slot a answers again" in lines[2]] == [True, "slot b is good", True]
    assert open_slot(store, load)(RED).bundle_version == 1


def test_the_first_bundle_of_a_store(tmp_path: Path, make: Make) -> None:
    store = Store.create(tmp_path / "new")
    with pytest.raises(StoreError, match="it is empty"):
        open_slot(store, load)
    store.put(make(1))
    with kept(store) as (classifier, lines):
        assert states(store) == ("trial", "empty", "")
        until(lambda: states(store) == ("good", "empty", "a"), lambda: classifier(RED))
    assert lines == ["slot a is good"]


@pytest.mark.parametrize("damage", [b"junk", None])
def test_a_bundle_that_cannot_be_loaded_is_given_up(store: Store, make: Make, damage: bytes | None) -> None:
    store.put(make(2))
    model = store.bundle_path("b") / "model.onnx"
    model.unlink()
    if damage is not None:
        model.write_bytes(damage)
    with kept(store) as (classifier, lines):
        until(lambda: states(store) == ("good", "bad", "a"), lambda: classifier(RED))
        assert classifier(RED).bundle_version == 1
    assert lines[0].startswith("slot b is given up: ") and len(lines) == 1


def test_a_bundle_that_is_too_slow_is_given_up(store: Store, make: Make) -> None:
    store.put(make(2))
    with kept(store, Terms(answers=3, seconds=0.05, budget_ms=0.0)) as (classifier, lines):
        until(lambda: states(store) == ("good", "bad", "a"), lambda: classifier(RED))
        assert classifier(RED).bundle_version == 1
    assert "budget" in store.read().slots["b"].reason and "budget" in lines[-1]


def test_a_bundle_that_calls_everything_novel_is_given_up(tmp_path: Path, make: Make) -> None:
    """The novelty of the red frame is 0.02: above the threshold of the new bundle, below that of the old one."""
    store, old = Store.create(tmp_path / "store"), make(1, novelty_threshold=0.9)
    name = store.put(old)
    store.begin_trial(name)
    store.end_trial(name, old.digest)
    store.put(make(2, novelty_threshold=0.001))
    with kept(store) as (classifier, _):
        until(lambda: states(store) == ("good", "bad", "a"), lambda: classifier(RED))
        assert classifier(RED).is_novel is False
    assert "3 of its first 3 answers are novel, 0 of those of the old bundle" in store.read().slots["b"].reason


def test_a_trial_goes_on_with_the_next_process(store: Store, make: Make) -> None:
    store.put(make(2))
    with kept(store, Terms(answers=3, seconds=600)) as (classifier, _):
        until(lambda: classifier(RED).bundle_version == 2)
    assert states(store) == ("good", "verified", "a") and store.read().slots["b"].tries == 0
    with kept(store) as (classifier, _):
        assert classifier(RED).bundle_version == 1
        until(lambda: states(store) == ("good", "good", "b"), lambda: classifier(RED))


def test_processes_that_die_during_trials(store: Store, make: Make) -> None:
    store.put(make(2))
    for _ in range(MAX_TRIES):
        store.begin_trial("b")
    with kept(store) as (classifier, _):
        until(lambda: states(store) == ("good", "bad", "a"))
        assert classifier(RED).bundle_version == 1


def test_the_other_good_bundle_answers_where_the_active_one_is_damaged(store: Store, make: Make) -> None:
    with kept(store) as (classifier, _):
        store.put(make(2))
        until(lambda: states(store) == ("good", "good", "b"), lambda: classifier(RED))
    (store.bundle_path("b") / "model.onnx").unlink()
    assert open_slot(store, load)(RED).bundle_version == 1
    (store.bundle_path("a") / "model.onnx").unlink()
    with pytest.raises(StoreError, match=r"no bundle that can answer \(b: .*; a: .*\); update it"):
        open_slot(store, load)


def test_damaged_records_are_said_and_the_bundle_answers(store: Store) -> None:
    with kept(store) as (classifier, lines):
        (store.path / "slots.json").write_text("junk")
        until(lambda: bool(lines))
        assert classifier(RED).bundle_version == 1
    assert "the store cannot be kept" in lines[0] and "is damaged" in lines[0]
