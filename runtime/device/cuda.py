"""The GPUs of this machine, as reported by the library of the NVIDIA driver.

TensorRT is not used for this: without a driver, its runtime ends the whole process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

LIBCUDA = "libcuda.so.1"
# NVIDIA's Python bindings by the major version of CUDA. Before 12.9.1 they hold the GIL while CUDA works.
CUDA_PYTHON = {12: "'cuda-python>=12.9.1,<13'", 13: "'cuda-python>=13,<14'"}
# CUdevice_attribute of cuda.h
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76


class NoGpuError(Exception):
    """There is no driver, or it does not answer, or it lists no GPU; the message is the reason."""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: ``compute_capability`` as ``"sm87"``, the number of multiprocessors, and its memory in bytes."""

    name: str
    compute_capability: str
    multiprocessors: int
    memory_bytes: int


class Driver:
    """The library of the driver, loaded and initialised. Every call raises `NoGpuError` when the driver refuses it."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBCUDA)
        except OSError as error:
            raise NoGpuError(f"no NVIDIA driver ({error})") from error
        self._call("cuInit", 0)

    @property
    def cuda_version(self) -> str:
        """The newest CUDA version that the driver supports, such as ``"12.6"``."""
        version = self._integer("cuDriverGetVersion")
        return f"{version // 1000}.{version % 1000 // 10}"

    def gpus(self) -> Iterator[Gpu]:
        """The devices that this process sees, at least one."""
        count = self._integer("cuDeviceGetCount")
        if count < 1:
            raise NoGpuError("the NVIDIA driver lists no GPU")
        for index in range(count):
            device = self._integer("cuDeviceGet", index)
            name, size = ctypes.create_string_buffer(256), ctypes.c_size_t()
            self._call("cuDeviceGetName", name, len(name), device)
            self._call("cuDeviceTotalMem_v2", ctypes.byref(size), device)
            major, minor, multiprocessors = (
                self._integer("cuDeviceGetAttribute", attribute, device)
                for attribute in (_MAJOR, _MINOR, _MULTIPROCESSORS)
            )
            yield Gpu(name.value.decode(errors="replace"), f"sm{major}{minor}", multiprocessors, size.value)

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise NoGpuError(f"{function} failed with {(text.value or b'error').decode()} ({code})")

    def _integer(self, function: str, *arguments: object) -> int:
        value = ctypes.c_int()
        self._call(function, ctypes.byref(value), *arguments)
        return value.value
