"""Running an engine with TensorRT: what the rung ``tensorrt`` of the ladder opens.

Untested on a GPU, because none was available. The logic runs in the tests against a small imitation of
TensorRT and of the CUDA runtime, and the names that are used are compared with the real bindings. On a device, the
golden images decide whether it is used.

Two threads must not share an execution context, and a captured CUDA graph belongs to one context and one number of
images. So context, stream, buffers and graph form a `_Slot` for a fixed number of images. A thread borrows one for each
inference, and if all are in use, a new one is made.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from duallora_edge.errors import BackendError
from duallora_edge.runtime.backends.contract import (
    ENGINE_BATCH,
    GoldenCheck,
    Infer,
    UnavailableError,
    at_most,
    check_golden,
    in_groups,
)
from duallora_edge.runtime.backends.engine_build import build_engines, engine_keys, local_target
from duallora_edge.runtime.backends.engine_cache import read_engine
from duallora_edge.runtime.backends.tensorrt_api import TensorRT, make_runtime, tensorrt_logger
from duallora_edge.runtime.bundle import BETWEEN, INPUT, OUTPUTS, Bundle, Outputs
from duallora_edge.runtime.device.cuda import CUDA_PYTHON
from duallora_edge.runtime.preprocess import Pixels

CUDART = ("cuda.bindings.runtime", "cuda.cudart")  # the newer and the older name of NVIDIA's bindings
MAX_IDLE_SLOTS = 4  # each holds device memory
FIRST_PAUSE = 100  # inferences without a graph after the first capture that failed
_CAPTURE = threading.Lock()  # one capture at a time in this process


def open_tensorrt(bundle: Bundle, build: bool = False) -> Infer:
    """Load the engine of a bundle that was built for this GPU; with ``build``, build it when there is none.

    Raises `UnavailableError` when TensorRT, the GPU, cuda-python or the engine is missing, `EngineError` when the
    engine is damaged or cannot be built, and `BackendError` when it does not fit the bundle.
    """
    tensorrt, gpu = local_target()
    cudart = load_cudart()
    if build:
        build_engines(bundle)
    plans = []
    for key in engine_keys(bundle, tensorrt, gpu):
        stored = read_engine(key)
        if stored is None:
            raise UnavailableError(
                f"{tensorrt} has no engine of this model for {gpu.name} yet: run 'duallora-edge build {bundle.path}'"
            )
        plans.append(stored[1])
    return _run(TensorRTSession(tensorrt, cudart, plans, bundle), bundle)


def check_plans(bundle: Bundle, plans: Sequence[bytes]) -> GoldenCheck:
    """Let engines that are not in the cache answer the golden images. Raises as `open_tensorrt` does."""
    tensorrt, _ = local_target()
    infer = _run(TensorRTSession(tensorrt, load_cudart(), plans, bundle), bundle)
    return check_golden(in_groups(infer, bundle.manifest.batch), bundle.golden(), bundle.manifest.precision)


def _run(session: TensorRTSession, bundle: Bundle) -> Infer:
    return at_most(session.infer, bundle.manifest.batch or ENGINE_BATCH)


def load_cudart() -> Any:
    """NVIDIA's Python bindings of the CUDA runtime. Raises `UnavailableError` when there are none."""
    for name in CUDART:
        with suppress(ImportError):
            return importlib.import_module(name)
    raise UnavailableError(
        f"cuda-python is not installed: pip install {CUDA_PYTHON[12]} for CUDA 12, {CUDA_PYTHON[13]} for CUDA 13"
    )


