"""The TensorRT that is installed here, and what differs between its versions.

Two packages have nearly the same interface: ``tensorrt`` (8.5 to 11; on a Jetson it comes with JetPack) and
``tensorrt_rtx`` (for RTX-class GPUs, can build ahead of time without one). What all versions share is called directly;
the functions below hide the differences. The branches for TensorRT 8.5 to 11 follow the
sources of the bindings and are untested on a device.

``trt.nptype`` is never called: in TensorRT 8.5 it needs ``numpy.bool``, which NumPy 1.24 removed.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from duallora_edge.extras import install_hint
from duallora_edge.runtime.backends.contract import UnavailableError
from duallora_edge.runtime.device.cuda import Driver, Gpu, NoGpuError
from duallora_edge.text import escaped

TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt_rtx"
OLDEST = (8, 5)
KEPT_MESSAGES = 100
MAX_WARNING_CHARACTERS = 400

_ON_A_JETSON = (
    "on a Jetson use JetPack's python3-libnvinfer, with a virtual environment of JetPack's own Python made with "
    "--system-site-packages; elsewhere "
)
# Of TensorRT 8: these pass values on, so that a precision of their own would only add conversions.
_WITHOUT_PRECISION = ("CONSTANT", "SHAPE", "IDENTITY", "CAST")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT: the name of its package, its full version, and the module itself."""

    package: str
    version: str
    trt: Any = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {self.version}"

    @property
    def is_rtx(self) -> bool:
        """TensorRT-RTX, whose engines serve every GPU of a compute capability; TensorRT's serve one GPU model."""
        return self.package == TENSORRT_RTX

    @property
    def major(self) -> int:
        """The major version; that of TensorRT-RTX counts from 1 on its own."""
        return _numbers(self.version)[0]

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """What TensorRT-RTX can build for ahead of time, as ``"sm86"``; empty for TensorRT."""
        names = self.trt.ComputeCapability.__members__ if self.is_rtx else ()
        return tuple(f"sm{number}" for number in sorted(int(name[2:]) for name in names if name.startswith("SM")))


def find_gpu() -> Gpu:
    """The first CUDA device that this process sees. Raises `UnavailableError` with the reason when there is none."""
    try:
        return next(Driver().gpus())
    except NoGpuError as error:
        raise UnavailableError(str(error)) from error


def load_tensorrt(packages: Sequence[str] = (TENSORRT, TENSORRT_RTX)) -> TensorRT:
    """Import the first of ``packages`` that is installed and new enough.

    Raises `UnavailableError` with the reason and the remedy for each of them.
    """
    reasons = []
    for package in packages:
        try:
            trt: Any = importlib.import_module(package)
        except Exception as error:  # besides ImportError: whatever a damaged installation raises
            line = (str(error).splitlines() or [type(error).__name__])[0]
            remedy = install_hint("rtx") if package == TENSORRT_RTX else _ON_A_JETSON + install_hint("tensorrt")
            reasons.append(f"{package} cannot be imported ({line[:200]}): {remedy}")
            continue
        found = TensorRT(package, str(trt.__version__), trt)
        if found.is_rtx or _numbers(found.version) >= OLDEST:
            return found
        reasons.append(f"TensorRT {found.version} is older than {'.'.join(map(str, OLDEST))}: update JetPack")
    raise UnavailableError("; ".join(reasons))


@cache
def tensorrt_logger(trt: Any) -> Any:
    """The logger of this process: TensorRT keeps the first one it is given for everything.

    It has the latest ``errors``, and calls ``warn`` with each warning once. That is Python's ``logging`` unless it is
    replaced, which shows warnings on standard error where nothing else is set up.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=KEPT_MESSAGES)
            self.warn: Callable[[str], object] = _LOG.warning
            self._warned: deque[str] = deque(maxlen=KEPT_MESSAGES)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(message)
            elif int(severity) == int(trt.ILogger.WARNING) and message not in self._warned:
                self._warned.append(message)
                self.warn(f"TensorRT warns: {escaped(' '.join(message.split())[:MAX_WARNING_CHARACTERS])}")

    return Log()


def make_runtime(trt: Any, logger: Any) -> Any:
    """A TensorRT runtime, made only after the driver reported a GPU. Raises `UnavailableError`, see `find_gpu`."""
    find_gpu()
    return trt.Runtime(logger)


def network_flags(tensorrt: TensorRT) -> int:
    """The flags of ``create_network``, with which the precisions written in the ONNX file count.

    TensorRT 8 has only the flag of explicit batches; TensorRT 10 can type strictly; TensorRT 11 and TensorRT-RTX
    always do.
    """
    trt = tensorrt.trt
    if tensorrt.is_rtx or tensorrt.major >= 11:
        return 0
    if tensorrt.major < 10:
        return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def set_precision(tensorrt: TensorRT, network: Any, config: Any, precision: str) -> None:
    """Make the engine compute in the precisions that the network is written in.

    TensorFloat-32 is switched off, as on every other backend. TensorRT 8 needs a flag for fp16, after which it
    would choose fp16 everywhere; so each layer that is fp32 in the file is pinned to fp32.
    """
    trt = tensorrt.trt
    config.clear_flag(trt.BuilderFlag.TF32)
    if tensorrt.is_rtx or tensorrt.major >= 10 or precision != "fp16":
        return
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(number) for number in range(layer.num_outputs)]
        if layer.type.name in _WITHOUT_PRECISION or any(tensor.dtype != trt.float32 for tensor in outputs):
            continue
        layer.precision = trt.float32
        for number in range(layer.num_outputs):
            layer.set_output_type(number, trt.float32)


def device_memory_bytes(engine: Any) -> int:
    """Bytes of device memory that one execution context takes, besides the weights."""
    if hasattr(engine, "device_memory_size_v2"):
        return int(engine.device_memory_size_v2)
    return int(engine.device_memory_size)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2]) or (0,)
