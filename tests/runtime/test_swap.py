"""Another bundle takes over between two frames, and gives way again when it is not fit to answer."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from duallora_edge.errors import BackendError, SwapError
from duallora_edge.files import read_json, write_json
from duallora_edge.runtime import Classifier
from duallora_edge.runtime.backends.ladder import Backend, open_backend
from duallora_edge.runtime.bundle import MANIFEST, Bundle, Outputs
from duallora_edge.runtime.preprocess import Pixels

RED = np.full((20, 30, 3), (250, 5, 5), np.uint8)
OTHER = ("rot", "gruen", "blau", "dunkel")


@pytest.fixture
def other(make_bundle: Callable[..., Path]) -> Path:
    """The same model with other names: version 4, whose classes tell which bundle answered."""
    folder = make_bundle("other")
    document = read_json(folder / MANIFEST)
    document |= {"bundle_version": 4, "classes": list(OTHER)}
    write_json(folder / MANIFEST, document)
    return folder


class Backends:
    """Opens real backends; those of version 4 can be made to fail, to be slow, or not to open."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[object]] = []
        self.most = 0
        self.fail_after: int | None = None
        self.sleep_s = 0.0
        self.refuse: dict[int, Exception] = {}
        self.before_opening: Callable[[], None] = lambda: None

    def open(self, bundle: Bundle) -> Backend:
        version = bundle.manifest.bundle_version
        self.before_opening()
        if version in self.refuse:
            raise self.refuse[version]
        real, memory, calls = open_backend(bundle, "cpu", 1), np.zeros(4), 0
        self.alive.append(weakref.ref(memory))
        self.most = max(self.most, sum(item() is not None for item in self.alive))

        def run(images: Pixels, memory: object = memory) -> Outputs:
            nonlocal calls
            calls += 1
            if version == 4:
                time.sleep(self.sleep_s)
                if self.fail_after is not None and calls > self.fail_after:
                    raise BackendError("The device is gone.")
            return real.infer(images)

        return Backend("cpu", run, real.check, {})


@pytest.fixture
def backends() -> Backends:
    return Backends()


@pytest.fixture
def classifier(bundle: Path, backends: Backends) -> Classifier:
    opened = Bundle.open(bundle)
    return Classifier(opened, backends.open(opened), reopen=backends.open)


@contextmanager
def callers(classifier: Classifier, threads: int = 3) -> Iterator[list[list[str]]]:
    """Threads that go on calling; the labels that each of them got."""
    labels: list[list[str]] = [[] for _ in range(threads)]
    errors: list[Exception] = []
    stop = threading.Event()

    def call(own: list[str]) -> None:
        try:
            while not stop.is_set():
                own.append(classifier(RED).label)
                time.sleep(0.001)  # leaves the processor to the thread that swaps
        except Exception as error:
            errors.append(error)

    pool = [threading.Thread(target=call, args=(own,)) for own in labels]
    for thread in pool:
        thread.start()
    try:
        yield labels
    finally:
        stop.set()
        for thread in pool:
            thread.join(10)
    assert not errors and not any(thread.is_alive() for thread in pool)


@pytest.mark.parametrize("stop_first", [False, True])
def test_a_swap(classifier: Classifier, backends: Backends, bundle: Path, other: Path, stop_first: bool) -> None:
    with callers(classifier) as labels:
        for path in [other, bundle] * 3:
            swap = classifier.swap(path, stop_first=stop_first, probation=4)
            assert (swap.state, swap.new.endswith("4")) == ("probation", path == other)
            assert classifier(RED).label == ("rot" if path == other else "red")
            # An answer in progress holds the model that it began with, so each caller begins another one first.
            due, end = [len(own) + 2 for own in labels], time.monotonic() + 60
            while any(len(own) < count for own, count in zip(labels, due, strict=True)) and time.monotonic() < end:
                time.sleep(0.001)
    assert {label for own in labels for label in own} <= {"red", "rot"}
    while classifier.health().status == "probation":
        classifier(RED)
    health = classifier.health()
    assert (health.status, health.swaps, health.failures) == ("ok", {"confirmed": 6}, 0)
    gc.collect()
    assert sum(item() is not None for item in backends.alive) == 1
    assert backends.most == (1 if stop_first else 2)


def test_a_prediction_names_its_bundle(classifier: Classifier, other: Path) -> None:
    assert (classifier(RED).bundle, classifier(RED).bundle_version) == ("colours", 3)
    classifier.swap(other)
    assert classifier(RED).bundle_version == 4 and classifier.classes == OTHER


def test_a_frame_prepared_for_another_size(classifier: Classifier, other: Path, seal: Callable[[Path], None]) -> None:
    prepared = classifier.prepare(RED)
    small = np.zeros((8, 8, 3), np.uint8)
    stale = type(prepared)(prepared.rgb, small, type(prepared.preprocessing)(8), 1.0)
    first, second = classifier.answer([prepared, stale])
    assert np.array_equal(first.probabilities, second.probabilities)
    assert classifier.answer([]) == []


