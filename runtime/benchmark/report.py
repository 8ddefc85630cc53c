"""What a benchmark measured, whether it is within a budget, and how far it is from the estimate of the exporter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from duallora_edge import __version__
from duallora_edge.device_profiles.catalog import packaged
from duallora_edge.device_profiles.profile import DeviceProfile
from duallora_edge.errors import BudgetError
from duallora_edge.runtime.backends.ladder import Backend
from duallora_edge.runtime.benchmark.scenarios import Offline, Paced, Parallel, Stream
from duallora_edge.runtime.benchmark.statistics import Latency
from duallora_edge.runtime.device.sampler import Series
from duallora_edge.runtime.device.state import DeviceState
from duallora_edge.runtime.process_memory import MemoryReadings

SCHEMA = 1
LABEL = "quick local measurement, not MLPerf"
# Two clocks within this share of each other count as equal, because profiles hold rounded values.
CLOCK_TOLERANCE = 0.03


@dataclass(frozen=True)
class EstimateCheck:
    """The ``estimates`` of the bundle, one per power mode, and the measured p50 of the single stream over one of them.

    ``ratio`` is None, with the ``reason``, if no estimate is for this device in its current ``mode``.
    """

    estimates: tuple[Mapping[str, Any], ...]
    mode: str | None
    ratio: float | None
    reason: str | None


@dataclass(frozen=True)
class Device:
    """The state of the device ``before`` and ``after`` the measurements, and what it did ``during`` them.

    ``during``: kind with its unit -> name -> statistics of the readings. ``warnings`` say what slowed the device down.
    """

    before: DeviceState
    after: DeviceState
    during: Mapping[str, Mapping[str, Series]]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Images:
    """What was classified in place of a generated frame: ``count`` images of a folder, and their mean size."""

    folder: str
    count: int
    megapixels: float


@dataclass(frozen=True)
class Report:
    """Everything `run_benchmark` found.

    ``single_stream`` and ``multi_stream``: prepared images, the model only; ``offline``: images per second. A scenario
    that was not asked for is None. ``phases``: ``preprocess``, ``infer``, ``postprocess`` and ``end_to_end`` of camera
    frames of ``frame`` (width, height) or, where that is None, of ``images``. ``paced``: the same frames at a fixed
    rate; ``parallel``: prepared images, by several callers. ``memory``: readings ``before_load``, ``after_load``,
    ``after_runs`` (single images only) and, where there were batches or several callers, ``after_batches``.
    ``estimate``: what the exporter expected of its target device, and whether that is this one.
    """

    bundle: Mapping[str, Any]
    backend: Mapping[str, Any]
    machine: Mapping[str, Any]
    load_ms: float
    seconds: float
    single_stream: Stream | None
    multi_stream: Stream | None
    offline: Offline | None
    parallel: Parallel | None
    frame: tuple[int, int] | None
    images: Images | None
    phases: Mapping[str, Latency]
    paced: Paced | None
    memory: Mapping[str, MemoryReadings]
    device: Device
    estimate: EstimateCheck

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, without the samples."""
        facts = asdict(self, dict_factory=_without_samples)
        return {"schema": SCHEMA, "label": LABEL, "duallora_edge": __version__, **facts}


def _without_samples(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if not isinstance(value, np.ndarray)}


def answer(report: Report, milliseconds: float | None, megabytes: float | None) -> str:
    """The line that most people want: latency and memory, and whether they are within the budgets."""
    latency = report.single_stream.latency if report.single_stream else None
    p90, pss = latency.p90.value if latency else None, report.memory["after_runs"].pss.bytes
    where = f"on {report.backend['name']} in {report.backend['precision']}"
    parts = [f"The single stream was not measured {where}"]
    if p90 is not None:
        parts = [f"One image takes {p90:.2f} ms (p90) {where}{_verdict(p90, milliseconds, 'ms')}"]
    if pss is not None:
        parts.append(f"memory (PSS) {pss / 1e6:.1f} MB{_verdict(pss / 1e6, megabytes, 'MB')}")
    if milliseconds is None and megabytes is None:
        parts.append("no budget given")
    return f"{'; '.join(parts)}."


