"""Readers of the device's state, on trees of files and with programs that the tests make up.

What nvpmodel, jetson_clocks and tegrastats print here was written for these tests after NVIDIA's documentation and
the reports of users; nothing was recorded on a device. The files are named as the Linux kernel documents them.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from duallora_edge.runtime.device import sampler as device_watch
from duallora_edge.runtime.device import state as device_state
from duallora_edge.runtime.device.sampler import Power, Watch, throttling
from duallora_edge.runtime.device.state import Clock, DeviceState, PowerMode, read_state
from duallora_edge.runtime.device.tegrastats import parse_line

ORIN = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "45500",
    "sys/class/thermal/thermal_zone1/type": "CV0-therm",
    "sys/class/thermal/thermal_zone1/temp": "-256000",  # switched off
    "sys/class/thermal/thermal_zone2/type": "gpu-thermal",
    "sys/class/thermal/thermal_zone2/temp": "44000",
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "3",
    "sys/class/thermal/cooling_device1/type": "cpu-throttle-alert",
    "sys/class/thermal/cooling_device1/cur_state": "0",
    "sys/class/thermal/cooling_device2/type": "17000000.ga10b",
    "sys/class/thermal/cooling_device2/cur_state": "0",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1190400",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1728000",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "1728000",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_min_freq": "729600",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_max_freq": "1728000",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000",
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": "5000",
    "sys/class/hwmon/hwmon1/curr1_input": "1200",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_SOC",
    "sys/class/hwmon/hwmon1/in2_input": "5000",
    "sys/class/hwmon/hwmon1/curr2_input": "300",
    "sys/class/hwmon/hwmon1/in3_label": "NC",
    "sys/class/hwmon/hwmon1/in3_input": "0",
    "sys/class/hwmon/hwmon1/curr3_input": "0",
    "sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages",
    "sys/class/hwmon/hwmon1/in7_input": "3",
    "sys/class/hwmon/hwmon1/curr7_input": "3",
    "sys/class/hwmon/hwmon2/name": "soctherm_oc",
    "sys/class/hwmon/hwmon2/oc1_event_cnt": "0",
    "sys/class/hwmon/hwmon2/oc3_event_cnt": "2",
}
COMPUTER = {
    "sys/class/thermal/thermal_zone0/type": "acpitz",
    "sys/class/thermal/thermal_zone0/temp": "27800",
    "sys/class/thermal/thermal_zone1/type": "acpitz",
    "sys/class/thermal/thermal_zone1/temp": "29800",
    "sys/class/thermal/thermal_zone2/type": "x86_pkg_temp",
    "sys/class/thermal/thermal_zone2/temp": "nonsense",
    "sys/class/thermal/cooling_device0/type": "Processor",
    "sys/class/thermal/cooling_device0/cur_state": "0",
    "sys/class/thermal/cooling_device1/type": "Processor",
    "sys/class/thermal/cooling_device1/cur_state": "3",
    "sys/class/thermal/cooling_device2/type": "TCC Offset",
    "sys/class/thermal/cooling_device2/cur_state": "10",
    "sys/class/hwmon/hwmon0/name": "coretemp",
    "sys/class/hwmon/hwmon0/temp1_label": "Package id 0",
    "sys/class/hwmon/hwmon0/temp1_input": "51000",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "3400000",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "800000",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "4600000",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "4",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "1",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "2",
    "sys/class/powercap/intel-rapl:0/name": "package-0",
    "sys/class/powercap/intel-rapl:0/energy_uj": "2500000",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
    "sys/class/powercap/intel-rapl:0:0/name": "core",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "1500000",
}

Tree = Callable[[Mapping[str, str]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write files below a folder that stands for the root; what lies in usr/ can be run."""

    def make(files: Mapping[str, str]) -> Path:
        for name, content in files.items():
            file = tmp_path / "root" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content + "\n")
            file.chmod(0o755 if name.startswith("usr/") else 0o644)
        return tmp_path / "root"

    return make


def test_the_files_of_a_jetson(tree: Tree) -> None:
    found = read_state(tree(ORIN))
    assert found.temperatures.value == {"cpu": 45.5, "gpu": 44.0}
    assert found.clocks.value == {"cpu": Clock(1728, 729.6, 1728), "gpu": Clock(306, 306, 1020)}
    assert found.power.value == {"VDD_IN": 6.0, "VDD_SOC": 1.5}
    assert found.limits.value == {"cpu-throttle-alert": 0, "17000000.ga10b": 0}
    assert found.throttle_counts.value == {"over-current, oc1": 0, "over-current, oc3": 2}
    assert found.energy.value is None