@pytest.mark.parametrize("stop_first", [False, True])
@pytest.mark.parametrize("problem", ["missing", "altered", "backend", "memory"])
def test_what_is_not_fit(
    classifier: Classifier, backends: Backends, other: Path, stop_first: bool, problem: str
) -> None:
    if problem == "missing":
        shutil.rmtree(other)
    elif problem == "altered":
        (other / "model.onnx").write_bytes(b"altered")
    else:
        backends.refuse[4] = BackendError("wrong results") if problem == "backend" else MemoryError()
    with pytest.raises(SwapError, match=r"other cannot be swapped in, 'colours, version 3' goes on answering: \S"):
        classifier.swap(other, stop_first=stop_first)
    assert classifier(RED).label == "red"
    health = classifier.health()
    assert (health.status, health.swaps) == ("ok", {"refused": 1})
    assert health.last_swap is not None and health.last_swap.reason


@pytest.mark.parametrize("stop_first", [False, True])
@pytest.mark.parametrize("problem", ["fails", "slow"])
def test_a_probation_that_fails(
    classifier: Classifier, backends: Backends, other: Path, stop_first: bool, problem: str
) -> None:
    if problem == "fails":
        backends.fail_after = 3
    else:
        backends.sleep_s = 0.02
    with callers(classifier) as labels:
        classifier.swap(other, budget_ms=15, stop_first=stop_first, probation=6)
        deadline = time.monotonic() + 20
        while classifier.health().status != "ok" and time.monotonic() < deadline:
            time.sleep(0.01)
    assert {label for own in labels for label in own} == {"red", "rot"}
    health = classifier.health()
    assert (health.status, health.swaps) == ("ok", {"returned": 1})
    assert health.bundle == "colours, version 3" and classifier(RED).label == "red"
    assert health.last_swap is not None
    assert ("gone" if problem == "fails" else "the budget 15 ms") in health.last_swap.reason
    gc.collect()
    assert sum(item() is not None for item in backends.alive) == 1
    assert backends.most == (1 if stop_first else 2)


def test_after_the_probation_an_error_is_an_error(classifier: Classifier, backends: Backends, other: Path) -> None:
    backends.fail_after = 2
    classifier.swap(other, probation=2)
    assert [classifier(RED).label for _ in range(2)] == ["rot", "rot"]
    with pytest.raises(BackendError, match="gone"):
        classifier(RED)
    assert classifier.health().failures == 1 and classifier.health().last_error == "The device is gone."


def test_an_old_bundle_that_was_overwritten(
    classifier: Classifier, backends: Backends, bundle: Path, other: Path
) -> None:
    backends.refuse[4] = BackendError("wrong results")
    backends.before_opening = lambda: shutil.copytree(other, bundle, dirs_exist_ok=True)
    with pytest.raises(SwapError, match="nothing answers any more"):
        classifier.swap(other, stop_first=True)
    assert classifier.health().status == "failed"
    with pytest.raises(BackendError, match="now holds another bundle; keep the old one beside"):
        classifier(RED)
    backends.refuse, backends.before_opening = {}, lambda: None
    classifier.swap(other)
    assert classifier(RED).label == "rot"


def test_an_interrupt_while_loading(classifier: Classifier, backends: Backends, other: Path) -> None:
    backends.refuse[4] = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        classifier.swap(other, stop_first=True)
    assert classifier(RED).label == "red" and classifier.health().status == "ok"


def test_calls_wait_while_nothing_is_loaded(classifier: Classifier, backends: Backends, other: Path) -> None:
    opening, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        opening.set()
        assert go_on.wait(10)

    backends.before_opening = hold
    swapping = threading.Thread(target=classifier.swap, args=(other,), kwargs={"stop_first": True})
    swapping.start()
    assert opening.wait(10) and classifier.health().status == "loading"
    answers: list[str] = []
    calling = threading.Thread(target=lambda: answers.append(classifier(RED).label))
    calling.start()
    calling.join(0.1)
    assert calling.is_alive() and not answers
    go_on.set()
    swapping.join(10)
    calling.join(10)
    assert answers == ["rot"]


def test_a_swap_during_the_probation_of_another(
    classifier: Classifier, backends: Backends, bundle: Path, other: Path
) -> None:
    classifier.swap(other)
    classifier.swap(bundle, probation=0)
    health = classifier.health()
    assert (health.status, health.swaps) == ("ok", {"confirmed": 2})
    with pytest.raises(ValueError, match="negative"):
        classifier.swap(other, probation=-1)


def test_a_link_that_is_turned_round(bundle: Path, other: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundle)
    classifier = Classifier.load(link, "cpu", 1)
    link.unlink()
    link.symlink_to(other)
    assert classifier.bundle.path == bundle
    classifier.swap(link)
    assert classifier.bundle.path == other and classifier(RED).label == "rot"
