from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duallora_edge.errors import ConfigError, DataError
from duallora_edge.learner.data import ImageFile, TaskData, open_stream
from duallora_edge.text import UNSAFE


def sizes(task: TaskData) -> tuple[int, int, int]:
    return len(task.train), len(task.validation), len(task.test)


def test_class_folders(root: Path, make_images: Any) -> None:
    make_images("cat", 10)
    make_images("dog", 5)
    make_images("few", 4)
    stream = open_stream(str(root))
    assert stream.layout == "class folders"
    (task,) = stream.tasks
    assert task.name == "data"
    assert task.train.classes == ("cat", "dog", "few")
    # test: 2 + 1 + 0; validation: of the 8, 4, 4 left: 1 + 0 + 0
    assert sizes(task) == (15, 1, 3)
    assert "3 of 19 images became the test set" in task.notes[0]
    assert "class folders" in stream.describe() and "15 train" in stream.describe()


def test_split_folders_use_a_val_folder_and_ignore_what_is_no_image(root: Path, make_images: Any) -> None:
    make_images("train/a", 6)
    make_images("val/a", 2)
    make_images("test/a", 3)
    make_images("train/.thumbnails", 1)
    (root / "train/a/notes.txt").write_text("x")
    (root / ".DS_Store").write_text("x")
    stream = open_stream(str(root), task_name="site")
    assert stream.layout == "split folders"
    assert stream.tasks[0].name == "site"
    assert sizes(stream.tasks[0]) == (6, 2, 3)
    assert stream.notes == ("ignored: 1 files that are not images", "ignored: 2 hidden files or folders")


def test_other_names_of_splits(root: Path, make_images: Any) -> None:
    make_images("Train/a", 6)
    make_images("valid/a", 2)
    assert sizes(open_stream(str(root)).tasks[0]) == (6, 2, 0)
    make_images("val/a", 2)
    with pytest.raises(DataError, match="are both for val; make one folder of them"):
        open_stream(str(root))


def test_a_class_may_be_called_train(root: Path, make_images: Any) -> None:
    make_images("train", 3)
    make_images("bus", 3)
    assert open_stream(str(root)).tasks[0].train.classes == ("bus", "train")


def test_task_folders(root: Path, make_images: Any) -> None:
    make_images("b/train/x", 6)
    make_images("b/test/x", 1)
    make_images("a/train/x", 1)  # a known class, one image, no test
    make_images("c/train/y", 1)
    stream = open_stream(str(root))
    assert stream.layout == "task folders"
    assert [(task.name, *sizes(task)) for task in stream.tasks] == [("a", 1, 0, 0), ("b", 5, 1, 1), ("c", 1, 0, 0)]
    (root / "notes").mkdir()  # not looked at when the order is given
    stream = open_stream(str(root), task_order=["c", "a"])
    assert [task.name for task in stream.tasks] == ["c", "a"]
    assert stream.notes == ("ignored: 2 folders not named by task_order",)


def test_symlinks_are_followed_and_loops_end(root: Path, make_images: Any) -> None:
    (original,) = make_images("train/a", 1)
    (root / "train/b").mkdir()
    (root / "train/b/link.png").symlink_to(original)
    assert len(open_stream(str(root)).tasks[0].train) == 2
    (root / "train/b/loop").symlink_to(root)
    with pytest.raises(DataError, match="should hold images but holds the folder 'loop'"):
        open_stream(str(root))


