from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from duallora_edge.errors import ConfigError, DataError
from duallora_edge.learner.data import cache as cache_module
from duallora_edge.learner.data.cache import FACT_BYTES, Decoded, DecodedCache

COUNT, SIZE = 5, 8
A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def content(seed: int = 0) -> Decoded:
    rng = np.random.default_rng(seed)
    return Decoded(
        rng.integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8),
        rng.integers(0, 256, (COUNT, FACT_BYTES), dtype=np.uint8),
    )


def store(cache: DecodedCache, key: str) -> Decoded:
    whole = content()
    halves = [Decoded(whole.pixels[part], whole.facts[part]) for part in (slice(0, 3), slice(3, 5))]
    return cache.store(key, COUNT, SIZE, halves)


def test_round_trip(tmp_path: Path) -> None:
    stored = store(DecodedCache(tmp_path), "k")
    loaded = DecodedCache(tmp_path).load("k", COUNT, SIZE)
    assert loaded is not None
    for entry in (stored, loaded):
        np.testing.assert_array_equal(entry.pixels, content().pixels)
        np.testing.assert_array_equal(entry.facts, content().facts)
    assert DecodedCache(tmp_path).load("other", COUNT, SIZE) is None
    assert DecodedCache(tmp_path).load("k", COUNT + 1, SIZE) is None


@pytest.mark.parametrize(
    "damage", ["short", "long", "first pixel", "last pixel", "facts", "checksum", "renamed", "folder"]
)
def test_a_damaged_file_does_not_count_and_is_replaced(tmp_path: Path, damage: str) -> None:
    cache = DecodedCache(tmp_path)
    store(cache, "k")
    file = cache.folder / "k.u8"
    data = file.read_bytes()
    if damage == "short":
        file.write_bytes(data[:-1])
    elif damage == "long":
        file.write_bytes(data + b"x")
    elif damage == "folder":
        file.unlink()
        file.mkdir()
        assert cache.load("k", COUNT, SIZE) is None
        file.rmdir()
    elif damage != "renamed":
        pixels = COUNT * SIZE * SIZE * 3
        place = {"first pixel": 0, "last pixel": pixels - 1, "facts": pixels, "checksum": len(data) - 1}[damage]
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    else:
        store(cache, "other")
        (cache.folder / "other.u8").replace(file)
    assert cache.load("k", COUNT, SIZE) is None
    store(cache, "k")
    assert cache.load("k", COUNT, SIZE) is not None


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module.os, "fsync", full)
    cache = DecodedCache(tmp_path)
    with pytest.raises(DataError, match=r"No space left on device.*free some space.*DUALLORA_EDGE_CACHE"):
        store(cache, "k")
    assert list(cache.folder.iterdir()) == []


def test_a_cache_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "decoded").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        store(DecodedCache(tmp_path), "k")


def test_trim_drops_the_oldest_unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = DecodedCache(tmp_path)
    for age, key in enumerate((A, B, C)):
        store(old, key)
        os.utime(old.folder / f"{key}.u8", (1000 + age, 1000 + age))
    (old.folder / ".decoded.abcdefgh.tmp").write_text("x")
    os.utime(old.folder / ".decoded.abcdefgh.tmp", (0, 0))
    size = (old.folder / f"{A}.u8").stat().st_size
    monkeypatch.setenv("DUALLORA_EDGE_CACHE_GB", str(2.5 * size / 1e9))
    fresh = DecodedCache(tmp_path)
    fresh.trim()
    assert sorted(path.name for path in fresh.folder.iterdir()) == [f"{B}.u8", f"{C}.u8"]
    monkeypatch.setenv("DUALLORA_EDGE_CACHE_GB", "0")
    fresh.load(B, COUNT, SIZE)
    fresh.trim()
    assert [path.name for path in fresh.folder.iterdir()] == [f"{B}.u8"]


def test_trim_touches_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DecodedCache(tmp_path)
    store(cache, A)
    for name in ("notes.u8", "a.tmp", ".decoded.x.tmp", "sub/deep.u8", f"{B}.u8.bak"):
        (cache.folder / name).parent.mkdir(exist_ok=True)
        (cache.folder / name).write_text("x")
        os.utime(cache.folder / name, (0, 0))
    (cache.folder / f"{C}.u8").symlink_to(cache.folder / "notes.u8")
    before = sorted(path.name for path in cache.folder.iterdir())
    monkeypatch.setenv("DUALLORA_EDGE_CACHE_GB", "0")
    DecodedCache(tmp_path).trim()
    assert sorted(path.name for path in cache.folder.iterdir()) == [name for name in before if name != f"{A}.u8"]


@pytest.mark.parametrize("what", ["world-writable", "foreign"])
def test_pixels_from_a_folder_that_others_can_change_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    cache = DecodedCache(tmp_path)
    store(cache, "k")
    if what == "foreign":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        cache.folder.chmod(0o777)
    for use in (lambda: cache.load("k", COUNT, SIZE), lambda: store(cache, "k")):
        with pytest.raises(ConfigError, match="DUALLORA_EDGE_CACHE"):
            use()


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_a_bad_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DUALLORA_EDGE_CACHE_GB", text)
    with pytest.raises(ConfigError, match="DUALLORA_EDGE_CACHE_GB"):
        DecodedCache(tmp_path).trim()
