"""Building a TensorRT engine on the device that will run it, in a child process.

With TensorRT-RTX an engine can also be built ahead of time, for a GPU that this machine does not have. The
tests cover that; building with TensorRT on a GPU is untested on a device.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from duallora_edge.files import atomic_directory, own_folder
from duallora_edge.runtime.backends.contract import ENGINE_BATCH, UnavailableError
from duallora_edge.runtime.backends.engine_cache import (
    PLAN,
    RECORD,
    Engine,
    EngineError,
    EngineKey,
    RefusedModelError,
    delete_engine,
    disk_errors,
    engines_folder,
    evict,
    find_engine,
    locked,
    write_record,
)
from duallora_edge.runtime.backends.engine_worker import Job
from duallora_edge.runtime.backends.tensorrt_api import TENSORRT_RTX, TensorRT, find_gpu, load_tensorrt
from duallora_edge.runtime.bundle import Bundle, Manifest
from duallora_edge.runtime.device.cuda import Driver, Gpu, NoGpuError
from duallora_edge.runtime.process_memory import read_memory

WORKER = "duallora_edge.runtime.backends.engine_worker"
# Part of every key: raise it when the same inputs give another engine, for example after changing the worker.
RECIPE = 1
# Estimates of what a build takes besides its workspace: libraries, and the model in several forms at once.
LIBRARY_BYTES = 600 * 10**6
MODEL_COPIES = 5
MIN_WORKSPACE_MB = 64
TIMEOUT_S = 3600.0
HEARTBEAT_S = 30.0
EXIT_S = 5.0
_POLL_S = 0.2

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Limits:
    """What ends a build early: a moment of ``time.monotonic()``, and an event."""

    deadline: float
    cancel: threading.Event | None

    def check(self) -> None:
        if self.cancel is not None and self.cancel.is_set():
            raise EngineError("The build was cancelled; run 'duallora-edge build' to start it again.")
        if time.monotonic() > self.deadline:
            raise EngineError("The build took longer than its time limit; allow it more with --timeout.")


def local_target() -> tuple[TensorRT, Gpu]:
    """The best TensorRT installed and the GPU of this machine; raises `UnavailableError` when one is missing."""
    gpu = find_gpu()
    tensorrt = load_tensorrt()
    if tensorrt.is_rtx and gpu.compute_capability not in tensorrt.compute_capabilities:
        raise UnavailableError(
            f"{tensorrt} builds for {', '.join(tensorrt.compute_capabilities)}, not for {gpu.compute_capability} "
            f"({gpu.name}): install TensorRT itself"
        )
    return tensorrt, gpu


def engine_keys(bundle: Bundle, tensorrt: TensorRT, gpu: Gpu | str) -> list[EngineKey]:
    """The keys of a bundle's engines, in the order in which they run: one, or two where it is split."""
    return [engine_key(bundle, tensorrt, gpu, graph) for graph in bundle.gpu_graphs]


def engine_key(bundle: Bundle, tensorrt: TensorRT, gpu: Gpu | str, graph: Path | None = None) -> EngineKey:
    """The key of the engine of a graph, by default the whole one.

    ``gpu``: the GPU it is for, or with TensorRT-RTX a compute capability such as ``"sm86"``.
    """
    device = gpu if isinstance(gpu, Gpu) and not tensorrt.is_rtx else None
    return EngineKey(
        package=tensorrt.package,
        version=tensorrt.version,
        platform=f"{platform.system()}-{platform.machine()}".lower(),
        compute_capability=gpu.compute_capability if isinstance(gpu, Gpu) else gpu,
        device=device.name if device else None,
        multiprocessors=device.multiprocessors if device else None,
        model_sha256=bundle.manifest.graph((graph or _graph(bundle)).name).sha256,
        precision=bundle.manifest.precision,
        batch=bundle.manifest.batch,
        max_batch=bundle.manifest.batch or ENGINE_BATCH,
        recipe=RECIPE,
    )


def _graph(bundle: Bundle) -> Path:
    return bundle.graph(bundle.manifest.precision)


def build_engines(
    bundle: Bundle,
    compute_capability: str | None = None,
    workspace_mb: int | None = None,
    force: bool = False,
    timeout_s: float = TIMEOUT_S,
    say: Say = lambda text: None,
) -> list[Engine]:
    """Build what a bundle needs on a GPU, arguments as for `build_engine`: one engine, or two where it is split.

    The prefix of a split bundle does not change with new tasks, so its engine is then found in the cache.
    """
    return [
        build_engine(bundle, compute_capability, workspace_mb, force, timeout_s, say, graph=graph)
        for graph in bundle.gpu_graphs
    ]


