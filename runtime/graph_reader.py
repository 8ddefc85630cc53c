"""ONNX files read without a library that a hostile file could bring down.

A file is one message of Protocol Buffers: fields, each a number, a wire type and a value, and a value may be a message
again. The tables at the end of this module name every field that `export.graph` writes. Any other field is refused, and
with it all that hides behind one: external data, subgraphs, functions, sparse tensors, strings, metadata. No message
contains one of its own kind, so the depth is fixed; numbers of entries and lengths of texts are limited; weights
are views of the file and are never copied.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

MAX_BYTES = 2**31 - 1
"""The largest message that Protocol Buffers can hold."""
MAX_NODES = 10_000
MAX_TEXT = 256
MAX_RANK = 8
MAX_EDGES = 256
"""The most inputs, outputs or attributes of a node."""

_WIRE = {"integer": 0, "text": 2, "bytes": 2, "float": 5}
_SIGN = 2**63
_EMPTY = memoryview(b"")

T = TypeVar("T")


@dataclass
class Attribute:
    """A setting of a node; ``type`` says which of the three values counts (1: f, 2: i, 7: ints)."""

    name: str = ""
    f: float = 0.0
    i: int = 0
    ints: list[int] = field(default_factory=list)
    type: int = 0


@dataclass
class Node:
    """One operation: names of the tensors it reads and of those it makes."""

    name: str = ""
    op_type: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)


@dataclass
class Tensor:
    """A constant; ``raw`` holds its values in C order, little-endian."""

    name: str = ""
    dtype: int = 0
    dims: list[int] = field(default_factory=list)
    raw: memoryview = _EMPTY


@dataclass
class Dimension:
    """A size, or a name in place of one."""

    value: int = 0
    param: str = ""


@dataclass
class Shape:
    dims: list[Dimension] = field(default_factory=list)


@dataclass
class TensorType:
    dtype: int = 0
    shape: Shape = field(default_factory=Shape)


@dataclass
class Type:
    tensor: TensorType = field(default_factory=TensorType)


@dataclass
class Edge:
    """An input or output of the graph."""

    name: str = ""
    type: Type = field(default_factory=Type)


@dataclass
class Graph:
    name: str = ""
    nodes: list[Node] = field(default_factory=list)
    initializers: list[Tensor] = field(default_factory=list)
    inputs: list[Edge] = field(default_factory=list)
    outputs: list[Edge] = field(default_factory=list)


@dataclass
class Opset:
    domain: str = ""
    version: int = 0


@dataclass
class Model:
    """A whole file."""

    ir_version: int = 0
    producer_name: str = ""
    producer_version: str = ""
    graph: Graph = field(default_factory=Graph)
    opsets: list[Opset] = field(default_factory=list)


class _Field(NamedTuple):
    name: str
    kind: Literal["integer", "float", "text", "bytes"] | _Message[Any]
    most: int = 1
    """How often it may stand in a message; a list when that is more than once."""


class _Message(Generic[T]):
    """How one kind of message is read: its fields by number. What is absent is 0 or empty, as the format has it."""

    def __init__(self, build: Callable[..., T], fields: Mapping[int, _Field]) -> None:
        self.build = build
        self.name = getattr(build, "__name__", "message").lower()
        self.fields = {
            number << 3 | (_WIRE[each.kind] if isinstance(each.kind, str) else 2): each
            for number, each in fields.items()
        }

    def read(self, content: memoryview, position: int, end: int) -> T:
        """The message from ``position`` to ``end``. Raises ``ValueError`` with the reason."""
        values: dict[str, Any] = {}
        while position < end:
            key, position = _varint(content, position, end)
            known = self.fields.get(key)
            if known is None:
                raise ValueError(f"field {key >> 3} with wire type {key & 7} in {self.name}")
            name, kind, most = known
            value: Any
            value, position = (4, position) if kind == "float" else _varint(content, position, end)
            if kind == "integer":
                if value >= _SIGN:
                    value -= 2 * _SIGN
            else:
                start, position = position, position + value
                if position > end:
                    raise ValueError(f"the file ends within {name}")
                value = (
                    _text(name, content[start:position]) if kind == "text" else _value(kind, content, start, position)
                )
            if most > 1:
                entries = values.setdefault(name, [])
                if len(entries) == most:
                    raise ValueError(f"more than {most} {name} in {self.name}")
                entries.append(value)
            elif name in values:
                raise ValueError(f"{name} twice in {self.name}")
            else:
                values[name] = value
        return self.build(**values)


def read_model(content: bytes | memoryview) -> Model:
    """The model in the bytes of a file. Raises ``ValueError`` with the reason, in words for a user."""
    if not 0 < len(content) <= MAX_BYTES:
        raise ValueError(f"{len(content)} bytes")
    return _MODEL.read(memoryview(content), 0, len(content))


def _value(kind: str | _Message[Any], content: memoryview, start: int, end: int) -> Any:
    if isinstance(kind, _Message):
        return kind.read(content, start, end)
    return content[start:end] if kind == "bytes" else struct.unpack_from("<f", content, start)[0]


def _varint(content: memoryview, position: int, end: int) -> tuple[int, int]:
    """A number of up to 64 bits in groups of 7, lowest first, and the position behind it."""
    if position < end and content[position] < 0x80:  # most are small
        return content[position], position + 1
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise ValueError("the file ends within a number")
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 or value >> 64:
                break
            return value, position
    raise ValueError("a number longer than it has to be")


def _text(name: str, content: memoryview) -> str:
    """Printable ASCII, so that it can stand in a message."""
    if len(content) > MAX_TEXT:
        raise ValueError(f"a {name} of {len(content)} bytes")
    text = str(content, "latin-1")
    if not (text.isascii() and text.isprintable()):
        raise ValueError(f"a {name} with characters other than printable ASCII")
    return text


_ATTRIBUTE = _Message(
    Attribute,
    {
        1: _Field("name", "text"),
        2: _Field("f", "float"),
        3: _Field("i", "integer"),
        8: _Field("ints", "integer", MAX_RANK),
        20: _Field("type", "integer"),
    },
)
_NODE = _Message(
    Node,
    {
        1: _Field("inputs", "text", MAX_EDGES),
        2: _Field("outputs", "text", MAX_EDGES),
        3: _Field("name", "text"),
        4: _Field("op_type", "text"),
        5: _Field("attributes", _ATTRIBUTE, MAX_RANK),
    },
)
_TENSOR = _Message(
    Tensor,
    {
        1: _Field("dims", "integer", MAX_RANK),
        2: _Field("dtype", "integer"),
        8: _Field("name", "text"),
        9: _Field("raw", "bytes"),
    },
)
_DIMENSION = _Message(Dimension, {1: _Field("value", "integer"), 2: _Field("param", "text")})
_SHAPE = _Message(Shape, {1: _Field("dims", _DIMENSION, MAX_RANK)})
_TENSOR_TYPE = _Message(TensorType, {1: _Field("dtype", "integer"), 2: _Field("shape", _SHAPE)})
_TYPE = _Message(Type, {1: _Field("tensor", _TENSOR_TYPE)})
_EDGE = _Message(Edge, {1: _Field("name", "text"), 2: _Field("type", _TYPE)})
_GRAPH = _Message(
    Graph,
    {
        1: _Field("nodes", _NODE, MAX_NODES),
        2: _Field("name", "text"),
        5: _Field("initializers", _TENSOR, MAX_NODES),
        11: _Field("inputs", _EDGE, MAX_EDGES),
        12: _Field("outputs", _EDGE, MAX_EDGES),
    },
)
_OPSET = _Message(Opset, {1: _Field("domain", "text"), 2: _Field("version", "integer")})
_MODEL = _Message(
    Model,
    {
        1: _Field("ir_version", "integer"),
        2: _Field("producer_name", "text"),
        3: _Field("producer_version", "text"),
        7: _Field("graph", _GRAPH),
        8: _Field("opsets", _OPSET, MAX_RANK),
    },
)
