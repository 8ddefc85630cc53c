"""Recognising machines from small recorded file trees, and surviving strange ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duallora_edge.device_profiles import detect

R36_4_3 = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n# KERNEL_VARIANT: oot\n"
ARM_CPU = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\n\nprocessor\t: 1\nCPU architecture: 8\n"
X86_CPU = (
    "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) N100\nflags\t\t: fpu lm avx2 fma\n\n"
    "processor\t: 1\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) N100\nflags\t\t: fpu lm avx2 fma\n"
)


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def jetson(model: str, compatible: str, kilobytes: int, release: str = R36_4_3) -> dict[str, str | bytes]:
    return {
        "proc/device-tree/model": model.encode() + b"\0",
        "proc/device-tree/compatible": compatible.replace(" ", "\0").encode() + b"\0",
        "proc/meminfo": f"MemTotal:       {kilobytes} kB\nMemFree:  1 kB\n",
        "proc/cpuinfo": ARM_CPU,
        "etc/nv_tegra_release": release,
    }


DEVKIT = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
ORIN = "nvidia,tegra234"
# model, compatible, MemTotal in kB, profile, part
JETSONS = [
    # by part number
    (DEVKIT, f"nvidia,p3768-0000+p3767-0005-super nvidia,p3767-0005 {ORIN}", 7802604, "orin-nano-8gb", "p3767-0005"),
    ("Jetson", f"nvidia,p3768-0000+p3767-0004 {ORIN}", 3400000, "orin-nano-4gb", "p3767-0004"),
    ("Jetson", f"nvidia,p3768-0000+p3767-0001 {ORIN}", 7600000, "orin-nx-8gb", "p3767-0001"),
    ("Jetson", f"nvidia,p3768-0000+p3767-0000 {ORIN}", 15600000, "orin-nx-16gb", "p3767-0000"),
    ("Jetson", f"nvidia,p3737-0000+p3701-0005 {ORIN}", 64300000, "agx-orin-64gb", "p3701-0005"),
    ("Jetson", "nvidia,p3509-0000+p3668-0001 nvidia,tegra194", 7900000, "xavier-nx", "p3668-0001"),
    ("Jetson TX2 NX", "nvidia,p3509-0000+p3636-0001 nvidia,tegra186", 3900000, "tx2-nx", "p3636-0001"),
    ("Jetson AGX Thor", "nvidia,p4071-0000+p3834-0008 nvidia,tegra264", 128800000, "thor-t5000", "p3834-0008"),
    # by model name and memory, where the module's number is not given or not known
    ("Jetson-AGX", "nvidia,p2972-0000 nvidia,tegra194", 32000000, "agx-xavier", None),
    ("NVIDIA Jetson Nano Developer Kit", "nvidia,p3450-0000 nvidia,tegra210", 4051048, "nano-4gb", None),
    ("Acme box with NVIDIA Jetson Orin NX", ORIN, 15600000, "orin-nx-16gb", None),
    ("Acme box with NVIDIA Jetson Orin NX", ORIN, 7600000, "orin-nx-8gb", None),
    ("NVIDIA Jetson AGX Orin", f"nvidia,p3737-0000+p3701-0000 {ORIN}", 31200000, "agx-orin-32gb", None),
    ("NVIDIA Jetson Thor", "nvidia,tegra264", 64000000, "thor-t4000", None),
    # no profile
    ("NVIDIA Jetson TX1", "nvidia,tegra210", 4000000, None, None),
]


@pytest.mark.parametrize(("model", "compatible", "kilobytes", "profile", "part"), JETSONS)
def test_jetsons(
    tmp_path: Path, model: str, compatible: str, kilobytes: int, profile: str | None, part: str | None
) -> None:
    found = detect(tree(tmp_path, jetson(model, compatible, kilobytes)))
    assert (found.profile, found.part, found.is_jetson) == (profile, part, True)
    assert (found.architecture, found.cpu_cores, found.l4t, found.jetpack) == ("arm64", 2, "36.4.3", "6.2")
    json.dumps(found.to_json())


def test_boot_settings_name_the_module_on_a_custom_board(tmp_path: Path) -> None:
    files = jetson("Acme carrier", ORIN, 15600000)
    files["etc/nv_boot_control.conf"] = "TNSPEC 3767-300-0000-N.2-1-0-acme-nvme0n1p1\nTEGRA_CHIPID 0x23\n"
    found = detect(tree(tmp_path, files))
    assert (found.profile, found.reason) == ("orin-nx-16gb", "module part number p3767-0000")


def test_the_second_place_of_the_device_tree(tmp_path: Path) -> None:
    files = {
        name.replace("proc/device-tree", "sys/firmware/devicetree/base"): content
        for name, content in jetson(DEVKIT, f"nvidia,p3767-0003 {ORIN}", 7802604).items()
    }
    assert detect(tree(tmp_path, files)).profile == "orin-nano-8gb"


def test_memory_decides_and_is_missing(tmp_path: Path) -> None:
    files = jetson("NVIDIA Jetson Orin NX", ORIN, 0)
    del files["proc/meminfo"]
    found = detect(tree(tmp_path, files))
    assert found.profile is None and "memory size" in found.reason


@pytest.mark.parametrize(
    ("release", "l4t", "jetpack"),
    [
        ("# R32 (release), REVISION: 7.1, GCID: 29818004", "32.7.1", "4.6"),
        ("# R35 (release), REVISION: 2.1, GCID: 32413640", "35.2.1", "5.1"),
        ("# R35 (release), REVISION: 6.4, GCID: 1", "35.6.4", "5.1"),
        ("# R36 (release), REVISION: 3.0, GCID: 36191598", "36.3.0", "6.0"),
        ("# R36 (release), REVISION: 4.0, GCID: 37537400", "36.4.0", "6.1"),
        ("# R36 (release), REVISION: 4.7, GCID: 1", "36.4.7", "6.2"),
        ("# R36 (release), REVISION: 5.2, GCID: 1", "36.5.2", "6.2"),
        ("# R38 (release), REVISION: 2.0, GCID: 1", "38.2.0", "7.0"),
        ("# R38 (release), REVISION: 4.0, GCID: 1", "38.4.0", "7.1"),
        ("# R39 (release), REVISION: 2.1, GCID: 1", "39.2.1", "7.2"),
        ("# R35 (release), REVISION: 1.0, GCID: 1", "35.1.0", None),
        ("# R99 (release), REVISION: 20.0, GCID: 1", "99.20.0", None),
        ("R36 something else", None, None),
    ],
)
def test_jetson_linux_and_jetpack(tmp_path: Path, release: str, l4t: str | None, jetpack: str | None) -> None:
    found = detect(tree(tmp_path, jetson(DEVKIT, ORIN, 7802604, release)))
    assert (found.l4t, found.jetpack) == (l4t, jetpack)


PI = {"proc/device-tree/model": "Raspberry Pi 5 Model B\0", "proc/device-tree/compatible": "raspberrypi,5-model-b\0"}


@pytest.mark.parametrize(
    ("files", "profile", "architecture"),
    [
        ({"proc/cpuinfo": X86_CPU, "proc/meminfo": "MemTotal: 16000000 kB\n"}, "x86-cpu", "x86"),
        ({"proc/cpuinfo": ARM_CPU}, "arm64-cpu", "arm64"),
        ({"proc/cpuinfo": ARM_CPU, **PI}, "arm64-cpu", "arm64"),
        ({"proc/cpuinfo": X86_CPU.replace(" lm ", " ")}, None, None),
        ({"proc/cpuinfo": "processor: 0\nhart: 0\nisa: rv64imafdc\n"}, None, None),
        ({}, None, None),
    ],
)
def test_machines_without_a_gpu(
    tmp_path: Path, files: dict[str, str | bytes], profile: str | None, architecture: str | None
) -> None:
    found = detect(tree(tmp_path, files))
    assert (found.profile, found.architecture, found.is_jetson, found.gpu) == (profile, architecture, False, None)


@pytest.mark.parametrize(
    ("script", "profile", "gpu"),
    [
        ("echo 'NVIDIA GeForce RTX 4090, 8.9'; echo 'Tesla T4, 7.5'", "rtx-sm89", "NVIDIA GeForce RTX 4090"),
        ("echo 'NVIDIA RTX PRO 6000, 12.0'", "rtx-sm120", "NVIDIA RTX PRO 6000"),
        ("echo 'NVIDIA H200, 9.0'", "x86-cpu", "NVIDIA H200"),
        ("echo 'Orin (nvgpu), [N/A]'", "x86-cpu", None),
        ("echo 'No devices were found'; exit 6", "x86-cpu", None),
        ("printf '\\377\\000,\\n8.9'", "x86-cpu", None),
        ("sleep 30", "x86-cpu", None),
    ],
)
def test_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, profile: str, gpu: str | None
) -> None:
    monkeypatch.setattr("duallora_edge.device_profiles.detection.NVIDIA_SMI_TIMEOUT_S", 0.5)
    tree(tmp_path, {"proc/cpuinfo": X86_CPU, "usr/bin/nvidia-smi": f"#!/bin/sh\nexec 2>/dev/null\n{script}\n"})
    (tmp_path / "usr/bin/nvidia-smi").chmod(0o755)
    found = detect(tmp_path)
    assert (found.profile, found.gpu) == (profile, gpu)
    assert gpu is None or gpu in found.reason


FILES = ["model", "compatible", "etc/nv_tegra_release", "etc/nv_boot_control.conf", "proc/meminfo", "proc/cpuinfo"]
NOISE = st.binary(max_size=200) | st.sampled_from(
    [b"nvidia,tegra234", b"# R36 (release), REVISION: " + b"9" * 500, b"MemTotal: " + b"9" * 400 + b" kB", b":" * 99]
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FILES), NOISE))
def test_noise_never_crashes(tmp_path: Path, noise: dict[str, bytes]) -> None:
    for name in FILES:
        place = name if "/" in name else f"proc/device-tree/{name}"
        tree(tmp_path, {place: noise.get(name, b"")})
    json.dumps(detect(tmp_path).to_json())


def test_folders_and_pipes_in_place_of_files(tmp_path: Path) -> None:
    import os

    (tmp_path / "proc/device-tree/model").mkdir(parents=True)
    os.mkfifo(tmp_path / "proc/cpuinfo")
    (tmp_path / "usr/bin/nvidia-smi").mkdir(parents=True)
    assert detect(tmp_path).profile is None


def test_a_megabyte_of_blanks_is_read_quickly(tmp_path: Path) -> None:
    blanks = b" " * 2**20
    found = detect(tree(tmp_path, {"proc/cpuinfo": blanks, "proc/meminfo": blanks, "proc/device-tree/model": blanks}))
    assert found.profile is None


def test_this_machine() -> None:
    assert detect().reason