def test_the_files_of_a_computer(tree: Tree) -> None:
    found = read_state(tree(COMPUTER))
    assert found.temperatures.value == {"acpitz": 27.8, "acpitz'": 29.8, "coretemp package id 0": 51.0}
    assert found.clocks.value == {"cpu": Clock(3400, 800, 4600)}
    assert found.power.value is None
    assert found.energy.value == {"package-0": 2.5}
    assert found.limits.value == {"Processor": 3}
    assert found.throttle_counts.value == {"heat, core": 6, "heat, package": 1}


def test_nothing_is_there(tmp_path: Path) -> None:
    found = read_state(tmp_path)
    assert all(value["value"] is None and value["reason"] for value in found.to_json().values())
    assert ("nvpmodel -q", "not installed") in found.reasons and len(found.reasons) == len(found.to_json())


def test_counters_that_only_root_may_read(tree: Tree) -> None:
    root = tree({key: value for key, value in COMPUTER.items() if not key.endswith("energy_uj")})
    assert device_state.energy(root).reason == "its counters may only be read by root"


@pytest.mark.skipif(not Path("/sys/class").is_dir(), reason="needs Linux")
def test_this_machine() -> None:
    for value in read_state().to_json().values():
        assert value["method"] and (value["value"] is None) == bool(value["reason"])


@pytest.mark.parametrize(
    ("script", "expected", "reason"),
    [
        ("printf 'NV Power Mode: MODE_15W_6CORE\\n2\\n'", PowerMode("MODE_15W_6CORE", 2), None),  # JetPack 5
        ("printf 'NV Fan Mode:quiet\\nNV Power Mode: 25W\\n1\\n'", PowerMode("25W", 1), None),  # JetPack 6
        (
            "printf 'NVPM WARN: no fan mode\\nNV Power Mode: MAXN_SUPER\\n'",
            PowerMode("MAXN_SUPER", None),
            None,
        ),
        ("echo", None, "it names no power mode"),
        ("echo Error: no rights; exit 3", None, "nvpmodel -q ended with code 3 (Error: no rights)"),
        ("printf '\\377\\376'; exit 1", None, "nvpmodel -q ended with code 1 (\ufffd\ufffd)"),
        ("kill -9 $$", None, "nvpmodel -q ended with code -9 (it may need root)"),
    ],
)
def test_power_mode(tree: Tree, script: str, expected: PowerMode | None, reason: str | None) -> None:
    found = device_state.power_mode(tree({"usr/sbin/nvpmodel": f"#!/bin/sh\n{script}"}))
    assert (found.value, found.reason) == (expected, reason)


def test_a_tool_that_hangs_or_is_no_program(tree: Tree) -> None:
    root = tree({"usr/bin/slow": "#!/bin/sh\nsleep 60", "usr/bin/odd": "#!/absent/shell"})
    assert device_state.run_tool(root, "slow", "-q", 0.2).reason == "slow -q failed (TimeoutExpired)"
    assert device_state.run_tool(root, "odd", "-q").reason == "odd -q failed (FileNotFoundError)"


SHOWN = """SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Developer Kit
Online CPUs: 0-4
cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1728000 CurrentFreq=1113600 IdleStates: WFI=1 c7=1
cpu1:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1728000 CurrentFreq=1728000 IdleStates: WFI=1 c7=1
cpu5:  Online=0 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=2201600 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=1020000000 CurrentFreq=306000000
Active GPU TPCs: 4
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=2133000000 FreqOverride=0
FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=58
NV Power Mode: MAXN_SUPER"""


def test_jetson_clocks(tree: Tree) -> None:
    found = device_state.jetson_clocks(tree({"usr/bin/jetson_clocks": f"#!/bin/sh\ncat <<END\n{SHOWN}\nEND"}))
    assert found.value == {
        "cpu": Clock(1728, 729.6, 1728),
        "gpu": Clock(306, 306, 1020),
        "emc": Clock(2133, 204, 3199),
    }
    assert device_state.jetson_clocks(tree({"usr/bin/jetson_clocks": "#!/bin/sh"})).reason == "it shows no clocks"


