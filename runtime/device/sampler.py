"""What a device does while something runs on it: clocks, temperatures, power and throttling, two times per second.

A thread reads the files of `state`; on a Jetson, tegrastats also runs as a child process.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import IO

from duallora_edge.runtime.device.state import (
    ROOT,
    DeviceState,
    clocks,
    energy,
    energy_range,
    find_tool,
    limits,
    rails,
    temperatures,
)
from duallora_edge.runtime.device.tegrastats import Readings, parse_line

INTERVAL_S = 0.5
STOP_S = 5.0
MAX_LINE = 64 * 2**10
MIN_SAMPLES = 2
# Rails that together are all that the module, or the board, takes; the first group that is complete counts.
# AGX Orin and AGX Xavier have none for the whole. The groups are not checked on a device.
WHOLE = (
    ("VDD_IN",),
    ("POM_5V_IN",),
    ("VIN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)
PACKAGE = "package-"


@dataclass(frozen=True)
class Series:
    """Smallest, mean and largest of ``n`` readings."""

    low: float
    mean: float
    high: float
    n: int


@dataclass(frozen=True)
class Power:
    """Mean power in W over ``n`` readings; ``of`` names the rails or processor packages."""

    watts: float
    of: str
    n: int


class Watch:
    """Collects readings from the start of a ``with`` block to its end; ``root`` as in `state.read_state`.

    Attribute: ``samples``, pairs of the time (``time.perf_counter``) and what was read.
    """

    def __init__(self, root: Path = ROOT, interval_s: float = INTERVAL_S) -> None:
        self.samples: list[tuple[float, Readings]] = []
        self._root = root
        self._interval = interval_s
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watch:
        self._start(self._poll)
        program = find_tool(self._root, "tegrastats")
        if program is not None:
            with suppress(OSError):  # without it the files remain
                self._process = subprocess.Popen(
                    [program, "--interval", str(int(1000 * self._interval))],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
        if self._process is not None and self._process.stdout is not None:
            self._start(self._listen, self._process.stdout)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        for thread in self._threads:
            thread.join(STOP_S)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _listen(self, output: IO[bytes]) -> None:
        with output:
            while line := output.readline(MAX_LINE):
                self.samples.append((time.perf_counter(), parse_line(line.decode(errors="replace"))))

    def _poll(self) -> None:
        ranges = energy_range(self._root)
        before, then = energy(self._root).value or {}, time.perf_counter()
        while not self._stop.wait(self._interval):
            readings = dict(_read(self._root))
            after, now = energy(self._root).value or {}, time.perf_counter()
            if watts := _watts(before, after, ranges, now - then):
                readings["power_w"] = {**readings.get("power_w", {}), **watts}
            self.samples.append((now, readings))
            before, then = after, now

    def series(self, start: float = float("-inf"), end: float = float("inf")) -> dict[str, dict[str, Series]]:
        """Statistics of the readings between two times (``time.perf_counter``), by kind and name."""
        values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for at, readings in list(self.samples):
            for kind, named in readings.items() if start <= at <= end else ():
                for name, value in named.items():
                    values[kind][name].append(value)
        return {
            kind: {name: Series(min(found), fmean(found), max(found), len(found)) for name, found in named.items()}
            for kind, named in values.items()
        }

    def power(self, start: float, end: float) -> Power | None:
        """The mean power between two times; None without `MIN_SAMPLES` readings of it.

        Of the whole module or board where it has a monitor, otherwise of all processor packages (RAPL).
        """
        measured = self.series(start, end).get("power_w", {})
        packages = tuple(sorted(name for name in measured if name.startswith(PACKAGE)))
        for names in (*WHOLE, packages):
            found = [measured[name] for name in names if name in measured]
            n = min((series.n for series in found), default=0)
            if names and len(found) == len(names) and n >= MIN_SAMPLES:
                return Power(sum(series.mean for series in found), " + ".join(names), n)
        return None


def _read(root: Path) -> Iterator[tuple[str, Mapping[str, float]]]:
    """One reading of every available kind."""
    clock = {name: found.current for name, found in (clocks(root).value or {}).items()}
    kinds = (
        ("temperature_c", temperatures(root).value),
        ("clock_mhz", clock),
        ("power_w", rails(root).value),
        ("limit_state", limits(root).value),
    )
    yield from ((kind, values) for kind, values in kinds if values)


def _watts(
    before: Mapping[str, float], after: Mapping[str, float], ranges: Mapping[str, float], seconds: float
) -> dict[str, float]:
    """The mean power between two readings of counters in J, which start again at their ranges."""
    found = {}
    for name in before.keys() & after.keys():
        used = after[name] - before[name]
        found[name] = (used if used >= 0 else used + ranges.get(name, 0.0)) / seconds
    return found


def throttling(before: DeviceState, during: Mapping[str, Mapping[str, Series]], after: DeviceState) -> tuple[str, ...]:
    """One warning for each thing that slowed the device down, or changed, between two moments."""
    found = []
    counts = before.throttle_counts.value or {}
    for name, count in (after.throttle_counts.value or {}).items():
        if count > counts.get(name, count):
            found.append(f"throttled: {count - counts[name]:.0f} events ({name}); improve the cooling or power supply")
    states = {name: series.high for name, series in during.get("limit_state", {}).items()}
    for state in (before, after):
        for name, value in (state.limits.value or {}).items():
            states[name] = max(value, states.get(name, 0.0))
    slowed = ", ".join(sorted(name for name, value in states.items() if value > 0))
    if slowed:
        found.append(f"throttled: the device lowered its clocks ({slowed}); improve the cooling")
    limit = before.clocks.value or {}
    for name, clock in (after.clocks.value or {}).items():
        if name in limit and clock.high < limit[name].high:
            found.append(
                f"throttled: the limit of the {name} clock fell from {limit[name].high:.0f} to {clock.high:.0f} MHz"
            )
    if before.power_mode.value != after.power_mode.value:
        found.append("the power mode was changed during the run; measure again")
    return tuple(found)
