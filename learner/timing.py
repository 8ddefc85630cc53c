"""Where the time of a training call goes: seconds by phase, for each task, when somebody asks for it.

One profile at most is in work in a process, so that the code that is measured names its phase and passes nothing on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

PHASES = (
    "decode", "base adaptation", "frozen prefix", "suffix forward", "suffix backward", "optimiser", "validation",
    "bases", "statistics", "evaluation", "checkpoint", "rest",
)  # fmt: skip
BEFORE = "(before)"
_OFF = nullcontext()


class Profile:
    """Seconds by phase and task, and the seconds ``wall`` between start and end, read from a clock of its own.

    A phase inside another one counts for itself alone, so that the phases of all tasks add up to the whole. What
    comes before the first task is under `BEFORE`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, dict[str, float]] = {}
        self.wall = 0.0
        self._open = ["rest"]
        self._started = time.monotonic()
        self._since = time.perf_counter()
        self.task(BEFORE)

    def task(self, name: str) -> None:
        """What follows belongs to this task."""
        if self.seconds:
            self._charge()
        self._now = self.seconds.setdefault(name, dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside belongs to this phase."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def close(self) -> None:
        """The end: what is open is counted up to now."""
        self._charge()
        self.wall = time.monotonic() - self._started

    def to_json(self) -> dict[str, Any]:
        """``wall_s``, ``sum_s`` over all phases, and ``tasks``: name and ``seconds`` by phase each."""
        tasks = [{"task": name, "seconds": seconds} for name, seconds in self.seconds.items()]
        total = sum(sum(seconds.values()) for seconds in self.seconds.values())
        return {"wall_s": self.wall, "sum_s": total, "tasks": tasks}

    def table(self) -> str:
        """One line for each phase, with its seconds over all tasks and its share; then the sum beside the clock."""
        sums = {name: sum(seconds[name] for seconds in self.seconds.values()) for name in PHASES}
        total = sum(sums.values())
        lines = [f"{name:<16} {sums[name]:>9.2f} s {100 * sums[name] / total:>5.1f} %" for name in PHASES]
        return "\n".join([*lines, f"{'sum':<16} {total:>9.2f} s, by the clock {self.wall:.2f} s"])

    def _charge(self) -> None:
        if self.device.type == "cuda":  # kernels run behind the program: wait, or they count for a later phase
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self._now[self._open[-1]] += now - self._since
        self._since = now


_current: Profile | None = None


@contextmanager
def profiling(device: torch.device) -> Iterator[Profile]:
    """Measure what happens inside, work on ``device`` included. Not to be nested."""
    global _current
    _current = profile = Profile(device)
    try:
        yield profile
    finally:
        _current = None
        profile.close()


def phase(name: str) -> AbstractContextManager[None]:
    """The context of a phase of `PHASES`; it does nothing where nobody measures."""
    return _OFF if _current is None else _current.phase(name)


def timed(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: every call of the function is a phase."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with phase(name):
                return function(*args, **kwargs)

        return call

    return decorate


def start_task(name: str) -> None:
    """What follows belongs to the task ``name``, where somebody measures."""
    if _current is not None:
        _current.task(name)
