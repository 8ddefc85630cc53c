"""Questions about this machine, each answered in a child process.

A broken GPU package can crash the process that imports it, or hang forever. So each question is a function that a
short-lived child runs; the parent learns the answer, why there is none, which signal killed the child, or that it hung.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from duallora_edge.errors import DualLoraEdgeError
from duallora_edge.runtime.device.cuda import Driver, NoGpuError

MODULE = "duallora_edge.runtime.device.probes"
NOT_INSTALLED = "not installed"
KILL_WAIT_S = 5.0
OOM_SCORE = "900"  # of 1000: when memory runs out, the system ends this process before the application
_POLL_S = 0.02
_PR_SET_PDEATHSIG = 1  # prctl(2)
# The answer is the last marked line: GPU libraries print what they like around it.
_MARK = "duallora-edge answers: "


@dataclass(frozen=True)
class Answer:
    """What came back: ``"ok"`` with JSON values, otherwise the reason.

    ``state`` is ``"no"`` (the question ran, and it does not work), ``"crashed"`` (the process died) or ``"hung"``.
    """

    state: str
    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.state == "ok"


class NoAnswerError(Exception):
    """There is no answer; the message is the reason."""


def ask(
    question: str,
    *arguments: str,
    timeout_s: float,
    memory_bytes: int | None = None,
    cancel: threading.Event | None = None,
) -> Answer:
    """Run the function ``question`` ("module:function") on strings, in a process that gets ``timeout_s`` seconds.

    The function returns a dict of JSON values; whatever it raises is a "no" with the error's first line. A process
    that comes to hold more than ``memory_bytes`` is ended (Linux; memory of a GPU does not count), and so is one whose
    answer is no longer wanted because ``cancel`` was set.
    """
    # The child searches where this process does; "-m" would put the current folder in front.
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; from {MODULE} import answer; answer({os.getpid()}, sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, question, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                output, errors = process.communicate(timeout=_POLL_S)
                break
            if cancel is not None and cancel.is_set():
                return Answer("no", reason="it was cancelled")
            if time.monotonic() > deadline:
                return Answer("hung", reason=f"no answer within {timeout_s:g} s")
            if memory_bytes is not None and _resident_bytes(process.pid) > memory_bytes:
                return Answer("crashed", reason=f"it took more than {memory_bytes / 1e6:.0f} MB of memory")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            # With a limit: a process that hangs inside a driver cannot be killed.
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=KILL_WAIT_S)
    return _read(process.returncode, output.decode(errors="replace"), errors.decode(errors="replace"))


def _resident_bytes(process: int) -> int:
    """How much memory a process holds; 0 where that cannot be told, as after its end."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def _read(code: int, output: str, errors: str) -> Answer:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        cause = ", as Linux does when memory runs out" if name == "SIGKILL" else ""
        return Answer("crashed", reason=f"the process was killed by {name}{cause}")
    marked = [line for line in output.splitlines() if line.startswith(_MARK)]
    if code or not marked:
        said = next((f" ({line.strip()[:200]})" for line in reversed(errors.splitlines()) if line.strip()), "")
        return Answer("crashed", reason=f"the process ended with code {code} and no answer{said}")
    result = Answer(**json.loads(marked[-1].removeprefix(_MARK)))
    # NumPy says it there only: what imports a module built for NumPy 1 gets an ImportError without words.
    numpy = None if result.ok else re.search("compiled using NumPy 1", errors)
    return replace(result, reason=f"{result.reason} ({numpy[0]})") if numpy else result


def answer(parent: int, arguments: Sequence[str]) -> None:
    """The child's side of `ask`: call the function, print the result, and end with the ``parent``."""
    _end_with(parent)
    module, function = arguments[0].split(":")
    try:
        result = Answer("ok", getattr(importlib.import_module(module), function)(*arguments[1:]))
    except Exception as error:  # any error is the answer
        result = Answer("no", reason=first_line(error))
    print(f"\n{_MARK}{json.dumps(asdict(result))}", flush=True)


def _end_with(parent: int) -> None:
    """End when the parent ends (Linux), and before it when the system runs out of memory."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before it could be watched
        os._exit(1)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type."""
    lines = str(error).strip().splitlines()
    line = (lines[0] if lines else "")[:300]
    whole = line and isinstance(error, (NoAnswerError, DualLoraEdgeError))  # a sentence that stands alone
    return line if whole else f"{type(error).__name__}: {line}".rstrip(": ")


def package(modules: str, distributions: str) -> dict[str, Any]:
    """Import the first of ``modules`` that exists; its version, or that of the first distribution (comma-separated).

    For ONNX Runtime also the providers that are compiled in, which need not work.
    """
    for name in modules.split(","):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and f"{name}.".startswith(f"{error.name}."):
                continue  # it or a package above it, not something that it needs
            raise
        break
    else:
        raise NoAnswerError(NOT_INSTALLED)
    if module.__file__ is None:
        raise NoAnswerError("its folder is there, but empty")
    if hasattr(module, "nptype"):  # TensorRT's Python names NumPy types that newer NumPy does not have
        module.nptype(module.float32)
    values = {"version": getattr(module, "__version__", None) or _version(distributions.split(","))}
    if hasattr(module, "get_available_providers"):
        values["providers"] = module.get_available_providers()
    return values


def _version(distributions: Sequence[str]) -> str | None:
    from importlib import metadata  # here, because it takes longer to import than the rest of the runtime

    for name in distributions:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def cuda() -> dict[str, Any]:
    """The CUDA version of the driver and the devices it can see (memory in bytes)."""
    try:
        driver = Driver()
        version, gpus = driver.cuda_version, list(driver.gpus())
    except NoGpuError as error:
        raise NoAnswerError(str(error)) from error
    devices = [
        {
            "name": gpu.name,
            "compute_capability": f"{gpu.compute_capability[2:-1]}.{gpu.compute_capability[-1]}",
            "memory_bytes": gpu.memory_bytes,
        }
        for gpu in gpus
    ]
    return {"version": version, "devices": devices}


def tensorrt_start(module: str) -> dict[str, Any]:
    """Create TensorRT's runtime; only for machines whose driver answers, because TensorRT crashes without one."""
    trt = importlib.import_module(module)
    trt.Runtime(trt.Logger(trt.Logger.ERROR))
    return {}
