"""Whether the estimate that the exporter stored is of this device, and how far the measurement is from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duallora_edge.device_profiles.catalog import packaged
from duallora_edge.device_profiles.profile import DeviceProfile
from duallora_edge.runtime.backends.ladder import Backend
from duallora_edge.runtime.benchmark.scenarios import Stream
from duallora_edge.runtime.device.state import DeviceState

# The clock of a power mode and that of the profile, which is rounded, count as the same up to this share.
CLOCK_TOLERANCE = 0.03


@dataclass(frozen=True)
class EstimateCheck:
    """The ``estimates`` of the bundle, one a power mode, and the measured p50 of the single stream over one of them.

    ``ratio`` is None with the ``reason`` where no estimate is of this device, in the ``mode`` in which it is.
    """

    estimates: tuple[Mapping[str, Any], ...]
    mode: str | None
    ratio: float | None
    reason: str | None


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
        return EstimateCheck(estimates, None, None, f"the estimate is of another device: {machine}")
    mode = _current_mode(packaged(here), state)
    if mode is None:
        return EstimateCheck(estimates, None, None, "no estimate is for the GPU clock that is set here")
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

    The power mode's name would not do: in its 7 W mode an Orin Nano is slower than its profile's "normal" mode.
    """
    clocks = state.clocks.value or state.jetson_clocks.value or {}
    if "gpu" not in clocks:
        # A graphics card has one mode; on a Jetson it could be any.
        return next(iter(profile.modes), None) if profile.kind == "rtx" else None
    limit = clocks["gpu"].high
    for name, mode in profile.modes.items():
        if abs(limit / mode.gpu_mhz - 1) <= CLOCK_TOLERANCE:
            return name
    return None


def _milliseconds(entry: Mapping[str, Any]) -> float | None:
    """The latency of an estimate. It comes from a file, so nothing in it is taken for granted."""
    value = entry.get("latency_ms")
    return value if isinstance(value, float) and 0 < value < math.inf else None
