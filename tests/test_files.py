"""Files are written whole or not at all: what fails half-way leaves the old content and nothing else."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duallora_edge.errors import ConfigError
from duallora_edge.files import (
    atomic_directory,
    cache_folder,
    lock_holder,
    note_holder,
    open_lock,
    own_folder,
    read_json,
    sha256_file,
    write_atomic,
    write_json,
)


def content(folder: Path) -> dict[str, bytes | None]:
    """Every name below a folder, hidden ones too, with the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- single files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"", b"\x00\xff", "text, näïve", b"x" * 100_000])
def test_write_atomic(tmp_path: Path, value: bytes | str) -> None:
    path = tmp_path / "file"
    for before in (None, b"old and longer than the new one"):
        if before is not None:
            path.write_bytes(before)
        write_atomic(path, value)
        assert content(tmp_path) == {"file": value.encode() if isinstance(value, str) else value}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.chmod", "pathlib.Path.replace"])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, step: str
) -> None:
    path = tmp_path / "HEAD.json"
    if existing:
        path.write_text("old")
    before = content(tmp_path)
    monkeypatch.setattr(step, full)
    for write in (lambda: write_atomic(path, "new"), lambda: write_json(path, {"new": 1})):
        with pytest.raises(OSError, match="No space left"):
            write()
        assert content(tmp_path) == before


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", "new")
    assert content(tmp_path) == {"file": b"old"}


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        steps.append("sync " + ("folder" if Path(f"/proc/self/fd/{handle}").resolve().is_dir() else "file"))
        sync(handle)

    def rename(path: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    write_atomic(tmp_path / "file", "new")
    assert steps == ["sync file", "rename", "sync folder"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aé\n☃"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("kü", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(value=JSON_VALUES)
def test_json_reads_back(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value == json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1, {"x": float("-inf")}], {"x": object()}, b"bytes"])
def test_what_is_not_json_is_refused_and_the_old_file_stays(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "file", {"old": 1})
    before = content(tmp_path)
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "file", value)
    assert content(tmp_path) == before


def test_read_json_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('"' + "x" * 98 + '"')
    assert read_json(path, limit=100) == "x" * 98
    with pytest.raises(ValueError, match="is larger than 99 bytes"):
        read_json(path, limit=99)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[1,]", b"{'a': 1}"], ids=repr)
def test_read_json_of_something_else(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError):
        read_json(tmp_path / "file")


def test_read_json_of_what_is_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "file")


