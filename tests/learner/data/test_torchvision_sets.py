from __future__ import annotations

import functools
import struct
from pathlib import Path

import numpy as np
import pytest

from duallora_edge.errors import DataError
from duallora_edge.learner.data import open_stream, prepare
from duallora_edge.runtime.preprocess import Preprocessing

datasets = pytest.importorskip("torchvision.datasets")


def write_idx(path: Path, array: np.ndarray) -> None:
    """The IDX format of MNIST: magic (type 8 = uint8, rank), big-endian sizes, bytes."""
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return tmp_path


def test_local_mnist(mnist: Path) -> None:
    stream = open_stream("torchvision:MNIST", classes_per_task=4, data_root=mnist)
    assert stream.layout == "torchvision MNIST"
    assert [task.name for task in stream.tasks] == ["classes-001-004", "classes-005-008", "classes-009-010"]
    first = stream.tasks[0]
    assert first.train.classes == ("0 - zero", "1 - one", "2 - two", "3 - three")
    assert (len(first.train), len(first.validation), len(first.test)) == (20, 4, 8)
    prepared = prepare(stream, Preprocessing(28), mnist / "cache")
    dataset = datasets.MNIST(mnist, train=False)
    expected = np.asarray(dataset[0][0].convert("RGB"))
    assert prepared.tasks[0].test.labels[0] == "0 - zero"
    np.testing.assert_array_equal(prepared.tasks[0].test.pixels[0], expected)


def test_dataset_without_train_and_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = functools.partial(datasets.FakeData, size=40, image_size=(3, 12, 12), num_classes=3)
    monkeypatch.setattr(datasets, "FakeData", small)
    stream = open_stream("torchvision:FakeData", data_root=tmp_path)
    (task,) = stream.tasks
    assert task.name == "fakedata"
    assert task.train.classes == ("class-000", "class-001", "class-002")
    assert len(task.train) + len(task.validation) + len(task.test) == 40
    prepared = prepare(stream, Preprocessing(12), tmp_path / "cache", workers=4).tasks[0]
    for row, image in zip(prepared.test.pixels, task.test.images, strict=True):
        np.testing.assert_array_equal(row, np.asarray(small()[image.index][0]))


def test_datasets_without_one_class_an_image_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Boxes:
        def __init__(self, root: str) -> None:
            self.targets = [{"box": 1}]

    monkeypatch.setattr(datasets, "CocoDetection", Boxes)
    with pytest.raises(DataError, match="no one class"):
        open_stream("torchvision:CocoDetection", data_root=tmp_path)
