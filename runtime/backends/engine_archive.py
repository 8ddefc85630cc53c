"""Engines for the twins of a device: built once, and loaded where everything that they depend on is the same.

The archive is a tar file with ``DIGEST/engine.json`` and ``DIGEST/engine.plan`` of each engine, as in the cache. Of
``tarfile`` only the headers are used: nothing is unpacked under a name from the archive, and no header that leads
elsewhere is followed. Loading on a GPU is untested on a device.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from duallora_edge.errors import ConfigError
from duallora_edge.files import atomic_directory, own_folder, parse_json, read_limited, write_atomic
from duallora_edge.runtime.backends.contract import GoldenCheck, UnavailableError
from duallora_edge.runtime.backends.engine_build import Say, driver_cuda, engine_keys, local_target
from duallora_edge.runtime.backends.engine_cache import (
    PLAN,
    RECORD,
    Engine,
    EngineError,
    EngineKey,
    disk_errors,
    engines_folder,
    evict,
    find_engine,
    locked,
    read_engine,
    read_folder,
)
from duallora_edge.runtime.backends.tensorrt import check_plans, load_cudart
from duallora_edge.runtime.bundle import Bundle

MAX_BYTES = {RECORD: 64 * 1024, PLAN: 4 * 2**30}
_NAMES = {
    "package": "package",
    "version": "TensorRT",
    "platform": "platform",
    "compute_capability": "compute capability",
    "device": "GPU",
    "multiprocessors": "multiprocessors",
    "precision": "precision",
    "batch": "batch",
    "max_batch": "largest batch",
    "recipe": "recipe of this package",
}
_REMEDY = "build on this device with 'duallora-edge build'"


class UnfitEngineError(EngineError):
    """An archive is for another device, other software or another bundle."""


class _DamagedError(Exception):
    """What is wrong with an archive."""


def check_archive_target(path: Path) -> None:
    """Raise `ConfigError` unless an archive can be written there, in place of an older one at most."""
    if not path.parent.is_dir():
        raise ConfigError(f"The folder of {path} does not exist; make it, or name another file in --save.")
    if os.path.lexists(path):
        try:
            with _open(path) as file:
                _member(file, RECORD)
        except (OSError, _DamagedError) as error:
            raise ConfigError(f"{path} is not an archive of engines; name another file in --save.") from error


def save_engines(path: Path, engines: Sequence[Engine]) -> None:
    """Write engines of the cache to an archive. Raises `EngineError` when that fails, and then leaves none."""
    check_archive_target(path)
    try:
        write_atomic(path, _parts(engines))
    except OSError as error:
        raise EngineError(
            f"The engines cannot be written to {path} ({error.strerror or error}); free some space, or name another "
            "file in --save."
        ) from error


def _parts(engines: Sequence[Engine]) -> Iterator[bytes]:
    for engine in engines:
        stored = read_engine(engine.key)
        if stored is None:
            raise EngineError(f"The engine {engine.plan} is gone; run 'duallora-edge build' again.")
        record = read_limited(engine.plan.with_name(RECORD), MAX_BYTES[RECORD])
        for name, content in ((RECORD, record), (PLAN, stored[1])):
            header = tarfile.TarInfo(f"{engine.key.digest}/{name}")
            header.size = len(content)
            yield header.tobuf(tarfile.USTAR_FORMAT)
            yield content
            yield bytes(-len(content) % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def load_engines(path: Path, bundle: Bundle, say: Say = lambda text: None) -> tuple[list[Engine], GoldenCheck]:
    """Put the engines of an archive into the cache of this machine, once they answer the golden images correctly.

    ``bundle``: the one that they were built from. Where its fp16 was given up, they may be its engines in fp32.

    Raises `UnfitEngineError` when they are for another device, other software or another bundle, and `BackendError`
    when the archive is damaged, this machine has no GPU or TensorRT, or the answers are wrong. The cache is then as it
    was before.
    """
    try:
        tensorrt, gpu = local_target()
        load_cudart()
    except UnavailableError as error:
        raise EngineError(f"No engine can be loaded on this machine: {error}.") from error
    bundles = {"fp32": bundle.in_fp32, bundle.manifest.precision: bundle}
    wanted = {precision: engine_keys(each, tensorrt, gpu) for precision, each in bundles.items()}
    try:
        file = _open(path)
    except (OSError, _DamagedError) as error:
        raise EngineError(f"{path} cannot be read ({error}); name a file that 'build --save' wrote.") from error
    folder = engines_folder()
    with file, disk_errors(folder):
        own_folder(folder)
        with ExitStack() as stack:
            try:
                staged = _unpack(file, folder, list(wanted.values()), stack, say)
                plans = [read_folder(staging, key)[1] for key, staging in staged.items()]
            except UnfitEngineError as error:
                raise UnfitEngineError(f"{path} does not fit: {error}.") from error
            except (_DamagedError, ValueError, TypeError, KeyError) as error:
                raise EngineError(
                    f"{path} is damaged, or no archive of engines ({str(error)[:200]}); save it again with "
                    "'duallora-edge build --save'."
                ) from error
            keys = list(staged)
            check = check_plans(bundles[keys[0].precision], plans)
            if not check.passed:
                raise EngineError(f"The engines of {path} answer wrongly here, {check}; {_REMEDY}.")
        engines = [engine for key in keys if (engine := find_engine(key))]
        evict(folder, keys[-1])
    return [replace(engine, from_cache=False) for engine in engines], check


def _unpack(
    file: BinaryIO, folder: Path, wanted: list[list[EngineKey]], stack: ExitStack, say: Say
) -> dict[EngineKey, Path]:
    """Write one of the lists ``wanted`` of engines into folders that take their places in the cache with ``stack``."""
    staged: dict[EngineKey, Path] = {}

    def kept(rest: Path) -> None:
        say(f"files that do not belong to the engine are kept in {rest}")

    while header := _member(file, RECORD):
        digest, size = header
        content = b"".join(_read(file, size))
        record, place = parse_json(content), len(staged)
        wanted = [keys for keys in wanted if len(keys) > place]
        fitting = [keys for keys in wanted if record["key"] == asdict(keys[place])]
        if not fitting:
            raise UnfitEngineError(_differences(record["key"], [keys[place] for keys in wanted]))
        wanted, key = fitting, fitting[0][place]
        if digest != key.digest:
            raise _DamagedError("a record is not in its folder")
        built, here = record.get("driver_cuda"), driver_cuda(key)
        if built != here:
            raise UnfitEngineError(f"the driver supports CUDA {here} here, {str(built)[:20]} there; {_REMEDY}")
        stack.enter_context(locked(folder, key, _refuse_to_wait))
        staging = stack.enter_context(atomic_directory(folder / digest, replaces=(PLAN, RECORD), on_kept=kept))
        (staging / RECORD).write_bytes(content)
        header = _member(file, PLAN)
        if header is None or header[0] != digest:
            raise _DamagedError("a plan is missing")
        with (staging / PLAN).open("wb") as plan:
            plan.writelines(_read(file, header[1]))
        staged[key] = staging
    if list(staged) not in wanted:
        raise _DamagedError("an engine is missing")
    return staged


def _differences(key: Any, wanted: Sequence[EngineKey]) -> str:
    """How the key of a record differs from those of this machine, and what to do."""
    if not isinstance(key, dict):
        raise _DamagedError("a record without a key")
    if not wanted:
        raise _DamagedError("it has more engines than the bundle")
    here = next((each for each in wanted if each.precision == key.get("precision")), wanted[0])
    names = [name for name, value in asdict(here).items() if key.get(name) != value]
    found = [
        f"{_NAMES[name]} {getattr(here, name)} here, {str(key.get(name))[:60]} there"
        for name in names
        if name in _NAMES
    ]
    if "model_sha256" in names:
        found.append("another bundle: load it with the one that it was saved with")
    return f"{'; '.join(found)}; {_REMEDY}"


def _refuse_to_wait(process: str) -> None:
    raise EngineError(f"Process {process} is building this engine; load the archive when it has ended.")


def _open(path: Path) -> BinaryIO:
    """A regular file, opened without waiting for anybody. Raises ``OSError`` or `_DamagedError`."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _DamagedError("it is not a file")
    return file


def _member(file: BinaryIO, name: str) -> tuple[str, int] | None:
    """The digest and the size of the next file, which has to be ``DIGEST/name``, or None at the end of the archive."""
    block = file.read(tarfile.BLOCKSIZE)
    if block == bytes(tarfile.BLOCKSIZE):
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise _DamagedError(f"no header of tar: {error}") from error
    match = re.fullmatch(rf"([0-9a-f]{{32}})/{re.escape(name)}", header.name)
    if match is None or header.type != tarfile.REGTYPE:
        raise _DamagedError(f"{header.name[:60]!r} in place of a file {name}")
    if not 0 <= header.size <= MAX_BYTES[name]:
        raise _DamagedError(f"a file {name} of {header.size} bytes")
    return match[1], header.size


def _read(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The content of a file, in parts."""
    left = size
    while left:
        part = file.read(min(left, 2**20))
        if not part:
            raise _DamagedError("it is cut off")
        left -= len(part)
        yield part
    file.read(-size % tarfile.BLOCKSIZE)
