"""Tensor files: as safetensors writes and reads them, and nothing else is taken for one."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from safetensors.numpy import load, save

from duallora_edge.runtime.tensor_file import TensorFile, blocks

DTYPES = st.sampled_from([np.dtype("<f4"), np.dtype("<f2"), np.dtype("u1")])
ARRAYS = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
    DTYPES.flatmap(lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, min_side=0, max_side=4))),
    max_size=5,
)


@given(ARRAYS)
def test_what_is_written_is_read_here_and_by_safetensors(arrays: dict[str, np.ndarray]) -> None:
    content = b"".join(blocks(arrays))
    for found in (TensorFile(content).arrays(), load(content), TensorFile(save(arrays)).arrays()):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()
    assert list(TensorFile(content).entries) == list(arrays)


def test_arrays_are_views_that_cannot_be_changed() -> None:
    file = TensorFile(b"".join(blocks({"a": np.arange(3, dtype=np.float32)})))
    assert not file["a"].flags.writeable and not file["a"].flags.owndata
    with pytest.raises(KeyError):
        file["b"]


def with_header(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a tensor file"),
        (b"\xff" * 100, "not a tensor file"),
        (with_header(b"[" * 100_000), "deep"),
        (with_header([GOOD]), "header is not"),
        (with_header({"a": 1}), "does not say what 'a' is"),
        (with_header({"a": {**GOOD, "dtype": "F64"}}), "does not say"),
        (with_header({"a": {**GOOD, "shape": [3]}}), "does not fit"),
        (with_header({"a": {**GOOD, "shape": [-2]}}), "does not fit"),
        (with_header({"a": {**GOOD, "shape": [2**40, 2**40]}}), "does not fit"),
        (with_header({"a": {**GOOD, "shape": ["2"]}}), "does not fit"),
        (with_header({"a": {**GOOD, "shape": [2, 1, 1, 1, 1, 1, 1, 1, 1]}}), "does not fit"),
        (with_header({"a": {**GOOD, "data_offsets": [4, 12]}}, bytes(12)), "does not fit"),
        (with_header({"a/b": GOOD}), "does not fit"),
        (with_header({"": GOOD}), "does not fit"),
        (with_header({"a": GOOD, "b": GOOD}), "does not fit"),
        (with_header({"a": GOOD}, bytes(7)), "bytes instead of"),
        (with_header({"a": GOOD}, bytes(9)), "bytes instead of"),
        (with_header({f"a{i}": {**GOOD, "shape": [0], "data_offsets": [0, 0]} for i in range(10_001)}), "at most"),
    ],
)
def test_what_is_no_tensor_file(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TensorFile(content)


@given(st.integers(0, 200), st.binary(max_size=8))
def test_damage_raises_nothing_else(position: int, replacement: bytes) -> None:
    content = b"".join(blocks({"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.uint8)}))
    with contextlib.suppress(ValueError):
        TensorFile(content[:position] + replacement + content[position + len(replacement) :]).arrays()
