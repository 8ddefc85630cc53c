"""Files are written whole or not at all: what fails half-way leaves the old content and nothing else."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duallora_edge import files
from duallora_edge.errors import ConfigError
from duallora_edge.files import (
    SPARE_BYTES,
    atomic_directory,
    cache_folder,
    keep_spare,
    lock_holder,
    note_holder,
    open_lock,
    own_folder,
    parse_json,
    read_json,
    sha256_file,
    sweep,
    write_atomic,
    write_json,
)


def content(folder: Path) -> dict[str, bytes | None]:
    """Every name below a folder, hidden ones too, with the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- single files ---------------------------------------------------------------------------------------------


def test_write_atomic_in_parts(tmp_path: Path) -> None:
    def parts(fails: bool) -> Iterator[bytes]:
        yield b"new "
        if fails:
            raise ValueError("a part is missing")
        yield b"content"

    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="a part is missing"):
        write_atomic(tmp_path / "file", parts(True))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    write_atomic(tmp_path / "file", parts(False))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new content"]


@pytest.mark.parametrize("value", [b"", b"\x00\xff", "text, näïve", b"x" * 100_000])
def test_write_atomic(tmp_path: Path, value: bytes | str) -> None:
    path = tmp_path / "file"
    for before in (None, b"old and longer than the new one"):
        if before is not None:
            path.write_bytes(before)
        write_atomic(path, value)
        assert content(tmp_path) == {"file": value.encode() if isinstance(value, str) else value}


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002], indirect=True)
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int) -> None:
    write_atomic(tmp_path / "file", "x")
    with atomic_directory(tmp_path / "bundle") as staging:
        (staging / "model").write_text("x")
    modes = [
        path.stat().st_mode & 0o777 for path in (tmp_path / "file", tmp_path / "bundle", tmp_path / "bundle/model")
    ]
    assert modes == [0o666 & ~umask, 0o777 & ~umask, 0o666 & ~umask]


def test_a_temporary_name_is_never_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / ".file.00000000.tmp").symlink_to("thesis")
    monkeypatch.setattr("secrets.token_hex", lambda _: "00000000")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "thesis").read_text() == "years of work" and not (tmp_path / "file").exists()


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
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


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe", "utf-8"),
        (b"[1,]", "Expecting value"),
        (b"{'a': 1}", "Expecting property name"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "a number of 5000 digits is too large"),
        (b"[-" + b"9" * 400 + b"]", "is too large"),
        (b"[1e999]", "the number 1e999 is too large"),
        (b"[-1" + b"0" * 1000 + b".5]", "is too large"),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (b"-Infinity", "-Infinity is not a number of JSON"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_read_json_of_something_else(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "file").write_bytes(data)
    for read in (lambda: read_json(tmp_path / "file"), lambda: parse_json(data)):
        with pytest.raises(ValueError, match=reason):
            read()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40) | st.text('[]{}",:0123456789.eE+-truefalsnNaIinty \\', max_size=40).map(str.encode))
def test_parse_json_of_anything(data: bytes) -> None:
    """A value or a ``ValueError``, and every number is one that a float holds."""
    try:
        value = parse_json(data)
    except ValueError:
        return
    json.dumps(value, allow_nan=False)


