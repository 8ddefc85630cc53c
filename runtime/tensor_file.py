"""Tensor files: named arrays in one file, in the format of safetensors (https://huggingface.co/docs/safetensors).

A file is the length of a header, the header as JSON and the arrays, one after the other, so every array is a view of
the file and nothing is copied. The same arrays always give the same bytes, on any machine.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from duallora_edge.files import parse_json

MAX_HEADER_BYTES = 2**20
MAX_TENSORS = 10_000
MAX_RANK = 8
_DTYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "U8": np.dtype("u1")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_ALIGNMENT = 64  # of the first array in the file

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Entry:
    """One array: its dtype and shape, and where its bytes begin and end in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """The arrays of a tensor file, as read-only views of its content."""

    def __init__(self, content: bytes | memoryview) -> None:
        """Read the header; the arrays fill the rest of the file in its order. Raises ``ValueError`` for other files."""
        self.content = memoryview(content)
        self.entries = read_header(self.content, len(self.content))

    def __getitem__(self, name: str) -> Array:
        """The array of this name. Raises ``KeyError``."""
        entry = self.entries[name]
        return np.frombuffer(self.content[entry.start : entry.stop], entry.dtype).reshape(entry.shape)

    def arrays(self) -> dict[str, Array]:
        """All arrays by name, in the order of the file."""
        return {name: self[name] for name in self.entries}


def header(arrays: Mapping[str, Array]) -> bytes:
    """What stands before the arrays in the file that holds them in this order."""
    offset, described = 0, {}
    for name, array in arrays.items():
        end = offset + array.nbytes
        described[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def blocks(arrays: Mapping[str, Array]) -> Iterator[bytes | memoryview]:
    """The content of the file that holds ``arrays`` (float32, float16 or uint8, little-endian) in this order."""
    yield header(arrays)
    for array in arrays.values():
        if array.nbytes:
            yield np.ascontiguousarray(array).data.cast("B")


def read_header(content: memoryview, size: int) -> dict[str, Entry]:
    """The arrays of a file of ``size`` bytes that begins with ``content``. Raises ``ValueError``."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= length <= min(len(content) - 8, MAX_HEADER_BYTES):
        raise ValueError("it is not a tensor file")
    described = parse_json(bytes(content[8 : 8 + length]))
    if not isinstance(described, dict) or len(described) > MAX_TENSORS:
        raise ValueError(f"its header is not that of at most {MAX_TENSORS} tensors")
    position = 8 + length
    entries: dict[str, Entry] = {}
    for name, given in described.items():
        if name == "__metadata__" and not entries:  # other programs write it
            continue
        try:
            dtype, shape, offsets = _DTYPES[given["dtype"]], given["shape"], given["data_offsets"]
            sizes_fit = len(shape) <= MAX_RANK and all(type(size) is int and 0 <= size < 2**31 for size in shape)
        except (KeyError, TypeError) as error:
            raise ValueError(f"its header does not say what {name[:50]!r} is") from error
        stop = position + math.prod(shape) * dtype.itemsize if sizes_fit else -1
        if not _NAME.fullmatch(name) or offsets != [position - 8 - length, stop - 8 - length]:
            raise ValueError(f"its header does not fit the tensor {name[:50]!r}")
        entries[name] = Entry(dtype, tuple(shape), position, stop)
        position = stop
    if position != size:
        raise ValueError(f"it has {size} bytes instead of {position}")
    return entries
