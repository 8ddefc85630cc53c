"""The rung ``tensorrt``: threads, CUDA graphs, fixed batches, wrong shapes and wrong results.

There is no GPU here. A small imitation of TensorRT computes with NumPy, and one of the CUDA runtime copies between
blocks of ordinary memory, records graphs and counts what was not given back. What a real GPU does, no test here tells.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from duallora_edge.errors import BackendError
from duallora_edge.files import read_json, write_json
from duallora_edge.runtime import Classifier
from duallora_edge.runtime.backends import engine_build as engine
from duallora_edge.runtime.backends import tensorrt as tensorrt_backend
from duallora_edge.runtime.backends import tensorrt_api
from duallora_edge.runtime.backends.contract import UnavailableError
from duallora_edge.runtime.backends.engine_build import build_engine, build_engines
from duallora_edge.runtime.backends.engine_cache import RefusedModelError
from duallora_edge.runtime.backends.ladder import Backend, open_backend
from duallora_edge.runtime.bundle import (
    BETWEEN,
    INPUT,
    MANIFEST,
    MODEL,
    MODEL_FP16,
    OUTPUTS,
    Bundle,
    FileRecord,
    Manifest,
)
from duallora_edge.runtime.device.cuda import Gpu

GPU = Gpu("Imaginary Orin", "sm87", 8, 8 * 10**9)
Compute = Callable[[np.ndarray], dict[str, np.ndarray]]


# What an engine reads and returns, by the first word of the name of its graph.
PARTS = {"model": ((INPUT,), OUTPUTS), "prefix": ((INPUT,), BETWEEN), "suffix": (BETWEEN, OUTPUTS)}


class CudaError(IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorLaunchFailure = 719  # noqa: N815
    cudaErrorStreamCaptureUnsupported = 900  # noqa: N815


class Cuda:
    """The CUDA runtime on ordinary memory. ``fail`` maps a function to the error it answers with."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815

    def __init__(self) -> None:
        self.fail: dict[str, IntEnum] = {}
        self.memory: dict[int, Any] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: dict[int, list[Callable[[], None]]] = {}
        self.streams: set[int] = set()
        self.launches = 0
        self.captures = self.most_captures = 0
        self.capture_s = 0.0
        self.lock = threading.Lock()
        self.next = 1

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        act = getattr(type(self), f"do_{name}")

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name in self.fail:
                return (self.fail[name], None)
            value = act(self, *arguments)
            return (CudaError.cudaSuccess,) if value is None else (CudaError.cudaSuccess, value)

        return call

    def number(self) -> int:
        with self.lock:
            self.next += 1
            return self.next

    def do_cudaMalloc(self, size: int) -> int:  # noqa: N802
        block = (ctypes.c_byte * size)()
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    do_cudaMallocHost = do_cudaMalloc  # noqa: N815

    def do_cudaFree(self, address: int) -> None:  # noqa: N802
        del self.memory[address]

    do_cudaFreeHost = do_cudaFree  # noqa: N815

    def do_cudaStreamCreateWithFlags(self, flags: int) -> int:  # noqa: N802
        assert flags == self.cudaStreamNonBlocking, "the default stream would wait, and break captures"
        stream = self.number()
        self.streams.add(stream)
        return stream

    def do_cudaStreamDestroy(self, stream: int) -> None:  # noqa: N802
        self.streams.remove(stream)

    def do_cudaStreamSynchronize(self, stream: int) -> None:  # noqa: N802
        pass

    def do_cudaGetLastError(self) -> None:  # noqa: N802
        pass

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Do the work, or record it."""
        if stream in self.recording:
            self.recording[stream].append(work)
        else:
            work()

    def do_cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:  # noqa: N802
        self.submit(stream, lambda: ctypes.memmove(target, source, size) and None)

    def do_cudaStreamBeginCapture(self, stream: int, mode: int) -> None:  # noqa: N802
        self.recording[stream] = []
        self.captures += 1
        self.most_captures = max(self.most_captures, len(self.recording))
        time.sleep(self.capture_s)

    def do_cudaStreamEndCapture(self, stream: int) -> int:  # noqa: N802
        graph = self.number()
        self.graphs[graph] = self.recording.pop(stream)
        return graph

    def do_cudaGraphInstantiate(self, graph: int, flags: int) -> int:  # noqa: N802
        launchable = self.number()
        self.graphs[launchable] = self.graphs[graph]
        return launchable

    def do_cudaGraphLaunch(self, graph: int, stream: int) -> None:  # noqa: N802
        self.launches += 1
        for work in self.graphs[graph]:
            work()

    def do_cudaGraphDestroy(self, graph: int) -> None:  # noqa: N802
        del self.graphs[graph]

    do_cudaGraphExecDestroy = do_cudaGraphDestroy  # noqa: N815


class Context:
    """An execution context: NumPy between the addresses it was given."""

    def __init__(self, trt: Imitation, part: str) -> None:
        self.trt, self.part = trt, part
        self.addresses: dict[str, int] = {}
        self.images = 0
        self.busy = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.images = shape[0]
        fits = shape == (shape[0], *self.trt.shapes[name][1:])
        return fits and name in PARTS[self.part][0] and self.trt.batch in (None, shape[0]) and shape[0] <= 16

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.images, *self.trt.shapes[name][1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def view(self, name: str) -> np.ndarray:
        shape, dtype = self.get_tensor_shape(name), np.uint8 if name == INPUT else np.float32
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_byte * size).from_address(self.addresses[name]), dtype).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        if self.trt.fails:
            return False
        self.trt.cuda.submit(stream, self.compute)
        return True

    def compute(self) -> None:
        assert not self.busy, "two threads in one context"
        self.busy = True
        for name, values in self.answers().items():
            self.view(name)[:] = values
        self.busy = False

    def answers(self) -> dict[str, np.ndarray]:
        if self.part == "prefix":
            image = self.view(INPUT)
            return {"tokens": image.reshape(len(image), -1, 3), "phi": image.mean(axis=(1, 2))}
        if self.part == "suffix":
            image = self.view("tokens").reshape(-1, 16, 16, 3).astype(np.uint8)
            np.testing.assert_allclose(self.view("phi"), image.mean(axis=(1, 2)), rtol=1e-5)
            return self.trt.compute(image)
        return self.trt.compute(self.view(INPUT))


class Imitation:
    """The module ``tensorrt``. Its engine computes ``compute``; the attributes say what is wrong with it."""

    def __init__(self, cuda: Cuda, compute: Compute) -> None:
        self.__version__ = "10.3.0.30"
        self.cuda = cuda
        self.compute = compute
        self.batch: int | None = None
        self.fails = False
        self.loads = True
        self.contexts = 0
        self.most_contexts = 99
        self.shapes: dict[str, tuple[int, ...]] = {
            INPUT: (-1, 16, 16, 3),
            "probabilities": (-1, 4),
            "task_probabilities": (-1, 2),
            "novelty": (-1,),
            "features": (-1, 3),
            "tokens": (-1, 256, 3),
            "phi": (-1, 3),
        }
        self.dtypes = {name: "uint8" if name == INPUT else "float32" for name in self.shapes}
        self.uint8, self.float32 = "uint8", "float32"
        self.TensorIOMode = SimpleNamespace(INPUT=1, OUTPUT=2)
        self.ILogger = type("ILogger", (), {"__init__": lambda self: None, "ERROR": 1, "WARNING": 2})

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        def load(plan: bytes) -> Any:
            part = plan.decode()
            logger.log(2, "another model\nof devices")
            reads, writes = PARTS[part]
            if not self.loads:
                logger.log(1, "The plan file is not compatible")
                return None
            names = [name for name in (*reads, *writes) if name in self.shapes]
            return SimpleNamespace(
                num_io_tensors=len(names),
                get_tensor_name=names.__getitem__,
                get_tensor_mode=lambda name: 1 if name in reads else 2,
                get_tensor_dtype=self.dtypes.__getitem__,
                get_tensor_shape=lambda name: (self.batch or -1, *self.shapes[name][1:]),
                create_execution_context=lambda: self.create_context(part),
            )

        return SimpleNamespace(deserialize_cuda_engine=load)

    def create_context(self, part: str) -> Context | None:
        self.contexts += 1
        return Context(self, part) if self.contexts <= self.most_contexts else None


@pytest.fixture
def trt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numpy_outputs: Callable[[np.ndarray], dict[str, np.ndarray]]
) -> Imitation:
    """TensorRT, CUDA and a GPU are there, and a builder that writes the plan of the imitation."""
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(tmp_path / "cache"))
    imitation = Imitation(Cuda(), numpy_outputs)
    monkeypatch.setitem(sys.modules, "tensorrt", imitation)
    monkeypatch.setitem(sys.modules, tensorrt_backend.CUDART[0], imitation.cuda)
    for module in (tensorrt_api, engine):
        monkeypatch.setattr(module, "find_gpu", lambda: GPU)

    def work(job: Any, limits: Any, say: Any) -> dict[str, Any]:
        Path(job.plan).write_text(Path(job.model).stem.split("-")[0])
        return {"seconds": 1.0, "device_memory_bytes": 10}

    monkeypatch.setattr(engine, "_run_worker", work)
    return imitation


@pytest.fixture
def built(trt: Imitation, shared_bundle: Path) -> Bundle:
    """A bundle whose engine was built."""
    bundle = Bundle.open(shared_bundle)
    build_engine(bundle)
    return bundle


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def assert_right(backend: Backend, compute: Compute, images: np.ndarray) -> None:
    outputs = backend.infer(images)
    for name, expected in compute(images).items():
        np.testing.assert_allclose(getattr(outputs, name), expected, atol=1e-6)


# -- which rung -----------------------------------------------------------------------------------------------


def test_an_engine_that_was_built_is_used(trt: Imitation, built: Bundle) -> None:
    backend = open_backend(built)
    assert (backend.name, backend.precision, backend.not_used) == ("tensorrt", "fp32", {})
    for count in (1, 2, 16, 17, 40, 1):
        assert_right(backend, trt.compute, frames(count, count))


@pytest.fixture
def any_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a graph may hold anything: the imitation does not read them."""
    monkeypatch.setattr("duallora_edge.runtime.graph_check.check_graph", lambda *_: None)


