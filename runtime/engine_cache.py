"""The cache of TensorRT engines, which a kill at any moment cannot harm.

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
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from duallora_edge.errors import BackendError
from duallora_edge.files import cache_folder, cache_limit, read_json, sha256_file, write_json
from duallora_edge.runtime.tensorrt_api import TENSORRT_RTX

PLAN = "engine.plan"
RECORD = "engine.json"
LIMIT_VARIABLE = "DUALLORA_EDGE_ENGINES_GB"
LIMIT_GB = 4
_ABANDONED_AFTER_S = 24 * 3600
_POLL_S = 0.2


class EngineError(BackendError):
    """An engine cannot be built, stored or read."""


class RefusedModelError(EngineError):
    """TensorRT cannot make an engine of this graph; it may of the one in another precision."""


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on.

    ``device`` and ``multiprocessors`` are None for TensorRT-RTX, whose engines serve a whole compute capability
    ("sm86"). ``batch`` is the number of images that the graph takes, or None where the engine takes any number up to
    ``max_batch``. ``recipe`` numbers our way of building.
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
    """

    key: EngineKey
    plan: Path
    bytes: int
    workspace_mb: int
    granted_mb: int
    seconds: float
    device_memory_bytes: int | None
    from_cache: bool = True

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**asdict(self), "plan": str(self.plan)}


def engines_folder() -> Path:
    """Where engines are kept."""
    return cache_folder() / "engines"


def find_engine(key: EngineKey) -> Engine | None:
    """The engine of this key, or None. Raises `EngineError` when it is there but damaged."""
    folder = engines_folder() / key.digest
    plan = folder / PLAN
    try:
        record = read_json(folder / RECORD)
        if record["key"] != asdict(key):
            raise ValueError("it belongs to another key")
        if (record["bytes"], record["sha256"]) != (plan.stat().st_size, sha256_file(plan)):
            raise ValueError("its size or SHA-256 is not the recorded one")
        engine = Engine(
            key=key,
            plan=plan,
            bytes=record["bytes"],
            workspace_mb=record["workspace_mb"],
            granted_mb=record["granted_mb"],
            seconds=record["seconds"],
            device_memory_bytes=record["device_memory_bytes"],
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        if not folder.exists():
            return None
        raise EngineError(
            f"The engine in {folder} is damaged ({str(error)[:200]}); run 'duallora-edge build' again."
        ) from error
    with contextlib.suppress(OSError):  # a cache that cannot be written can still be read
        os.utime(folder / RECORD)
    return engine


def write_record(folder: Path, key: EngineKey, facts: dict[str, Any]) -> None:
    """Complete a folder that has its plan with the record that `find_engine` checks."""
    plan = folder / PLAN
    record = {"key": asdict(key), "bytes": plan.stat().st_size, "sha256": sha256_file(plan), **facts}
    write_json(folder / RECORD, record)


@contextlib.contextmanager
def locked(folder: Path, key: EngineKey, wait: Callable[[str], None]) -> Iterator[None]:
    """Be the only one who builds the engine of ``key``, and delete what a killed builder left of it.

    While another one does, ``wait`` is called again and again with its process id; it may raise. The lock belongs to
    the process (flock), so that the file of a process that was killed holds nobody up.
    """
    path = folder / f"{key.digest}.lock"
    while True:
        file = path.open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it has deleted the file by now, and another may hold a new one of the same name.
            if _is_at(file.fileno(), path):
                break
            file.close()
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "?"
            file.close()
            wait(holder)
            time.sleep(_POLL_S)
    with file:
        try:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            for leftover in folder.glob(f".{key.digest}.*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
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
    """Delete what was used longest ago until the rest fits ``$DUALLORA_EDGE_ENGINES_GB`` (default 4).

    The engine ``keep`` and its timings stay, even beyond the limit. Files that killed builds left go after a day.
    """
    limit = cache_limit(LIMIT_VARIABLE, LIMIT_GB)
    sizes: dict[Path, int] = {}
    used: dict[Path, float] = {}
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may delete it meanwhile
            if path.name.startswith("."):
                if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                    _delete(path)
            elif path.suffix != ".lock":
                sizes[path] = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
                used[path] = (path / RECORD if (path / RECORD).exists() else path).stat().st_mtime
    total = sum(sizes.values())
    for path in sorted(used, key=used.__getitem__):
        if total > limit and path.name not in (keep.digest, keep.timing_name):
            _delete(path)
            total -= sizes[path]


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
