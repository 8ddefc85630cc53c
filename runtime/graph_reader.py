"""Reads ONNX files without a library that a hostile file could crash.

A file is one message of Protocol Buffers: fields, each a number, a wire type and a value, and a value may be a message
again. The classes below name every field that `export` writes. Any other field is refused, and with it
subgraphs, functions, sparse tensors, strings and metadata of nodes. No message contains one of its
own kind, so the depth is fixed; numbers of entries and lengths of texts are limited; weights and what the graph says of
itself are views of the file and never copied.
"""

# ruff: noqa: RUF009 - _field makes fields of dataclasses
from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

MAX_BYTES = 2**31 - 1
"""The largest message that Protocol Buffers can hold."""
MAX_NODES = 10_000
MAX_EDGES = 128
"""The most inputs or outputs of a node or of the graph."""
MAX_RANK = 8
"""The most sizes of a shape, elements of a constant of integers, attributes of a node."""
MAX_TEXT = 256

_Kind = Literal["integer", "float", "text", "bytes"] | type[Any]
_WIRE = {"integer": 0, "text": 2, "bytes": 2, "float": 5}
_EMPTY = {"integer": 0, "text": "", "bytes": memoryview(b"")}


def _field(number: int, kind: _Kind, most: int = 1, *, choice: bool = False) -> Any:
    """A field that may stand up to ``most`` times in its message.

    Absent is 0 or empty, as the format has it, and None for a ``choice``, one of several that exclude each other.
    """
    metadata = {"number": number, "kind": kind, "most": most}
    if choice:
        return field(default=None, metadata=metadata)
    if most > 1:
        return field(default_factory=list, metadata=metadata)
    if isinstance(kind, str):
        return field(default=_EMPTY[kind], metadata=metadata)
    return field(default_factory=kind, metadata=metadata)


@dataclass
class Attribute:
    """A setting of a node; ``type`` says which of the three values counts (1: f, 2: i, 7: ints)."""

    name: str = _field(1, "text")
    f: float | None = _field(2, "float", choice=True)
    i: int | None = _field(3, "integer", choice=True)
    ints: list[int] | None = _field(8, "integer", MAX_RANK, choice=True)
    type: int = _field(20, "integer")


@dataclass
class Node:
    """One operation: names of the tensors it reads and of those it makes."""

    inputs: list[str] = _field(1, "text", MAX_EDGES)
    outputs: list[str] = _field(2, "text", MAX_EDGES)
    name: str = _field(3, "text")
    op_type: str = _field(4, "text")
    attributes: list[Attribute] = _field(5, Attribute, MAX_RANK)


@dataclass
class Pair:
    """One of the facts about values in another file."""

    key: str = _field(1, "text")
    value: str = _field(2, "text")


@dataclass
class Tensor:
    """A constant; ``raw`` holds its values in C order, little-endian.

    With a ``location`` of 1 they lie in another file, and ``external`` says where: in any order its name, and the
    place and number of the bytes.
    """

    dims: list[int] = _field(1, "integer", MAX_RANK)
    dtype: int = _field(2, "integer")
    name: str = _field(8, "text")
    raw: memoryview = _field(9, "bytes")
    external: list[Pair] = _field(13, Pair, 3)
    location: int = _field(14, "integer")


@dataclass
class Dimension:
    """A size, or a name in place of one."""

    value: int | None = _field(1, "integer", choice=True)
    param: str | None = _field(2, "text", choice=True)


@dataclass
class Shape:
    dims: list[Dimension] = _field(1, Dimension, MAX_RANK)


@dataclass
class TensorType:
    dtype: int = _field(1, "integer")
    shape: Shape = _field(2, Shape)


@dataclass
class Type:
    tensor: TensorType = _field(1, TensorType)


@dataclass
class Edge:
    """An input or output of the graph."""

    name: str = _field(1, "text")
    type: Type = _field(2, Type)


@dataclass
class Graph:
    nodes: list[Node] = _field(1, Node, MAX_NODES)
    name: str = _field(2, "text")
    initializers: list[Tensor] = _field(5, Tensor, MAX_NODES)
    inputs: list[Edge] = _field(11, Edge, MAX_EDGES)
    outputs: list[Edge] = _field(12, Edge, MAX_EDGES)