@pytest.mark.parametrize(
    ("folders", "settings", "message"),
    [
        ([], {}, "holds no images"),
        (["cat/", "dog/"], {}, "holds no images"),
        (["cat", "dog/"], {}, "dog holds no images"),
        (["."], {}, "outside a class folder"),
        (["train/a", "b"], {}, "mixes layouts"),
        (["test/a"], {}, "has no 'train' folder"),
        (["train/a", "train/b/", "test/a"], {}, "b holds no images"),
        (["train/a", "test/b"], {}, "has test images but no training images of 'b'"),
        (["train"], {"task_order": ["train"]}, "single task"),
        (["a/train/x", "b/y"], {}, "holds no 'train' folder"),
        (["a/train/x", "a/trian/x"], {}, "beside the split folders"),
        (["a/train/x", "a"], {}, "mixes|beside"),
        (["a/train/x", "a/train"], {}, "outside a class folder"),
        (["a/train/x/deep"], {}, "should hold images"),
        (["gtsrb/train/x"], {"task_order": ["gtsrbb"]}, "did you mean 'gtsrb'"),
        (["a/train/x"], {"task_order": ["a", "a"]}, "twice"),
        (["a/train/x"], {"task_order": []}, "empty"),
        (["a/train/x"], {"classes_per_task": 1}, "leave out classes_per_task"),
    ],
)
def test_folder_errors(
    root: Path, make_images: Any, folders: list[str], settings: dict[str, Any], message: str
) -> None:
    root.mkdir()
    for folder in folders:
        if folder.endswith("/"):
            (root / folder).mkdir(parents=True)
        else:
            make_images(folder, 1)
    with pytest.raises(DataError, match=message):
        open_stream(str(root), **settings)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"validation_fraction": 1.0}, ConfigError),
        ({"test_fraction": -0.1}, ConfigError),
        ({"validation_fraction": float("nan")}, ConfigError),
        ({"classes_per_task": 0}, ConfigError),
        ({"classes_per_task": 1, "class_order": "random"}, ConfigError),
        ({"classes_per_task": 1, "class_order": "seed:99999999999"}, ConfigError),
        ({"task_order": ["a"]}, DataError),
    ],
)
def test_bad_settings(root: Path, make_images: Any, settings: dict[str, Any], error: type[Exception]) -> None:
    make_images("a", 2)
    with pytest.raises(error):
        open_stream(str(root), **settings)


@pytest.mark.parametrize("source", ["nowhere", "torchvision:Nothing", "torchvision:MNIST"])
def test_unusable_sources(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")

    def offline(self: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", offline)
    with pytest.raises(DataError, match=r"does not exist|no dataset|put the files"):
        open_stream(source, data_root=tmp_path / "files")


def test_a_file_that_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("x")
    with pytest.raises(DataError, match="neither a folder nor"):
        open_stream(str(tmp_path / "list.txt"))


def test_the_same_name_in_another_unicode_form_is_the_same_class(root: Path, make_images: Any) -> None:
    make_images("a/train/caf\u00e9", 1)
    make_images("b/train/cafe\u0301", 1)
    first, second = open_stream(str(root)).tasks
    assert first.train.classes == second.train.classes


def test_a_folder_name_that_is_not_utf8_is_an_error(root: Path, make_images: Any) -> None:
    make_images("bad\udcff", 1)
    with pytest.raises(DataError, match="not valid UTF-8"):
        open_stream(str(root))


def test_file_identity_follows_content(root: Path, make_images: Any) -> None:
    (path,) = make_images("a", 1)
    before = ImageFile(path).key()
    path.write_bytes(path.read_bytes() + b"x")
    assert ImageFile(path).key() != before
    path.unlink()
    assert ImageFile(path).key().endswith("missing")


UNSAFE_NAMES = ["red\x1b[2J", "a\u202eb", "a\nb", "a\x9bb", "\u2066x"]


@pytest.mark.parametrize("name", UNSAFE_NAMES)
@pytest.mark.parametrize("layout", ["{}", "train/{}", "task/train/{}", "{}/train/x"])
def test_control_characters_in_folder_names(root: Path, make_images: Any, name: str, layout: str) -> None:
    make_images(layout.format(name), 2)
    with pytest.raises(DataError, match="holds control characters; rename it") as caught:
        open_stream(str(root))
    assert not UNSAFE.search(str(caught.value))


@pytest.mark.parametrize("name", UNSAFE_NAMES)
@pytest.mark.parametrize("settings", [{}, {"classes_per_task": 1}])
def test_control_characters_in_the_task_name(root: Path, make_images: Any, name: str, settings: dict[str, Any]) -> None:
    make_images("a", 2)
    with pytest.raises(DataError, match="holds control characters; rename it"):
        open_stream(str(root), task_name=name, **settings)
    root.rename(root.with_name(name))
    with pytest.raises(DataError, match=r"name .* of a task holds control characters"):
        open_stream(str(root.with_name(name)))
    assert open_stream(str(root.with_name(name)), task_name="fine").tasks[0].name == "fine"


def test_a_name_that_is_too_long_for_a_bundle(root: Path, make_images: Any) -> None:
    make_images("a", 2)
    with pytest.raises(DataError, match="must have 1 to 2000 characters"):
        open_stream(str(root), task_name="x" * 2001)
