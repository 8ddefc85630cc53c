"""What runs the model: a ladder of backends, best first, from which a real inference picks one.

A provider that is compiled in, or even listed by a session, may still not work on this machine: a build without kernels
for the GPU fails at the first inference, and some builds silently compute wrong results. So every candidate answers the
golden images before it is used, and each rejected candidate leaves its reason. On a GPU, each candidate is tried in the
precision that the bundle recommends, and in fp32 if fp16 gives wrong answers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from duallora_edge.errors import BackendError
from duallora_edge.runtime.backends.contract import (
    GoldenCheck,
    Infer,
    UnavailableError,
    check_golden,
    in_groups,
    nodes_on_cpu,
)
from duallora_edge.runtime.backends.tensorrt_api import find_gpu
from duallora_edge.runtime.bundle import INPUT, OUTPUTS, Bundle, FloatArray, Manifest, Outputs, gpu_graphs
from duallora_edge.runtime.device.cuda import NoGpuError
from duallora_edge.runtime.device.probes import NoAnswerError
from duallora_edge.runtime.graph_weights import external_arrays
from duallora_edge.runtime.preprocess import Pixels

CPU_PROVIDER = "CPUExecutionProvider"
_NODES_ON_CPU = "fallback to CPU EP has been explicitly disabled"  # words of ONNX Runtime


@dataclass(frozen=True)
class Rung:
    """A backend and the precision in which it runs."""

    backend: str
    precision: str

    def __str__(self) -> str:
        return f"{self.backend} in {self.precision}"

    def is_below(self, other: Rung) -> bool:
        """Whether it stands below ``other``: a later backend of the ladder, or the same without its fp16."""
        return self._height < other._height

    @property
    def _height(self) -> tuple[int, bool]:
        return -BACKENDS.index(self.backend), self.precision == "fp16"


@dataclass(frozen=True)
class Backend:
    """The backend that runs, the check it passed, and why each better one was not used (name -> reason).

    ``precision`` is that of the graph that runs. A backend that was also tried in fp32 has a second reason, under
    its name with " in fp32". ``irrelevant`` are the names in ``not_used`` that nobody expects to run: they are not
    installed, were not asked for by name, and this machine has no GPU. ``on_cpu`` are the nodes of the graph that a
    backend for the GPU leaves to the CPU.

    ``infer`` takes ``uint8 [N, S, S, 3]`` RGB images and returns `Outputs`; it may be called from several threads
    at once. It raises `BackendError` when the device fails.
    """

    name: str
    infer: Infer
    check: GoldenCheck
    not_used: Mapping[str, str]
    precision: str = "fp32"
    irrelevant: frozenset[str] = frozenset()
    on_cpu: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a person: what runs, and why nothing better does where this machine could run it."""
        name = f"{self.name} (ONNX Runtime)" if self.name in ("cuda", "cpu") else self.name
        notes = [nodes_on_cpu(self.on_cpu)] if self.on_cpu else []
        notes += [f"not {label}: {reason}" for label, reason in self.not_used.items() if label not in self.irrelevant]
        return "; ".join([name, *notes])

    @property
    def rung(self) -> Rung:
        """Where on the ladder it stands."""
        return Rung(self.name, self.precision)

    def to_json(self) -> dict[str, Any]:
        """Name, precision, golden check, reasons and nodes on the CPU as JSON values."""
        return {
            "name": self.name,
            "precision": self.precision,
            "not_used": dict(self.not_used),
            "on_cpu": list(self.on_cpu),
            "golden_check": asdict(self.check),
        }


def _open_tensorrt(bundle: Bundle, threads: int | None, build: bool = False) -> Infer:
    from duallora_edge.runtime.backends.tensorrt import open_tensorrt

    return open_tensorrt(bundle, build)