LINES = [
    (  # JetPack 4: power without a unit, the PMIC's temperature is a constant
        "RAM 1689/3825MB (lfb 339x4MB) SWAP 0/1913MB (cached 0MB) IRAM 0/252kB(lfb 252kB) "
        "CPU [3%@345,off,off,1%@345] EMC_FREQ 5%@1600 GR3D_FREQ 61%@921 APE 25 PLL@50.5C CPU@51C PMIC@100C "
        "thermal@50.3C POM_5V_IN 4310/4200 POM_5V_GPU 40/41 POM_5V_CPU 1200/1100",
        {"cpu": 2.0, "emc": 5.0, "gpu": 61.0},
        {"cpu": 345.0, "emc": 1600.0, "gpu": 921.0},
        {"pll": 50.5, "cpu": 51.0, "thermal": 50.3},
        {"POM_5V_IN": 4.31, "POM_5V_GPU": 0.04, "POM_5V_CPU": 1.2},
    ),
    (  # JetPack 5: a GPU's clock only for root, a part that is switched off
        "09-25-2023 10:00:01 RAM 2840/7620MB (lfb 512x4MB) SWAP 0/4096MB (cached 0MB) CPU [25%@1420,off,20%@1420] "
        "EMC_FREQ 0% GR3D_FREQ 76% CV0@-256C CPU@42.5C GPU@40C tj@42.5C "
        "VDD_IN 5765mW/5640mW VDD_CPU_GPU_CV 1548mW/1500mW VDD_SOC 1497mW/1490mW",
        {"cpu": 22.5, "emc": 0.0, "gpu": 76.0},
        {"cpu": 1420.0},
        {"cpu": 42.5, "gpu": 40.0, "tj": 42.5},
        {"VDD_IN": 5.765, "VDD_CPU_GPU_CV": 1.548, "VDD_SOC": 1.497},
    ),
    (  # JetPack 6 and 7 on an Orin: a clock for every part of the GPU
        "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201] EMC_FREQ 3%@3199 "
        "GR3D_FREQ 40%@[1300,1290] NVENC off APE 174 cpu@52.968C/52.968C VDD_GPU_SOC 3000mW/2900mW "
        "VDD_CPU_CV 800mW/800mW VIN_SYS_5V0 4000mW/4000mW",
        {"cpu": 16.5, "emc": 3.0, "gpu": 40.0},
        {"cpu": 2201.0, "emc": 3199.0, "gpu": 1300.0},
        {"cpu": 52.968},
        {"VDD_GPU_SOC": 3.0, "VDD_CPU_CV": 0.8, "VIN_SYS_5V0": 4.0},
    ),
    (  # JetPack 7 on a Thor: no load of the GPU, power below zero when idle
        "09-01-2025 12:00:00 RAM 9000/125772MB (lfb 4x4MB) CPU [0%@972,100%@2601] GR3D_FREQ @[1575,1575,1575] "
        "cpu@40.1C tj@40.9C VDD_GPU -392mW/-392mW VDD_CPU_SOC_MSS 3924mW/3900mW VIN_SYS_5V0 5000mW/5000mW "
        "VIN 23000mW/22000mW",
        {"cpu": 50.0},
        {"cpu": 2601.0, "gpu": 1575.0},
        {"cpu": 40.1, "tj": 40.9},
        {"VDD_GPU": -0.392, "VDD_CPU_SOC_MSS": 3.924, "VIN_SYS_5V0": 5.0, "VIN": 23.0},
    ),
]


@pytest.mark.parametrize(("line", "load", "clock", "temperature", "power"), LINES)
def test_a_line_of_tegrastats(line: str, load: object, clock: object, temperature: object, power: object) -> None:
    found = parse_line(line)
    assert found["load_percent"] == load and found["clock_mhz"] == clock
    assert found["temperature_c"] == temperature and found["power_w"] == power
    assert found["ram_mb"]["used"] < found["ram_mb"]["total"]


@pytest.mark.parametrize(
    "line", ["", "garbage", "CPU [off,off]", "RAM ", "\x1b[2J", "VDD_IN x/y CPU [,]", "9" * 60_000]
)
def test_a_line_without_readings(line: str) -> None:
    assert parse_line(line) == {}