def split(folder: Path, precision: str = "fp32") -> Bundle:
    """The bundle in ``folder`` with its graph in two parts as well."""
    document = read_json(folder / MANIFEST)
    document["engine"].update(precision=precision, split=True)
    for name in {
        f"prefix-{precision}.onnx",
        f"suffix-{precision}.onnx",
        *([MODEL_FP16] if precision != "fp32" else []),
    }:
        (folder / name).write_bytes(name.encode())
        document["files"][name] = vars(FileRecord.of((folder / name).read_bytes()))
    write_json(folder / MANIFEST, document)
    return Bundle.open(folder)


@pytest.mark.usefixtures("any_graph")
def test_a_split_bundle_runs_as_two_engines(trt: Imitation, bundle: Path) -> None:
    opened = split(bundle)
    assert "has no engine" in open_backend(opened, threads=1).not_used["tensorrt"]
    prefix, suffix = build_engines(opened)
    backend = open_backend(opened)
    assert (backend.name, backend.not_used) == ("tensorrt", {})
    for count in (1, 2, 40, 1, 1):
        assert_right(backend, trt.compute, frames(count, count))
    assert trt.cuda.launches > 0 and prefix.key != suffix.key

    (bundle / "suffix-fp32.onnx").write_bytes(b"a new task")
    again = build_engines(split_again(bundle))
    assert [engine.from_cache for engine in again] == [True, False]


