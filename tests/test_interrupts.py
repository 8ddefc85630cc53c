"""SIGINT stops training also where Python loses it."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from duallora_edge import interrupts
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.terminal import TerminalCallback


class Ends:
    """Something whose end somebody waits for."""


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Python's own handler, which a shell takes away from what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def lost() -> None:
    """SIGINT while the callback of a weak reference runs: the KeyboardInterrupt is printed and gone."""
    ends = Ends()
    reference = weakref.ref(ends, lambda _: signal.raise_signal(signal.SIGINT))
    del ends
    assert reference() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("stage", ["decode", "encode", "train"])
def test_an_interrupt_that_is_lost_stops_training(
    call: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    image_stream: Path,
    tmp_path: Path,
    stage: str,
) -> None:
    seen: list[str] = []

    def progress(listener: TerminalCallback, now: str, done: int, total: int) -> None:
        seen.append(now)
        if now == stage and stage not in seen[:-1]:
            lost()

    monkeypatch.setattr(TerminalCallback, "progress", progress)
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "quick.yaml").write_text("epochs: 1\nmin_steps: 1000\nbatch_size: 4\nforward_batch: 4\n")
    run = tmp_path / "run"
    options = ["--data", image_stream, "--run", run, "--config", tmp_path / "quick.yaml", "--device", "cpu"]
    code, _, errors = call("train", *options)
    assert code == 1 and "Interrupted; everything committed so far is kept." in errors
    assert seen.count(stage) == 1 and seen[-1] == stage
    assert not RunDirectory.exists(run) or RunDirectory.open(run).active_tasks() == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_is_noted() -> None:
    for _ in range(2):  # the second time nothing of the first is left
        with interrupts.noted():
            interrupts.check()
            lost()
            with pytest.raises(KeyboardInterrupt):
                interrupts.check()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_ends_the_process() -> None:
    pid = os.fork()
    if not pid:
        with interrupts.noted():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGINT


def test_who_handles_it_himself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.noted():
            signal.raise_signal(signal.SIGINT)
            interrupts.check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    failures: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with interrupts.noted():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert failures == []
