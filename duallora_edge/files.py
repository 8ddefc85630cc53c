"""Files that are written whole or not at all, and read with limits."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from duallora_edge.errors import ConfigError

MAX_JSON_BYTES = 16 * 2**20


def cache_folder() -> Path:
    """``$DUALLORA_EDGE_CACHE``, else ``duallora-edge`` in the user's cache folder (XDG base directories)."""
    if folder := os.environ.get("DUALLORA_EDGE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duallora-edge"


def own_folder(path: Path) -> Path:
    """Make a folder for files that are trusted when they are read again (a cache), and return it.

    Raises `ConfigError` when another user owns it or everybody may write to it, ``OSError`` when it cannot be made.
    """
    for folder in (*reversed(path.parents), path):
        folder.mkdir(mode=0o755, exist_ok=True)
    facts = path.stat()
    other = "name a folder of your own in DUALLORA_EDGE_CACHE"
    if facts.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to another user, who could change what is read from it; {other}.")
    if facts.st_mode & stat.S_IWOTH:
        raise ConfigError(f"Everybody may write to {path}; take that away with 'chmod o-w {path}', or {other}.")
    return path


def cache_limit(variable: str, default_gb: int) -> float:
    """How many bytes a cache may take: the environment's number of gigabytes. Raises `ConfigError` for nonsense."""
    text = os.environ.get(variable, str(default_gb))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise ConfigError(f"{variable} must be a number of gigabytes such as {default_gb}, not {text!r}.")
    return limit * 1e9


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write ``content`` to a temporary name beside ``path``, sync it, and rename it over ``path``.

    A reader sees the old file or the new one, never a part; on an error (a full disk) the old file stays.
    """
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file of at most ``limit`` bytes.

    Raises ``OSError`` when it cannot be read and ``ValueError`` when it is too large or not JSON.
    """
    if path.stat().st_size > limit:
        raise ValueError(f"{path} is larger than {limit} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def open_lock(path: Path) -> BinaryIO:
    """Open a lock file for `fcntl.flock`, made if need be; what is in it stays.

    Raises `ConfigError` when something else than a file has its name: a link could lead to a file of the user.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        raise ConfigError(f"{path} is not a lock file that was written here; delete it.") from error
    file = os.fdopen(handle, "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise ConfigError(f"{path} is not a lock file that was written here; delete it.")
    return file


def lock_holder(file: BinaryIO) -> str:
    """The process id in a lock file, or ``"?"`` when it holds something else."""
    with suppress(OSError):
        text = os.pread(file.fileno(), 32, 0).decode("ascii", errors="replace").strip()
        if text.isdigit():
            return text
    return "?"


def note_holder(file: BinaryIO) -> None:
    """Write the id of this process into the lock file that it holds. On a full disk the old one may stay."""
    with suppress(OSError):
        text = str(os.getpid()).encode()
        os.ftruncate(file.fileno(), os.pwrite(file.fileno(), text, 0))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable (a no-op where directories cannot be opened)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """Sync every file and directory below ``root``, contents before names."""
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_directory(path)
    sync_directory(root)


def _replace_directory(target: Path, new: Path) -> None:
    """Rename ``new`` to ``target``; the old one is deleted only when a whole directory stands in its place."""
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old.", suffix=".tmp")) / target.name
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        shutil.rmtree(old.parent, ignore_errors=True)
        raise
    shutil.rmtree(old.parent, ignore_errors=True)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``target`` when the block ends, and vanishes when it raises.

    An existing ``target`` is replaced as a whole: it is moved aside, the new one takes its place, and only
    then is the old one deleted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        yield staging
        staging.chmod(0o755)
        sync_tree(staging)
        if target.exists():
            _replace_directory(target, staging)
        else:
            staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_directory(target.parent)
