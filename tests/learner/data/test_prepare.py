from __future__ import annotations

import json
import os
import shutil
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duallora_edge.errors import DataError
from duallora_edge.learner.data import ImageFile, PreparedStream, open_stream, prepare
from duallora_edge.runtime.preprocess import Preprocessing, read_image

SIZE = 12


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Any:
    def run(**settings: Any) -> PreparedStream:
        stream = open_stream(str(root), validation_fraction=0, **settings)
        return prepare(stream, Preprocessing(SIZE), tmp_path / "cache", workers=2)

    return run


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: ImageFile) -> None:
        raise AssertionError(f"{self.path} was decoded")

    monkeypatch.setattr(ImageFile, "read", read)


def pixels_of(path: Path) -> np.ndarray:
    return Preprocessing(SIZE)(read_image(path))


def test_pixels_labels_and_a_warm_cache(
    root: Path, make_images: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images("train/a", 3, (20, 30)) + make_images("train/b", 2)
    cold = run()
    (task,) = cold.tasks
    assert task.train.labels == ("a",) * 3 + ("b",) * 2
    assert task.classes == ("a", "b")
    assert task.train.pixels.shape == (5, SIZE, SIZE, 3) and task.train.pixels.dtype == np.uint8
    assert not task.train.pixels.flags.writeable
    for row, path in zip(task.train.pixels, paths, strict=True):
        np.testing.assert_array_equal(row, pixels_of(path))
    assert task.test.pixels.shape == (0, SIZE, SIZE, 3) and len(task.test) == 0
    forbid_decoding(monkeypatch)
    warm = run()
    assert warm.tasks[0].digest == task.digest
    assert warm.health == cold.health
    np.testing.assert_array_equal(warm.tasks[0].train.pixels, task.train.pixels)


def test_progress_reaches_the_total_cold_and_warm(root: Path, make_images: Any, tmp_path: Path) -> None:
    make_images("train/a", 3)
    make_images("test/a", 2)
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        prepare(
            open_stream(str(root)),
            Preprocessing(SIZE),
            tmp_path / "cache",
            on_progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert seen[-1] == (5, 5)


def save_rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("RGB", (24, 16), "red").save(path, exif=exif)


def save_huge_header(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def save_truncated(path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1000])


ODD_FILES: list[tuple[str, Any, str, bool]] = [
    ("rotated.jpg", save_rotated, "rotated", True),
    ("alpha.png", lambda path: Image.new("RGBA", (16, 16), (9, 9, 9, 99)).save(path), "alpha", True),
    ("palette.png", lambda path: Image.new("P", (16, 16)).save(path, transparency=0), "alpha", True),
    ("grey.png", lambda path: Image.new("L", (16, 16), 7).save(path), "grey", True),
    ("deep.png", lambda path: Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(path), "grey", True),
    ("tiny.png", lambda path: Image.new("RGB", (40, 7)).save(path), "tiny", False),
    ("truncated.jpg", save_truncated, "unreadable", False),
    ("empty.png", lambda path: path.write_bytes(b""), "unreadable", False),
    ("text.png", lambda path: path.write_text("not an image"), "unreadable", False),
    ("bomb.png", save_huge_header, "unreadable", False),
    ("gone.png", lambda path: path.symlink_to("nowhere.png"), "unreadable", False),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("name", "save", "finding", "stays"), ODD_FILES, ids=[row[0] for row in ODD_FILES])
def test_odd_files(root: Path, make_images: Any, run: Any, name: str, save: Any, finding: str, stays: bool) -> None:
    paths = make_images("train/a", 2)
    save(root / "train/a" / name)  # sorts behind 000.png and 001.png
    prepared = run()
    (health,) = prepared.health.tasks
    assert health.counts == {finding: 1}
    assert list(health.examples[finding]) == [str(root / "train/a" / name)]
    kept = [*paths, root / "train/a" / name] if stays else paths
    assert health.kept == {"train": len(kept), "validation": 0, "test": 0}
    for row, path in zip(prepared.tasks[0].train.pixels, kept, strict=True):
        np.testing.assert_array_equal(row, pixels_of(path))
    assert f"1 {finding}: " in prepared.health.table()
    assert json.loads(json.dumps(prepared.health.to_json()))["tasks"][0]["counts"] == {finding: 1}


@pytest.mark.parametrize(
    ("source", "copy", "finding", "kept"),
    [
        ("train/a/000.png", "train/a/copy.png", "duplicate", (4, 2)),
        ("test/a/000.png", "test/a/copy.png", "duplicate", (4, 2)),
        ("test/a/000.png", "train/a/copy.png", "in test", (4, 2)),
        ("test/a/000.png", "train/b/copy.png", "in test", (4, 2)),
        ("train/a/000.png", "train/b/copy.png", "conflicting", (3, 2)),
    ],
)
def test_copies(
    root: Path, make_images: Any, run: Any, source: str, copy: str, finding: str, kept: tuple[int, int]
) -> None:
    for folder in ("train/a", "train/b", "test/a"):
        make_images(folder, 2)
    Image.open(root / source).save((root / copy).with_suffix(".bmp"))  # another format, the same pixels
    prepared = run()
    health = prepared.health.tasks[0]
    assert (health.kept["train"], health.kept["test"]) == kept
    assert set(health.counts) == {finding}
    assert health.counts[finding] == 5 + 2 - sum(kept)
    assert len(prepared.tasks[0].train) == len(prepared.tasks[0].train.pixels) == kept[0]


def test_test_images_of_any_task_leave_training(root: Path, make_images: Any, run: Any) -> None:
    (leak, _) = make_images("1/train/a", 2)
    make_images("2/train/b", 1)
    (root / "2/test/b").mkdir(parents=True)
    shutil.copy(leak, root / "2/test/b/x.png")
    first, second = run().health.tasks
    assert first.counts == {"in test": 1} and first.kept["train"] == 1
    assert second.counts == {} and second.kept["test"] == 1


def test_a_validation_copy_of_a_training_image_goes(root: Path, make_images: Any, run: Any) -> None:
    (path,) = make_images("train/a", 1)
    make_images("val/a", 1)
    shutil.copy(path, root / "val/a/copy.png")
    health = run().health.tasks[0]
    assert health.counts == {"duplicate": 1}
    assert health.kept == {"train": 1, "validation": 1, "test": 0}


def test_a_class_that_loses_all_images_is_an_error(root: Path, make_images: Any, run: Any) -> None:
    make_images("train/a", 2)
    (root / "train/b").mkdir()
    (root / "train/b/x.png").write_text("no image")
    with pytest.raises(DataError, match=r"Class 'b' of task 'data' .*x\.png \(unreadable\); replace"):
        run()


def test_digest_is_the_content_and_nothing_else(root: Path, make_images: Any, tmp_path: Path) -> None:
    paths = make_images("train/a", 6)
    make_images("test/a", 1)

    def digest(folder: Path, size: int = SIZE, **settings: Any) -> str:
        stream = open_stream(str(folder), **settings)
        return prepare(stream, Preprocessing(size), tmp_path / "cache").tasks[0].digest

    first = digest(root)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "train/a").mkdir(parents=True)
    for index, path in enumerate(reversed(paths)):
        Image.open(path).save(elsewhere / "train/a" / f"{index}.bmp")
    assert digest(elsewhere) == first
    assert digest(root, seed=3, size=16) == first
    shutil.copy(paths[0], root / "train/a/copy.png")
    assert digest(root) == first
    make_images("train/a", 7)
    assert digest(root) != first
    (elsewhere / "train/a").rename(elsewhere / "train/b")
    assert digest(elsewhere) != first


@pytest.mark.assets
def test_real_images(tmp_path: Path) -> None:
    if "DUALLORA_EDGE_ASSETS" not in os.environ:
        pytest.skip("DUALLORA_EDGE_ASSETS does not name the folder of real images")
    with tarfile.open(Path(os.environ["DUALLORA_EDGE_ASSETS"]) / "images" / "dtd10.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    prepared = prepare(open_stream(str(tmp_path / "dtd10")), Preprocessing(64), tmp_path / "cache")
    (task,) = prepared.tasks
    assert (len(task.train), len(task.validation), len(task.test)) == (717, 79, 400)
    assert prepared.health.tasks[0].counts == {"in test": 4}
    assert 60 < float(task.train.pixels.mean()) < 200
