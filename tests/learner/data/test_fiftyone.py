from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duallora_edge.errors import DataError
from duallora_edge.learner.data import fiftyone, open_stream, prepare
from duallora_edge.runtime.preprocess import Preprocessing

CLASSES = ["cat", "dog"]


def write(folder: Path, labels: Any, classes: Any = CLASSES) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "labels.json").write_text(json.dumps({"classes": classes, "labels": labels}))
    return str(folder)


@pytest.mark.parametrize(
    "label",
    [CLASSES.index, str, lambda name: {"label": name, "confidence": 0.5}, lambda name: {"label": CLASSES.index(name)}],
    ids=["number", "name", "dict", "dict with a number"],
)
@pytest.mark.parametrize("key", ["{0.stem}", "{0.name}"])
def test_classes_of_images(root: Path, make_images: Any, label: Callable[[str], Any], key: str) -> None:
    paths = make_images("data", 10)
    source = write(root, {key.format(path): label(CLASSES[index % 2]) for index, path in enumerate(paths)})
    stream = open_stream(source, test_fraction=0.0, validation_fraction=0.0)
    (task,) = stream.tasks
    assert (stream.layout, stream.notes) == ("FiftyOne folder", ())
    assert dict(zip(task.train.images, task.train.labels, strict=True)) == {
        image: CLASSES[int(image.name[-7:-4]) % 2] for image in task.train.images
    }
    assert Counter(task.train.labels) == {"cat": 5, "dog": 5}


def test_images_in_folders_below(root: Path, make_images: Any) -> None:
    make_images("data/a", 2)
    make_images("data/b", 2)
    labels = {f"{folder}/{index:03d}": folder for folder in "ab" for index in range(2)}
    task = open_stream(write(root, labels, None)).tasks[0]
    assert {image.name.split("/")[0] for image in task.train.images} == set(task.train.classes) == {"a", "b"}


def test_the_images_and_classes_are_those_of_folders(root: Path, photos: Any, tmp_path: Path) -> None:
    """FiftyOne has no splits, so all images are learned here."""
    shutil.rmtree(root / "test")
    folder = tmp_path / "export"
    (folder / "data").mkdir(parents=True)
    for index, (path, _) in enumerate(photos["train"]):
        shutil.copy(path, folder / "data" / f"{index:024x}.png")
    write(folder, {f"{index:024x}": name for index, (_, name) in enumerate(photos["train"])})
    expected, found = (
        prepare(
            open_stream(str(source), test_fraction=0.0, validation_fraction=0.0), Preprocessing(32), tmp_path / "cache"
        ).tasks[0]
        for source in (root, folder)
    )
    assert found.digest == expected.digest
    assert found.counts == expected.counts == {"cat": 6, "dog": 5}
    assert {pixels.tobytes() for pixels in found.train.pixels} == {pixels.tobytes() for pixels in expected.train.pixels}


def test_what_is_ignored_is_counted(root: Path, make_images: Any) -> None:
    make_images("data", 4)
    stream = open_stream(write(root, {"000": "cat", "001": None, "003": 1, "004": 0, "005": None}))
    assert stream.notes == ("ignored: 1 classes of images that are missing", "ignored: 2 images without a class")


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ({"000": 2}, CLASSES, "'000' in .* has the class number 2, but .* lists 2 classes"),
        ({"000": -1}, CLASSES, "has the class number -1"),
        ({"000": ["cat", "dog"]}, CLASSES, "has a list of labels, but one image has one class here"),
        ({"000": [{"label": "cat", "bounding_box": [0, 0, 1, 1]}]}, CLASSES, "has a list of labels"),
        ({"000": True}, CLASSES, "has the label 'True', which names no class"),
        ({"000": ""}, CLASSES, "which names no class"),
        ({"000": {"confidence": 1}}, CLASSES, "the key 'label' is missing"),
        ({"../000": "cat"}, CLASSES, "None of the images"),
        ({"/etc/passwd": "cat"}, CLASSES, "None of the images"),
        ({"000": None}, CLASSES, "None of the images"),
        ({"000": 0}, ["cat", "cat"], "names the class 'cat' 2 times"),
        ({"000": 0}, 7, "cannot be read as FiftyOne writes it .*; export the dataset again"),
        ([], CLASSES, "cannot be read as FiftyOne"),
        ({"000": "a\x1bb"}, None, "holds control characters"),
    ],
)
def test_wrong_labels(root: Path, make_images: Any, labels: Any, classes: Any, message: str) -> None:
    make_images("data", 1)
    with pytest.raises(DataError, match=message):
        open_stream(write(root, labels, classes))


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"classes": []}'])
def test_a_damaged_file(root: Path, make_images: Any, content: str) -> None:
    make_images("data", 1)
    (root / "labels.json").write_text(content)
    with pytest.raises(DataError, match="cannot be read as FiftyOne"):
        open_stream(str(root))


def test_a_class_may_be_called_data(root: Path, make_images: Any) -> None:
    for name in ("data", "other"):
        make_images(name, 5)
    (task,) = open_stream(write(root, {})).tasks
    assert task.train.classes == ("data", "other")


def test_limits_and_task_order(root: Path, make_images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images("data", 1)
    source = write(root, {"000": "cat"})
    with pytest.raises(DataError, match="is a single task"):
        open_stream(source, task_order=["a"])
    monkeypatch.setattr(fiftyone, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="larger than"):
        open_stream(source)