def _open_cuda(bundle: Bundle, threads: int | None) -> Infer:
    provider = "CUDAExecutionProvider"
    _import_onnxruntime(provider)
    options = {
        # TensorFloat-32 (10 bits of mantissa) is on by default and costs the parity that the bundle promises.
        "use_tf32": "0",
        # On a Jetson this is the memory of the whole system. By default it grows by powers of two, without a limit.
        "gpu_mem_limit": str(find_gpu().memory_bytes // 2),
        "arena_extend_strategy": "kSameAsRequested",
    }
    return _open_onnxruntime(bundle, threads, provider, options)


def _open_cpu(bundle: Bundle, threads: int | None) -> Infer:
    return _open_onnxruntime(bundle, threads, CPU_PROVIDER, {})


# Best first. A rung raises UnavailableError if this installation lacks it, anything else if it fails.
LADDER: dict[str, Callable[[Bundle, int | None], Infer]] = {
    "tensorrt": _open_tensorrt,
    "cuda": _open_cuda,
    "cpu": _open_cpu,
}
BACKENDS = ("auto", *LADDER)


def open_backend(
    bundle: Bundle, backend: str = "auto", threads: int | None = None, strict: bool = False, build: bool = False
) -> Backend:
    """Open the best backend, from ``backend`` downwards, that answers the golden images correctly.

    ``backend``: a rung of the ladder, or ``"auto"`` for those that the manifest names (all when it names none).
    ``threads``: CPU threads of one inference, by default ONNX Runtime's choice (the physical cores). ``strict``: a
    fallback is an error. With ``"auto"``, only a backend that is installed and fails counts as one; with a named
    backend, any other backend does. So does a node that ONNX Runtime leaves to the CPU. ``build``: build TensorRT's
    engine when there is none yet, which takes minutes on a device; without it, a backend that has no engine is not
    used.

    Raises `BackendError` when no backend works, or on a fallback with ``strict``.
    """
    if backend not in BACKENDS:
        raise BackendError(f"Unknown backend '{backend}'; use one of {', '.join(BACKENDS)}.")
    if threads is not None and threads < 1:
        raise BackendError(f"The number of threads must be at least 1, not {threads}.")
    names = list(LADDER)
    wanted = _auto_names(bundle.manifest) if backend == "auto" else names[names.index(backend) :]
    opened, not_used = _open_first(bundle, wanted, threads, backend if strict else None, build)
    if opened is not None:
        return opened if backend == "auto" else replace(opened, irrelevant=frozenset())
    reasons = "; ".join(f"{label}: {reason}" for label, reason in not_used.items())
    fallback_left = strict and names[-1] not in not_used
    remedy = "see 'duallora-edge doctor' or export the run again"
    if fallback_left:
        remedy = "leave out 'strict' to fall back"
    raise BackendError(f"No backend can run {bundle.path} as asked ({reasons}); {remedy}.")


def _auto_names(manifest: Manifest) -> list[str]:
    """What ``"auto"`` tries, best first: the backends that a manifest names, all when it names none."""
    return [name for name in manifest.backends if name in LADDER] or list(LADDER)


def _open_first(
    bundle: Bundle, names: Sequence[str], threads: int | None = None, strict: str | None = None, build: bool = False
) -> tuple[Backend | None, dict[str, str]]:
    """The first of ``names`` that answers the golden images correctly, and why the others do not (label -> reason).

    ``strict``: the first failure ends the search, and so does this name if it is not installed.
    """
    golden = bundle.golden()
    missing: dict[str, UnavailableError] = {}
    not_used: dict[str, str] = {}
    for label, name, graph in _attempts(bundle, names):
        if name in missing:
            continue
        opener = partial(_open_tensorrt, build=True) if build and name == "tensorrt" else LADDER[name]
        try:
            opened = opener(graph, threads)
            on_cpu = opened.on_cpu if isinstance(opened, OnnxRuntime) else ()
            if strict and on_cpu:
                raise BackendError(nodes_on_cpu(on_cpu))
            infer = in_groups(opened, bundle.manifest.batch)
            check = check_golden(infer, golden, graph.manifest.precision)
        except UnavailableError as error:
            not_used[label] = str(error)
            missing[name] = error
            if strict == name:
                break
            continue
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            not_used[label] = _first_line(error)
        else:
            if check.passed:
                no_gpu = any(isinstance(error.__cause__, NoGpuError) for error in missing.values())
                irrelevant = frozenset(missing) if no_gpu else frozenset()
                return Backend(name, infer, check, not_used, graph.manifest.precision, irrelevant, on_cpu), not_used
            not_used[label] = f"wrong results in {graph.manifest.precision}, {check}"
        if strict:
            break
    return None, not_used


def rungs(path: str) -> dict[str, Any]:
    """For a child process: verify the bundle at ``path``; the names of all rungs, and what ``"auto"`` tries."""
    return {"rungs": list(LADDER), "auto": _auto_names(Bundle.open(path).manifest)}


def rung(path: str, name: str) -> dict[str, Any]:
    """For a child process: run the golden images of the bundle at ``path`` on the rung ``name`` alone."""
    opened, not_used = _open_first(Bundle.open(path), [name])
    if opened is None:
        raise NoAnswerError("; ".join(why if label == name else f"{label}: {why}" for label, why in not_used.items()))
    notes = [str(opened.check), *([nodes_on_cpu(opened.on_cpu)] if opened.on_cpu else [])]
    return {"check": "; ".join(notes), **opened.to_json()}


def _attempts(bundle: Bundle, names: Sequence[str]) -> Iterator[tuple[str, str, Bundle]]:
    """Everything worth trying: a label, the rung, and the bundle in a precision. On a CPU, fp16 only costs time."""
    exact = bundle.in_fp32
    for name in names:
        yield name, name, exact if name == "cpu" else bundle
        if name != "cpu" and bundle.manifest.precision != "fp32":
            yield f"{name} in fp32", name, exact


def _import_onnxruntime(provider: str) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UnavailableError(f"ONNX Runtime cannot be imported ({_first_line(error)})") from error
    if provider not in ort.get_available_providers():
        raise UnavailableError(f"this ONNX Runtime ({ort.__version__}) is built without {provider}")
    return ort


@dataclass(frozen=True)
class OnnxRuntime:
    """An inference with ONNX Runtime, and the nodes that a provider for the GPU leaves to the CPU."""

    run: Infer
    on_cpu: tuple[str, ...]

    def __call__(self, images: Pixels) -> Outputs:
        return self.run(images)


def _open_onnxruntime(bundle: Bundle, threads: int | None, provider: str, options: dict[str, str]) -> OnnxRuntime:
    ort = _import_onnxruntime(provider)
    # The verified bytes, outside any folder in which a graph could find other files.
    content, weights = bundle.content(gpu_graphs(bundle.manifest.precision, split=False)[0]), bundle.weights
    graph = content.source or content.read()
    arrays = external_arrays(content.view(), weights) if weights is not None else {}
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]

    def start(refuse: bool = False, profile: str = "") -> Any:
        settings = ort.SessionOptions()
        # Errors only: graphs with named initializers cause a page of warnings. A refusal is an error that is raised.
        settings.log_severity_level = 4 if refuse else 3
        settings.inter_op_num_threads = 1
        if threads is not None:
            settings.intra_op_num_threads = threads
        if profile:
            settings.enable_profiling, settings.profile_file_prefix = True, profile
        if refuse:
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if values:
            settings.add_external_initializers(list(arrays), values)
        # Without fallback, or a failing GPU would silently be replaced by the CPU.
        session = ort.InferenceSession(graph, settings, providers=[(provider, options)], enable_fallback=0)
        if session.get_providers()[0] != provider:
            raise BackendError(f"ONNX Runtime could not start {provider} on this machine")
        return session

    on_cpu: tuple[str, ...] = ()
    if provider == CPU_PROVIDER:
        session = start()
    else:
        try:
            session = start(refuse=True)
        except Exception as error:
            if _NODES_ON_CPU not in str(error):
                raise
            with tempfile.TemporaryDirectory() as folder:
                session = start(profile=str(Path(folder) / "nodes"))
                size = bundle.manifest.preprocessing.size
                session.run(None, {INPUT: np.zeros((bundle.manifest.batch or 1, size, size, 3), np.uint8)})
                on_cpu = _nodes_on_cpu(Path(session.end_profiling()))
    shapes = bundle.manifest.output_shapes

    def infer(images: Pixels) -> Outputs:
        try:
            arrays: list[FloatArray] = session.run(list(OUTPUTS), {INPUT: images})
        except Exception as error:  # see above: no common base class
            raise BackendError(
                f"The model failed on {provider} ({_first_line(error)}); try a smaller batch."
            ) from error
        for array, (name, shape) in zip(arrays, shapes(len(images)).items(), strict=True):
            if array.shape != shape or array.dtype != np.float32:
                raise BackendError(
                    f"The model returned '{name}' as {array.dtype} {list(array.shape)} instead of float32 "
                    f"{list(shape)}; export the run again."
                )
        return Outputs(*arrays)

    return OnnxRuntime(infer, on_cpu)


def _nodes_on_cpu(profile: Path) -> tuple[str, ...]:
    """The nodes that ran on the CPU, from a profile that ONNX Runtime wrote."""
    events = json.loads(profile.read_text(encoding="utf-8"))
    ran = [event for event in events if event.get("args", {}).get("provider") == CPU_PROVIDER]
    return tuple(dict.fromkeys(event["name"].removesuffix("_kernel_time") for event in ran))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
