"""Decoded images on disk: one file for each set of images, mapped into memory, written whole or not at all.

A file holds the pixels ``uint8 [N, S, S, 3]``, then the facts ``uint8 [N, 17]`` (see `Decoded`), then a
checksum of key and facts. Its name is the key. A file of the wrong size or checksum does not count as there.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from duallora_edge.errors import DataError
from duallora_edge.files import cache_limit

Bytes = npt.NDArray[np.uint8]

HASH_BYTES = 16
FACT_BYTES = HASH_BYTES + 1
LIMIT_GB = 8
_ABANDONED_AFTER_S = 24 * 3600


@dataclass(frozen=True, eq=False)
class Decoded:
    """Images at the size of the model, and what was seen while decoding them.

    ``pixels``: ``uint8 [N, S, S, 3]`` RGB, read-only. ``facts``: ``uint8 [N, 17]``, the hash of the full-size
    image (16 bytes) and the flags of `health.Flag`.
    """

    pixels: Bytes
    facts: Bytes


class DecodedCache:
    """The cache folder. Safe for several processes: a file appears by a rename and is never changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "decoded"
        self._used: set[str] = set()

    def load(self, key: str, count: int, size: int) -> Decoded | None:
        """The ``count`` images of ``size`` pixels under ``key``; ``None`` when absent, short or damaged."""
        path = self.folder / f"{key}.u8"
        pixel_bytes = count * size * size * 3
        try:
            if path.stat().st_size != pixel_bytes + count * FACT_BYTES + HASH_BYTES:
                return None
            with path.open("rb") as file:
                file.seek(pixel_bytes)
                trailer = file.read()
            if trailer[count * FACT_BYTES :] != _checksum(key, trailer[: count * FACT_BYTES]):
                return None
            pixels = (
                np.asarray(np.memmap(path, np.uint8, "r", shape=(count, size, size, 3)))
                if count
                else np.zeros((0, size, size, 3), np.uint8)
            )
            os.utime(path)
        except FileNotFoundError:
            return None
        self._used.add(key)
        return Decoded(pixels, np.frombuffer(trailer, np.uint8, count * FACT_BYTES).reshape(count, FACT_BYTES))

    def store(self, key: str, count: int, size: int, batches: Iterable[Decoded]) -> Decoded:
        """Write the ``count`` images that ``batches`` yield, in order, and return them as `load` does.

        Raises `DataError` when the folder cannot be written or has too little space; nothing is left behind.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            try:
                _write(handle, key, count * (size * size * 3 + FACT_BYTES) + HASH_BYTES, batches)
                Path(name).replace(self.folder / f"{key}.u8")
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            stored = self.load(key, count, size)
        except OSError as error:
            raise DataError(
                f"Decoded images cannot be written to {self.folder} ({error.strerror or error}); free some space, "
                f"or name another folder in DUALLORA_EDGE_CACHE."
            ) from error
        if stored is None:
            raise DataError(f"{self.folder} lost a file just written to it; is another program emptying it?")
        return stored

    def trim(self) -> None:
        """Delete the files used longest ago until the rest fits ``$DUALLORA_EDGE_CACHE_GB`` (default 8).

        Files that this object has returned stay, even beyond the limit. On POSIX systems a file that another
        process has mapped stays readable there.
        """
        limit = cache_limit("DUALLORA_EDGE_CACHE_GB", LIMIT_GB)
        entries = [(path, path.stat()) for path in _listed(self.folder, "*.u8")]
        total = sum(facts.st_size for _, facts in entries)
        for path, facts in sorted(entries, key=lambda entry: entry[1].st_mtime):
            if total > limit and path.stem not in self._used:
                path.unlink(missing_ok=True)
                total -= facts.st_size
        for path in _listed(self.folder, "*.tmp"):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                path.unlink(missing_ok=True)


def release(pixels: Bytes) -> None:
    """Give back the memory of pixels that are mapped from a file; they are read again when they are needed."""
    base: object = pixels
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def _write(handle: int, key: str, size: int, batches: Iterable[Decoded]) -> None:
    with os.fdopen(handle, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # a full disk shows now, not after minutes of decoding
        facts = bytearray()
        for batch in batches:
            file.write(np.ascontiguousarray(batch.pixels).data)
            facts += batch.facts.tobytes()
        file.write(facts)
        file.write(_checksum(key, bytes(facts)))
        file.flush()
        os.fsync(file.fileno())


def _checksum(key: str, facts: bytes) -> bytes:
    return hashlib.blake2b(key.encode() + facts, digest_size=HASH_BYTES).digest()


def _listed(folder: Path, pattern: str) -> Collection[Path]:
    return [path for path in folder.glob(pattern) if path.is_file()]
