from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duallora_edge.errors import DataError
from duallora_edge.learner.data import manifest, open_stream


def write(root: Path, *lines: str) -> str:
    file = root / "list.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def test_tasks_and_splits(root: Path, make_images: Any) -> None:
    make_images("x", 4)
    source = write(
        root,
        "path,label,split,task",
        "x/000.png,cat,train,second",
        "x/001.png,cat,test,second",
        "",
        '"x/002.png","dog, big",train,first',
        "x/003.png,cat,val,second",
    )
    stream = open_stream(source)
    assert stream.layout == "CSV manifest"
    second, first = stream.tasks
    assert (second.name, len(second.train), len(second.validation), len(second.test)) == ("second", 1, 1, 1)
    assert (first.name, first.train.classes) == ("first", ("dog, big",))
    assert [task.name for task in open_stream(source, task_order=["first"]).tasks] == ["first"]
    with pytest.raises(DataError, match="unknown task"):
        open_stream(source, task_order=["third"])


def test_without_splits_some_images_become_the_test_set(root: Path, make_images: Any) -> None:
    make_images("x", 10)
    source = write(root, "\ufeffPath,Label", *(f"x/{index:03d}.png,c{index % 2}" for index in range(10)))
    (task,) = open_stream(source, classes_per_task=2, task_name="lines").tasks
    assert (task.name, len(task.train), len(task.test)) == ("lines-001-002", 8, 2)
    with pytest.raises(DataError, match="needs a 'task' column"):
        open_stream(source, task_order=["list"])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("x/000.png,cat,train", "3 cells instead of 4"),
        ("x/000.png,cat,train,t,more", "5 cells instead of 4"),
        (",cat,train,t", "'path' is empty"),
        ("x/000.png, ,train,t", "'label' is empty"),
        ("x/000.png,cat,,t", "'split' is empty"),
        ("x/000.png,cat,train,", "'task' is empty"),
        ("x/000.png,cat,training,t", "the split is 'training'"),
        ("x/999.png,cat,train,t", "there is no file 'x/999.png'"),
        ("x,cat,train,t", "'x' has no suffix of an image"),
        (f"{'x' * 300}.png,cat,train,t", "there is no file"),
        ("x/\0.png,cat,train,t", "there is no file"),
        ("x/000.png,c\x1bat,train,t", r"the label 'c\x1bat' holds control characters"),
        ("x/000.png,c\u202eat,train,t", r"the label 'c\u202eat' holds control characters"),
        ("x/000.png,cat,train,t\u202e", r"the task name 't\u202e' cannot be the name of a folder"),
        ("x/000.png,cat,train,../up", "the task name '../up' cannot be the name of a folder"),
    ],
)
def test_bad_rows(root: Path, make_images: Any, row: str, problem: str) -> None:
    make_images("x", 1)
    source = write(root, "path,label,split,task", "x/000.png,cat,train,t", row)
    with pytest.raises(DataError) as caught:
        open_stream(source)
    assert f"has 1 bad rows; correct or delete them:\n  row 3: {problem}" in str(caught.value)


def test_all_bad_rows_are_counted_and_the_first_ten_shown(root: Path) -> None:
    root.mkdir()
    source = write(root, "path,label", *("gone.png,a" for _ in range(15)))
    with pytest.raises(DataError) as caught:
        open_stream(source)
    message = str(caught.value)
    assert "has 15 bad rows" in message
    assert message.count("  row ") == 10
    assert message.endswith("and 5 more")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "first line"),
        (b"path\na.png", "first line"),
        (b"path,label,label\n", "first line"),
        (b"path,label,spilt\n", "first line"),
        (b"path,label\n", "lists no images"),
        (b"path,label\n\xff\xfe.png,a\n", "not a CSV file in UTF-8"),
        (b'path,label\n"open.png,a\n', "not a CSV file in UTF-8"),
        (b"path,label\nx.png," + b"a" * 200_000 + b"\n", "not a CSV file in UTF-8 .*field limit"),
        ("path,label\nx.png,a\n".encode("utf-16"), "not a CSV file in UTF-8"),
        ("path,label\nx.png,é\n".encode("latin-1"), "not a CSV file in UTF-8"),
        (b"path,label\0\n", "first line"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "list.csv"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_stream(str(file))


def test_limits(root: Path, make_images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images("x", 1)
    source = write(root, "path,label", *("x/000.png,a" for _ in range(4)))
    monkeypatch.setattr(manifest, "MAX_ROWS", 3)
    with pytest.raises(DataError, match="more than 3 rows"):
        open_stream(source)
    monkeypatch.setattr(manifest, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="larger than"):
        open_stream(source)