def build_engine(
    bundle: Bundle,
    compute_capability: str | None = None,
    workspace_mb: int | None = None,
    force: bool = False,
    timeout_s: float = TIMEOUT_S,
    say: Say = lambda text: None,
    cancel: threading.Event | None = None,
    graph: Path | None = None,
) -> Engine:
    """Build the engine of a bundle, in the precision its manifest names, or find it in the cache.

    ``compute_capability``: None for the GPU of this machine, or one that TensorRT-RTX builds for ahead of time
    (``"sm86"``). ``workspace_mb`` (10^6 bytes): the builder's working memory, by default the manifest's; less is
    granted where the machine has less. A stored engine that was built with another explicit ``workspace_mb`` is
    replaced, with ``force`` any. ``say`` is called with lines of progress; ``cancel`` ends the build when it is set.
    ``graph``: the ONNX file of the bundle, by default the whole of that precision.

    Raises `EngineError`, and `ConfigError` when others may write to the cache; a build that fails or is cancelled
    leaves nothing, and an engine that was there stays.
    """
    tensorrt, gpu = _target(compute_capability)
    graph = graph or _graph(bundle)
    key = engine_key(bundle, tensorrt, gpu, graph)
    folder = engines_folder()
    limits = _Limits(time.monotonic() + timeout_s, cancel)

    def stored() -> Engine | None:
        engine = None if force else find_engine(key)
        return engine if engine and workspace_mb in (None, engine.workspace_mb) else None

    with suppress(EngineError):  # damaged: dealt with below, where nobody else writes
        if engine := stored():
            return engine
    with disk_errors(folder):
        own_folder(folder)
        with locked(folder, key, _Waiting(limits, say)):
            try:
                if engine := stored():  # built while this one waited
                    return engine
            except EngineError:
                say("the stored engine is damaged; it is deleted and built again")
                delete_engine(folder / key.digest)
            _build(bundle.manifest, graph, key, folder / key.digest, workspace_mb, limits, say)
            engine = find_engine(key)
        evict(folder, key)
    if engine is None:
        raise EngineError(
            f"An engine just written to {folder} is gone; check whether another program empties that folder."
        )
    return replace(engine, from_cache=False)


class _Waiting:
    """What to do while another process builds the same engine: say so once, and keep to the limits."""

    def __init__(self, limits: _Limits, say: Say) -> None:
        self._limits = limits
        self._say: Say | None = say

    def __call__(self, process: str) -> None:
        if self._say is not None:
            self._say(f"process {process} is building this engine; waiting for it")
            self._say = None
        self._limits.check()


def _target(compute_capability: str | None) -> tuple[TensorRT, Gpu | str]:
    if compute_capability is None:
        try:
            return local_target()
        except UnavailableError as error:
            raise EngineError(
                f"No engine can be built for this machine: {error}; run this on the device, or name the compute "
                "capability of an RTX-class GPU (--compute-capability sm86) to build ahead of time with TensorRT-RTX."
            ) from error
    try:
        tensorrt = load_tensorrt((TENSORRT_RTX,))
    except UnavailableError as error:
        raise EngineError(f"Building ahead of time needs TensorRT-RTX: {error}.") from error
    if compute_capability not in tensorrt.compute_capabilities:
        raise EngineError(
            f"{tensorrt} cannot build for '{compute_capability}', only for "
            f"{', '.join(tensorrt.compute_capabilities)}; run 'duallora-edge build' on the device itself."
        )
    return tensorrt, compute_capability


def _build(
    manifest: Manifest, graph: Path, key: EngineKey, folder: Path, workspace_mb: int | None, limits: _Limits, say: Say
) -> None:
    workspace_mb = workspace_mb or manifest.workspace_mb
    granted_mb = _grant_workspace(workspace_mb, manifest.graph(graph.name).bytes, say)
    timing = key.timing_name

    def kept(rest: Path) -> None:
        say(f"files that do not belong to the engine are kept in {rest}")

    with atomic_directory(folder, replaces=(PLAN, RECORD), on_kept=kept) as staging:
        job = Job(
            package=key.package,
            model=str(graph),
            model_sha256=key.model_sha256,
            plan=str(staging / PLAN),
            max_batch=key.max_batch if key.batch is None else None,
            precision=key.precision,
            workspace_bytes=granted_mb * 10**6,
            compute_capability=key.compute_capability if key.device is None else None,
            timing_cache=str(folder.parent / timing) if timing else None,
        )
        facts = _run_worker(job, limits, say)
        write_record(
            staging,
            key,
            {"workspace_mb": workspace_mb, "granted_mb": granted_mb, **facts, "driver_cuda": driver_cuda(key)},
        )