def wait_for(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ready()


def test_a_watch_reads_files_and_tegrastats(tree: Tree) -> None:
    loop = f"while True:\n    print({LINES[1][0]!r}, flush=True)\n    time.sleep(0.01)"
    script = f"#!{sys.executable}\nimport time\n{loop}"
    root = tree({**ORIN, "usr/bin/tegrastats": script})
    with Watch(root, interval_s=0.01) as watch:
        wait_for(lambda: {"load_percent", "limit_state"} <= watch.series().keys())
    found = watch.series()
    assert found["temperature_c"]["tj"].mean == 42.5 and found["temperature_c"]["cpu"].high == 45.5
    assert found["limit_state"]["cpu-throttle-alert"].high == 0
    power = watch.power(-math.inf, math.inf)
    assert power is not None and power.of == "VDD_IN" and 5.7 < power.watts <= 6.0
    assert watch.power(0, 0) is None
    count = len(watch.samples)
    time.sleep(0.05)
    assert len(watch.samples) == count  # both the thread and the process have ended


def test_a_watch_where_there_is_nothing(tree: Tree) -> None:
    root = tree({"usr/bin/tegrastats": "#!/absent/shell"})
    with pytest.raises(KeyError), Watch(root, interval_s=0.01) as watch:
        raise KeyError
    assert watch.series() == {} and watch.power(-math.inf, math.inf) is None


def test_power_of_energy_counters(tree: Tree) -> None:
    root = tree(COMPUTER)
    counter = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    joules = itertools.count(3)

    def measured() -> Power | None:
        new = counter.with_name("new")
        new.write_text(f"{next(joules)}000000")
        new.replace(counter)  # never a half-written number
        return watch.power(-math.inf, math.inf)

    with Watch(root, interval_s=0.01) as watch:
        wait_for(measured)
    power = measured()
    assert power is not None and power.of == "package-0" and power.watts > 0


@pytest.mark.parametrize(("before", "after", "watts"), [(10.0, 16.0, 3.0), (99.0, 5.0, 3.0)])
def test_a_counter_may_start_again(before: float, after: float, watts: float) -> None:
    assert device_watch._watts({"package-0": before}, {"package-0": after}, {"package-0": 100.0}, 2.0) == {
        "package-0": watts
    }


@pytest.mark.parametrize(
    ("rails", "expected"),
    [
        ({"VDD_IN": 6.0, "VDD_SOC": 1.5}, Power(6.0, "VDD_IN", 2)),
        ({"VDD_GPU_SOC": 3.0, "VDD_CPU_CV": 1.0, "VIN_SYS_5V0": 4.0, "VDDQ_VDD2_1V8AO": 1.0}, Power(8.0, "", 2)),
        ({"package-0": 20.0, "package-1": 30.0}, Power(50.0, "package-0 + package-1", 2)),
        ({"VDD_SOC": 1.5}, None),  # a part is not the whole
    ],
)
def test_power_of_the_whole(rails: dict[str, float], expected: Power | None) -> None:
    watch = Watch()
    watch.samples += [(1.0, {"power_w": rails}), (2.0, {"power_w": rails}), (9.0, {"power_w": {"VDD_IN": 99.0}})]
    found = watch.power(1.0, 2.0)
    assert (found is None) == (expected is None)
    if found and expected:
        assert (found.watts, found.n) == (expected.watts, expected.n) and found.of.startswith(expected.of)


def test_throttling_is_told(tree: Tree) -> None:
    root = tree(ORIN)
    before = read_state(root)
    assert throttling(before, {}, read_state(root)) == ()
    changes = {
        "sys/class/thermal/cooling_device1/cur_state": "1",
        "sys/class/hwmon/hwmon2/oc3_event_cnt": "7",
        "sys/class/devfreq/17000000.gpu/max_freq": "624750000",
        "usr/sbin/nvpmodel": "#!/bin/sh\necho NV Power Mode: 15W",
    }
    after: DeviceState = read_state(tree(changes))
    found = throttling(before, {}, after)
    words = (
        "5 events (over-current, oc3)",
        "(cpu-throttle-alert)",
        "limit of the gpu clock fell from 1020 to 625 MHz",
        "power mode was changed",
    )
    assert len(found) == 4 and all(word in text for word, text in zip(words, found, strict=True))
