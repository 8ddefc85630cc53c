"""The weights of several graphs in one file beside them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from duallora_edge.runtime.graph_weights import WEIGHTS
from duallora_edge.runtime.tensor_file import Array, TensorFile, blocks


def move_weights(graphs: Mapping[str, onnx.ModelProto]) -> TensorFile:
    """Move the float32 weights of ``graphs`` into one file, which they share; returns its content.

    The graphs, changed in place, refer to it as external data. What has a single element stays: runtimes fold it.
    """
    arrays: dict[str, Array] = {}
    for model in graphs.values():
        for tensor in _weights(model):
            array = numpy_helper.to_array(tensor)
            known = arrays.setdefault(tensor.name, array)
            assert np.array_equal(known, array), f"graphs with different weights {tensor.name}"
    file = TensorFile(b"".join(blocks(arrays)))
    for model in graphs.values():
        for tensor in _weights(model):
            entry = file.entries[tensor.name]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": WEIGHTS, "offset": entry.start, "length": entry.stop - entry.start}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
    return file


def _weights(model: onnx.ModelProto) -> list[TensorProto]:
    return [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims)]