@dataclass
class Opset:
    domain: str = _field(1, "text")
    version: int = _field(2, "integer")


@dataclass
class Metadata:
    """Something for people and other programs to read; nothing depends on it."""

    key: str = _field(1, "text")
    value: memoryview = _field(2, "bytes")


@dataclass
class Model:
    """A whole file."""

    ir_version: int = _field(1, "integer")
    producer_name: str = _field(2, "text")
    producer_version: str = _field(3, "text")
    graph: Graph = _field(7, Graph)
    opsets: list[Opset] = _field(8, Opset, MAX_RANK)
    metadata: list[Metadata] = _field(14, Metadata, 2)


class _Entry(NamedTuple):
    name: str
    kind: _Kind
    most: int


def read_model(content: bytes | memoryview) -> Model:
    """The model in the bytes of a file. Raises ``ValueError`` with the reason, in words for a user."""
    if not 0 < len(content) <= MAX_BYTES:
        raise ValueError(f"a file of {len(content)} bytes")
    model: Model = _read(Model, memoryview(content), 0, len(content))
    return model


def _table(message: type[Any]) -> dict[int, _Entry]:
    """The fields of a message by what stands before their values: the number and the wire type."""
    entries = [(each.name, each.metadata) for each in fields(message)]
    return {
        data["number"] << 3 | _WIRE.get(data["kind"], 2): _Entry(name, data["kind"], data["most"])
        for name, data in entries
    }


_MESSAGES = (Attribute, Node, Pair, Tensor, Dimension, Shape, TensorType, Type, Edge, Graph, Opset, Metadata, Model)
_TABLES = {message: _table(message) for message in _MESSAGES}


def key_of(message: type[Any], name: str) -> int:
    """What stands before the values of a field."""
    return next(key for key, entry in _TABLES[message].items() if entry.name == name)


def fields_of(content: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message from ``position`` to ``end``: key, and where field and value begin and both end.

    Raises ``ValueError`` where it is no message.
    """
    while position < end:
        begin = position
        key, position = _varint(content, position, end)
        if key & 7 == _WIRE["float"]:
            value, position = position, position + 4
        else:
            size, value = _varint(content, position, end)
            position = value if key & 7 == _WIRE["integer"] else value + size
        if position > end or key & 7 not in _WIRE.values():
            raise ValueError("the end of the file within a field")
        yield key, begin, value, position


def varint(value: int) -> bytes:
    """A number from 0 to 2^63 in groups of 7 bits, lowest first."""
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def _read(message: type[Any], content: memoryview, position: int, end: int) -> Any:
    """The message from ``position`` to ``end``."""
    table = _TABLES[message]
    values: dict[str, Any] = {}
    while position < end:
        key, position = _varint(content, position, end)
        entry = table.get(key)
        if entry is None:
            raise ValueError(f"field {key >> 3} with wire type {key & 7} in {message.__name__}")
        name, kind, most = entry
        value: Any
        value, position = (4, position) if kind == "float" else _varint(content, position, end)
        if kind == "integer":
            value -= value >> 63 << 64  # the sign
        else:
            start, position = position, position + value
            if position > end:
                raise ValueError(f"the end of the file within {name}")
            value = _value(name, kind, content, start, position)
        if most == 1:
            if name in values:
                raise ValueError(f"{name} twice in {message.__name__}")
            values[name] = value
        else:
            several = values.setdefault(name, [])
            several.append(value)
            if len(several) > most:
                raise ValueError(f"more than {most} {name} in {message.__name__}")
    return message(**values)


def _value(name: str, kind: _Kind, content: memoryview, start: int, end: int) -> Any:
    if kind == "text":
        return _text(name, content[start:end])
    if kind == "bytes":
        return content[start:end]
    return struct.unpack_from("<f", content, start)[0] if isinstance(kind, str) else _read(kind, content, start, end)


def _varint(content: memoryview, position: int, end: int) -> tuple[int, int]:
    """A number of up to 64 bits in groups of 7, lowest first, and the position behind it."""
    if position < end and content[position] < 0x80:  # most are small
        return content[position], position + 1
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise ValueError("the end of the file within a number")
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