def _verdict(value: float, limit: float | None, unit: str) -> str:
    return "" if limit is None else f", {'within' if value <= limit else 'over'} the budget of {limit:g} {unit}"


def check_budgets(report: Report, milliseconds: float | None, megabytes: float | None) -> None:
    """Raise `BudgetError` with every budget that the report exceeds.

    ``milliseconds`` limits the p90 of the single stream, ``megabytes`` (10^6 bytes) the PSS of the whole process
    after single images: interpreter and libraries count, because the device has to hold them.
    """
    problems = []
    if milliseconds is not None:
        latency = report.single_stream.latency if report.single_stream else None
        p90 = latency.p90.value if latency else None
        if p90 is None:
            problems.append("the latency cannot be checked, because the single stream was not measured")
        elif p90 > milliseconds:
            problems.append(f"p90 is {p90:.2f} ms, the budget {milliseconds:g} ms")
    if megabytes is not None:
        pss = report.memory["after_runs"].pss
        if pss.bytes is None:
            problems.append(f"memory cannot be checked, because {pss.reason}")
        elif pss.bytes > megabytes * 1e6:
            problems.append(f"PSS is {pss.bytes / 1e6:.1f} MB, the budget {megabytes:g} MB")
    if problems:
        raise BudgetError(
            f"Over budget: {'; '.join(problems)}; choose a smaller backbone or image, or a faster device."
        )


def check_estimates(
    target: Mapping[str, Any], here: str | None, state: DeviceState, backend: Backend, single: Stream | None
) -> EstimateCheck:
    """Compare the single stream with the estimates in the ``target`` of a manifest; ``here``: the detected profile."""
    stored = target.get("estimates")
    estimates = tuple(entry for entry in stored if isinstance(entry, dict)) if isinstance(stored, list) else ()
    if not estimates:
        return EstimateCheck((), None, None, "the bundle holds no estimate")
    if here is None or target.get("profile") != here:
        machine = f"this machine is {here}" if here else "this machine has no profile"
        return EstimateCheck(estimates, None, None, f"the estimate is for another device: {machine}")
    mode = _current_mode(packaged(here), state)
    if mode is None:
        return EstimateCheck(estimates, None, None, "no estimate is for the current GPU clock")
    fitting = [entry for entry in estimates if (entry.get("mode"), entry.get("precision")) == (mode, backend.precision)]
    expected = _milliseconds(fitting[0]) if fitting and backend.name != "cpu" else None
    measured = single.latency.p50.value if single and single.latency else None
    if expected is None:
        reason = f"there is no estimate for {backend.name} in {backend.precision}, {mode} mode"
        return EstimateCheck(estimates, mode, None, reason)
    if measured is None:
        return EstimateCheck(estimates, mode, None, "the single stream was not measured")
    return EstimateCheck(estimates, mode, measured / expected, None)


def _current_mode(profile: DeviceProfile, state: DeviceState) -> str | None:
    """The mode of a profile whose GPU clock is the highest that the device may use now.

    The name of the power mode is not enough: in its 7 W mode an Orin Nano is slower than "normal" in its profile.
    """
    clocks = state.clocks.value or state.jetson_clocks.value or {}
    if "gpu" not in clocks:
        # A graphics card has one mode; a Jetson could be in any.
        return next(iter(profile.modes), None) if profile.kind == "rtx" else None
    limit = clocks["gpu"].high
    for name, mode in profile.modes.items():
        if abs(limit / mode.gpu_mhz - 1) <= CLOCK_TOLERANCE:
            return name
    return None


def _milliseconds(entry: Mapping[str, Any]) -> float | None:
    """The latency of an estimate, which comes from a file that may hold anything."""
    value = entry.get("latency_ms")
    return value if isinstance(value, float) and 0 < value < math.inf else None
