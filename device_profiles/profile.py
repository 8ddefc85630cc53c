"""What the YAML file of a device says about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from duallora_edge.device_profiles.reader import Section, did_you_mean, read_yaml
from duallora_edge.errors import ProfileError

FOLDER = Path(__file__).parent
KINDS = ("jetson", "rtx", "cpu")
PRECISIONS = ("fp32", "fp16", "int8", "fp8")
BACKENDS = ("tensorrt", "cuda", "cpu")
DEFAULT_WORKSPACE_MB = 512
GIB = 2**30


@dataclass(frozen=True)
class JetPack:
    """One JetPack line: the versions NVIDIA ships together and the ONNX this project writes for them.

    ``l4t`` are prefixes of Jetson Linux versions. ``opset`` and ``ir_version`` are None when the line is
    refused; ``refused`` then says why.
    """

    version: str
    l4t: tuple[str, ...]
    ubuntu: str
    python: str
    cuda: str
    cudnn: str
    tensorrt: str
    parser_opsets: str
    opset: int | None
    ir_version: int | None
    refused: str | None
    notes: str


@dataclass(frozen=True)
class Mode:
    """Peaks at one clock: dense TFLOPS (no sparsity), memory bandwidth in GB/s, power budgets in W."""

    gpu_mhz: float
    fp16_tflops: float
    fp32_tflops: float
    bandwidth_gbs: float
    watts: tuple[float, ...]
    from_jetpack: str | None


@dataclass(frozen=True)
class DeviceProfile:
    """One device. Fields that do not apply are None or empty (a CPU profile has no GPU and no modes).

    ``memory_bytes`` is the nominal size (GB of the data sheet as GiB). ``precisions`` maps a precision to
    None when it is offered, otherwise to the reason why not. ``opset`` and ``ir_version`` are None for a
    Jetson, where they depend on the JetPack. ``workspace_mb`` (10^6 bytes) limits the memory with which TensorRT
    builds an engine there, and ``backends`` are the runtime's backends to try, best first. ``derived`` and
    ``unverified`` hold dotted paths into the file.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    kind: str
    compute_capability: str | None
    cuda_cores: int
    tensor_cores: int
    dla_cores: int
    memory_bytes: int | None
    memory_unified: bool
    modes: Mapping[str, Mode]
    precisions: Mapping[str, str | None]
    jetpacks: tuple[str, ...]
    default_jetpack: str | None
    parts: tuple[str, ...]
    models: tuple[str, ...]
    opset: int | None
    ir_version: int | None
    workspace_mb: int
    backends: tuple[str, ...]
    notes: str
    derived: tuple[str, ...]
    unverified: tuple[str, ...]
    sources: tuple[str, ...]

    @classmethod
    def from_file(cls, path: Path) -> DeviceProfile:
        """Read and check a profile; to write your own, copy a packaged one of the same kind.

        Raises `ProfileError` that lists every problem with its dotted path.
        """
        problems: list[str] = []
        profile = _read_profile(Section(read_yaml(path), "", problems))
        if problems:
            raise ProfileError(f"{path} is not a valid device profile; correct:\n  " + "\n  ".join(problems))
        return profile

    @property
    def default_precision(self) -> str:
        """``"fp16"`` where the device offers it, otherwise ``"fp32"``."""
        return "fp16" if self.precisions.get("fp16", "") is None else "fp32"

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; ``precisions`` keeps None for "offered"."""
        return asdict(self)


@lru_cache(maxsize=1)
def jetpacks() -> dict[str, JetPack]:
    """The known JetPack lines by version ("6.2"), oldest first."""
    path = FOLDER / "jetpack.yaml"
    problems: list[str] = []
    table = Section(read_yaml(path), "", problems)
    lines = {version: _read_jetpack(version, table.section(version)) for version in table.values}
    if problems:
        raise ProfileError(f"{path} is damaged; reinstall duallora-edge:\n  " + "\n  ".join(problems))
    return lines


def _read_jetpack(version: str, line: Section) -> JetPack:
    refused = line.text("refused") if line.has("refused") else None
    result = JetPack(
        version=version,
        l4t=line.texts("l4t"),
        ubuntu=line.text("ubuntu"),
        python=line.text("python"),
        cuda=line.text("cuda"),
        cudnn=line.text("cudnn"),
        tensorrt=line.text("tensorrt"),
        parser_opsets=line.text("parser_opsets"),
        opset=None if refused else line.integer("opset", 7, 30),
        ir_version=None if refused else line.integer("ir_version", 3, 20),
        refused=refused,
        notes=line.text("notes") if line.has("notes") else "",
    )
    line.finish()
    return result


def _read_profile(top: Section) -> DeviceProfile:
    name = top.text("name")
    if name and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,62}", name):
        top.problem("name", "may have lower-case letters, digits, '-' and '.', at most 63 of them")
    kind = top.choice("kind", KINDS)
    capability, cores = _read_gpu(top, kind)
    memory = _read_memory(top, kind)
    supported, default = _read_jetpack_support(top, kind)
    export = top.section("export") if kind != "jetson" else None
    detect = top.section("detect") if top.has("detect") else None
    engine = top.section("engine")
    profile = DeviceProfile(
        name=name,
        title=top.text("title"),
        aliases=top.texts("aliases") if top.has("aliases") else (),
        kind=kind,
        compute_capability=capability,
        cuda_cores=cores["cuda_cores"],
        tensor_cores=cores["tensor_cores"],
        dla_cores=cores["dla_cores"],
        memory_bytes=memory[0],
        memory_unified=memory[1],
        modes=_read_modes(top) if kind != "cpu" else {},
        precisions=_read_precisions(top.section("precisions")),
        jetpacks=supported,
        default_jetpack=default,
        parts=detect.texts("parts") if detect else (),
        models=detect.texts("models") if detect else (),
        opset=export.integer("opset", 7, 30) if export else None,
        ir_version=export.integer("ir_version", 3, 20) if export else None,
        workspace_mb=engine.integer("workspace_mb", 16, 65536) if kind != "cpu" else DEFAULT_WORKSPACE_MB,
        backends=_read_backends(engine),
        notes=top.text("notes") if top.has("notes") else "",
        derived=_read_marks(top, "derived"),
        unverified=_read_marks(top, "unverified"),
        sources=top.texts("sources"),
    )
    for section in (detect, engine, export, top):
        if section:
            section.finish()
    return profile


def _read_backends(engine: Section) -> tuple[str, ...]:
    backends = engine.texts("backends")
    for name in backends:
        if name not in BACKENDS:
            hint = did_you_mean(name, list(BACKENDS)) or f" Use {', '.join(BACKENDS)}."
            engine.problem("backends", f"'{name[:30]}' is unknown.{hint}")
    if not backends and engine.has("backends"):
        engine.problem("backends", "must name at least one")
    return backends


def _read_gpu(top: Section, kind: str) -> tuple[str | None, dict[str, int]]:
    keys = ("cuda_cores", "tensor_cores", "dla_cores")
    if kind == "cpu":
        return None, dict.fromkeys(keys, 0)
    gpu = top.section("gpu")
    capability = gpu.text("compute_capability", 'text such as "8.7"')
    if capability and not re.fullmatch(r"\d{1,2}\.\d", capability):
        gpu.problem("compute_capability", 'must look like "8.7"')
    cores = {key: gpu.integer(key, 0, 1_000_000) for key in keys}
    gpu.finish()
    return capability, cores


def _read_memory(top: Section, kind: str) -> tuple[int | None, bool]:
    if kind == "cpu" and not top.has("memory"):
        return None, True
    memory = top.section("memory")
    size = int(memory.number("gb", 0.25, 16384) * GIB), memory.boolean("unified")
    memory.finish()
    return size


def _read_modes(top: Section) -> dict[str, Mode]:
    modes = top.section("modes")
    result = {"normal": _read_mode(modes.section("normal"))}
    if modes.has("super"):
        result["super"] = _read_mode(modes.section("super"))
    modes.finish()
    return result


def _read_mode(mode: Section) -> Mode:
    result = Mode(
        gpu_mhz=mode.number("gpu_mhz", 1, 20_000),
        fp16_tflops=mode.number("fp16_tflops", 0.001, 100_000),
        fp32_tflops=mode.number("fp32_tflops", 0.001, 100_000),
        bandwidth_gbs=mode.number("bandwidth_gbs", 0.1, 100_000),
        watts=mode.numbers("watts", 0.1, 5_000),
        from_jetpack=mode.choice("from_jetpack", jetpacks()) if mode.has("from_jetpack") else None,
    )
    mode.finish()
    return result


def _read_precisions(section: Section) -> dict[str, str | None]:
    result = {}
    for name in PRECISIONS:
        if section.has(name):
            value = section.text(name, "'allowed', or the reason why it is refused")
            result[name] = None if value == "allowed" else value
    section.finish()
    if result.get("fp32", "") is not None:
        section.problem("fp32", "must be 'allowed'; every device runs it")
    return result


def _read_jetpack_support(top: Section, kind: str) -> tuple[tuple[str, ...], str | None]:
    if kind != "jetson":
        return (), None
    section = top.section("jetpack")
    supported = section.texts("supported")
    for version in supported:
        if version not in jetpacks():
            section.problem("supported", f"'{version[:20]}' is unknown; known are {', '.join(jetpacks())}")
    default = section.choice("default", supported) if supported else section.text("default")
    section.finish()
    return supported, default


def _read_marks(top: Section, key: str) -> tuple[str, ...]:
    """Dotted paths of marked values; each must exist in the file."""
    marks = top.texts(key) if top.has(key) else ()
    for mark in marks:
        value: Any = top.values
        for part in mark.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            top.problem(key, f"'{mark[:60]}' names no value of this file")
    return marks