class TensorRTSession:
    """An engine in GPU memory that several threads may run at once, or two of which the second reads from the first."""

    def __init__(self, tensorrt: TensorRT, cudart: Any, plans: Sequence[bytes], bundle: Bundle) -> None:
        """Load ``plans``. Raises `BackendError` when TensorRT refuses one or its tensors do not fit the bundle."""
        self._trt = tensorrt.trt
        self._cudart = cudart
        self._manifest = bundle.manifest
        logger = tensorrt_logger(self._trt)
        self._errors = logger.errors
        self._errors.clear()
        self._runtime = make_runtime(self._trt, logger)  # TensorRT wants it to outlive the engine
        self._engines = []
        for plan in plans:
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise BackendError(f"{tensorrt} cannot load the engine{self._words()}; {_REBUILD}.")
            self._engines.append(engine)
        self._check_tensors()
        self._lock = threading.Lock()
        self._idle: list[_Slot] = []
        self._plain_runs = 0  # to go before the next capture
        self._pause = FIRST_PAUSE

    def infer(self, images: Pixels) -> Outputs:
        """Run images ``uint8 [N, S, S, 3]``, as many as the engine takes at once.

        Raises `BackendError` when the GPU fails or the images do not fit.
        """
        size = self._manifest.preprocessing.size
        if images.dtype != np.uint8 or images.shape != (len(images), size, size, 3) or len(images) == 0:
            raise BackendError(
                f"The model takes uint8 images [N, {size}, {size}, 3], not {images.dtype} {list(images.shape)}."
            )
        slot = self._borrow(len(images))
        outputs = slot.infer(images)  # a slot that fails is not used again
        if slot.has_graph or self._try_capture(slot):
            with self._lock:
                self._idle.append(slot)
                del self._idle[:-MAX_IDLE_SLOTS]
        return outputs

    def _try_capture(self, slot: _Slot) -> bool:
        """Capture a graph unless it is too early; False if that fails, which leaves the slot in an undefined state.

        A failure may be the fault of what else happened on the GPU, so it is tried again, each time after twice as many
        inferences without a graph.
        """
        if not _CAPTURE.acquire(blocking=False):
            return True
        try:
            if self._plain_runs:
                self._plain_runs -= 1
                return True
            if slot.capture():
                return True
            self._plain_runs, self._pause = self._pause, 2 * self._pause
            return False
        finally:
            _CAPTURE.release()

    def _borrow(self, images: int) -> _Slot:
        with self._lock:
            for index, slot in enumerate(self._idle):
                if slot.images == images:
                    return self._idle.pop(index)
        self._errors.clear()
        size = self._manifest.preprocessing.size
        shapes: dict[str, tuple[int, ...]] = {INPUT: (images, size, size, 3)}
        contexts = []
        for engine in self._engines:
            context = engine.create_execution_context()
            if context is None:
                raise BackendError(f"TensorRT has no memory for another inference{self._words()}; use fewer threads.")
            tensors = _tensors(engine)
            for name in (name for name, mode in tensors if mode == self._trt.TensorIOMode.INPUT):
                if not context.set_input_shape(name, shapes[name]):
                    raise BackendError(f"The engine refuses {images} images at once{self._words()}; {_REBUILD}.")
            shapes |= {name: tuple(context.get_tensor_shape(name)) for name, _ in tensors if name not in shapes}
            contexts.append((context, {name for name, _ in tensors}))
        for name, shape in self._manifest.output_shapes(images).items():
            if shapes[name] != shape:
                raise BackendError(
                    f"The engine returns '{name}' as {list(shapes[name])} instead of {list(shape)}; export the run "
                    "again."
                )
        return _Slot(self._cudart, contexts, shapes)

    def _check_tensors(self) -> None:
        """The first engine reads the image, each further one what the one before returns, the last one answers."""
        trt = self._trt
        reads = {INPUT: trt.uint8}
        for number, engine in enumerate(self._engines, 1):
            writes = dict.fromkeys(OUTPUTS if number == len(self._engines) else BETWEEN, trt.float32)
            wanted = {name: (trt.TensorIOMode.INPUT, dtype) for name, dtype in reads.items()}
            wanted |= {name: (trt.TensorIOMode.OUTPUT, dtype) for name, dtype in writes.items()}
            found = {name: (mode, engine.get_tensor_dtype(name)) for name, mode in _tensors(engine)}
            if found != wanted:
                described = ", ".join(f"{name} {dtype}" for name, (_, dtype) in found.items())
                raise BackendError(
                    f"The tensors of the engine differ from those of the bundle ({described}); export the run again."
                )
            reads = writes
        size = self._manifest.preprocessing.size
        engine = self._engines[0]
        shape, rows = tuple(engine.get_tensor_shape(INPUT)), self._manifest.batch or -1
        if shape != (rows, size, size, 3):
            raise BackendError(f"The engine takes images of shape {list(shape)}; {_REBUILD}.")

    def _words(self) -> str:
        return f" ({self._errors[-1][:300]})" if self._errors else ""


