"""``duallora-edge doctor``: what this machine can really run, found by running it, and what to do about the rest."""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from duallora_edge import __version__
from duallora_edge.device_profiles.commands import describe
from duallora_edge.device_profiles.detection import Detected, detect
from duallora_edge.device_profiles.profile import GIB, jetpacks
from duallora_edge.extras import install_hint, onnxruntimes
from duallora_edge.files import cache_folder
from duallora_edge.runtime.device import probes
from duallora_edge.runtime.device.cuda import CUDA_PYTHON
from duallora_edge.runtime.device.probes import NOT_INSTALLED, Answer, ask
from duallora_edge.runtime.device.state import run_tool
from duallora_edge.runtime.process_memory import read_memory
from duallora_edge.text import escaped

PROBE_TIMEOUT_S = 60.0
RUNG_TIMEOUT_S = 180.0  # the first session of a GPU provider can take more than a minute
TOOL_TIMEOUT_S = 10.0
FATAL = ("crashed", "hung")
LOW_BYTES = GIB  # of free memory or disk; building an engine takes several hundred megabytes of each
HOLDS_NO_GIL = [12, 9, 1]  # cuda-python, from this version on
BUILT_FOR_NUMPY_1 = re.compile(r"numpy\.core\.multiarray|_ARRAY_API|compiled using NumPy 1")

