"""Files that are written whole or not at all, and read with limits."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from duallora_edge.errors import ConfigError

MAX_JSON_BYTES = 16 * 2**20
SPARE_BYTES = 64 * 1024
_MAX_DIGITS = 300  # what a float can hold
_MARKER = ".duallora-edge-staging"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


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


def write_atomic(path: Path, content: bytes | str | Iterable[bytes], spare: Path | None = None) -> None:
    """Write ``content`` (whole or in parts) to a temporary name beside ``path``, sync it, and rename it over ``path``.

    A reader sees the old file or the new one, never a part; on an error (a full disk) the old file stays. On a full
    disk ``spare``, a file beside ``path`` made by `keep_spare`, is used up instead: whole content goes into its blocks.
    """
    data = content.encode() if isinstance(content, str) else content
    parts = [data] if isinstance(data, bytes) else data
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # The umask gives the mode, and an exclusive open follows no link.
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            _hold(file)
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if not (spare and isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise
        if not isinstance(data, bytes) or not _overwrite(spare, data):
            raise
        spare.replace(path)
    sync_directory(path.parent)


def keep_spare(path: Path) -> None:
    """Make sure that ``path`` is a file whose blocks hold `SPARE_BYTES` for `write_atomic`; none on a full disk."""
    with suppress(OSError):
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size == SPARE_BYTES:
            return
    with suppress(OSError):
        write_atomic(path, bytes(SPARE_BYTES))  # written, as blocks that are only reserved may need others to be used


def _overwrite(spare: Path, data: bytes) -> bool:
    """Give ``spare`` this content within the blocks that it has; False when there is none or it is too small."""
    try:
        handle = os.open(spare, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(handle, "wb") as file:
        if os.fstat(handle).st_size < len(data):
            return False
        file.write(data)
        file.truncate()
        os.fsync(handle)
    return True


def _hold(file: BinaryIO) -> None:
    """Show other processes that this one is at work on a file, where the file system has such locks."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file of at most ``limit`` bytes.

    Raises ``OSError`` when it cannot be read and ``ValueError`` when it is too large, no regular file, or not JSON.
    """
    return parse_json(read_limited(path, limit))


def read_limited(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; neither a pipe nor a growing file holds it up.

    Raises ``OSError`` when it cannot be read and ``ValueError`` when it is something else.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} is larger than {limit} bytes")
    return content


def parse_json(content: bytes) -> Any:
    """The value of JSON text in UTF-8. Raises ``ValueError`` for anything else, and for what no float can hold."""
    try:
        return json.loads(
            content.decode("utf-8"), parse_int=_parse_int, parse_float=_parse_float, parse_constant=_parse_constant
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _parse_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _parse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


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


@contextmanager
def atomic_directory(
    target: Path, *, replaces: Collection[str] = (), on_kept: Callable[[Path], object] | None = None
) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``target`` when the block ends, and vanishes when it raises.

    ``target`` must not exist or be empty, unless ``replaces`` names the files of an older one. That is replaced as a
    whole, for readers at no moment absent (where the file system can exchange two names), and of it these files are
    deleted. What else it holds is kept in a folder beside it, with which ``on_kept`` is called. A link is followed.

    Left-overs of processes that were killed are deleted here: those that hold our marker, which no process locks.

    Raises `ConfigError` when something else is there, and without ``on_kept`` also when something is kept.
    """
    target = Path(os.path.realpath(target))
    if any(name in ("", "..") or Path(name).name != name for name in replaces):
        raise ValueError("replaces must be names of files without folders")
    _check_replaceable(target, replaces)
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = sweep(target)
    staging = _Staging.make(target, replaces)
    try:
        yield staging.new
        sync_tree(staging.new)
        _check_replaceable(target, replaces)
        staging.put(target)
        sync_directory(target.parent)
    finally:
        kept += staging.close()
    for folder in kept:
        if on_kept is None:
            raise ConfigError(f"{target} is written; files that did not belong to the older one are kept in {folder}.")
        on_kept(folder)


