"""MemoryReadings readings: the right line of the right file, or the reason why there is none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from duallora_edge.runtime.process_memory import MemoryReadings, Reading, available_drop, read_memory


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/smaps_rollup").write_text("5 [rollup]\nRss:   900 kB\nPss:   700 kB\nPss_Dirty:  3 kB\n")
    (tmp_path / "self/status").write_text("Name:\tx\nVmHWM:\t    1000 kB\nVmRSS:\t     900 kB\n")
    (tmp_path / "meminfo").write_text("MemTotal:   8000 kB\nMemFree: 1 kB\nMemAvailable:   5000 kB\n")
    return tmp_path


def fake_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_readings_of_proc(proc: Path) -> None:
    memory = read_memory(proc)
    assert (memory.pss.bytes, memory.rss.bytes, memory.peak_rss.bytes) == (700 * 1024, 900 * 1024, 1000 * 1024)
    assert memory.available.bytes == 5000 * 1024
    assert memory.pss.method == f"Pss of {proc}/self/smaps_rollup"
    assert memory.to_json()["peak_rss"]["method"].startswith("VmHWM of ")


def test_what_is_missing_has_a_reason(proc: Path) -> None:
    (proc / "self/smaps_rollup").unlink()
    (proc / "self/status").write_text("VmRSS:\tmany\n")
    memory = read_memory(proc)
    assert memory.pss.bytes is None and "cannot be read" in str(memory.pss.reason)
    assert memory.rss.bytes is None and "no line VmRSS" in str(memory.rss.reason)


def test_the_gpu_memory_of_a_jetson(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(proc, "echo '[N/A]'", monkeypatch)
    with (proc / "meminfo").open("a") as file:
        file.write("NvMapMemUsed:   300 kB\n")
    device = read_memory(proc).device
    assert device.bytes == 300 * 1024 and "all processes" in device.method


@pytest.mark.parametrize(
    ("script", "expected", "reason"),
    [
        ('echo "1, 50"; echo "$PPID, 120"; echo "$PPID, 30"', 150 * 2**20, None),
        ("echo '1, 50'", None, "does not list this process"),
        ("echo '[N/A], [N/A]'", None, "does not list this process"),
        ("exit 9", None, "CalledProcessError"),
    ],
)
def test_the_gpu_memory_of_a_card(
    proc: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: int | None, reason: str | None
) -> None:
    fake_nvidia_smi(proc, script, monkeypatch)
    device = read_memory(proc).device
    assert device.bytes == expected
    assert reason is None or reason in str(device.reason)


def test_without_a_gpu(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert read_memory(proc).device.reason == "nvidia-smi is not installed"


def test_the_drop_of_available_memory() -> None:
    def at(available: Reading) -> MemoryReadings:
        none = Reading("x", None, "no")
        return MemoryReadings(none, none, none, available, none)

    assert available_drop(at(Reading("a", 500)), at(Reading("a", 380))).bytes == 120
    lost = available_drop(at(Reading("a", 500)), at(Reading("a", None, "gone")))
    assert lost.bytes is None and lost.reason == "gone"


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc/self/smaps_rollup")
def test_a_process_grows_by_what_it_allocates() -> None:
    # A process of its own: in that of the tests, other objects may be freed at the same moment.
    code = (
        "from duallora_edge.runtime.process_memory import read_memory\n"
        "before = read_memory()\n"
        "block = bytearray(b'x') * (64 * 2**20)\n"
        "after = read_memory()\n"
        "print(before.pss.bytes, after.pss.bytes, after.rss.bytes, after.peak_rss.bytes, len(block), after.rss.method)"
    )
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(
        " ", 5
    )
    before, after, rss, peak, allocated = map(int, words[:5])
    assert after - before == pytest.approx(allocated, rel=0.1)
    assert peak >= rss
    assert re.search("VmRSS", words[5])
