"""The cache of TensorRT engines, safe against a kill at any moment.

In ``engines`` of the cache folder each engine is a folder, named by a digest of everything it depends on, with
``engine.plan`` and ``engine.json`` (the key, and size and SHA-256 of the plan). It appears by a rename when it is
whole. Beside the folders lie the timings that builds share (``*.timing``) and the locks of builds (``*.lock``).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from duallora_edge.errors import BackendError
from duallora_edge.files import (
    cache_folder,
    cache_limit,
    lock_holder,
    note_holder,
    open_lock,
    own_folder,
    read_json,
    read_limited,
    sha256_file,
    sweep,
    write_json,
)
from duallora_edge.runtime.backends.tensorrt_api import TENSORRT_RTX

PLAN = "engine.plan"
RECORD = "engine.json"
LIMIT_VARIABLE = "DUALLORA_EDGE_ENGINES_GB"
LIMIT_GB = 4
_ABANDONED_AFTER_S = 24 * 3600
_POLL_S = 0.2
# The names of what is made here; nothing else in the folder is touched.
_ENGINE = re.compile("[0-9a-f]{32}")
_TIMING = re.compile(r"[0-9a-f]{32}\.timing")
_UNFINISHED = re.compile(r"\.([0-9a-f]{32}(?:\.timing)?)\.[0-9a-f]{8}\.tmp")


class EngineError(BackendError):
    """An engine cannot be built, stored or read."""


class RefusedModelError(EngineError):
    """TensorRT cannot build an engine from this graph; another precision may work."""


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on.

    ``device`` and ``multiprocessors`` are None for TensorRT-RTX, whose engines serve a whole compute capability
    ("sm86"). ``batch`` is the number of images that the graph takes, or None where the engine takes any number up to
    ``max_batch``. ``recipe`` is the version of our way of building.
    """

    package: str
    version: str
    platform: str
    compute_capability: str
    device: str | None
    multiprocessors: int | None
    model_sha256: str
    precision: str
    batch: int | None
    max_batch: int
    recipe: int

    @property
    def digest(self) -> str:
        """The name of the engine's folder."""
        return _digest(asdict(self))

    @property
    def timing_name(self) -> str | None:
        """The file of the timings that all builds for this GPU share; None for TensorRT-RTX, which times nothing."""
        if self.package == TENSORRT_RTX:
            return None
        shared = (self.package, self.version, self.platform, self.compute_capability, self.device, self.multiprocessors)
        return f"{_digest(shared)}.timing"


@dataclass(frozen=True)
class Engine:
    """An engine in the cache: the file ``plan`` of ``bytes`` bytes.

    ``workspace_mb`` (10^6 bytes) was asked for and ``granted_mb`` given to the builder, which took ``seconds``.
    ``device_memory_bytes``: what one execution context takes on the GPU; None where the build did not load the engine.
    ``driver_cuda``: the newest CUDA version of the driver at the build; None for TensorRT-RTX and where it is unknown.
    """

    key: EngineKey
    plan: Path
    bytes: int
    workspace_mb: int
    granted_mb: int
    seconds: float
    device_memory_bytes: int | None
    driver_cuda: str | None = None
    from_cache: bool = True

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**asdict(self), "plan": str(self.plan)}


def engines_folder() -> Path:
    """Where engines are kept."""
    return cache_folder() / "engines"


def find_engine(key: EngineKey) -> Engine | None:
    """The engine of this key, or None. Raises as `read_engine` does."""
    found = read_engine(key)
    return found[0] if found else None


def read_engine(key: EngineKey) -> tuple[Engine, bytes] | None:
    """The engine of this key and its plan (the bytes that were compared with the record), or None.

    Raises `EngineError` when it is there but damaged, and `ConfigError` when others may write to the folder.
    """
    folder = engines_folder() / key.digest
    if not os.path.lexists(folder):
        return None
    try:
        own_folder(engines_folder())
        engine, content = read_folder(folder, key)
    except (OSError, ValueError, TypeError, KeyError) as error:
        if not os.path.lexists(folder):
            return None
        raise EngineError(
            f"The engine in {folder} is damaged ({str(error)[:200]}); run 'duallora-edge build' again."
        ) from error
    with contextlib.suppress(OSError):  # a cache that cannot be written can still be read
        os.utime(folder / RECORD)
    return engine, content