def split_again(folder: Path) -> Bundle:
    """The bundle after its second part changed."""
    document = read_json(folder / MANIFEST)
    document["files"]["suffix-fp32.onnx"] = vars(FileRecord.of((folder / "suffix-fp32.onnx").read_bytes()))
    write_json(folder / MANIFEST, document)
    return Bundle.open(folder)


@pytest.mark.usefixtures("any_graph")
def test_a_split_bundle_with_wrong_results_is_tried_whole_in_fp32(trt: Imitation, bundle: Path) -> None:
    opened = split(bundle, "fp16")
    build_engines(opened)
    build_engine(opened.in_fp32)
    right, wrong = trt.compute, lambda images: {n: v * 0.9 for n, v in right(images).items()}
    trt.compute = wrong
    backend = open_backend(opened, threads=1)
    assert backend.name == "cpu" and "wrong results in fp16" in backend.not_used["tensorrt"]
    assert "wrong results in fp32" in backend.not_used["tensorrt in fp32"]


def test_no_engine_is_built_by_loading(trt: Imitation, shared_bundle: Path) -> None:
    bundle = Bundle.open(shared_bundle)
    backend = open_backend(bundle, threads=1)
    assert backend.name == "cpu"
    reason = backend.not_used["tensorrt"]
    assert reason.startswith("TensorRT 10.3.0.30 has no engine of this model for Imaginary Orin yet: run ")
    assert reason.endswith(f"'duallora-edge build {bundle.path}'")
    assert open_backend(bundle, strict=True).name == "cpu"  # nothing failed, so nothing fell back
    with pytest.raises(BackendError, match="has no engine"):
        open_backend(bundle, "tensorrt", strict=True)
    classifier = Classifier.load(shared_bundle, build=True)
    assert classifier.backend.name == "tensorrt"
    assert classifier(np.full((40, 40, 3), (250, 5, 5), np.uint8)).label == "red"
    assert Classifier.load(shared_bundle).backend.name == "tensorrt"


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.usefixtures("any_graph")
def test_a_twin_loads_what_was_saved(
    trt: Imitation,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
    is_split: bool,
) -> None:
    opened = split(bundle) if is_split else Bundle.open(bundle)
    assert call("build", bundle, "--save", tmp_path / "engines.tar")[0] == 0
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(tmp_path / "twin"))
    right = trt.compute
    trt.compute = lambda images: {**right(images), "novelty": right(images)["novelty"] + 1}
    code, out, err = call("build", bundle, "--load", tmp_path / "engines.tar")
    assert (code, out) == (1, "") and "answer wrongly here" in err and not list((tmp_path / "twin/engines").iterdir())
    trt.compute = right
    code, out, err = call("build", bundle, "--load", tmp_path / "engines.tar")
    assert (code, err) == (0, "") and out.count("loaded)") == 1 + is_split
    assert open_backend(opened).name == "tensorrt"


