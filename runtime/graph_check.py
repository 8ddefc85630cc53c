"""Checks an ONNX file of a bundle before any other library reads it: it must be a graph as `export.graph` writes them.

Libraries that run models read files outside the bundle, allocate without limit or crash if a graph asks for it. So
every graph is read here first, in pure Python, and every node is followed: its operator, its attributes, the types and
shapes of its inputs and outputs. Integers are never computed with; they are constants that give shapes and positions.

The number of images is unknown. A prime larger than any allowed size stands for it, so one division tells whether a
size counts one image or all of them, and plain integers are enough.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from duallora_edge.errors import BundleError
from duallora_edge.files import MAX_JSON_BYTES
from duallora_edge.runtime.graph_reader import (
    MAX_EDGES,
    MAX_RANK,
    Attribute,
    Dimension,
    Edge,
    Model,
    Node,
    Tensor,
    read_model,
)
from duallora_edge.runtime.graph_weights import WEIGHTS
from duallora_edge.runtime.tensor_file import TensorFile

OPSETS = range(14, 21)
IR_VERSIONS = range(7, 11)
MAX_BATCH = 1024
MAX_IMAGE_BYTES = 2**31
"""The most memory that the intermediate results of one image may need at a time, with nodes in the order of the file.

Attention of 12 heads over 4096 tokens (1024 pixels in patches of 16) needs 1.6 GB.
"""
MAX_IMAGE_WORK = 2**42
"""The most multiply-adds, or elements of results where there are none, for one image."""
METADATA = ("classes", "preprocessing")
"""What a graph may say of itself. Other names can be settings: ONNX Runtime reads its own under ``ort_config``."""
MAX_PADDING = 4096
# The upper triangle of the second-order summary with its most directions, 128.
MAX_POSITIONS = 128 * 129 // 2

FLOAT, UINT8, INT64, FLOAT16 = 1, 2, 7, 10
_BYTES = {FLOAT: 4, UINT8: 1, INT64: 8, FLOAT16: 2}
_KINDS = {"f": 1, "i": 2, "ints": 7}
_IMAGES = 2**61 - 1
_MAX_SIZE = 2**31 - 1

Dims = tuple[int, ...]
Attributes = Mapping[str, Any]


class _Value(NamedTuple):
    """A tensor; ``ints`` are the elements of a constant of int64."""

    dtype: int
    shape: Dims
    ints: Dims = ()


@dataclass(frozen=True)
class Operator:
    """How the exporter uses an operator: ``floats`` tensors, up to ``optional`` more, then ``ints`` constants.

    ``rule`` gives the shapes of the outputs from the shapes of the floats, the constants and the attributes, or raises
    ``ValueError``. ``attributes`` map to the field of their value; those without ``defaults`` have to be there.
    """

    rule: Callable[[Sequence[Dims], Sequence[Dims], Attributes], list[Dims]]
    floats: int = 1
    optional: int = 0
    ints: int = 0
    attributes: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, int] = field(default_factory=dict)


def check_graph(
    content: bytes | memoryview, reads: Collection[str], returns: Collection[str], weights: TensorFile | None = None
) -> None:
    """Refuse the ONNX file ``content`` unless it is a graph as the exporter writes them.

    ``reads`` and ``returns`` are the names of its inputs and outputs. Accepted graphs use the operators of `operators`
    alone, with shapes that fit for any number of images. They read no other file than that of the ``weights``, and of
    it the tensors of the same names; they need at most `MAX_IMAGE_BYTES` and `MAX_IMAGE_WORK` for one image, and
    compute constants no larger than the two files. Weights are neither copied nor read. Raises `BundleError`.
    """
    try:
        model = read_model(content)
        _check_versions(model)
        _check_metadata(model)
        values, outputs = _edges(model, reads, returns)
        for tensor in model.graph.initializers:
            _add(values, tensor.name, _initializer(tensor, weights))
        _follow(model, values, len(content) + (len(weights.content) if weights else 0))
        for name, value in outputs.items():
            if values.get(name) != value:
                raise ValueError(f"the output '{name}' is not made in the shape it is declared with")
    except ValueError as error:
        reason = str(error)[:300]
        raise BundleError(f"The graph is not one that the exporter writes ({reason}); export the run again.") from error


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _check_versions(model: Model) -> None:
    opsets = [(opset.domain, opset.version) for opset in model.opsets]
    _require(model.ir_version in IR_VERSIONS, f"IR version {model.ir_version}")
    _require(len(opsets) == 1 and opsets[0][0] == "" and opsets[0][1] in OPSETS, f"opsets {opsets}")


def _check_metadata(model: Model) -> None:
    """Refuse what is not printable ASCII under one of the names of `METADATA`, each once."""
    names = [each.key for each in model.metadata]
    _require(len({*names}) == len(names) and {*names} <= {*METADATA}, f"metadata {names}")
    for each in model.metadata:
        _require(len(each.value) <= MAX_JSON_BYTES, f"metadata of {len(each.value)} bytes")
        text = str(each.value, "latin-1")
        _require(text.isascii() and text.isprintable(), "metadata with characters other than printable ASCII")


def _edges(
    model: Model, reads: Collection[str], returns: Collection[str]
) -> tuple[dict[str, _Value], dict[str, _Value]]:
    """The inputs and the outputs of the graph by name; all begin with the same number of images."""
    edges = (model.graph.inputs, model.graph.outputs)
    batches = []
    for found, wanted in zip(edges, (reads, returns), strict=True):
        names = [edge.name for edge in found]
        _require(sorted(names) == sorted(wanted), f"inputs or outputs {names} instead of {[*wanted]}")
        batches += [dims[0] if (dims := edge.type.tensor.shape.dims) else Dimension() for edge in found]
    one = batches[0] if batches else Dimension()
    counted = one.value is not None
    _require(counted != bool(one.param) and all(each == one for each in batches), "no number of images common to all")
    _require(not counted or 1 <= (one.value or 0) <= MAX_BATCH, f"{one.value} images in one run")
    inputs, outputs = ({edge.name: _edge(edge) for edge in found} for found in edges)
    _require(all(value.dtype == FLOAT for value in outputs.values()), "an output other than float32")
    return inputs, outputs


def _edge(edge: Edge) -> _Value:
    dims = edge.type.tensor.shape.dims[1:]
    shape = tuple(dim.value or 0 for dim in dims)
    _require(edge.type.tensor.dtype in (FLOAT, UINT8), f"type {edge.type.tensor.dtype} of '{edge.name}'")
    _require(all(1 <= size <= _MAX_SIZE for size in shape), f"shape {list(shape)} of '{edge.name}'")
    _require(all(dim.param is None for dim in dims), f"a size of '{edge.name}' with a name")
    return _Value(edge.type.tensor.dtype, (_IMAGES, *shape))


def _initializer(tensor: Tensor, weights: TensorFile | None) -> _Value:
    shape, dtype = tuple(tensor.dims), tensor.dtype
    if tensor.location or tensor.external:
        _check_external(tensor, weights)
        return _Value(dtype, shape)
    if dtype not in (FLOAT, INT64, FLOAT16):
        raise ValueError(f"type {dtype} of '{tensor.name}'")
    if shape and not 1 <= min(shape) <= max(shape) <= _MAX_SIZE:
        raise ValueError(f"shape {list(shape)} of '{tensor.name}'")
    size = math.prod(shape) * _BYTES[dtype]
    if len(tensor.raw) != size:
        raise ValueError(f"'{tensor.name}' has {len(tensor.raw)} bytes instead of {size}")
    if dtype != INT64:
        return _Value(dtype, shape)
    _require(len(shape) == 1 and shape[0] <= MAX_POSITIONS, f"shape {list(shape)} of the integers '{tensor.name}'")
    ints = struct.unpack(f"<{shape[0]}q", tensor.raw)
    _require(all(abs(value) <= _MAX_SIZE for value in ints), f"value too large in '{tensor.name}'")
    return _Value(INT64, shape, ints)


def _check_external(tensor: Tensor, weights: TensorFile | None) -> None:
    """Refuse values outside the bundle, and any but the whole tensor of the same name, dtype and shape."""
    found = {pair.key: pair.value for pair in tensor.external}
    entry = weights.entries.get(tensor.name) if weights else None
    _require(entry is not None and tensor.location == 1 and not len(tensor.raw), f"no weights of '{tensor.name}'")
    assert entry is not None
    place = {"location": WEIGHTS, "offset": str(entry.start), "length": str(entry.stop - entry.start)}
    _require(found == place and len(tensor.external) == 3, f"the place of '{tensor.name}'")
    fits = tensor.dtype == FLOAT and entry.dtype == np.float32 and tuple(tensor.dims) == entry.shape
    _require(fits and all(1 <= size <= _MAX_SIZE for size in entry.shape), f"the shape of '{tensor.name}'")


def _add(values: dict[str, _Value], name: str, value: _Value) -> None:
    if not name or name in values:
        raise ValueError(f"the name '{name}' twice or empty")
    values[name] = value


def _follow(model: Model, values: dict[str, _Value], most_constant: int) -> None:
    """Add the outputs of every node to ``values``, and count memory and work for one image."""
    known = operators(model.opsets[0].version)
    nodes = model.graph.nodes
    last = {name: index for index, node in enumerate(nodes) for name in node.inputs}
    sizes = {edge.name: _bytes(values[edge.name])[0] for edge in model.graph.inputs}
    live, work, constant = sum(sizes.values()), 0, 0
    for index, node in enumerate(nodes):
        try:
            made, products = _infer(known, node, values)
            for name, value in zip(node.outputs, made, strict=True):
                sizes[name], of_images = _bytes(value)
                live += sizes[name]
                constant += 0 if of_images else sizes[name]
                work += sizes[name] // _BYTES[value.dtype] * products
                _add(values, name, value)
            _require(node.name in ("", node.outputs[0]), "a name other than that of what it makes")
            _require(live <= MAX_IMAGE_BYTES and work <= MAX_IMAGE_WORK, "too much memory or work for one image")
            _require(constant <= most_constant, "constants computed that are larger than the file")
        except ValueError as error:
            raise ValueError(f"node {index}, '{node.name}' ({node.op_type}): {error}") from error
        live -= sum(sizes.pop(name, 0) for name in node.inputs if last[name] == index)


def _bytes(value: _Value) -> tuple[int, bool]:
    """Bytes for one image, and whether each further image takes as many."""
    elements = math.prod(value.shape)
    of_images, rest = divmod(elements, _IMAGES)
    _require(rest == 0 or of_images == 0, "a size of some images and something else")
    size = (of_images or elements) * _BYTES[value.dtype]
    _require(size <= MAX_IMAGE_BYTES, "too much memory or work for one image")
    return size, of_images > 0


def _infer(known: Mapping[str, Operator], node: Node, values: Mapping[str, _Value]) -> tuple[list[_Value], int]:
    """What a node makes, and the products for each element of it."""
    operator = known.get(node.op_type)
    if operator is None:
        raise ValueError("an operator that no exported graph needs")
    for name in node.inputs:
        if name not in values:
            raise ValueError(f"reads '{name}', which nothing before it makes")
    count = len(node.inputs) - operator.ints
    if not 0 <= count - operator.floats <= operator.optional:
        raise ValueError(f"{len(node.inputs)} inputs")
    attributes = _attributes(operator, node.attributes)
    inputs = [values[name] for name in node.inputs]
    constants = [value.ints for value in inputs[count:]]
    _require(all(constants), "positions or shapes that are not constants")
    rule, dtype = operator.rule, inputs[0].dtype
    allowed = (FLOAT, FLOAT16, UINT8) if rule is _cast else (FLOAT, FLOAT16)
    for value in inputs[:count]:
        if value.dtype != dtype or dtype not in allowed:
            raise ValueError(f"an input of type {value.dtype}")
    shapes = [value.shape for value in inputs[:count]]
    made = rule(shapes, constants, attributes)
    if len(made) != len(node.outputs):
        raise ValueError(f"{len(node.outputs)} outputs")
    products = 1
    if rule is _conv:
        products = math.prod(shapes[1][1:])
    elif rule in (_gemm, _matmul):
        products = shapes[0][-1] // _IMAGES or shapes[0][-1]
    dtype = attributes["to"] if rule is _cast else dtype
    return [_Value(dtype, shape) for shape in made], products


def _attributes(operator: Operator, found: Sequence[Attribute]) -> Attributes:
    values: dict[str, Any] = {}
    for attribute in found:
        name = attribute.name
        kind = operator.attributes.get(name)
        if kind is None or name in values:
            raise ValueError(f"the attribute '{name}'")
        given = [other for other in _KINDS if getattr(attribute, other) is not None]
        if attribute.type != _KINDS[kind] or given != [kind]:
            raise ValueError(f"the type of the attribute '{name}'")
        values[name] = getattr(attribute, kind)
    values = {**operator.defaults, **values}
    for name in operator.attributes:
        if name not in values:
            raise ValueError(f"no attribute '{name}'")
    return values


# -- rules: shapes of the outputs -----------------------------------------------------------------------------


def _cast(shapes: Sequence[Dims], _: Sequence[Dims], attributes: Attributes) -> list[Dims]:
    _require(attributes["to"] in (FLOAT, FLOAT16), f"to {attributes['to']}")
    return [shapes[0]]


def _unchanged(shapes: Sequence[Dims], _: Sequence[Dims], attributes: Attributes) -> list[Dims]:
    if "axis" in attributes:
        _axis(shapes[0], attributes["axis"])
    return [shapes[0]]


def _axis(shape: Dims, axis: int) -> int:
    _require(-len(shape) <= axis < len(shape), f"axis {axis} of {len(shape)}")
    return axis % len(shape)


def _clip(shapes: Sequence[Dims], _: Sequence[Dims], attributes: Attributes) -> list[Dims]:
    _require(shapes[1] == shapes[2] == (), "limits that are not scalars")
    return [shapes[0]]


def _broadcast(shapes: Sequence[Dims], *_: object) -> list[Dims]:
    made = []
    for a, b in zip_longest(reversed(shapes[0]), reversed(shapes[1]), fillvalue=1):
        _require(a == b or 1 in (a, b), "shapes that do not fit")
        made.append(max(a, b))
    return [tuple(reversed(made))]


def _transpose(shapes: Sequence[Dims], _: Sequence[Dims], attributes: Attributes) -> list[Dims]:
    order = attributes["perm"]
    _require(sorted(order) == [*range(len(shapes[0]))], f"order {order}")
    return [tuple(shapes[0][axis] for axis in order)]


def _conv(shapes: Sequence[Dims], _: Sequence[Dims], attributes: Attributes) -> list[Dims]:
    x, weight, *bias = shapes
    _require(len(x) == len(weight) == 4 and x[1] == weight[1], "shapes that do not fit")
    kernel, strides = attributes["kernel_shape"], attributes["strides"]
    _require(tuple(kernel) == weight[2:] and len(strides) == 2 and min(strides) > 0, f"{kernel}, {strides}")
    _require(all(size <= whole < _IMAGES for size, whole in zip(kernel, x[2:], strict=True)), "a kernel too large")
    _require(all(each == weight[:1] for each in bias), "shapes that do not fit")
    made = ((whole - size) // step + 1 for whole, size, step in zip(x[2:], kernel, strides, strict=True))
    return [(x[0], weight[0], *made)]


def _reshape(shapes: Sequence[Dims], constants: Sequence[Dims], _: Attributes) -> list[Dims]:
    shape, wanted = shapes[0], constants[0]
    _require(len(wanted) <= MAX_RANK, f"{len(wanted)} axes")
    _require(all(size >= -1 for size in wanted) and wanted.count(-1) <= 1, f"shape {wanted}")
    _require(all(size or axis < len(shape) for axis, size in enumerate(wanted)), f"shape {wanted}")
    made = [size or shape[axis] for axis, size in enumerate(wanted)]
    if -1 in made:
        rest = -math.prod(made)
        made[made.index(-1)] = math.prod(shape) // rest
    _require(math.prod(made) == math.prod(shape), f"shape {wanted} that does not fit")
    return [tuple(made)]


def _pad(shapes: Sequence[Dims], constants: Sequence[Dims], _: Attributes) -> list[Dims]:
    axes, amounts = len(shapes[0]), constants[0]
    _require(len(amounts) == 2 * axes and all(0 <= n <= MAX_PADDING for n in amounts), f"amounts {amounts}")
    return [tuple(amounts[i] + size + amounts[axes + i] for i, size in enumerate(shapes[0]))]


def _layer_norm(shapes: Sequence[Dims], _: Sequence[Dims], attributes: Attributes) -> list[Dims]:
    _require(attributes["axis"] == -1 and 0 <= attributes["epsilon"] <= 1, "axis or epsilon")
    _require(all(weights == shapes[0][-1:] != () for weights in shapes[1:]), "shapes that do not fit")
    return [shapes[0]]


def _reduce(shapes: Sequence[Dims], constants: Sequence[Dims], attributes: Attributes) -> list[Dims]:
    shape, keep = shapes[0], attributes["keepdims"]
    axes = [_axis(shape, axis) for axis in (constants[0] if constants else attributes["axes"])]
    _require(keep in (0, 1) and 0 < len(axes) == len({*axes}), f"axes {axes}")
    return [tuple(1 if i in axes else size for i, size in enumerate(shape) if keep or i not in axes)]


def _matmul(shapes: Sequence[Dims], *_: object) -> list[Dims]:
    a, b = shapes
    _require(len(a) > 1 and len(b) > 1 and a[-1] == b[-2], "shapes that do not fit")
    return [(*_broadcast([a[:-2], b[:-2]])[0], a[-2], b[-1])]


def _gemm(shapes: Sequence[Dims], _: Sequence[Dims], attributes: Attributes) -> list[Dims]:
    a, b, *bias = shapes
    _require(len(a) == len(b) == 2 and attributes["transB"] in (0, 1), "shapes that do not fit")
    inner, columns = reversed(b) if attributes["transB"] else b
    made = (a[0], columns)
    _require(a[1] == inner and all(_broadcast([made, c]) == [made] for c in bias), "shapes that do not fit")
    return [made]


def _split(shapes: Sequence[Dims], constants: Sequence[Dims], attributes: Attributes) -> list[Dims]:
    sizes, shape = constants[0], shapes[0]
    _require(attributes["axis"] == -1 and min(sizes) > 0 and (sum(sizes),) == shape[-1:], f"sizes {sizes}")
    return [(*shape[:-1], size) for size in sizes]


def _slice(shapes: Sequence[Dims], constants: Sequence[Dims], _: Attributes) -> list[Dims]:
    _require(all(len(values) == 1 for values in constants), "more than one axis")
    (start,), (end,), (axis,) = constants
    made = list(shapes[0])
    axis = _axis(shapes[0], axis)
    _require(0 <= start < end <= made[axis] < _IMAGES, f"from {start} to {end}")
    made[axis] = end - start
    return [tuple(made)]


def _gather(shapes: Sequence[Dims], constants: Sequence[Dims], attributes: Attributes) -> list[Dims]:
    axis, rows = _axis(shapes[0], attributes["axis"]), constants[0]
    _require(all(0 <= row < shapes[0][axis] < _IMAGES for row in rows), "positions outside")
    made = list(shapes[0])
    made[axis] = len(rows)
    return [tuple(made)]


def _concat(shapes: Sequence[Dims], _: Sequence[Dims], attributes: Attributes) -> list[Dims]:
    axis = _axis(shapes[0], attributes["axis"])
    made = [(*shape[:axis], sum(s[axis] for s in shapes if len(s) > axis), *shape[axis + 1 :]) for shape in shapes]
    _require(len({*made}) == 1 and len({*map(len, shapes)}) == 1, "shapes that do not fit")
    return made[:1]


def operators(opset: int) -> dict[str, Operator]:
    """The operators that the exporter writes at an opset."""
    summed = Operator(_reduce, ints=1, attributes={"keepdims": "i"})
    reduced = summed if opset >= 18 else Operator(_reduce, attributes={"axes": "ints", "keepdims": "i"})
    normalised = Operator(_layer_norm, 2, optional=1, attributes={"axis": "i", "epsilon": "f"})
    return {
        "Cast": Operator(_cast, attributes={"to": "i"}),
        "Transpose": Operator(_transpose, attributes={"perm": "ints"}),
        "Conv": Operator(_conv, 2, optional=1, attributes={"strides": "ints", "kernel_shape": "ints"}),
        "Reshape": Operator(_reshape, ints=1),
        "Pad": Operator(_pad, ints=1),
        "Slice": Operator(_slice, ints=3),
        "Gather": Operator(_gather, ints=1, attributes={"axis": "i"}),
        "Split": Operator(_split, ints=1, attributes={"axis": "i"}),
        "Concat": Operator(_concat, 1, optional=MAX_EDGES, attributes={"axis": "i"}),
        "MatMul": Operator(_matmul, 2),
        "Gemm": Operator(_gemm, 2, optional=1, attributes={"transB": "i"}, defaults={"transB": 0}),
        "Softmax": Operator(_unchanged, attributes={"axis": "i"}),
        "ReduceSum": summed,
        "ReduceMean": reduced,
        "ReduceMax": reduced,
        "Clip": Operator(_clip, 3),
        **{op: Operator(_broadcast, 2) for op in ("Add", "Sub", "Mul", "Div")},
        **{op: Operator(_unchanged) for op in ("Sqrt", "Relu", "Sigmoid", "Erf")},
        **({"LayerNormalization": normalised} if opset >= 17 else {}),
        **({"Gelu": Operator(_unchanged)} if opset >= 20 else {}),
    }