def _check_replaceable(target: Path, replaces: Collection[str]) -> None:
    """Raises `ConfigError` unless ``target`` may be replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is not a folder; delete it or give another name.")
    if not replaces and (names := sorted(path.name for path in target.iterdir())):
        raise ConfigError(f"{target} holds other files ({names[0]}, ...); give an empty or new folder.")


def sweep(target: Path) -> list[Path]:
    """Delete what processes that were killed while they wrote ``target`` left beside it.

    Returns folders in which something is kept that did not belong to a directory that was replaced.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    kept: list[Path] = []
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        if not pattern.fullmatch(path.name):
            continue
        with suppress(OSError, ConfigError):  # not ours, or gone by now
            if stat.S_ISREG(path.lstat().st_mode):
                with open_lock(path) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            elif (path / _MARKER).is_file() and (staging := _Staging.found(path)):
                staging.restore(target)
                kept += staging.close()
    return kept


class _Staging:
    """A folder beside a target in which its replacement is written.

    It holds a marker, which is locked as long as its process lives and says which folder was made here (device and
    inode) and which files of the replaced one may be deleted; ``new``, exchanged with the target in the end; and
    ``old`` where names cannot be exchanged.
    """

    def __init__(self, path: Path, marker: BinaryIO, made: tuple[int, int] | None, replaces: Collection[str]) -> None:
        self.path, self.marker, self.made, self.replaces = path, marker, made, replaces
        self.new, self.old = path / "new", path / "old"

    @classmethod
    def make(cls, target: Path, replaces: Collection[str]) -> _Staging:
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        path.mkdir()
        marker = open_lock(path / _MARKER)
        _hold(marker)
        staging = cls(path, marker, None, replaces)
        try:
            staging.new.mkdir()
            staging.made = _identity(staging.new)
            marker.write(json.dumps({"marker": _MARKER, "made": staging.made, "replaces": list(replaces)}).encode())
            os.fsync(marker.fileno())
        except BaseException:
            staging.close()
            raise
        return staging

    @classmethod
    def found(cls, path: Path) -> _Staging | None:
        """The one that a process left at ``path``. Raises ``OSError`` when the process lives."""
        marker = open_lock(path / _MARKER)
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (content := marker.read(MAX_JSON_BYTES)):  # killed before anything was written into it
                return cls(path, marker, None, ())
            value = parse_json(content)
            if value["marker"] == _MARKER:
                return cls(path, marker, tuple(value["made"]), [Path(str(name)).name for name in value["replaces"]])
        except (ValueError, KeyError, TypeError):
            pass
        except BaseException:
            marker.close()
            raise
        marker.close()
        return None

    def put(self, target: Path) -> None:
        """Make the new folder the target, and an older target part of this one."""
        if not os.path.lexists(target) or not self.replaces:
            self.new.rename(target)  # over an empty folder at most
        elif not _exchange(self.new, target):
            target.rename(self.old)
            try:
                self.new.rename(target)
            except BaseException:
                self.old.rename(target)
                raise

    def restore(self, target: Path) -> None:
        """Put back an older target that was moved away while no new one took its place."""
        if self.old.is_dir() and not os.path.lexists(target):
            self.old.rename(target)

    def close(self) -> list[Path]:
        """Delete what was made here and what may be deleted of an older target; returns where the rest is kept."""
        kept = []
        for folder in (self.new, self.old):
            with suppress(FileNotFoundError):
                if _identity(folder) == self.made:
                    shutil.rmtree(folder, ignore_errors=True)
                    continue
                for name in self.replaces:
                    with suppress(OSError):  # a folder of this name, or no right to delete it: it is kept
                        (folder / name).unlink()
                try:
                    folder.rmdir()
                except OSError:
                    name = self.path.name[1:].removesuffix(".tmp").rpartition(".")[0]
                    kept.append(self.path.with_name(f"{name}.kept-{secrets.token_hex(4)}"))
                    folder.rename(kept[-1])
        with suppress(OSError):
            (self.path / _MARKER).unlink()
            self.path.rmdir()
        self.marker.close()
        return kept


def _identity(path: Path) -> tuple[int, int]:
    facts = path.lstat()
    return facts.st_dev, facts.st_ino


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