def driver_cuda(key: EngineKey) -> str | None:
    """The newest CUDA version of this machine's driver, where the engine is for its GPU and the driver tells."""
    with suppress(NoGpuError):
        return Driver().cuda_version if key.device else None
    return None


def _grant_workspace(wanted_mb: int, model_bytes: int, say: Say) -> int:
    """The workspace that fits into the free memory, in MB. On a Jetson the GPU's memory is that of the system.

    Raises `EngineError` when even a small one does not fit.
    """
    available = read_memory().available.bytes
    besides = LIBRARY_BYTES + MODEL_COPIES * model_bytes
    if available is None:
        return wanted_mb
    granted = min(wanted_mb, (available - besides) // 10**6)
    if granted < min(wanted_mb, MIN_WORKSPACE_MB):
        raise EngineError(
            f"Building takes about {(besides + MIN_WORKSPACE_MB * 10**6) / 1e6:.0f} MB (estimate), but only "
            f"{available / 1e6:.0f} MB are available; close other programs or add swap."
        )
    if granted < wanted_mb:
        say(f"{granted} MB of workspace instead of {wanted_mb}: {available / 1e6:.0f} MB are available")
    return int(granted)


def _run_worker(job: Job, limits: _Limits, say: Say) -> dict[str, Any]:
    """Run the job in a child process; in any case, the process has ended afterwards.

    Raises `EngineError`, and ``OSError`` when the process could not write the plan.
    """
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER, job.to_text()],
            stdin=subprocess.PIPE,  # held open: the child ends when it closes
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "CUDA_MODULE_LOADING": "LAZY"},
            start_new_session=True,  # Ctrl-C ends this process, which then ends that one
        )
    except OSError as error:
        raise EngineError(
            f"The building process could not be started ({error.strerror}); close other programs."
        ) from error
    assert process.stdout is not None and process.stderr is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    words: deque[str | None] = deque(maxlen=10)
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, words.append), daemon=True),
    ]
    with process:
        try:
            for reader in readers:
                reader.start()
            answer = _listen(lines, limits, say)
            if not answer:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(EXIT_S)
        finally:
            process.kill()  # after its answer, it has nothing left to do
            code = process.wait()
            for reader in readers:
                reader.join()
    if "done" in answer:
        facts: dict[str, Any] = answer["done"]
        return facts
    if answer.get("errno") is not None:
        raise OSError(answer["errno"], answer["error"])
    if "error" in answer:
        raise RefusedModelError(
            f"{job.package} cannot build the engine, {answer['error']}; use another backend, or export the run for "
            "another target or precision."
        )
    raise EngineError(_post_mortem(code, [word for word in words if word]))


def _read(stream: IO[str], put: Callable[[str | None], None]) -> None:
    for line in stream:
        put(line.strip())
    put(None)


def _listen(lines: queue.SimpleQueue[str | None], limits: _Limits, say: Say) -> dict[str, Any]:
    """Pass the lines of progress on until the answer; it is empty when the process ends without one."""
    start = heard = time.monotonic()
    while True:
        limits.check()
        try:
            line = lines.get(timeout=_POLL_S)
        except queue.Empty:
            if time.monotonic() - heard > HEARTBEAT_S:
                heard = time.monotonic()
                say(f"still building after {heard - start:.0f} s")
            continue
        if line is None:
            return {}
        answer: dict[str, Any] = json.loads(line)
        if "progress" not in answer:
            return answer
        heard = time.monotonic()
        say(answer["progress"])


def _post_mortem(code: int, words: list[str]) -> str:
    if code == -signal.SIGKILL:
        return (
            "The building process was killed, most likely because memory ran out; close other programs, add swap, or "
            "allow less with --workspace-mb."
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    last = f" ({words[-1][:300]})" if words else ""
    return f"The building process {how}{last}; use another backend, or export the run for another target."