def test_an_engine_of_another_gpu_is_not_used(trt: Imitation, built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_gpu", lambda: replace(GPU, multiprocessors=4))
    assert "has no engine" in open_backend(built, threads=1).not_used["tensorrt"]


def test_without_cuda_python(
    trt: Imitation, built: Bundle, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    for name in tensorrt_backend.CUDART:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match=r"not installed: pip install 'cuda-python>=12.9.1,<13' for CUDA 12"):
        tensorrt_backend.load_cudart()
    assert "cuda-python" in open_backend(built, threads=1).not_used["tensorrt"]
    assert call("build", built.path)[2].startswith("Error: An engine could be built, but not checked or run")


def test_the_older_name_of_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    older = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(cudart=older))
    monkeypatch.setitem(sys.modules, "cuda.cudart", older)
    assert tensorrt_backend.load_cudart() is older


def wrong_dtype(trt: Imitation) -> None:
    trt.dtypes["features"] = "float16"


def wrong_output(trt: Imitation) -> None:
    trt.shapes["probabilities"] = (-1, 5)


def wrong_input(trt: Imitation) -> None:
    trt.shapes[INPUT] = (-1, 8, 8, 3)


def missing_output(trt: Imitation) -> None:
    del trt.shapes["novelty"]


def wrong_numbers(trt: Imitation) -> None:
    compute = trt.compute
    trt.compute = lambda images: {**compute(images), "probabilities": compute(images)["probabilities"][:, ::-1]}


def no_numbers(trt: Imitation) -> None:
    compute = trt.compute
    trt.compute = lambda images: {**compute(images), "probabilities": np.full((len(images), 4), np.nan)}