def test_read_json_of_what_is_doubled(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": 1, "a": 2}')
    assert read_json(tmp_path / "file") == {"a": 2}


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_read_json_of_no_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "value.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises((ValueError, IsADirectoryError), match=r"regular file|directory"):
        read_json(path)


def test_read_json_of_a_file_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read counts, not what its size was a moment ago."""
    path = tmp_path / "value.json"
    path.write_bytes(b" " * 101)
    facts = path.stat
    monkeypatch.setattr(os, "fstat", lambda _: os.stat_result([*facts()[:6], 1, *facts()[7:]]))
    with pytest.raises(ValueError, match="is larger than 100 bytes"):
        read_json(path, limit=100)


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
        assert staging.is_relative_to(tmp_path / "a" / "b")  # the same file system
    assert content(tmp_path / "a" / "b") == {
        "bundle": None,
        "bundle/deep": None,
        "bundle/deep/er": None,
        "bundle/model": b"new",
        "bundle/deep/er/file": b"new",
    }


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to replace a directory; the second is for file systems that cannot exchange names."""
    if not request.param:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    return bool(request.param)


OLD = ("model", "only-in-the-old")


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("linked", [False, True])
def test_a_directory_is_replaced_as_a_whole(tmp_path: Path, linked: bool) -> None:
    fill(tmp_path / "bundle", "old", *OLD)
    if linked:  # a link leads to the folder that is replaced, and stays
        (tmp_path / "bundle").rename(tmp_path / "version-3")
        (tmp_path / "bundle").symlink_to("version-3")
    with atomic_directory(tmp_path / "bundle", replaces=OLD) as staging:
        fill(staging, "new", "model", "only-in-the-new")
        assert (tmp_path / "bundle" / "model").read_text() == "old"  # until the end
    assert content(tmp_path / "bundle") == {"model": b"new", "only-in-the-new": b"new"}
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", *(["version-3"] if linked else [])}


def test_readers_never_find_it_absent(tmp_path: Path) -> None:
    """A process that replaces it without end, and one that looks without end."""
    target = tmp_path / "bundle"
    fill(target, "0", "model")
    pid = os.fork()
    if not pid:
        try:
            for number in range(60):
                with atomic_directory(target, replaces=["model"]) as staging:
                    fill(staging, str(number), "model")
        finally:
            os._exit(0)
    seen = set()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        seen.add((target / "model").exists())
    assert seen == {True} and (target / "model").read_text() == "59"


@pytest.mark.usefixtures("exchange")
def test_what_was_no_part_of_the_old_directory_is_kept(tmp_path: Path) -> None:
    fill(tmp_path / "bundle", "old", *OLD, "thesis.tex", "photos/one.png", "nested/model")
    kept: list[Path] = []
    with atomic_directory(tmp_path / "bundle", replaces=[*OLD, "photos"], on_kept=kept.append) as staging:
        fill(staging, "new", "model")
    expected: dict[str, bytes | None] = {"thesis.tex": b"old", "photos/one.png": b"old", "nested/model": b"old"}
    assert content(kept[0]) == expected | {"photos": None, "nested": None}
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", kept[0].name}
    (tmp_path / "bundle" / "more").write_text("work")
    with (
        pytest.raises(ConfigError, match=r"is written; files .* are kept in .*bundle\.kept-"),
        atomic_directory(tmp_path / "bundle", replaces=["model"]) as staging,
    ):
        fill(staging, "newer", "model")
    assert content(tmp_path / "bundle") == {"model": b"newer"}
    assert [path.read_text() for path in tmp_path.rglob("more")] == ["work"]


@pytest.mark.parametrize("replaces", [["../thesis"], ["/etc/passwd"], ["deep/file"], [".."]])
def test_only_files_of_the_directory_itself_are_replaced(tmp_path: Path, replaces: list[str]) -> None:
    with pytest.raises(ValueError, match="names of files"), atomic_directory(tmp_path / "x", replaces=replaces):
        pass


@pytest.mark.parametrize("late", [False, True])
def test_a_directory_that_nobody_named_is_left_alone(tmp_path: Path, late: bool) -> None:
    """Also when it appears while the new one is written."""
    if not late:
        fill(tmp_path / "bundle", "old", "thesis.tex")
    with pytest.raises(ConfigError, match="holds other files"), atomic_directory(tmp_path / "bundle") as staging:
        fill(staging, "new", "model")
        fill(tmp_path / "bundle", "old", "thesis.tex")
    assert content(tmp_path) == {"bundle": None, "bundle/thesis.tex": b"old"}
    with pytest.raises(ConfigError, match="is not a folder"), atomic_directory(tmp_path / "bundle" / "thesis.tex"):
        pass


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with atomic_directory(tmp_path / "bundle") as staging:
        fill(staging, "new", "model")
    assert content(tmp_path) == {"bundle": None, "bundle/model": b"new"}


def test_who_reads_the_old_directory_goes_on_reading(tmp_path: Path) -> None:
    fill(tmp_path / "bundle", "old", "model")
    with (tmp_path / "bundle" / "model").open() as reader:
        with atomic_directory(tmp_path / "bundle", replaces=["model"]) as staging:
            fill(staging, "new", "model")
        assert reader.read() == "old"


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=repr)
def test_a_block_that_fails_leaves_the_old_directory(tmp_path: Path, existing: bool, error: BaseException) -> None:
    if existing:
        fill(tmp_path / "bundle", "old", "model", "deep/file")
    before = content(tmp_path)
    with pytest.raises(type(error)), atomic_directory(tmp_path / "bundle", replaces=["model"]) as staging:
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
    with (
        pytest.raises(OSError, match="No space left"),
        atomic_directory(tmp_path / "bundle", replaces=["model"]) as staging,
    ):
        fill(staging, "new", "model")
    assert content(tmp_path) == before


def failing_renames(monkeypatch: pytest.MonkeyPatch, numbers: set[int]) -> None:
    """Renames of these numbers fail: 1 moves the old directory aside, 2 the new one in place, 3 the old one back."""
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
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
    with (
        pytest.raises(OSError, match="No space left"),
        atomic_directory(tmp_path / "bundle", replaces=["model"]) as staging,
    ):
        fill(staging, "new", "model")
    assert content(tmp_path) == before


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV])
def test_a_file_system_that_cannot_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fill(tmp_path / "bundle", "old", "model")
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=lambda *_: -1))
    monkeypatch.setattr(files.ctypes, "get_errno", lambda: code)
    with (
        pytest.raises(OSError) if code == errno.EXDEV else nullcontext(),
        atomic_directory(tmp_path / "bundle", replaces=["model"]) as staging,
    ):
        fill(staging, "new", "model")
    assert content(tmp_path) == {"bundle": None, "bundle/model": b"old" if code == errno.EXDEV else b"new"}