def test_read_json_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing")


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1])
def test_sha256_file(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * (size // 256) + b"\x07" * (size % 256)
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    monkeypatch.delattr(hashlib, "file_digest", raising=False)  # as in Python 3.10
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


# -- directories ----------------------------------------------------------------------------------------------


def fill(folder: Path, text: str, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_a_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a" / "b" / "bundle") as staging:
        fill(staging, "new", "model", "deep/er/file")
        assert not (tmp_path / "a" / "b" / "bundle").exists()
        assert staging.parent == tmp_path / "a" / "b"  # the same file system
    found = content(tmp_path / "a" / "b")
    assert {name: value for name, value in found.items() if value is not None} == {
        "bundle/model": b"new",
        "bundle/deep/er/file": b"new",
    }
    assert (tmp_path / "a" / "b" / "bundle").stat().st_mode & 0o777 == 0o755


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    fill(tmp_path / "bundle", "old", "model", "only-in-the-old")
    with atomic_directory(tmp_path / "bundle") as staging:
        fill(staging, "new", "model", "only-in-the-new")
        assert (tmp_path / "bundle" / "model").read_text() == "old"  # until the end
    assert content(tmp_path) == {"bundle": None, "bundle/model": b"new", "bundle/only-in-the-new": b"new"}


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=repr)
def test_a_block_that_fails_leaves_the_old_directory(tmp_path: Path, existing: bool, error: BaseException) -> None:
    if existing:
        fill(tmp_path / "bundle", "old", "model", "deep/file")
    before = content(tmp_path)
    with pytest.raises(type(error)), atomic_directory(tmp_path / "bundle") as staging:
        fill(staging, "new", "model", "deep/file")
        raise error
    assert content(tmp_path) == before


@pytest.mark.parametrize("existing", [True, False])
def test_a_sync_that_fails_leaves_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        fill(tmp_path / "bundle", "old", "model")
    before = content(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_directory(tmp_path / "bundle") as staging:
        fill(staging, "new", "model")
    assert content(tmp_path) == before


def failing_renames(monkeypatch: pytest.MonkeyPatch, numbers: set[int]) -> None:
    """Renames of these numbers fail: 1 moves the old directory aside, 2 the new one in place, 3 the old one back."""
    count, rename = [0], Path.rename

    def renamed(path: Path, target: Path) -> Path:
        count[0] += 1
        if count[0] in numbers:
            full()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)


@pytest.mark.parametrize("number", [1, 2])
def test_a_rename_that_fails_leaves_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fill(tmp_path / "bundle", "old", "model")
    before = content(tmp_path)
    failing_renames(monkeypatch, {number})
    with pytest.raises(OSError, match="No space left"), atomic_directory(tmp_path / "bundle") as staging:
        fill(staging, "new", "model")
    assert content(tmp_path) == before


def test_the_old_directory_is_never_deleted_before_a_new_one_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "bundle", "old", "model")
    failing_renames(monkeypatch, {2, 3})
    with pytest.raises(OSError, match="No space left"), atomic_directory(tmp_path / "bundle") as staging:
        fill(staging, "new", "model")
    assert [path.read_text() for path in tmp_path.rglob("bundle/model")] == ["old"]


# -- a disk that is really full -------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    write_atomic(small_disk / "file", b"o" * 100_000)
    with pytest.raises(OSError) as caught:
        write_atomic(small_disk / "file", b"n" * 200_000)
    assert caught.value.errno == errno.ENOSPC
    assert content(small_disk) == {"file": b"o" * 100_000}
    write_atomic(small_disk / "file", b"n" * 100_000)  # nothing of the failed attempt takes up space
    assert content(small_disk) == {"file": b"n" * 100_000}


def test_a_full_disk_keeps_the_old_directory(small_disk: Path) -> None:
    fill(small_disk / "bundle", "o" * 60_000, "model", "golden")
    before = content(small_disk)
    with pytest.raises(OSError) as caught, atomic_directory(small_disk / "bundle") as staging:
        fill(staging, "n" * 60_000, "model", "golden", "one too many")
    assert caught.value.errno == errno.ENOSPC
    assert content(small_disk) == before


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DUALLORA_EDGE_CACHE": "/one"}, "/one"),
        ({"XDG_CACHE_HOME": "/two"}, "/two/duallora-edge"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/duallora-edge"),
    ],
)
def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("DUALLORA_EDGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


# -- locks and folders of one's own ---------------------------------------------------------------------------


def test_a_lock_file_names_its_holder(tmp_path: Path) -> None:
    with open_lock(tmp_path / ".lock") as file:
        assert lock_holder(file) == "?"
        note_holder(file)
    (tmp_path / ".lock").write_text("12345678901234")
    with open_lock(tmp_path / ".lock") as file:
        note_holder(file)
        assert lock_holder(file) == str(os.getpid())


@pytest.mark.parametrize("held", [b"", "café".encode(), b"\xff\xfe\x00", b"\x1b[2J", b"9" * 1000, b" 17\n"], ids=repr)
def test_a_lock_file_may_hold_anything(tmp_path: Path, held: bytes) -> None:
    (tmp_path / ".lock").write_bytes(held)
    with open_lock(tmp_path / ".lock") as file:
        assert lock_holder(file) == {b" 17\n": "17", b"9" * 1000: "9" * 32}.get(held, "?")
    assert (tmp_path / ".lock").read_bytes() == held


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_a_lock_is_a_file(tmp_path: Path, kind: str) -> None:
    """A link would have the user's own file emptied."""
    (tmp_path / "thesis").write_text("years of work")
    path = tmp_path / ".lock"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("thesis" if kind == "link" else "nothing")
    with pytest.raises(ConfigError, match=r"is not a lock file .*; delete it"):
        open_lock(path)
    assert (tmp_path / "thesis").read_text() == "years of work" and not (tmp_path / "nothing").exists()


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    before = os.umask(0)
    try:
        assert own_folder(folder) == own_folder(folder) == folder
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o755}
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"Everybody may write .*chmod o-w .*DUALLORA_EDGE_CACHE"):
        own_folder(folder)


def test_a_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(ConfigError, match=r"belongs to another user.*DUALLORA_EDGE_CACHE"):
        own_folder(tmp_path)
