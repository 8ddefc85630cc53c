"""A line of tegrastats, NVIDIA's monitor of Jetson devices, as numbers.

The fields differ between JetPack versions and modules, and some appear only for root:

    RAM 2840/7620MB ... CPU [25%@1420,off,20%@1420]                   all
    GR3D_FREQ 61%   GR3D_FREQ 61%@1300   GR3D_FREQ 61%@[1300,1300]    GPU: JetPack 4, 5 and 6, and 7 on an Orin
    GR3D_FREQ @[1575,1575,1575]                                       GPU of a Thor: no load
    CPU@42.5C   cpu@42.5C   cpu@42.5C/42.5C                           temperatures: JetPack 4 and 5, 6, 7
    VDD_IN 5765/5640   VDD_IN 5765mW/5640mW   VDD_GPU -392mW/-392mW   power in mW, now and on average

Only the momentary value of the power is used, because the average counts from the start of tegrastats. Written from
NVIDIA's documentation (Jetson Linux Developer Guide, tegrastats) and reports of users; untested on a device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from duallora_edge.runtime.device.state import TEMPERATURES

Readings = Mapping[str, Mapping[str, float]]
"""Kind (with its unit, such as "power_w") -> name -> value."""

_CORES = re.compile(r"\bCPU \[([^\]]*)\]")
_ENGINE = re.compile(r"\b(GR3D|EMC)_FREQ (?:(\d{1,3})%)?(?:@(?:\[([\d,]+)\]|(\d+)))?")
_TEMPERATURE = re.compile(r"\b([A-Za-z][\w-]*)@(-?\d+(?:\.\d+)?)C\b")
_POWER = re.compile(r"(?<![\w/])([A-Z][A-Z0-9_]*) (-?\d+)(?:mW(?:/-?\d+mW)?|/-?\d+)(?=\s|$)")
_NAMES = {"GR3D": "gpu", "EMC": "emc"}


def parse_line(line: str) -> Readings:
    """The readings of one line, without the kinds of which it has none.

    ``ram_mb`` (used and total), ``load_percent`` and ``clock_mhz`` of ``cpu`` (mean load of the cores that are on, the
    fastest clock), ``gpu`` and ``emc`` (memory), ``temperature_c`` and ``power_w`` by name.
    """
    found: dict[str, dict[str, float]] = {kind: {} for kind in ("ram_mb", "load_percent", "clock_mhz")}
    if ram := re.search(r"\bRAM (\d+)/(\d+)MB", line):
        found["ram_mb"] = {"used": float(ram[1]), "total": float(ram[2])}
    if cores := _CORES.search(line):
        on = [(float(load), float(clock or 0)) for load, clock in re.findall(r"(\d+)%(?:@(\d+))?", cores[1])]
        if on:
            found["load_percent"]["cpu"] = sum(load for load, _ in on) / len(on)
            found["clock_mhz"]["cpu"] = max(clock for _, clock in on)
    for name, load, several, one in _ENGINE.findall(line):
        if load:
            found["load_percent"][_NAMES[name]] = float(load)
        if frequencies := [float(value) for value in (several or one).split(",") if value]:
            found["clock_mhz"][_NAMES[name]] = max(frequencies)
    found["temperature_c"] = {
        name.lower(): float(value)
        for name, value in _TEMPERATURE.findall(line)
        # The PMIC's is a constant on older modules.
        if TEMPERATURES[0] < float(value) < TEMPERATURES[1] and name != "PMIC"
    }
    found["power_w"] = {name: float(value) / 1000 for name, value in _POWER.findall(line)}
    return {kind: values for kind, values in found.items() if values}
