"""Decoded images on disk: one file for each set of images, mapped into memory, written whole or not at all.

A file holds the pixels ``uint8 [N, S, S, 3]``, then the facts ``uint8 [N, 81]`` (see `Decoded`), then a
checksum of the key and all of these. Its name is the key. A file of the wrong size or checksum does not count as
there. The checksum finds damage; against people it is the folder that protects, which must be the user's own.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from duallora_edge.errors import DataError
from duallora_edge.files import cache_limit, own_folder
from duallora_edge.learner.data.fingerprint import FINGERPRINT_BYTES, Bytes

FACT_BYTES = FINGERPRINT_BYTES + 1
CHECKSUM_BYTES = 16
LIMIT_GB = 8
_ABANDONED_AFTER_S = 24 * 3600
_BLOCK_BYTES = 2**20
_TEMPORARY = ".decoded."
# The names of what is written here; nothing else in the folder is touched.
_ENTRY = re.compile(r"[0-9a-f]{64}\.u8")
_UNFINISHED = re.compile(r"\.decoded\.\w{8}\.tmp")


@dataclass(frozen=True, eq=False)
class Decoded:
    """Images at the size of the model, and what was seen while decoding them.

    ``pixels``: ``uint8 [N, S, S, 3]`` RGB, read-only. ``facts``: ``uint8 [N, 81]``, the fingerprint of each
    image (80 bytes) and the flags of `health.Flag`.
    """

    pixels: Bytes
    facts: Bytes


class DecodedCache:
    """The cache folder. Safe for several processes: a file appears by a rename and is never changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "decoded"
        self._used: set[str] = set()

    def load(self, key: str, count: int, size: int) -> Decoded | None:
        """The ``count`` images of ``size`` pixels under ``key``; ``None`` when absent, short or damaged.

        All of it is read once, at a cost of half a second of one processor for 1 GB. Raises `ConfigError` when
        others may write to the folder.
        """
        path = self.folder / f"{key}.u8"
        if not path.is_file():
            return None
        try:
            own_folder(self.folder)
            if not _is_whole(path, key, count * size * size * 3, count * FACT_BYTES):
                return None
            entry = self._map(key, count, size)
        except OSError:  # what cannot be read is decoded again
            return None
        with suppress(OSError):  # a cache that cannot be written can still be read
            os.utime(path)
        return entry

    def _map(self, key: str, count: int, size: int) -> Decoded:
        with (self.folder / f"{key}.u8").open("rb") as file:
            pixels = (
                np.asarray(np.memmap(file, np.uint8, "r", shape=(count, size, size, 3)))
                if count
                else np.zeros((0, size, size, 3), np.uint8)
            )
            file.seek(pixels.nbytes)
            facts = np.frombuffer(file.read(count * FACT_BYTES), np.uint8).reshape(count, FACT_BYTES)
        self._used.add(key)
        return Decoded(pixels, facts)

    def store(self, key: str, count: int, size: int, batches: Iterable[Decoded]) -> Decoded:
        """Write the ``count`` images that ``batches`` yield, in order, and return them as `load` does.

        Raises `DataError` when the folder cannot be written or has too little space; nothing is left behind. Raises
        `ConfigError` when others may write to the folder.
        """
        try:
            own_folder(self.folder)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=_TEMPORARY, suffix=".tmp")
            try:
                _write(handle, key, count * (size * size * 3 + FACT_BYTES) + CHECKSUM_BYTES, batches)
                Path(name).replace(self.folder / f"{key}.u8")
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            return self._map(key, count, size)
        except OSError as error:
            raise DataError(
                f"Decoded images cannot be written to {self.folder} ({error.strerror or error}); free some space, "
                f"or name another folder in DUALLORA_EDGE_CACHE."
            ) from error

    def trim(self) -> None:
        """Delete the files used longest ago until the rest fits ``$DUALLORA_EDGE_CACHE_GB`` (default 8).

        Files that this object has returned stay, even beyond the limit. On POSIX systems a file that another
        process has mapped stays readable there.
        """
        limit = cache_limit("DUALLORA_EDGE_CACHE_GB", LIMIT_GB)
        entries = list(_listed(self.folder, _ENTRY))
        total = sum(facts.st_size for _, facts in entries)
        for path, facts in sorted(entries, key=lambda entry: entry[1].st_mtime):
            if total > limit and path.stem not in self._used:
                path.unlink(missing_ok=True)
                total -= facts.st_size
        for path, facts in _listed(self.folder, _UNFINISHED):
            if time.time() - facts.st_mtime > _ABANDONED_AFTER_S:
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
        pixel_sum = 0
        facts = bytearray()
        for batch in batches:
            pixels = np.ascontiguousarray(batch.pixels).data
            pixel_sum = zlib.crc32(pixels, pixel_sum)
            file.write(pixels)
            facts += batch.facts.tobytes()
        file.write(facts)
        file.write(_checksum(key, pixel_sum, facts))
        file.flush()
        os.fsync(file.fileno())


def _is_whole(path: Path, key: str, pixel_bytes: int, fact_bytes: int) -> bool:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != pixel_bytes + fact_bytes + CHECKSUM_BYTES:
            return False
        pixel_sum = 0
        for start in range(0, pixel_bytes, _BLOCK_BYTES):
            pixel_sum = zlib.crc32(file.read(min(_BLOCK_BYTES, pixel_bytes - start)), pixel_sum)
        return _checksum(key, pixel_sum, file.read(fact_bytes)) == file.read()


def _checksum(key: str, pixel_sum: int, facts: bytes | bytearray) -> bytes:
    """Of everything; the pixels by their CRC-32, which takes a quarter of the time of a hash."""
    return hashlib.blake2b(f"{key} {pixel_sum:08x}".encode() + facts, digest_size=CHECKSUM_BYTES).digest()


def _listed(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of this pattern that are there, links left out."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if pattern.fullmatch(path.name):
            with suppress(OSError):  # another process may delete it meanwhile
                facts = path.lstat()
                if stat.S_ISREG(facts.st_mode):
                    yield path, facts
