"""What slows a device down or speeds it up at one moment: power mode, clocks, temperatures, power and throttling.

There are two sources. Files below /sys, some of which every Linux has: thermal zones and cooling devices, hwmon (the
INA power monitors of Jetson boards, the sensors of other processors), cpufreq, devfreq (GPU clocks) and RAPL. And the
programs of Jetson Linux: nvpmodel and jetson_clocks. Nothing is changed, and nothing runs with additional rights. Each
reader returns what it found, or None with the reason. The formats follow the documentation of NVIDIA and the Linux
kernel; on a Jetson all this is untested.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from duallora_edge.runtime.device.probes import NOT_INSTALLED

ROOT = Path("/")
TOOL_TIMEOUT_S = 10.0
MAX_BYTES = 4096
# A sensor that is switched off answers -256 C, and some that do not exist 0 K or 127 C and more.
TEMPERATURES = (-40.0, 126.0)
# Cooling devices that slow the processor or the GPU down, unlike fans.
COOLING = re.compile(r"cpufreq|devfreq|throttle|processor|\bg[amvp]\d\db\b|^(cpu|gpu)", re.IGNORECASE)
# Names of GPUs below /sys/class/devfreq: "17000000.gpu", "17000000.ga10b", "57000000.gpu", "gpu-gpc-0".
GPU = re.compile(r"gpu|\bg[amvp]\d\db\b", re.IGNORECASE)
INA_CHANNELS = (1, 2, 3)  # an INA3221 has three; what follows are voltages of shunts and sums

Value = TypeVar("Value")


@dataclass(frozen=True)
class Finding(Generic[Value]):
    """A value and the method by which it was found, or None and the reason."""

    method: str
    value: Value | None
    reason: str | None = None


@dataclass(frozen=True)
class PowerMode:
    """The mode that nvpmodel names, such as ("MAXN_SUPER", 2)."""

    name: str
    id: int | None


@dataclass(frozen=True)
class Clock:
    """Frequencies in MHz: now, and the limits between which it may move."""

    current: float
    low: float
    high: float


@dataclass(frozen=True)
class DeviceState:
    """Everything at one moment.

    ``temperatures`` in degrees Celsius, ``power`` in W by rail, ``energy`` in J counted from an arbitrary start, with
    ``limits`` (cooling device -> state) above 0 while the device is slowed down, and ``throttle_counts`` the number of
    such events since it was started.
    """

    power_mode: Finding[PowerMode]
    jetson_clocks: Finding[Mapping[str, Clock]]
    clocks: Finding[Mapping[str, Clock]]
    temperatures: Finding[Mapping[str, float]]
    power: Finding[Mapping[str, float]]
    energy: Finding[Mapping[str, float]]
    limits: Finding[Mapping[str, float]]
    throttle_counts: Finding[Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """All findings as JSON values."""
        return asdict(self)

    @property
    def reasons(self) -> tuple[tuple[str, str], ...]:
        """The methods that found nothing, each with the reason."""
        findings: tuple[Finding[Any], ...] = tuple(vars(self).values())
        return tuple((finding.method, finding.reason) for finding in findings if finding.reason)


def read_state(root: Path = ROOT) -> DeviceState:
    """Ask every reader once; ``root`` is the file system that describes the device. Takes up to 20 s if tools hang."""
    return DeviceState(
        power_mode=power_mode(root),
        jetson_clocks=jetson_clocks(root),
        clocks=clocks(root),
        temperatures=temperatures(root),
        power=rails(root),
        energy=energy(root),
        limits=limits(root),
        throttle_counts=throttle_counts(root),
    )


def find_tool(root: Path, name: str) -> str | None:
    """The path of a program of the system below ``root``."""
    return shutil.which(name, path=os.pathsep.join(str(root / folder) for folder in ("usr/sbin", "usr/bin")))


def run_tool(root: Path, name: str, option: str, timeout_s: float = TOOL_TIMEOUT_S) -> Finding[list[str]]:
    """The lines that a program of Jetson Linux prints, without blank ones; it gets no input and ``timeout_s``."""
    method = f"{name} {option}"
    program = find_tool(root, name)
    if program is None:
        return Finding(method, None, NOT_INSTALLED)
    try:
        done = subprocess.run(
            [program, option],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(method, None, f"{method} failed ({type(error).__name__})")
    lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    if done.returncode:
        said = (lines or ["it may need root"])[0][:200]
        return Finding(method, None, f"{method} ended with code {done.returncode} ({said})")
    return Finding(method, lines)


def power_mode(root: Path = ROOT) -> Finding[PowerMode]:
    """The power mode by ``nvpmodel -q``: a line ``NV Power Mode: NAME`` and, below it, the number of the mode."""
    answer = run_tool(root, "nvpmodel", "-q")
    if answer.value is None:
        return Finding(answer.method, None, answer.reason)
    for index, line in enumerate(answer.value):
        if match := re.search(r"NV Power Mode:\s*(\S.*)", line):
            numbers = [int(below) for below in answer.value[index + 1 :] if re.fullmatch(r"\d{1,3}", below)]
            return Finding(answer.method, PowerMode(match[1], numbers[0] if numbers else None))
    return Finding(answer.method, None, "it names no power mode")


def jetson_clocks(root: Path = ROOT) -> Finding[Mapping[str, Clock]]:
    """The clocks ``cpu``, ``gpu`` and ``emc`` (memory) by ``jetson_clocks --show``, which may need root.

    Its lines read ``GPU MinFreq=306000000 MaxFreq=1020000000 CurrentFreq=306000000``, in Hz, and in kHz for every core:
    ``cpu0: Online=1 Governor=schedutil MinFreq=729600 ...``. Of the cores that are on, the fastest counts.
    """
    answer = run_tool(root, "jetson_clocks", "--show")
    if answer.value is None:
        return Finding(answer.method, None, answer.reason)
    found: dict[str, Clock] = {}
    for line in answer.value:
        name = re.match(r"(cpu|GPU|EMC)", line)
        values = re.search(r"MinFreq=(\d+)\s+MaxFreq=(\d+)\s+CurrentFreq=(\d+)", line)
        if name and values and "Online=0" not in line:
            scale = 1e3 if name[1] == "cpu" else 1e6
            low, high, current = (int(value) / scale for value in values.groups())
            _keep_fastest(found, name[1].lower(), Clock(current, low, high))
    return Finding(answer.method, found or None, None if found else "it shows no clocks")


def clocks(root: Path = ROOT) -> Finding[Mapping[str, Clock]]:
    """The clocks ``cpu`` (the fastest core) and ``gpu``, by cpufreq (kHz) and devfreq (Hz)."""
    found: dict[str, Clock] = {}
    for policy in _folders(root, "sys/devices/system/cpu/cpufreq", "policy*"):
        _add_clock(found, "cpu", policy, ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq"), 1e3)
    for device in _folders(root, "sys/class/devfreq", "*"):
        if GPU.search(device.name):
            _add_clock(found, "gpu", device, ("cur_freq", "min_freq", "max_freq"), 1e6)
    return _finding("cpufreq and devfreq", found)


def temperatures(root: Path = ROOT) -> Finding[Mapping[str, float]]:
    """Temperatures in degrees Celsius by thermal zone, and by sensor of hwmon (both in thousandths).

    The name of a zone loses its ending "-thermal" or "-therm"; sensors that are switched off are left out.
    """
    found: dict[str, float] = {}
    for zone in _folders(root, "sys/class/thermal", "thermal_zone*"):
        name = re.sub(r"[-_]therm(al)?$", "", _text(zone / "type") or zone.name, flags=re.IGNORECASE)
        _add_temperature(found, name.lower(), zone / "temp")
    for chip in _folders(root, "sys/class/hwmon", "hwmon*"):
        for file in sorted(chip.glob("temp*_input")):
            label = _text(chip / file.name.replace("_input", "_label")) or file.name.removesuffix("_input")
            _add_temperature(found, f"{_text(chip / 'name')} {label}".lower(), file)
    return _finding("thermal zones and hwmon", found)


def rails(root: Path = ROOT) -> Finding[Mapping[str, float]]:
    """Power in W of every rail of the INA power monitors: voltage (mV) times current (mA)."""
    found: dict[str, float] = {}
    for chip in _folders(root, "sys/class/hwmon", "hwmon*"):
        if not (_text(chip / "name") or "").startswith("ina"):
            continue
        for channel in INA_CHANNELS:
            label = _text(chip / f"in{channel}_label") or _text(chip / "label")
            voltage, current = (_number(chip / f"{what}{channel}_input") for what in ("in", "curr"))
            if label and label != "NC" and voltage is not None and current is not None:
                found[label] = voltage * current / 1e6
    return _finding("INA monitors in hwmon", found)


def energy(root: Path = ROOT) -> Finding[Mapping[str, float]]:
    """Energy in J that each processor package has used, by RAPL; the counters start again at `energy_range`."""
    found: dict[str, float] = {}
    packages = list(_packages(root))
    for package in packages:
        counted = _number(package / "energy_uj")
        if counted is not None:
            found[_text(package / "name") or package.name] = counted / 1e6
    reason = "its counters may only be read by root" if packages else None
    return _finding("RAPL", found, reason)


def energy_range(root: Path = ROOT) -> Mapping[str, float]:
    """The largest value of each counter of `energy`, in J."""
    return {
        _text(package / "name") or package.name: (_number(package / "max_energy_range_uj") or 0.0) / 1e6
        for package in _packages(root)
    }


def limits(root: Path = ROOT) -> Finding[Mapping[str, float]]:
    """State of the cooling devices that slow a processor down, the highest of each type; 0 is full speed."""
    found: dict[str, float] = {}
    for device in _folders(root, "sys/class/thermal", "cooling_device*"):
        kind, state = _text(device / "type") or "", _number(device / "cur_state")
        if COOLING.search(kind) and state is not None:
            found[kind] = max(found.get(kind, 0.0), state)
    return _finding("cooling devices", found)


def throttle_counts(root: Path = ROOT) -> Finding[Mapping[str, float]]:
    """How often heat (x86: thermal_throttle) or over-current (Jetson: oc*_event_cnt) slowed the device down.

    Sums over all cores.
    """
    found: dict[str, float] = {}
    for core in _folders(root, "sys/devices/system/cpu", "cpu[0-9]*"):
        for file in sorted(core.glob("thermal_throttle/*_throttle_count")):
            _add(found, f"heat, {file.name.split('_')[0]}", _number(file))
    for chip in _folders(root, "sys/class/hwmon", "hwmon*"):
        for file in sorted(chip.glob("oc*_event_cnt")):
            _add(found, f"over-current, {file.name.split('_')[0]}", _number(file))
    return _finding("throttle counters", found)


def _finding(method: str, found: dict[str, Any], reason: str | None = None) -> Finding[Mapping[str, Any]]:
    return Finding(method, found) if found else Finding(method, None, reason or "not on this machine")


def _folders(root: Path, parent: str, pattern: str) -> Iterator[Path]:
    """Folders in the order of the numbers in their names."""
    found = (root / parent).glob(pattern)
    yield from sorted(found, key=lambda path: (len(path.name), path.name))


def _packages(root: Path) -> Iterator[Path]:
    """The packages; their parts ("intel-rapl:0:0") are counted in them."""
    for zone in _folders(root, "sys/class/powercap", "intel-rapl:*"):
        if zone.name.count(":") == 1 and (_text(zone / "name") or "").startswith("package"):
            yield zone


def _text(path: Path) -> str | None:
    """The content of a small file, None when it cannot be read: a sensor that sleeps answers with an error."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode(errors="replace").strip("\0 \n") or None
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _text(path)
    return float(text) if text and re.fullmatch(r"-?\d{1,20}", text) else None


def _add(found: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        found[name] = found.get(name, 0.0) + value


def _add_temperature(found: dict[str, float], name: str, file: Path) -> None:
    value = _number(file)
    if value is None or not TEMPERATURES[0] < value / 1000 < TEMPERATURES[1]:
        return
    while name in found:  # several zones may have the same name
        name += "'"
    found[name] = value / 1000


def _add_clock(found: dict[str, Clock], name: str, folder: Path, files: tuple[str, str, str], scale: float) -> None:
    current, low, high = (_number(folder / file) for file in files)
    if current is not None and low is not None and high is not None:
        _keep_fastest(found, name, Clock(current / scale, low / scale, high / scale))


def _keep_fastest(found: dict[str, Clock], name: str, clock: Clock) -> None:
    if name not in found or (clock.high, clock.current) > (found[name].high, found[name].current):
        found[name] = clock
