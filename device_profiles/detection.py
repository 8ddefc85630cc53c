"""Finding out what machine this is, from files that every Linux has. Nothing is run on a GPU."""

from __future__ import annotations

import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from duallora_edge.device_profiles.catalog import list_profiles
from duallora_edge.device_profiles.profile import GIB, DeviceProfile, jetpacks

MAX_BYTES = 2**20
NVIDIA_SMI = ("usr/bin", "usr/lib/wsl/lib", "usr/local/nvidia/bin", "usr/local/bin")
NVIDIA_SMI_TIMEOUT_S = 5.0
GPU_QUERY = ["--query-gpu=name,compute_cap", "--format=csv,noheader"]


@dataclass(frozen=True)
class Detected:
    """What is known about this machine; None for what is unknown.

    ``profile`` is the name of the packaged profile that fits and ``reason`` how it was found. ``model`` and
    ``part`` come from the device tree (``part`` is NVIDIA's module number, "p3767-0005"), ``memory_bytes`` is
    what Linux can use, ``l4t`` is the Jetson Linux version and ``jetpack`` its line.
    """

    profile: str | None
    reason: str
    is_jetson: bool
    model: str | None
    part: str | None
    memory_bytes: int | None
    l4t: str | None
    jetpack: str | None
    architecture: str | None
    cpu: str | None
    cpu_cores: int | None
    gpu: str | None

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def detect(root: Path = Path("/")) -> Detected:
    """Recognise the machine whose file system is at ``root``; unreadable or missing facts are None.

    On a machine that is not a Jetson, nvidia-smi is asked for the GPU when it is installed under ``root``.
    """
    model = _device_tree(root, "model").strip() or None
    compatible = _device_tree(root, "compatible")
    is_jetson = "tegra" in compatible or "jetson" in (model or "").lower()
    memory = _memory_bytes(root)
    architecture, cpu, cores = _cpu(root)
    part = l4t = gpu = None
    if is_jetson:
        l4t = _l4t(root)
        part, profile, reason = _find_jetson(root, model or "", compatible, memory)
    else:
        gpu, capability = _gpu(root)
        profile, reason = _find_other(gpu, capability, architecture)
    return Detected(
        profile=profile,
        reason=reason,
        is_jetson=is_jetson,
        model=model,
        part=part,
        memory_bytes=memory,
        l4t=l4t,
        jetpack=_jetpack(l4t) if l4t else None,
        architecture=architecture,
        cpu=cpu,
        cpu_cores=cores,
        gpu=gpu,
    )


def _read(path: Path) -> str:
    """Text of a small file with NUL bytes as line ends (the device tree's strings), "" when there is none."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode(errors="replace").replace("\0", "\n")
    except OSError:
        return ""


def _device_tree(root: Path, name: str) -> str:
    return _read(root / "proc/device-tree" / name) or _read(root / "sys/firmware/devicetree/base" / name)


def _find_jetson(root: Path, model: str, compatible: str, memory: int | None) -> tuple[str | None, str | None, str]:
    """Part number, profile name and reason: by the module's part number, else by model name and memory."""
    found = re.findall(r"p\d{4}-\d{4}", compatible)
    # Custom carrier boards often omit the part in the device tree; the boot loader's settings still have it,
    # as in "TNSPEC 3668-200-0001-G.0-1-2-..." (board, revision, SKU).
    found += [
        f"p{board}-{sku}"
        for board, sku in re.findall(r"TNSPEC\s+(\d{4})-\w*-(\d{4})", _read(root / "etc/nv_boot_control.conf"))
    ]
    jetsons = [profile for profile in list_profiles() if profile.kind == "jetson"]
    for part in found:
        for profile in jetsons:
            if any(f"{part}-".startswith(f"{known}-") for known in profile.parts):
                return part, profile.name, f"module part number {part}"
    named = [profile for profile in jetsons if any(name.lower() in model.lower() for name in profile.models)]
    if not named:
        return None, None, f"a Jetson without a profile ({model or 'the device tree has no model name'})"
    if len(named) == 1:
        return None, named[0].name, f"model name '{model}'"
    if memory is None:
        return None, None, f"model name '{model}', but the memory size, which would decide between modules, is unknown"
    chosen = _by_memory(named, memory)
    return None, chosen.name, f"model name '{model}' with {memory / GIB:.1f} GiB of memory"


def _by_memory(profiles: list[DeviceProfile], memory: int) -> DeviceProfile:
    """The smallest module with at least ``memory``; Linux sees slightly less than the module has."""
    by_size = sorted(profiles, key=lambda profile: profile.memory_bytes or 0)
    return next((profile for profile in by_size if (profile.memory_bytes or 0) >= memory), by_size[-1])


def _find_other(gpu: str | None, capability: str | None, architecture: str | None) -> tuple[str | None, str]:
    profiles = list_profiles()
    for profile in profiles:
        if profile.kind == "rtx" and profile.compute_capability == capability:
            return profile.name, f"{gpu} with compute capability {capability}"
    without = f"; there is no profile for {gpu}" if gpu else ""
    if architecture in ("x86", "arm64"):
        return f"{architecture}-cpu", f"{architecture} CPU{without}"
    return None, f"the processor architecture could not be recognised{without}"


def _memory_bytes(root: Path) -> int | None:
    match = re.search(r"^MemTotal:\s+(\d{1,15}) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _cpu(root: Path) -> tuple[str | None, str | None, int | None]:
    """Architecture ("x86", "arm64" or None), model name and number of logical cores, from /proc/cpuinfo."""
    text = _read(root / "proc/cpuinfo")
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    fields = {key.strip(): value.strip() for key, value in pairs}
    cores = sum(key.strip() == "processor" for key, _ in pairs) or None
    architecture = None
    if "vendor_id" in fields and " lm " in f" {fields.get('flags', '')} ":  # lm: 64-bit "long mode"
        architecture = "x86"
    elif fields.get("CPU architecture", "").startswith(("8", "AArch64")):
        architecture = "arm64"
    name = fields.get("model name") or fields.get("Hardware") or fields.get("Model")
    return architecture, name or None, cores


def _l4t(root: Path) -> str | None:
    """Jetson Linux version ("36.4.3") from a line such as ``# R36 (release), REVISION: 4.3, GCID: ...``."""
    text = _read(root / "etc/nv_tegra_release")
    match = re.search(r"# R(\d{1,3}) \(release\), REVISION: (\d{1,3}(?:\.\d{1,3})*)", text)
    return f"{match[1]}.{match[2]}" if match else None


def _jetpack(l4t: str) -> str | None:
    """The JetPack line whose Jetson Linux prefix fits ``l4t`` best."""
    fitting = [
        (len(prefix), line.version)
        for line in jetpacks().values()
        for prefix in line.l4t
        if f"{l4t}.".startswith(f"{prefix}.")
    ]
    return max(fitting)[1] if fitting else None


def _gpu(root: Path) -> tuple[str | None, str | None]:
    """Name and compute capability of the first NVIDIA GPU, by nvidia-smi."""
    for folder in NVIDIA_SMI:
        program = root / folder / "nvidia-smi"
        try:
            answer = subprocess.run(
                [str(program), *GPU_QUERY],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=NVIDIA_SMI_TIMEOUT_S,
                check=True,
            ).stdout.decode(errors="replace")
        except (OSError, subprocess.SubprocessError):
            continue
        match = re.match(r"(\S.*?), *(\d{1,2}\.\d)\s*$", answer, re.MULTILINE)
        if match:
            return match[1], match[2]
    return None, None