def no_memory(trt: Imitation) -> None:
    trt.cuda.fail["cudaMalloc"] = CudaError.cudaErrorMemoryAllocation


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (wrong_dtype, "tensors of the engine differ .*features float16.*export the run again"),
        (wrong_output, r"returns 'probabilities' as \[1, 5\] instead of \[1, 4\]; export"),
        (wrong_input, r"takes images of shape \[-1, 8, 8, 3\]; run 'duallora-edge build --force'"),
        (missing_output, "tensors of the engine differ"),
        (wrong_numbers, "wrong results in fp32, largest difference"),
        (no_numbers, "wrong results"),
        (lambda trt: setattr(trt, "loads", False), r"cannot load the engine \(The plan file is not compatible\)"),
        (lambda trt: setattr(trt, "fails", True), "could not start the model"),
        (lambda trt: setattr(trt, "most_contexts", 0), "no memory for another inference"),
        (no_memory, "GPU failed with cudaErrorMemoryAllocation"),
    ],
)
def test_what_does_not_work_leaves_its_reason_and_nothing_else(
    trt: Imitation, built: Bundle, fault: Callable[[Imitation], None], reason: str
) -> None:
    fault(trt)
    backend = open_backend(built, threads=1)
    assert backend.name == "cpu"
    assert re.search(reason, backend.not_used["tensorrt"])
    with pytest.raises(BackendError, match=reason):
        open_backend(built, strict=True)
    gc.collect()
    assert not trt.cuda.streams and not trt.cuda.memory and not trt.cuda.graphs


# -- two precisions -------------------------------------------------------------------------------------------


@pytest.fixture
def half_bundle(bundle: Path) -> Path:
    """A bundle that recommends fp16 and brings such a graph (here the same one, with a note in it)."""
    model = onnx.load(bundle / MODEL)
    model.producer_version = "fp16"
    onnx.save(model, bundle / MODEL_FP16)
    manifest = Manifest.from_json(read_json(bundle / MANIFEST))
    files = {**manifest.files, MODEL_FP16: FileRecord.of((bundle / MODEL_FP16).read_bytes())}
    write_json(bundle / MANIFEST, replace(manifest, precision="fp16", files=files).to_json())
    return bundle


