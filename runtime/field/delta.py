"""Deltas: small files that turn one bundle into a later one, bit for bit, and whole bundles in one file.

A delta is a zip archive. That of a whole bundle is one from nothing:

delta.json         which bundle it fits and which it makes (SHA-256 of the manifests), and how tensors are made
manifest.json      the manifest of the result, which has the hash of every file
NAME               a file of the result, as it is
NAME.header        the first bytes of a tensor file of the result
NAME.tensors       its tensors that are new, and factors of those that are sums

A tensor that is not among these is that of the same name in the older bundle. A sum is the older tensor plus products
of a column and a row, added one after the other to a range of its rows. Each product and each sum is rounded to
float32: two operations of IEEE 754 that are the same on every machine, where a matrix product rounds as its library
likes.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from duallora_edge.device_profiles.reader import Section
from duallora_edge.errors import BundleError
from duallora_edge.files import MAX_JSON_BYTES, atomic_directory, parse_json
from duallora_edge.runtime.bundle import GOLDEN, MANIFEST, Bundle, FileRecord, Manifest
from duallora_edge.runtime.graph_weights import WEIGHTS
from duallora_edge.runtime.tensor_file import MAX_HEADER_BYTES, Array, Entry, TensorFile, blocks, read_header

SCHEMA = 1
DELTA = "delta.json"
HEADER, TENSORS = ".header", ".tensors"
TENSOR_FILES = (WEIGHTS, GOLDEN)
MAX_MEMBERS = 100
MAX_TENSOR_BYTES = 2**28
_BLOCK = 2**20

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Term:
    """What is added to the rows from ``start`` of a tensor: ``up``^T ``down``, float32 [r, rows] and [r, columns].

    In a delta they are the tensors ``factors``.up and ``factors``.down.
    """

    start: int
    factors: str


@dataclass(frozen=True)
class Changes:
    """How a tensor file of the result is made: its header, tensors that are new or factors, and the terms of sums."""

    header: bytes
    tensors: Mapping[str, Array]
    sums: Mapping[str, tuple[Term, ...]]


def add_terms(tensor: Rows, terms: Iterable[tuple[int, Rows, Rows]]) -> Rows:
    """A tensor [n, columns] plus terms (start, up [r, rows], down [r, columns]), one rank after the other."""
    result = tensor.copy()
    for start, up, down in terms:
        rows = result[start : start + up.shape[1]]
        for column, row in zip(up, down, strict=True):
            rows += column[:, None] * row  # in two operations, so that no processor fuses them
    return result


def write_delta(file: Path, old: Bundle | None, new: Bundle, changes: Mapping[str, Changes]) -> None:
    """Write the delta from ``old`` (None: from nothing) to ``new``, whose files are read from its folder.

    ``changes`` are those of the tensor files; a file that is the same in both is left out.
    """
    facts = {
        "schema": SCHEMA,
        "from": None if old is None else {"bundle_version": old.manifest.bundle_version, "sha256": old.digest},
        "to": {"bundle_version": new.manifest.bundle_version, "sha256": new.digest},
        "sums": {
            name: {tensor: [[term.start, term.factors] for term in terms] for tensor, terms in each.sums.items()}
            for name, each in changes.items()
        },
    }
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(DELTA, json.dumps(facts, indent=1))
        archive.write(new.path / MANIFEST, MANIFEST)
        for name, record in new.manifest.files.items():
            if name in changes:
                archive.writestr(name + HEADER, changes[name].header)
                content = b"".join(blocks(changes[name].tensors))
                archive.writestr(name + TENSORS, content, zipfile.ZIP_STORED)
            elif old is None or old.manifest.files.get(name) != record:
                archive.write(new.path / name, name)


def apply_delta(old: str | Path | None, delta: str | Path, output: str | Path) -> Bundle:
    """Write the bundle that a delta makes of an older one.

    The memory it takes is that of the largest tensor and of the delta, not that of a bundle. A process that is killed
    leaves nothing; begin again.

    Args:
        old: The folder of the older bundle; None where the delta holds a whole one.
        delta: The file that ``export --delta-from`` or `write_delta` wrote.
        output: The folder of the new bundle, which must not exist yet or be empty.

    Returns:
        The new bundle without its contents. All its files have the hashes that the delta promises.

    Raises:
        BundleError: The delta does not fit the older bundle, or one of them is damaged.
        ConfigError: Something is at ``output``.
    """
    base, file = None if old is None else Bundle.peek(old), Path(delta)
    with _opened(file) as found:
        found.check_fits(base)
        with atomic_directory(Path(output)) as staging:
            for name, record in found.manifest.files.items():
                _write(staging / name, found.blocks_of(name, base), record, file)
            (staging / MANIFEST).write_bytes(found.manifest_bytes)
    return Bundle.peek(output)


@dataclass(frozen=True)
class DeltaFacts:
    """Which bundle a delta fits, by the digest, and the manifest of the one that it makes and its digest.

    The digest is "" and the version 0 of a delta from nothing.
    """

    from_digest: str
    from_version: int
    digest: str
    manifest: Manifest


def delta_facts(delta: str | Path) -> DeltaFacts:
    """What a delta says of itself. Raises `BundleError` when it is damaged."""
    with _opened(Path(delta)) as found:
        return found.facts


@contextmanager
def _opened(file: Path) -> Iterator[_Delta]:
    with _readable(file):
        archive = zipfile.ZipFile(file)
    with archive:
        yield _Delta(archive, file)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except BundleError:
        raise
    except Exception as error:  # zipfile and zlib raise many types on damaged files
        raise BundleError(f"{file} cannot be read ({str(error)[:200]}); copy the delta again.") from error


class _Delta:
    """An open delta whose list of members and facts are sound; what they hold is checked as it is used."""

    def __init__(self, archive: zipfile.ZipFile, file: Path) -> None:
        self.archive, self.file = archive, file
        members = archive.infolist()
        self.members = {member.filename: member for member in members}
        if len(self.members) != len(members) or len(members) > MAX_MEMBERS:
            raise self.damaged(f"{len(members)} members")
        self.manifest_bytes = self.read(MANIFEST, MAX_JSON_BYTES)
        problems: list[str] = []
        try:
            self.manifest = Manifest.from_json(parse_json(self.manifest_bytes))
            facts = Section(parse_json(self.read(DELTA, MAX_JSON_BYTES)), "", problems)
        except (ValueError, BundleError) as error:
            raise self.damaged(str(error)) from error
        schema = facts.integer("schema", 1, 10**6)
        if not problems and schema != SCHEMA:
            raise BundleError(f"{file} has schema {schema}, this version reads {SCHEMA}; upgrade duallora-edge here.")
        from_digest, from_version = "", 0
        if facts.values.get("from", 0) is not None:
            before = facts.section("from")
            from_digest, from_version = before.text("sha256"), before.integer("bundle_version", 1, 2**53)
        digest = facts.section("to").text("sha256")
        self.facts = DeltaFacts(from_digest, from_version, digest, self.manifest)
        self.sums = facts.section("sums").values
        if problems:
            raise self.damaged("; ".join(problems[:5]))
        if hashlib.sha256(self.manifest_bytes).hexdigest() != digest:
            raise self.damaged("its manifest is another one than it promises")

    def check_fits(self, base: Bundle | None) -> None:
        if self.facts.from_digest and (base is None or base.digest != self.facts.from_digest):
            which = "an older bundle" if base is None else f"another bundle than {base.path} ({base})"
            raise BundleError(
                f"{self.file} is for {which}: it leads from version {self.facts.from_version} to "
                f"{self.manifest.bundle_version}; use the delta of this bundle, or a whole one."
            )

    def damaged(self, reason: str) -> BundleError:
        return BundleError(
            f"{self.file} is not a delta of this project, or is damaged ({reason}); copy the delta again."
        )

    def read(self, name: str, limit: int) -> bytes:
        return b"".join(self.stream(name, limit))

    def stream(self, name: str, limit: int) -> Iterator[bytes]:
        """The blocks of a member of at most ``limit`` bytes."""
        member = self.members.get(name)
        if member is None or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.damaged(f"no {name}")
        if member.file_size > limit or member.flag_bits & 1:
            raise self.damaged(f"{name} has {member.file_size} bytes")
        left = limit + 1
        with _readable(self.file):
            stream = self.archive.open(member)
        with stream:
            while left:
                with _readable(self.file):
                    block = stream.read(min(_BLOCK, left))
                if not block:
                    return
                left -= len(block)
                yield block
        raise self.damaged(f"{name} is larger than it says")

    def blocks_of(self, name: str, base: Bundle | None) -> Iterator[bytes | memoryview]:
        """The content of a file of the result; what is too much of it shows when it is written."""
        if name in self.members:
            yield from self.stream(name, self.manifest.files[name].bytes)
        elif base is None or not self.facts.from_digest:
            raise self.damaged(f"no {name}")
        elif name + HEADER in self.members:
            yield from self._tensors(name, base)
        elif base.manifest.files.get(name) == self.manifest.files[name]:
            with _Old(base.path / name) as old:
                yield from old.blocks(0, old.size)
        else:
            raise self.damaged(f"no {name}")

    def _tensors(self, name: str, base: Bundle) -> Iterator[bytes | memoryview]:
        head = self.read(name + HEADER, MAX_HEADER_BYTES + 8)
        yield head
        try:
            entries = read_header(memoryview(head), self.manifest.files[name].bytes)
            new = TensorFile(self.read(name + TENSORS, self.manifest.files[name].bytes))
        except ValueError as error:
            raise self.damaged(f"{name}: {error}") from error
        sums = self.sums.get(name, {})
        if not isinstance(sums, dict):
            raise self.damaged(f"no sums of {name}")
        with _Old(base.path / name) as old:
            before = old.entries()
            for tensor, entry in entries.items():
                if tensor in new.entries:
                    yield self._fitting(tensor, new[tensor], entry).tobytes()
                    continue
                found = before.get(tensor)
                if found is None or (found.dtype, found.shape) != (entry.dtype, entry.shape):
                    raise self.damaged(f"{name} has no {tensor}, neither has the older bundle")
                if tensor not in sums:
                    yield from old.blocks(found.start, found.stop)
                    continue
                if found.dtype != np.float32 or len(found.shape) != 2 or found.stop - found.start > MAX_TENSOR_BYTES:
                    raise self.damaged(f"{tensor} cannot be a sum")
                content = b"".join(old.blocks(found.start, found.stop))
                rows = np.frombuffer(content, np.float32).reshape(found.shape)
                yield add_terms(rows, self._terms(tensor, sums[tensor], new, found.shape)).tobytes()

    def _fitting(self, name: str, array: Array, entry: Entry) -> Array:
        if (array.dtype, array.shape) != (entry.dtype, entry.shape):
            raise self.damaged(f"{name} has another shape than its header says")
        return array

    def _terms(
        self, tensor: str, terms: Any, new: TensorFile, shape: tuple[int, ...]
    ) -> Iterator[tuple[int, Rows, Rows]]:
        used: set[str] = set()  # each once, so that a small delta cannot ask for endless work
        if not isinstance(terms, list):
            raise self.damaged(f"no terms of {tensor}")
        for term in terms:
            try:
                start, factors = term
                up, down = new[f"{factors}.up"], new[f"{factors}.down"]
            except (TypeError, ValueError, KeyError) as error:
                raise self.damaged(f"no terms of {tensor}") from error
            fits = up.dtype == down.dtype == np.float32 and up.ndim == down.ndim == 2 and len(up) == len(down)
            fits = fits and type(start) is int and 0 <= start <= shape[0] - up.shape[1] and down.shape[1] == shape[1]
            if not fits or factors in used:
                raise self.damaged(f"terms of {tensor} that do not fit")
            used.add(factors)
            yield start, up, down


class _Old:
    """A file of the older bundle. It need not be verified: what is made of it has to have the hash of the result."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Old:
        try:
            self.file: BinaryIO = os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
            self.size = os.fstat(self.file.fileno()).st_size
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read ({error.strerror}); copy the older bundle again.") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def entries(self) -> dict[str, Entry]:
        """Where each tensor lies. Raises `BundleError` where it is not a tensor file."""
        self.file.seek(0)
        length = int.from_bytes(self.file.read(8), "little")
        self.file.seek(0)
        try:
            return read_header(memoryview(self.file.read(min(length, MAX_HEADER_BYTES) + 8)), self.size)
        except ValueError as error:
            raise BundleError(f"{self.path} is damaged ({error}); copy the older bundle again.") from error

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        self.file.seek(start)
        while start < stop and (block := self.file.read(min(_BLOCK, stop - start))):
            start += len(block)
            yield block


def _write(path: Path, content: Iterable[bytes | memoryview], record: FileRecord, delta: Path) -> None:
    """Write a file of the result, which must become what its record says."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for block in content:
            size += len(block)
            if size > record.bytes:
                break
            digest.update(block)
            file.write(block)
    if size != record.bytes or digest.hexdigest() != record.sha256:
        raise BundleError(
            f"{path.name} did not become what {delta} promises, so the older bundle or the delta is damaged; copy both "
            "again."
        )
