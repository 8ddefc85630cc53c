from __future__ import annotations

import json
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
        ("x/000.png,cat,trian,t", "the split is 'trian'"),
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


@pytest.mark.parametrize(
    ("header", "row", "notes"),
    [
        ("path,label", "x/000.png,cat", ()),
        ("file_name,class", "x/000.png,cat", ()),
        ("filename,category", "x/000.png,cat", ()),
        ("id, Image ,Target,width", "7,x/000.png,cat,16", ("ignored: columns id, width",)),
        ("image,id,choice,annotator", "x/000.png,1,cat,2", ("ignored: columns id, annotator",)),
        ("file,label,split", "x/000.png,cat,Train", ()),
    ],
)
def test_columns_of_other_tools(root: Path, make_images: Any, header: str, row: str, notes: tuple[str, ...]) -> None:
    make_images("x", 1)
    stream = open_stream(write(root, header, row))
    assert stream.tasks[0].train.classes == ("cat",)
    assert stream.notes == notes


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("path,file,label", "x/000.png,x/000.png,cat", "first line"),
        ("path,label,class", "x/000.png,cat,cat", "first line"),
        ("filename,class,xmin,ymin,xmax,ymax", "x/000.png,cat,1,1,2,2", "lists boxes .* give --crop-boxes"),
        ("image,choice", "/data/upload/1/abc-000.png,cat", "is an address on a server; download the image"),
        ("image,choice", "https://example.org/000.png,cat", "is an address on a server; download the image"),
    ],
)
def test_columns_that_do_not_tell_one_class_per_image(
    root: Path, make_images: Any, header: str, row: str, message: str
) -> None:
    make_images("x", 1)
    with pytest.raises(DataError, match=message):
        open_stream(write(root, header, row))


def lines(labels: dict[str, object], suffix: str) -> str:
    if suffix == "csv":
        return "\n".join(["file_name,label", *(f"{name},{label}" for name, label in labels.items())])
    return "\n".join(json.dumps({"file_name": name, "label": label}) for name, label in labels.items()) + "\n\n"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("splits", [(), ("train", "validation", "test")])
def test_metadata_beside_the_images(root: Path, make_images: Any, suffix: str, splits: tuple[str, ...]) -> None:
    for folder in splits or ("",):
        paths = make_images(folder, 10 if folder != "test" else 4)
        text = lines({path.name: index % 2 for index, path in enumerate(paths)}, suffix)
        (root / folder / f"metadata.{suffix}").write_text(text)
    stream = open_stream(str(root))
    (task,) = stream.tasks
    assert (stream.layout, task.name, task.train.classes) == ("folder with metadata", "data", ("0", "1"))
    assert len(task.train) + len(task.validation) + len(task.test) == (24 if splits else 10)
    assert len(task.test) == (4 if splits else 2)
    assert task.test_given == bool(splits)


def test_json_lines_as_a_list(root: Path, make_images: Any) -> None:
    make_images("x", 2)
    file = root / "list.jsonl"
    file.write_text(lines({"x/000.png": "cat", "x/001.png": "dog"}, "jsonl"))
    assert open_stream(str(file)).tasks[0].train.classes == ("cat", "dog")


def test_a_json_list_as_label_studio_exports_it(root: Path, make_images: Any) -> None:
    """Its JSON-MIN, with the paths of images that lie beside it."""
    make_images("x", 2)
    tasks = [
        {"image": f"x/{index:03d}.png", "id": index, "choice": name, "annotator": 1, "lead_time": 2.5}
        for index, name in enumerate(("cat", "dog"))
    ]
    file = root / "export.json"
    file.write_text(json.dumps(tasks, indent=2))
    stream = open_stream(str(file))
    assert stream.tasks[0].train.classes == ("cat", "dog")
    assert (stream.layout, stream.notes) == ("JSON list", ("ignored: columns id, annotator, lead_time",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image": "/data/upload/1/0123abcd-000.png", "choice": "cat"}], "is an address on a server; download"),
        ([{"image": "000.png", "choice": {"choices": ["cat", "dog"]}}], "row 2: 'label' is empty"),
        ([{"id": 1, "data": {"image": "000.png"}, "annotations": []}], "all annotations; export it as JSON-MIN or CSV"),
        ([{"photo": "000.png", "choice": "cat"}], r"The first object of .*export\.json must be path,label"),
        ([], "The first object of"),
        (
            {"images": [], "annotations": []},
            r"is not a JSON list of objects in UTF-8 \(it does not begin with a list\)",
        ),
        ([1], "is not a JSON list of objects"),
    ],
)
def test_other_json(root: Path, make_images: Any, content: Any, message: str) -> None:
    make_images("", 1)
    (root / "export.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        open_stream(str(root / "export.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "000.png", "objects": {"bbox": []}}', "lists boxes"),
        ('{"file_name": "000.png", "label": "a"}\n{"file_name": "001.png"}', "row 3: 'label' is empty"),
        ('{"file_name": "000.png", "label": ["a"]}', "row 2: 'label' is empty"),
        ('{"file_name": "000.png", "label": "a"}\n[1]', "not a JSON lines file in UTF-8 .*not an object"),
        ('{"file_name": "000.png", "label": 1e999}', "not a JSON lines file"),
        ("[" * 100_000, "not a JSON lines file"),
    ],
)
def test_bad_json_lines(root: Path, make_images: Any, content: str, message: str) -> None:
    make_images("", 2)
    (root / "metadata.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        open_stream(str(root))


@pytest.mark.parametrize("header", ["file_name,text", "image_id,label"])
def test_metadata_without_labels_of_files_leaves_the_folders_as_they_are(
    root: Path, make_images: Any, header: str
) -> None:
    make_images("cat", 2)
    (root / "metadata.csv").write_text(f"{header}\ncat/000.png,a cat\n")
    assert open_stream(str(root)).layout == "class folders"
