"""The weights of a bundle's graphs: they lie in one file beside the graphs, as external data of ONNX."""

from __future__ import annotations

from collections.abc import Iterator

from duallora_edge.runtime.graph_reader import Graph, Model, Tensor, fields_of, key_of, read_model, varint
from duallora_edge.runtime.tensor_file import Array, TensorFile

WEIGHTS = "model.safetensors"
"""The file of a bundle that holds the weights of all its graphs."""

Blocks = Iterator[bytes | memoryview]


def external_arrays(graph: bytes | memoryview, weights: TensorFile) -> dict[str, Array]:
    """The weights that a graph has outside, by the names of its initializers. Raises ``ValueError``."""
    return {tensor.name: _weight(tensor, weights) for tensor in read_model(graph).graph.initializers if tensor.location}


def inlined(graph: bytes | memoryview, weights: TensorFile) -> Blocks:
    """The same ONNX file with its weights inside, in blocks: for parsers that read one file from memory.

    The same graph and weights give the same bytes wherever the weights lie in their file. Raises ``ValueError``.
    """
    content = memoryview(graph)
    tensors = iter(read_model(content).graph.initializers)
    for key, begin, value, end in fields_of(content, 0, len(content)):
        if key != key_of(Model, "graph"):
            yield content[begin:end]
            continue
        parts: list[bytes | memoryview] = []
        for inner, first, start, stop in fields_of(content, value, end):
            tensor = next(tensors) if inner == key_of(Graph, "initializers") else None
            if tensor is None or not tensor.location:
                parts.append(content[first:stop])
                continue
            whole = list(_with_values(content, start, stop, _weight(tensor, weights)))
            parts += [varint(inner), varint(sum(map(len, whole))), *whole]
        yield from (varint(key), varint(sum(map(len, parts))), *parts)


def _with_values(content: memoryview, start: int, stop: int, array: Array) -> Blocks:
    """The fields of a tensor from ``start`` to ``stop``, with its values in the place of where they are."""
    outside = (key_of(Tensor, "external"), key_of(Tensor, "location"))
    for key, begin, _, end in fields_of(content, start, stop):
        if key not in outside:
            yield content[begin:end]
    values = array.data.cast("B")
    yield varint(key_of(Tensor, "raw")) + varint(len(values))
    yield values


def _weight(tensor: Tensor, weights: TensorFile) -> Array:
    try:
        return weights[tensor.name]
    except KeyError:
        raise ValueError(f"{WEIGHTS} has no weights of '{tensor.name}'") from None
