"""How much memory this process takes, by several named methods, because no single one tells the whole story.

The resident size counts shared libraries in full and misses what a GPU driver allocates. PSS divides shared libraries
among their processes. The drop of MemAvailable covers everything, but also what other processes do meanwhile.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
NVIDIA_SMI_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Reading:
    """A number of bytes, or None with the reason, and the method by which it was found."""

    method: str
    bytes: int | None
    reason: str | None = None


@dataclass(frozen=True)
class MemoryReadings:
    """All readings of one moment. ``available`` is what the system has left, the others what the process takes.

    ``device`` is memory of the GPU: of this process where nvidia-smi tells it, of all processes on a Jetson.
    """

    pss: Reading
    rss: Reading
    peak_rss: Reading
    available: Reading
    device: Reading

    def to_json(self) -> dict[str, Any]:
        """All readings as JSON values."""
        return asdict(self)


def read_memory(proc: Path = PROC) -> MemoryReadings:
    """Read every method once; ``proc`` is the process file system. Takes up to a second where nvidia-smi exists."""
    return MemoryReadings(
        pss=read_pss(proc),
        rss=_kilobytes(proc / "self/status", "VmRSS"),
        peak_rss=_kilobytes(proc / "self/status", "VmHWM"),
        available=available_memory(proc),
        device=_device(proc),
    )


def read_pss(proc: Path = PROC) -> Reading:
    """The proportional set size of this process alone, at once."""
    return _kilobytes(proc / "self/smaps_rollup", "Pss")


def available_memory(proc: Path = PROC) -> Reading:
    """What the system has left, at once."""
    return _kilobytes(proc / "meminfo", "MemAvailable")


def give_back_memory(collect: bool = True) -> None:
    """Return what was freed to the system; takes some milliseconds, with ``collect`` some ten to look for cycles.

    The C library keeps what a model that was let go leaves behind, in a pool for each thread that allocated it: without
    this, a process that swapped 40 models of 25 MB held four times as much as one that swapped none.
    """
    if collect:
        gc.collect()
    with suppress(AttributeError, OSError):  # only glibc can
        ctypes.CDLL(None).malloc_trim(0)


def available_drop(before: MemoryReadings, after: MemoryReadings) -> Reading:
    """By how much MemAvailable fell between two moments; negative when other processes gave memory back."""
    method = f"drop of {before.available.method}"
    if before.available.bytes is None or after.available.bytes is None:
        return Reading(method, None, before.available.reason or after.available.reason)
    return Reading(method, before.available.bytes - after.available.bytes)


def _kilobytes(file: Path, key: str) -> Reading:
    """The value of a line such as ``Pss:   1234 kB``."""
    method = f"{key} of {file}"
    try:
        text = file.read_text(errors="replace")
    except OSError as error:
        return Reading(method, None, f"{file} cannot be read ({error.strerror})")
    match = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    if match is None:
        return Reading(method, None, f"{file} has no line {key}")
    return Reading(method, int(match[1]) * 1024)


def _device(proc: Path) -> Reading:
    # On an Orin nvidia-smi is a stub, and the GPU's memory is the system's: the driver's own counter is left.
    shared = _kilobytes(proc / "meminfo", "NvMapMemUsed")
    if shared.bytes is not None:
        return Reading(f"{shared.method}, all processes", shared.bytes)
    method = "nvidia-smi --query-compute-apps, this process"
    program = shutil.which("nvidia-smi")
    if program is None:
        return Reading(method, None, "nvidia-smi is not installed")
    command = [program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True
        ).stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError) as error:
        return Reading(method, None, f"nvidia-smi failed ({type(error).__name__})")
    used = re.findall(rf"^\s*{os.getpid()}\s*,\s*(\d+)\s*$", answer, re.MULTILINE)
    if not used:
        return Reading(method, None, "nvidia-smi does not list this process (nor can it from inside a container)")
    return Reading(method, sum(map(int, used)) * 2**20)