def _tensors(engine: Any) -> list[tuple[str, Any]]:
    """Name and direction of what an engine reads and returns."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [(name, engine.get_tensor_mode(name)) for name in names]


class _Slot:
    """Execution contexts, a stream and buffers for exactly ``images`` images, used by one thread at a time."""

    def __init__(
        self, cudart: Any, contexts: Sequence[tuple[Any, set[str]]], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """``contexts``: execution contexts in the order in which they run, with the names of their tensors."""
        self.images = shapes[INPUT][0]
        self.has_graph = False
        self._cudart = cudart
        self._contexts = [context for context, _ in contexts]
        self._graph: Any = None
        # (function, handle) of everything to give back; filled one by one, so that a failure half-way leaks nothing.
        self._handles: list[tuple[Any, Any]] = []
        weakref.finalize(self, _give_back, self._handles)
        # Non-blocking: work of other threads on CUDA's default stream neither waits for this one nor ends its capture.
        self._stream = _ok(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self._handles.append((cudart.cudaStreamDestroy, self._stream))
        self._host: dict[str, npt.NDArray[Any]] = {}
        self._device: dict[str, Any] = {}
        for name, shape in shapes.items():
            dtype = np.dtype(np.uint8 if name == INPUT else np.float32)
            size = int(np.prod(shape)) * dtype.itemsize
            self._device[name] = _ok(cudart.cudaMalloc(size))
            self._handles.append((cudart.cudaFree, self._device[name]))
            for context, names in contexts:
                if name in names and not context.set_tensor_address(name, int(self._device[name])):
                    raise BackendError(f"TensorRT refuses the buffer of '{name}'; {_REBUILD}.")
            if name in BETWEEN:
                continue
            # Only from and to memory that is never paged out do copies run in the stream and in a graph.
            pinned = _ok(cudart.cudaMallocHost(size))
            self._handles.append((cudart.cudaFreeHost, pinned))
            buffer = (ctypes.c_byte * size).from_address(int(pinned))
            self._host[name] = np.frombuffer(memoryview(buffer), dtype).reshape(shape)

    def infer(self, images: Pixels) -> Outputs:
        """Run as many images as the slot is for. Raises `BackendError`."""
        self._host[INPUT][:] = images
        if self._graph is None:
            self._enqueue()
        else:
            _ok(self._cudart.cudaGraphLaunch(self._graph, self._stream))
        _ok(self._cudart.cudaStreamSynchronize(self._stream))
        return Outputs(*(self._host[name].copy() for name in OUTPUTS))

    def capture(self) -> bool:
        """Record an inference, after a first one, so that later ones are launched in one call; False if that fails."""
        cudart = self._cudart
        try:
            # Thread-local: what other threads do on the GPU meanwhile does not end the recording.
            _ok(
                cudart.cudaStreamBeginCapture(
                    self._stream, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
                )
            )
            try:
                self._enqueue()
            finally:
                recorded = _ok(cudart.cudaStreamEndCapture(self._stream))
            self._handles.append((cudart.cudaGraphDestroy, recorded))
            self._graph = _ok(cudart.cudaGraphInstantiate(recorded, 0))
            self._handles.append((cudart.cudaGraphExecDestroy, self._graph))
        except Exception:  # many operations cannot be recorded, which only costs some speed
            cudart.cudaGetLastError()  # forget the error, or the next call would report it
            return False
        self.has_graph = True
        return True

    def _enqueue(self) -> None:
        self._copy(INPUT, self._device[INPUT], self._host[INPUT].ctypes.data, "cudaMemcpyHostToDevice")
        for context in self._contexts:
            if not context.execute_async_v3(int(self._stream)):
                raise BackendError("TensorRT could not start the model; try a smaller batch or another backend.")
        for name in OUTPUTS:
            self._copy(name, self._host[name].ctypes.data, self._device[name], "cudaMemcpyDeviceToHost")

    def _copy(self, name: str, target: Any, source: Any, kind: str) -> None:
        cudart = self._cudart
        direction = getattr(cudart.cudaMemcpyKind, kind)
        _ok(cudart.cudaMemcpyAsync(target, source, self._host[name].nbytes, direction, self._stream))


_REBUILD = "run 'duallora-edge build --force' again"


def _ok(answer: tuple[Any, ...]) -> Any:
    """The value of a call of the CUDA runtime, which answers (error, value). Raises `BackendError`."""
    error, *values = answer
    if int(error) != 0:
        raise BackendError(f"The GPU failed with {error.name}; try a smaller batch, or restart the application.")
    return values[0] if values else None


def _give_back(handles: list[tuple[Any, Any]]) -> None:
    """Free in reverse order; errors are ignored."""
    for free, handle in reversed(handles):
        free(handle)