# Name -> modules of which the first that exists is imported, and distributions that know the version.
PACKAGES = {
    "numpy": ("numpy", "numpy"),
    "onnxruntime": ("onnxruntime", "onnxruntime,onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt-rtx"),
    "cuda-python": ("cuda.bindings.driver,cuda.cuda", "cuda-bindings,cuda-python"),
    "opencv": ("cv2", "opencv-python-headless,opencv-python"),
}
QUESTIONS = probes.MODULE  # the module that answers questions about the machine
LADDER = "duallora_edge.runtime.backends.ladder"  # and about its backends; not imported here: it needs NumPy


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    ``machine`` are lines about it by name, ``packages`` and ``backends`` the answers by name, the latter in the
    order of the ladder and empty without a usable bundle. ``bundle`` is the answer to opening it, None when none was
    given. ``cuda`` is the driver's answer.
    """

    machine: Mapping[str, str]
    detected: Detected
    packages: Mapping[str, Answer]
    cuda: Answer
    bundle: Answer | None
    backends: Mapping[str, Answer]
    advice: tuple[str, ...]

    @property
    def working(self) -> str | None:
        """The backend that runs here: the first one in the order of ``auto`` that works, otherwise any that works."""
        works = [name for name, answer in self.backends.items() if answer.ok]
        return next((name for name in self._auto if name in works), works[0] if works else None)

    @property
    def _auto(self) -> list[str]:
        """What the runtime tries when no backend is named, best first."""
        return list(self.bundle.values.get("auto", ())) if self.bundle else []

    @property
    def ok(self) -> bool:
        """At least one backend works, or no bundle was given to try them with."""
        return self.bundle is None or self.working is not None

    @property
    def conclusion(self) -> str:
        """One sentence: what the runtime will use here."""
        if self.bundle is None:
            return "No backend was tried, because that needs a bundle: duallora-edge doctor BUNDLE"
        if not self.bundle.ok:
            return f"No backend was tried, because the bundle cannot be used: {self.bundle.reason}"
        if self.working is None:
            return "No backend can run this bundle here."
        if self.working not in self._auto:
            return f"Use --backend {self.working} here: no backend of the bundle works ({', '.join(self._auto)})."
        passed_over = self._auto[: self._auto.index(self.working)]
        fatal = [f"{name} {self.backends[name].state}" for name in passed_over if self.backends[name].state in FATAL]
        if fatal:
            return f"Use --backend {self.working} here: by default the runtime tries others first ({', '.join(fatal)})."
        better = f" (not {', '.join(passed_over)}: see above)" if passed_over else ""
        return f"Here the runtime uses: {self.working} in {self.backends[self.working].values['precision']}{better}"

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "ok": self.ok,
            "working": self.working,
            "conclusion": self.conclusion,
            "machine": dict(self.machine),
            "detected": self.detected.to_json(),
            "packages": {name: asdict(answer) for name, answer in self.packages.items()},
            "cuda": asdict(self.cuda),
            "bundle": asdict(self.bundle) if self.bundle else None,
            "backends": {name: asdict(answer) for name, answer in self.backends.items()},
            "advice": list(self.advice),
        }


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def doctor(bundle: Path | None, as_json: bool) -> int:
    """Find out what this machine can really run, by running it.

    With BUNDLE, every backend answers its golden images, each in a child process, because a broken GPU package may
    crash or hang. The exit code is 1 if no backend answers correctly.

    \b
    Example:
      duallora-edge doctor
      duallora-edge doctor bundle
    """

    def progress(name: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"asking: {name}", err=True)

    found = diagnose(bundle, progress=progress)
    click.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False) if as_json else escaped(table(found)))
    return 0 if found.ok else 1


def diagnose(
    bundle: Path | None, root: Path = Path("/"), progress: Callable[[str], None] = lambda name: None
) -> Diagnosis:
    """Ask everything; ``root`` is the file system that describes the device, ``progress`` is told what is asked."""

    def question(function: str, *arguments: str, timeout_s: float = PROBE_TIMEOUT_S) -> Answer:
        progress(" ".join([function, *arguments]))
        module = LADDER if function in ("rungs", "rung") else QUESTIONS
        return ask(f"{module}:{function}", *arguments, timeout_s=timeout_s)

    detected = detect(root)
    machine, advice = _machine(root, detected)
    packages = {name: question("package", *names) for name, names in PACKAGES.items()}
    cuda = question("cuda")
    for name in ("tensorrt", "tensorrt_rtx"):
        if packages[name].ok and cuda.ok:
            started = question("tensorrt_start", name)
            if not started.ok:
                packages = {**packages, name: started}
    opened: Answer | None = None
    backends: dict[str, Answer] = {}
    if bundle is not None:
        opened = question("rungs", str(bundle))
        rungs = opened.values.get("rungs", ())
        backends = {name: question("rung", str(bundle), name, timeout_s=RUNG_TIMEOUT_S) for name in rungs}
    advice += _advise(detected, packages, cuda) + _backend_advice(backends, cuda)
    return Diagnosis(machine, detected, packages, cuda, opened, backends, tuple(advice))


def _machine(root: Path, detected: Detected) -> tuple[dict[str, str], list[str]]:
    """Lines about the machine by name, and advice where memory or disk are short."""
    lines = {
        "duallora-edge": __version__,
        "python": f"{platform.python_version()} on {platform.machine()} ({sys.executable})",
        "device": describe(detected),
    }
    if mode := _tool(root, "nvpmodel", "-q"):
        lines["power mode"] = ", ".join(mode)
    if clocks := _tool(root, "jetson_clocks", "--show"):
        lines["clocks"] = "; ".join([line for line in clocks if line.startswith(("GPU", "EMC"))] or clocks[:1])
    memory = read_memory(root / "proc").available
    lines["memory"] = f"unknown: {memory.reason}" if memory.bytes is None else f"{_gib(memory.bytes)} available"
    folder = cache_folder()
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    lines["disk"] = f"{_gib(free)} free in {folder}"
    advice = []
    if memory.bytes is not None and memory.bytes < LOW_BYTES:
        advice.append(f"Only {_gib(memory.bytes)} of memory is available: stop other programs or add swap space.")
    if free < LOW_BYTES:
        advice.append(
            f"Only {_gib(free)} is free in {folder}: make room, or set DUALLORA_EDGE_CACHE to another folder."
        )
    return lines, advice


def _tool(root: Path, name: str, option: str) -> list[str]:
    """What a program of Jetson Linux prints, [] where it does not exist."""
    answer = run_tool(root, name, option, TOOL_TIMEOUT_S)
    if answer.value is None:
        return [] if answer.reason == NOT_INSTALLED else [f"unknown: {answer.reason}"]
    return answer.value


def _advise(detected: Detected, packages: Mapping[str, Answer], cuda: Answer) -> list[str]:
    """One line for each problem of the machine and its packages."""
    advice = []
    line = jetpacks().get(detected.jetpack or "")
    if line and line.refused:
        advice.append(f"{line.refused}: update JetPack, or use another device.")
    elif line and _is_foreign_python(detected):
        python = _python()
        advice.append(
            f"JetPack {line.version} has Python {line.python}, and Python {python} cannot import its TensorRT: here "
            f"only what is installed for {python} can run, such as the CPU build of ONNX Runtime."
        )
    elif line and packages["tensorrt"].reason == NOT_INSTALLED:
        advice.append(
            "JetPack's TensorRT is not visible: sudo apt install python3-libnvinfer, and create the virtual "
            "environment with --system-site-packages."
        )
    advice += [text for name, answer in packages.items() if (text := _package_advice(name, answer))]
    return [*advice, *_onnxruntime_advice(detected, packages, cuda), *_gpu_advice(detected, packages, cuda)]


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _is_foreign_python(detected: Detected) -> bool:
    """Not the Python of this JetPack, for which the builds for its GPU are made."""
    line = jetpacks().get(detected.jetpack or "")
    return line is not None and line.python != _python()


def _package_advice(name: str, answer: Answer) -> str | None:
    if answer.ok or answer.reason == NOT_INSTALLED:
        return None
    if "has no attribute 'bool'" in answer.reason:
        return f"This {name} is too old for the installed NumPy: pip install 'numpy<1.24'."
    if BUILT_FOR_NUMPY_1.search(answer.reason):
        return f"This {name} was built for NumPy 1: pip install 'numpy<2'."
    if name == "onnxruntime":
        return None  # has advice of its own
    return f"{name} is installed, but {_problem(answer)}: reinstall the build for this machine."


def _problem(answer: Answer) -> str:
    if answer.reason == NOT_INSTALLED:
        return "its files are missing"
    return f"{'cannot be imported' if answer.state == 'no' else answer.state} ({answer.reason})"


def _onnxruntime_advice(detected: Detected, packages: Mapping[str, Answer], cuda: Answer) -> list[str]:
    """What to do about ONNX Runtime. Never leads to a second one beside the first: they overwrite each other."""
    answer, there = packages["onnxruntime"], onnxruntimes()
    has_tensorrt = packages["tensorrt"].ok or packages["tensorrt_rtx"].ok
    on_gpu = cuda.ok and not _is_foreign_python(detected)
    if (detected.is_jetson and not _is_foreign_python(detected)) or (on_gpu and platform.machine() == "aarch64"):
        remedy = _uninstall(there) + "install the build for this JetPack (docs/jetson.md)"
    else:
        remedy = _uninstall(there) + install_hint("gpu" if on_gpu else "cpu", with_onnxruntime=True)
    if len(there) > 1:
        return [f"{' and '.join(there)} are both installed and overwrite each other: {remedy}."]
    if answer.ok:
        if on_gpu and not has_tensorrt and "CUDAExecutionProvider" not in answer.values.get("providers", ()):
            return [f"The GPU answers, but this ONNX Runtime is built for the CPU only: {remedy}."]
        return []
    if answer.reason == NOT_INSTALLED and not there:
        return [] if has_tensorrt else [f"ONNX Runtime is not installed: {remedy}."]
    if _package_advice("onnxruntime", answer):  # another NumPy will do
        return []
    return [f"{''.join(there) or 'onnxruntime'} is installed, but {_problem(answer)}: {remedy}."]


def _uninstall(distributions: Sequence[str]) -> str:
    return f"pip uninstall {' '.join(distributions)}, then " if distributions else ""


def _gpu_advice(detected: Detected, packages: Mapping[str, Answer], cuda: Answer) -> list[str]:
    if not cuda.ok:
        expected = "CUDAExecutionProvider" in packages["onnxruntime"].values.get("providers", ())
        if not (expected or detected.is_jetson or detected.gpu):
            return []
        return [
            f"The GPU does not answer ({cuda.reason}): check the driver; a container needs NVIDIA's runtime, and on a "
            "Jetson the user must be in the groups video and render."
        ]
    bindings = packages["cuda-python"]
    wanted = CUDA_PYTHON.get(int(cuda.values["version"].split(".")[0]))
    if wanted is None or not (packages["tensorrt"].ok or packages["tensorrt_rtx"].ok):
        return []
    if bindings.reason == NOT_INSTALLED:
        return [f"TensorRT needs cuda-python: pip install {wanted}."]
    version = str(bindings.values.get("version"))
    if bindings.ok and [int(number) for number in re.findall(r"\d+", version)[:3]] < HOLDS_NO_GIL:
        return [
            f"cuda-python {version} stops the other threads while the GPU works: pip uninstall cuda-python "
            f"cuda-bindings, then pip install {wanted}."
        ]
    return []


def _backend_advice(backends: Mapping[str, Answer], cuda: Answer) -> list[str]:
    advice = []
    for name, answer in backends.items():
        if re.search(r"no ?kernel ?image", answer.reason, re.IGNORECASE):
            devices = cuda.values.get("devices") or [{"compute_capability": "unknown"}]
            capability = devices[0]["compute_capability"]
            first = "" if name == "tensorrt" else _uninstall(onnxruntimes())
            advice.append(
                f"{name}: this build has no kernels for compute capability {capability}: {first}install another one."
            )
        elif answer.state in FATAL:
            advice.append(f"{name} {answer.state} ({answer.reason}): choose another backend with --backend.")
        elif "wrong results" in answer.reason:
            advice.append(f"{name} computes wrong results on this machine, so the runtime does not use it.")
    return advice


def table(found: Diagnosis) -> str:
    """The diagnosis as text; the last line is the conclusion."""
    cuda = "; ".join(
        [f"CUDA {found.cuda.values['version']}"]
        + [
            f"{device['name']}, compute capability {device['compute_capability']}, {_gib(device['memory_bytes'])}"
            for device in found.cuda.values["devices"]
        ]
        if found.cuda.ok
        else [found.cuda.reason]
    )
    sections = {
        "Machine": [(name, "", text) for name, text in found.machine.items()],
        "Packages": [(name, answer.state, _package_text(answer)) for name, answer in found.packages.items()],
        "GPU": [("libcuda", found.cuda.state, cuda)],
        "Backends, best first": [
            (name, answer.state, _backend_text(answer)) for name, answer in found.backends.items()
        ],
    }
    width = max(len(name) for rows in sections.values() for name, _, _ in rows) + 2
    lines: list[str] = []
    for title, rows in sections.items():
        if rows:
            lines += [title, *(_row(width, *row) for row in rows), ""]
    if found.advice:
        lines += ["Advice", *(_fill(f"  - {text}", 4) for text in found.advice), ""]
    return "\n".join([*lines, found.conclusion])


def _package_text(answer: Answer) -> str:
    if not answer.ok:
        return answer.reason
    built = [name.removesuffix("ExecutionProvider") for name in answer.values.get("providers", ())]
    return f"{answer.values['version'] or 'version unknown'}" + (f", built for {', '.join(built)}" if built else "")


def _backend_text(answer: Answer) -> str:
    if not answer.ok:
        return answer.reason
    text = f"{answer.values['precision']}, {answer.values['check']}"
    return "; ".join([text, *(f"not {label}: {reason}" for label, reason in answer.values["not_used"].items())])


def _row(width: int, name: str, state: str, text: str) -> str:
    start = f"  {name:<{width}}" + (f"{state:<9}" if state else "")
    return _fill(start + text, len(start))


def _fill(text: str, indent: int) -> str:
    return textwrap.fill(text, 110, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