def read_folder(folder: Path, key: EngineKey) -> tuple[Engine, bytes]:
    """The engine in a folder and its plan, compared with the record.

    Raises ``OSError``, ``ValueError``, ``TypeError`` or ``KeyError`` when it is damaged or not that of ``key``.
    """
    plan, record = folder / PLAN, read_json(folder / RECORD)
    if record["key"] != asdict(key):
        raise ValueError("it belongs to another key")
    engine = _engine(key, plan, record)
    content = read_limited(plan, engine.bytes) if plan.stat().st_size == engine.bytes else b""
    if record["sha256"] != hashlib.sha256(content).hexdigest():
        raise ValueError("its size or SHA-256 is not the recorded one")
    return engine, content


def _engine(key: EngineKey, plan: Path, record: dict[str, Any]) -> Engine:
    """Raises ``ValueError`` for values that no build wrote, ``KeyError`` for one that is missing."""

    def count(name: str) -> int:
        value = record[name]
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"its record has no number in '{name}'")
        return value

    seconds = record["seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < 2**31:
        raise ValueError("its record has no number in 'seconds'")
    driver = record.get("driver_cuda")  # older records have none
    if not isinstance(driver, (str, type(None))):
        raise ValueError("its record has no text in 'driver_cuda'")
    return Engine(
        key=key,
        plan=plan,
        bytes=count("bytes"),
        workspace_mb=count("workspace_mb"),
        granted_mb=count("granted_mb"),
        seconds=seconds,
        device_memory_bytes=None if record["device_memory_bytes"] is None else count("device_memory_bytes"),
        driver_cuda=driver,
    )


def write_record(folder: Path, key: EngineKey, facts: dict[str, Any]) -> None:
    """Complete a folder that has its plan with the record that `find_engine` checks."""
    plan = folder / PLAN
    record = {"key": asdict(key), "bytes": plan.stat().st_size, "sha256": sha256_file(plan), **facts}
    write_json(folder / RECORD, record)


@contextlib.contextmanager
def locked(folder: Path, key: EngineKey, wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock under which only one process builds the engine of ``key``.

    While another one does, ``wait`` is called again and again with its process id; it may raise. The lock belongs to
    the process (flock), so the file of a killed process blocks nobody. Raises `ConfigError` when something else
    has the name of the lock.
    """
    path = folder / f"{key.digest}.lock"
    while True:
        file = open_lock(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it has deleted the file by now, and another may hold a new one of the same name.
            if _is_at(file.fileno(), path):
                break
            file.close()
        except BlockingIOError:
            holder = lock_holder(file)
            file.close()
            wait(holder)
            time.sleep(_POLL_S)
    with file:
        try:
            note_holder(file)
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_at(handle: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn an ``OSError`` (a full disk, a folder that cannot be written) into an `EngineError` with its remedy."""
    try:
        yield
    except OSError as error:
        raise EngineError(
            f"Engines cannot be written to {folder} ({error.strerror or error}); free some space, or name another "
            "folder in DUALLORA_EDGE_CACHE."
        ) from error


def evict(folder: Path, keep: EngineKey) -> None:
    """Delete the least recently used engines above ``$DUALLORA_EDGE_ENGINES_GB`` (default 4).

    The engine ``keep`` and its timings stay, even beyond the limit. Files of killed builds are deleted after a day.
    """
    limit = cache_limit(LIMIT_VARIABLE, LIMIT_GB)
    sizes: dict[Path, int] = {}
    used: dict[Path, float] = {}
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may delete it meanwhile
            facts = path.lstat()
            if unfinished := _UNFINISHED.fullmatch(path.name):
                if time.time() - facts.st_mtime > _ABANDONED_AFTER_S:
                    sweep(folder / unfinished[1])
            elif _TIMING.fullmatch(path.name) and stat.S_ISREG(facts.st_mode):
                sizes[path], used[path] = facts.st_size, facts.st_mtime
            elif _ENGINE.fullmatch(path.name) and stat.S_ISDIR(facts.st_mode):
                sizes[path] = sum((path / name).lstat().st_size for name in (PLAN, RECORD))
                used[path] = (path / RECORD).lstat().st_mtime
    total = sum(sizes.values())
    for path in sorted(used, key=used.__getitem__):
        if total > limit and path.name not in (keep.digest, keep.timing_name):
            if _TIMING.fullmatch(path.name):
                path.unlink(missing_ok=True)
            else:
                delete_engine(path)
            total -= sizes[path]


def delete_engine(folder: Path) -> None:
    """Delete the two files of an engine, and its folder unless it holds anything else."""
    for name in (RECORD, PLAN):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