def off_by(trt: Imitation, difference: float) -> None:
    compute = trt.compute

    def shifted(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = compute(images)
        return {**outputs, "task_probabilities": outputs["task_probabilities"] + np.float32(difference)}

    trt.compute = shifted


def test_half_precision_has_a_wider_tolerance(trt: Imitation, half_bundle: Path) -> None:
    off_by(trt, 0.01)
    backend = open_backend(Bundle.open(half_bundle), "tensorrt", build=True)
    assert (backend.name, backend.precision) == ("tensorrt", "fp16")
    assert 0.009 < backend.check.max_difference < 0.02 and backend.check.precision == "fp16"
    assert backend.to_json()["precision"] == "fp16"


def test_wrong_half_precision_falls_back_to_fp32(
    trt: Imitation, half_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same plan for both here; the second graph is right because the imitation changes in between."""
    right = trt.compute
    no_numbers(trt)
    load = trt.Runtime

    def heal(logger: Any) -> Any:
        if trt.contexts:
            trt.compute = right
        return load(logger)

    monkeypatch.setattr(trt, "Runtime", heal)
    backend = open_backend(Bundle.open(half_bundle), build=True)
    assert (backend.name, backend.precision, list(backend.not_used)) == ("tensorrt", "fp32", ["tensorrt"])
    assert backend.not_used["tensorrt"].startswith("wrong results in fp16")


def test_both_precisions_wrong(trt: Imitation, half_bundle: Path) -> None:
    no_numbers(trt)
    backend = open_backend(Bundle.open(half_bundle), threads=1, build=True)
    assert (backend.name, backend.precision) == ("cpu", "fp32")
    assert {"tensorrt", "tensorrt in fp32"} <= set(backend.not_used)


def test_the_manifest_names_the_backends(trt: Imitation, built: Bundle) -> None:
    only_cpu = replace(built, manifest=replace(built.manifest, backends=("cpu", "of a later version")))
    assert open_backend(only_cpu).name == "cpu" and open_backend(only_cpu).not_used == {}
    assert open_backend(only_cpu, "tensorrt").name == "tensorrt"


# -- running --------------------------------------------------------------------------------------------------


def test_eight_threads(trt: Imitation, built: Bundle) -> None:
    backend = open_backend(built)
    batches = [frames(1 + index % 3, index) for index in range(120)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):  # while one thread captures, any number of answers go without a graph
            together = list(pool.map(backend.infer, batches))
            for outputs, images in zip(together, batches, strict=True):
                expected = trt.compute(images)
                for name in OUTPUTS:
                    np.testing.assert_array_equal(getattr(outputs, name), expected[name])
            if trt.cuda.launches > 60:
                break
    assert trt.cuda.launches > 60


def test_one_capture_at_a_time(trt: Imitation, built: Bundle) -> None:
    """Threads that would have to wait run without a graph instead; two models share the limit."""
    backends = [open_backend(built), open_backend(built)]
    trt.cuda.capture_s = 0.01
    batches = [frames(1 + index % 8, index) for index in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):  # one round may be over within few captures
            list(pool.map(lambda job: assert_right(backends[job[0] % 2], trt.compute, job[1]), enumerate(batches)))
            if trt.cuda.captures > 4:
                break
    assert trt.cuda.captures > 4 and trt.cuda.most_captures == 1


def test_the_second_run_is_a_graph(trt: Imitation, built: Bundle) -> None:
    backend = open_backend(built)
    before = trt.cuda.launches
    contexts = trt.contexts
    for seed in range(5):
        assert_right(backend, trt.compute, frames(1, seed))
    assert trt.cuda.launches == before + 5 and trt.contexts == contexts


@pytest.mark.parametrize("function", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_graph_that_cannot_be_captured(trt: Imitation, built: Bundle, function: str) -> None:
    trt.cuda.fail[function] = CudaError.cudaErrorStreamCaptureUnsupported
    backend = open_backend(built)
    assert backend.name == "tensorrt"
    contexts = trt.contexts
    for seed in range(5):
        assert_right(backend, trt.compute, frames(1, seed))
    assert trt.cuda.launches == 0 and trt.contexts == contexts


def test_a_failed_capture_is_tried_again(trt: Imitation, built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_backend, "FIRST_PAUSE", 3)
    trt.cuda.fail["cudaGraphInstantiate"] = CudaError.cudaErrorStreamCaptureUnsupported
    backend = open_backend(built)  # runs four golden images: one failure, and three runs without a graph
    tries = []
    for seed in range(11):  # a failure, six runs without a graph, a capture, and three launches
        if seed == 7:
            trt.cuda.fail.clear()
        assert_right(backend, trt.compute, frames(1, seed))
        tries.append(trt.cuda.captures)
    assert tries == [2] * 7 + [3] * 4 and trt.cuda.launches == 3


def test_warnings_of_tensorrt_are_told_once(trt: Imitation, built: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    open_backend(built)
    open_backend(built)
    assert [record.message for record in caplog.records] == ["TensorRT warns: another model of devices"]


@pytest.mark.parametrize("function", ["cudaGraphLaunch", "cudaStreamSynchronize"])
def test_a_gpu_that_fails_later(trt: Imitation, built: Bundle, function: str) -> None:
    backend = open_backend(built)
    trt.cuda.fail[function] = CudaError.cudaErrorLaunchFailure
    with pytest.raises(BackendError, match="GPU failed with cudaErrorLaunchFailure; try a smaller batch"):
        backend.infer(frames(1))
    trt.cuda.fail.clear()
    assert_right(backend, trt.compute, frames(1))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 8, 8, 3), np.uint8), ((1, 16, 16, 3), np.float32), ((0, 16, 16, 3), np.uint8)]
)
def test_images_that_do_not_fit(trt: Imitation, built: Bundle, shape: tuple[int, ...], dtype: type) -> None:
    images = np.zeros(shape, dtype)
    with pytest.raises(BackendError, match=r"takes uint8 images \[N, 16, 16, 3\], not"):
        open_backend(built).infer(images)


def test_memory_of_many_batch_sizes_is_bounded_and_given_back(trt: Imitation, built: Bundle) -> None:
    backend = open_backend(built)
    for count in (1, 2, 3, 4, 5, 6, 7, 8):
        assert_right(backend, trt.compute, frames(count))
    gc.collect()
    assert len(trt.cuda.streams) == tensorrt_backend.MAX_IDLE_SLOTS
    del backend
    gc.collect()
    assert not trt.cuda.streams and not trt.cuda.memory and not trt.cuda.graphs


def fix_batch(folder: Path, batch: int, seal: Callable[[Path], None]) -> Bundle:
    model = onnx.load(folder / MODEL)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, folder / MODEL)
    seal(folder)
    manifest = Manifest.from_json(read_json(folder / MANIFEST))
    write_json(folder / MANIFEST, replace(manifest, batch=batch).to_json())
    return Bundle.open(folder)


@pytest.mark.parametrize("backend", ["tensorrt", "cpu"])
def test_a_fixed_batch(trt: Imitation, bundle: Path, seal: Callable[[Path], None], backend: str) -> None:
    trt.batch = 3
    opened = open_backend(fix_batch(bundle, 3, seal), backend, strict=True, build=True)
    assert opened.name == backend
    for count in (1, 2, 3, 4, 7, 9):
        assert_right(opened, trt.compute, frames(count, count))


def test_an_engine_with_another_batch(trt: Imitation, bundle: Path, seal: Callable[[Path], None]) -> None:
    trt.batch = 2
    opened = open_backend(fix_batch(bundle, 3, seal), threads=1, build=True)
    assert opened.name == "cpu" and "shape [2, 16, 16, 3]" in opened.not_used["tensorrt"]


# -- the command ----------------------------------------------------------------------------------------------


def test_build_checks_the_engine(
    trt: Imitation, shared_bundle: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = call("build", shared_bundle)
    check, last = out.splitlines()
    assert code == 0 and check.startswith("Golden check: passed in fp32, largest difference")
    assert last.startswith("Engine: ") and "built in 1.0 s" in last
    code, out, _ = call("build", shared_bundle, "--json")
    document = json.loads(out)
    (engine,) = document["engines"]
    assert engine["from_cache"] and document["golden_check"]["passed"] and engine["key"]["device"] == GPU.name


def test_build_says_that_the_engine_is_wrong(
    trt: Imitation, shared_bundle: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    wrong_numbers(trt)
    code, out, err = call("build", shared_bundle)
    assert (code, out) == (1, "") and "cannot be used (wrong results in fp32" in err and "'cpu' runs instead" in err


def test_build_turns_to_fp32(
    trt: Imitation,
    half_bundle: Path,
    call: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = trt.compute
    no_numbers(trt)
    real = engine._run_worker

    def work(job: Any, limits: Any, say: Any) -> dict[str, Any]:
        if job.precision == "fp32":
            trt.compute = right
        return real(job, limits, say)

    monkeypatch.setattr(engine, "_run_worker", work)
    code, out, err = call("build", half_bundle)
    assert code == 0 and "wrong results in fp16" in err and "An engine in fp32 is built" in err
    assert out.startswith("Golden check: passed in fp32")


def test_build_turns_to_fp32_when_fp16_is_refused(
    trt: Imitation,
    half_bundle: Path,
    call: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = engine._run_worker

    def work(job: Any, limits: Any, say: Any) -> dict[str, Any]:
        if job.precision == "fp16":
            raise RefusedModelError("no kernel for half precision; use another backend.")
        return real(job, limits, say)

    monkeypatch.setattr(engine, "_run_worker", work)
    code, out, err = call("build", half_bundle)
    assert code == 0 and "no kernel for half precision" in err and "An engine in fp32 is built" in err
    assert out.startswith("Golden check: passed in fp32")