class Killed(BaseException):
    """After it nothing of the process has any effect."""


def kill_before(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From the call of this number on, nothing is changed on the disk any more."""
    count = [0]
    steps = [(Path, "mkdir"), (Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree"), (os, "fsync"),
             (json, "dumps"), (files, "open_lock"), (files, "_exchange")]  # fmt: skip

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            count[0] += 1
            if count[0] >= number:
                raise Killed
            return real(*arguments, **options)

        return call

    for place, name in steps:
        monkeypatch.setattr(place, name, dying(getattr(place, name)))


@pytest.mark.parametrize("existing", [False, True], ids=["new", "old"])
def test_a_kill_leaves_one_of_both_and_the_next_call_sweeps(tmp_path: Path, exchange: bool, existing: bool) -> None:
    """Killed before each change of the disk; a file of the user in the old directory lives on."""
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        target = folder / "bundle"
        folder.mkdir()
        if existing:
            fill(target, "old", "model", "thesis")
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            kill_before(patch, number)
            with atomic_directory(target, replaces=["model"], on_kept=lambda _: None) as staging:
                (staging / "model").write_text("new")
            break  # there are no more changes
        assert target.exists() or not (existing and exchange)  # with two renames there is a moment without
        if target.exists():
            names = {path.name: path.read_text() for path in target.iterdir()}
            assert names in [{"model": "old", "thesis": "old"} if existing else {}, {"model": "new"}]
        with atomic_directory(target, replaces=["model"], on_kept=lambda _: None) as staging:
            fill(staging, "next", "model")
        found = content(folder)
        assert found.pop("bundle/model") == b"next"
        assert [name.rpartition("/")[2] for name, value in found.items() if value is not None] == ["thesis"] * existing
        # Only what was made a moment before it was marked stays: an empty folder, of which nobody can tell whose it is.
        assert not [name for name in found if name.endswith(".tmp") and any((folder / name).iterdir())]
    assert number > 12


def test_what_a_living_process_writes_is_not_swept(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "bundle") as staging:
        fill(staging, "new", "model")
        pid = os.fork()
        if not pid:
            sweep(tmp_path / "bundle")
            os._exit(0)
        os.waitpid(pid, 0)
        assert content(staging) == {"model": b"new"}


@pytest.mark.parametrize("name", [".bundle.mine.tmp", ".bundle.tmp", ".bundle.01234567.tmp", ".other.01234567.tmp"])
@pytest.mark.parametrize("kind", ["folder", "folder with a marker", "link"])
def test_what_only_looks_like_a_left_over_is_kept(tmp_path: Path, name: str, kind: str) -> None:
    fill(tmp_path / "photos", "years of work", "new/one.png")
    if kind == "link":
        (tmp_path / name).symlink_to("photos")
    else:
        (tmp_path / "photos").rename(tmp_path / name)
        if kind == "folder with a marker":
            (tmp_path / name / ".duallora-edge-staging").write_text('{"marker": "another", "made": [1, 2]}')
    before = content(tmp_path)
    assert sweep(tmp_path / "bundle") == [] and content(tmp_path) == before


def test_half_written_files_are_swept(tmp_path: Path) -> None:
    names = [".HEAD.json.0123abcd.tmp", ".HEAD.json.mine.tmp", ".HEAD.json.x.0123abcd.tmp", "HEAD.json.0123abcd.tmp"]
    for name in names:
        (tmp_path / name).write_text("half")
    sweep(tmp_path / "HEAD.json")
    assert set(content(tmp_path)) == set(names[1:])


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
    with pytest.raises(OSError) as caught, atomic_directory(small_disk / "bundle", replaces=["model"]) as staging:
        fill(staging, "n" * 60_000, "model", "golden", "one too many")
    assert caught.value.errno == errno.ENOSPC
    assert content(small_disk) == before


def test_a_spare_file_is_used_where_no_byte_is_left(small_disk: Path) -> None:
    path, spare = small_disk / "HEAD.json", small_disk / ".spare"
    path.write_text("old")
    keep_spare(spare)
    assert spare.stat().st_size == SPARE_BYTES
    with suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "n" * (SPARE_BYTES + 1), spare=spare)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new", spare=small_disk / "none")
    assert path.read_text() == "old"
    write_atomic(path, "new", spare=spare)
    assert path.read_text() == "new" and not spare.exists()
    (small_disk / "ballast").unlink()
    keep_spare(spare)
    assert spare.stat().st_size == SPARE_BYTES and len(content(small_disk)) == 2


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
