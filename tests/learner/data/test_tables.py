"""Arrow and Parquet of Hugging Face datasets: read as class folders are, and damage ends in a sentence."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duallora_edge.errors import DataError
from duallora_edge.learner.data import open_stream, prepare, tables
from duallora_edge.learner.data.images import ImageFile
from duallora_edge.learner.data.scenes import scenes
from duallora_edge.runtime.preprocess import Preprocessing

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ALL = {"test_fraction": 0.0, "validation_fraction": 0.0}
NAMES = ["cat", "dog"]
IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
Pairs = Sequence[tuple[Path, Any]]


def features(**columns: Any) -> dict[str, Any]:
    return {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": NAMES}, **columns}


def table(
    pairs: Pairs, kind: Any = None, noted: dict[str, Any] | None = None, image: str = "image", **more: Any
) -> Any:
    """A table as the package `datasets` makes it, of paths and labels."""
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in pairs]
    made = pyarrow.table(
        {image: pyarrow.array(cells, IMAGE), "label": pyarrow.array([label for _, label in pairs], kind), **more}
    )
    return made if noted is None else made.replace_schema_metadata(note(noted))


def note(noted: Any) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": noted}})}


def numbers(pairs: Sequence[tuple[Path, str]]) -> list[tuple[Path, int]]:
    return [(path, NAMES.index(name)) for path, name in pairs]


def save(folder: Path, content: Any, files: int = 1, noted: Any = None, rows: int = 2) -> Path:
    """A folder of ``save_to_disk``."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    each = -(-len(content) // files)
    for number, name in enumerate(names):
        part = content.slice(number * each, each)
        with pyarrow.ipc.new_stream(str(folder / name), part.schema) as writer:
            writer.write_table(part, max_chunksize=rows)
    (folder / "dataset_info.json").write_text(json.dumps({"features": noted or features()}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def write(path: Path, content: Any, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(content, path, **settings)
    return path


def saved(folder: Path, split: str, pairs: Any) -> None:
    save(folder / split, table(numbers(pairs)), files=2)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def hub(folder: Path, split: str, pairs: Any) -> None:
    write(folder / f"data/{split}-00000-of-00001.parquet", table(numbers(pairs), noted=features()), row_group_size=2)
    (folder / "README.md").write_text("---\n---\n")
    (folder / ".gitattributes").write_text("")


def flat(folder: Path, split: str, pairs: Any) -> None:
    for number in range(2):
        write(folder / f"{split}-{number:05d}-of-00002.parquet", table(numbers(pairs[number::2]), noted=features()))


def split_folders(folder: Path, split: str, pairs: Any) -> None:
    write(folder / split / "0000.parquet", table(pairs, pyarrow.large_string()))


def bare_bytes(folder: Path, split: str, pairs: Any) -> None:
    columns = {"img": pyarrow.array([p.read_bytes() for p, _ in pairs]), "class": pyarrow.array([n for _, n in pairs])}
    write(folder / f"{split}.parquet", pyarrow.table({"id": range(len(pairs)), **columns}))


def dictionary(folder: Path, split: str, pairs: Any) -> None:
    kind = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    write(
        folder / f"{split}.parquet",
        table(pairs).set_column(1, "label", pyarrow.array([n for _, n in pairs]).cast(kind)),
    )


def names_beside(folder: Path, split: str, pairs: Any) -> None:
    write(folder / f"{split}.parquet", table(numbers(pairs), pyarrow.uint8()))
    (folder / "classes.txt").write_text("\n".join(NAMES))


@pytest.mark.parametrize("layout", [saved, hub, flat, split_folders, bare_bytes, dictionary, names_beside])
def test_the_images_and_classes_are_those_of_folders(
    photos: Any, same_as_photos: Callable[[Path], None], tmp_path: Path, layout: Callable[..., None]
) -> None:
    for split, pairs in photos.items():
        layout(tmp_path / "tables", split, pairs)
    same_as_photos(tmp_path / "tables")
    assert open_stream(str(tmp_path / "tables")).notes == ()


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_one_table_without_splits(root: Path, make_images: Any, tmp_path: Path, kind: str) -> None:
    content = table([(path, index % 2) for index, path in enumerate(make_images("x", 10))], noted=features())
    source = save(tmp_path / "all", content) if kind == "arrow" else write(tmp_path / "all.parquet", content)
    (task,) = open_stream(str(source)).tasks
    assert (task.name, len(task.train), len(task.test), task.test_given) == ("all", 8, 2, False)
    assert task.train.classes == ("cat", "dog")
    with pytest.raises(DataError, match="is a single task"):
        open_stream(str(source), task_order=["a"])


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_reference_is_read_in_place(
    root: Path, make_images: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images("x", 9)
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = 6, "Camera"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:02 10:15:00"
    Image.open(paths[5]).resize((16, 24)).convert("L").save(paths[5], exif=exif)
    content = table([(path, 0) for path in paths])
    if kind == "arrow":
        source = save(tmp_path / "all", content)
    else:
        source = write(tmp_path / "all.parquet", content, row_group_size=2)
    tables.release_groups()
    images = open_stream(str(source), **ALL).tasks[0].train.images
    same = ImageFile(paths[5])
    image = images[5]
    assert isinstance(image, ImageFile)
    assert image.name == f"{image.path.name}/005.png"
    assert (image.size(), image.traits()) == (same.size(), same.traits()) == ((24, 16), {"grey", "rotated"})
    assert image.taken() == (same.taken() if kind == "arrow" else None)
    assert len({image.key() for image in images}) == 9
    with ThreadPoolExecutor(4) as pool:
        for one, path in zip(
            pool.map(lambda one: pickle.loads(pickle.dumps(one)).read(), images * 3), paths * 3, strict=True
        ):
            np.testing.assert_array_equal(one, ImageFile(path).read())
    assert len(tables._groups) == (1 if kind == "arrow" else 2)
    tables.release_groups()
    assert not tables._groups
    before = image.key()
    image.path.write_bytes(b"damaged")
    assert image.key() != before
    with pytest.raises(DataError, match=f"cannot be read as {kind.title()} .*; copy or write it again"):
        image.read()
    image.path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        image.read()


def test_paths_tell_scenes_and_row_numbers_none(root: Path, make_images: Any, tmp_path: Path) -> None:
    paths = [
        path.rename(path.with_name(name))
        for path, name in zip(
            make_images("x", 5),
            ["hall-1.png", "kitchen-1.png", "kitchen-2.png", "kitchen-3.png", "hall-2.png"],
            strict=True,
        )
    ]
    for number, part in enumerate((paths[:3], paths[3:])):
        write(tmp_path / "named" / f"{number}.parquet", table([(path, "a") for path in part]))
        bytes_alone = [path.read_bytes() for path in part]
        write(
            tmp_path / "bare" / f"{number}.parquet", pyarrow.table({"image": bytes_alone, "label": ["a"] * len(part)})
        )
    for source, expected in (("named", [0, 1, 1, 1, 0]), ("bare", [0, 1, 2, 3, 4])):
        assert scenes(open_stream(str(tmp_path / source), **ALL).tasks[0].train.images) == expected


def test_what_is_ignored_is_noted(root: Path, make_images: Any, tmp_path: Path) -> None:
    paths = make_images("x", 6)
    labels = [0, 1, None, -1, 0, 1]
    for split in ("train", "unsupervised"):
        save(tmp_path / "all" / split, table(list(zip(paths, labels, strict=True))))
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "unsupervised"]}')
    stream = open_stream(str(tmp_path / "all"), **ALL)
    assert stream.notes == ("ignored: the split unsupervised", "ignored: 2 rows without a class")
    write(tmp_path / "numbers.parquet", table(list(zip(paths, labels, strict=True))))
    stream = open_stream(str(tmp_path / "numbers.parquet"), **ALL)
    assert stream.tasks[0].train.classes == ("0", "1")
    assert stream.notes[1:] == ("classes have only numbers; list their names in a file classes.txt beside them",)


def test_the_usual_names_of_columns_win(root: Path, make_images: Any, tmp_path: Path) -> None:
    (path,) = make_images("x", 1)
    other = pyarrow.array([{"bytes": b"mask", "path": None}], IMAGE)
    content = table([(path, "cat")], mask=other, category=pyarrow.array(["pet"]), text=pyarrow.array(["a cat"]))
    task = open_stream(str(write(tmp_path / "a.parquet", content)), **ALL).tasks[0]
    assert task.train.labels == ("cat",)
    assert task.train.images[0].read().shape == (16, 16, 3)
    noted = {"fine": {"_type": "ClassLabel", "names": NAMES}, "text": {"_type": "Value"}}
    content = pyarrow.table({"photo": content["image"], "text": ["a cat"], "fine": [1]}, metadata=note(noted))
    assert open_stream(str(write(tmp_path / "a.parquet", content)), **ALL).tasks[0].train.labels == ("dog",)


@pytest.mark.parametrize(
    ("columns", "noted", "message"),
    [
        ({"label": ["cat"]}, {}, r"has no column that may be the image \(label\); call the right one 'image'"),
        ({"image": ["a.png"], "label": ["cat"]}, {}, "no column that may be the image"),
        ({"a": [b"x"], "b": [b"x"], "label": ["cat"]}, {}, r"several columns that may be the image \(a, b, label\)"),
        ({"image": [b"x"], "text": ["cat"]}, {}, r"no column that may be the label \(image, text\); call .* 'label'"),
        ({"image": [b"x"], "label": [0.5]}, {}, "no column that may be the label"),
        ({"image": [b"x"], "label": [[1]]}, {}, "no column that may be the label"),
        (
            {"image": [b"x"], "fine": [0], "coarse": [0]},
            {"fine": {"_type": "ClassLabel"}, "coarse": {"_type": "ClassLabel"}},
            "several columns that may be the label",
        ),
        ({"image": [b"x"], "label": [2]}, features(), "Row 0 of .* has the class number 2, but .* lists 2 classes"),
        ({"image": [b"x"], "label": [-2]}, features(), "has the class number -2"),
        ({"image": [b"x"], "label": [0]}, features(label={"names": ["a", "a"]}), "names the class 'a' 2 times"),
        ({"image": [b"x"], "label": [0]}, features(label={"names": 7}), "cannot be read as Parquet"),
        ({"image": [b"x"], "label": [0]}, [], "cannot be read as Parquet"),
        ({"image": [b"x"], "label": ["a\x1bb"]}, {}, "holds control characters"),
        ({"image": [b"x"], "label": [None]}, {}, "no column|no training images"),
    ],
)
def test_tables_that_do_not_tell_one_class(tmp_path: Path, columns: Any, noted: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_stream(str(write(tmp_path / "a.parquet", pyarrow.table(columns, metadata=note(noted)))))


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_paths_in_place_of_bytes(root: Path, make_images: Any, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    paths = make_images("x", 3)

    def source(*names: str) -> str:
        cells = pyarrow.array([{"bytes": None, "path": name} for name in names], IMAGE)
        content = pyarrow.table({"image": cells, "label": ["cat"] * len(names)})
        return str(save(folder, content) if kind == "arrow" else write(folder / "a.parquet", content))

    (task,) = open_stream(source("x/000.png", str(paths[1])), **ALL).tasks
    assert [image.path for image in task.train.images] == paths[:2]
    (tmp_path / "out.png").write_bytes(paths[0].read_bytes())
    for name in ("../out.png", str(tmp_path / "out.png"), "x/999.png", "", "x", "x/\0.png", "a" * 5000):
        with pytest.raises(DataError, match=r"holds paths instead of images, .*; save the data set with save_to_disk"):
            open_stream(source(name))


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_what_is_not_an_image_is_left_out(root: Path, make_images: Any, tmp_path: Path, kind: str) -> None:
    cells = [{"bytes": path.read_bytes(), "path": None} for path in make_images("x", 2)]
    cells += [{"bytes": b"no image", "path": "c.png"}, {"bytes": None, "path": None}, None]
    content = pyarrow.table({"image": pyarrow.array(cells, IMAGE), "label": ["cat"] * 5})
    source = save(tmp_path / "all", content) if kind == "arrow" else write(tmp_path / "all.parquet", content)
    health = prepare(open_stream(str(source), **ALL), Preprocessing(32), tmp_path / "cache").health.tasks[0]
    assert (health.kept["train"], health.counts) == (2, {"unreadable": 3})
    assert [name.rpartition("/")[2] for name in health.examples["unreadable"]] == ["c.png", "3", "4"]


def damaged(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    return {
        "empty": b"",
        "text": b"no table",
        "cut": content[:middle],
        "end": content[:-1],
        "start": b"\xff" * 64 + content[64:],
        "schema": content[:40] + b"\xff" * 100 + content[140:],
        "footer": content[:-200] + b"\xff" * 150 + content[-50:],
    }[how]


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("how", ["empty", "text", "cut", "end", "start", "schema", "footer"])
def test_damage(root: Path, make_images: Any, tmp_path: Path, kind: str, how: str) -> None:
    content = table([(path, "cat") for path in make_images("x", 6)])
    source = save(tmp_path / "all", content) if kind == "arrow" else write(tmp_path / "all.parquet", content)
    (file,) = [source] if source.is_file() else source.glob("*.arrow")
    file.write_bytes(damaged(file.read_bytes(), how))
    with pytest.raises(DataError, match=r"cannot be read as (Arrow|Parquet) .*; copy or write it again|no usable"):
        prepare(open_stream(str(source), **ALL), Preprocessing(32), tmp_path / "cache")


def test_offsets_that_point_outside_of_an_arrow_file(root: Path, make_images: Any, tmp_path: Path) -> None:
    """They are mapped as they lie, and would be followed to any address."""
    content = pyarrow.table({"image": [path.read_bytes() for path in make_images("x", 2)], "label": ["cat", "cat"]})
    source = save(tmp_path / "all", content)
    (file,) = source.glob("*.arrow")
    ends = np.cumsum([0, *(len(cell) for cell in content["image"].to_pylist())], dtype=np.int32).tobytes()
    assert file.read_bytes().count(ends) == 1
    for wrong in ([0, 2**30, 2**31 - 1], [-(2**31), 0, 8]):
        file.write_bytes(file.read_bytes().replace(ends, np.array(wrong, np.int32).tobytes()))
        ends = np.array(wrong, np.int32).tobytes()
        with pytest.raises(DataError, match="cannot be read as Arrow"):
            open_stream(str(source))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", "{", "cannot be read as a folder of save_to_disk .*; save the dataset again"),
        ("state.json", "[]", "cannot be read as a folder of save_to_disk"),
        ("state.json", '{"_data_files": [{"filename": "../a.arrow"}]}', r"there is no file '\.\./a\.arrow'"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "there is no file 'gone.arrow'"),
        ("state.json", '{"_data_files": []}', "all has no files"),
        ("dataset_info.json", "{", "cannot be read as Arrow"),
        ("dataset_dict.json", '{"splits": [1]}', "cannot be read as a folder of save_to_disk"),
        ("dataset_dict.json", '{"splits": ["../train"]}', "it names no split train, val or test"),
        ("dataset_dict.json", '{"splits": ["train"]}', "No such file"),
    ],
)
def test_damaged_notes(root: Path, make_images: Any, tmp_path: Path, file: str, content: str, message: str) -> None:
    source = save(tmp_path / "all", table([(path, 0) for path in make_images("x", 2)]))
    if file == "dataset_dict.json":
        (source / "state.json").unlink()
    (source / file).write_text(content)
    with pytest.raises(DataError, match=message):
        open_stream(str(source))


def test_limits(root: Path, make_images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = make_images("x", 1)
    cells = [path.read_bytes() + bytes(1000)] * 3000  # a dictionary in the file: small there, large in memory
    source = write(tmp_path / "a.parquet", pyarrow.table({"image": cells, "label": ["cat"] * 3000}))
    assert source.stat().st_size < 200_000
    image = open_stream(str(source), **ALL).tasks[0].train.images[0]
    monkeypatch.setattr(tables, "MAX_GROUP_BYTES", 2**21)
    with pytest.raises(DataError, match=r"is larger than 2 MiB; write it again with row_group_size=100"):
        image.read()
    monkeypatch.setattr(tables, "MAX_ROWS", 2999)
    with pytest.raises(DataError, match="more than 2,999 rows"):
        open_stream(str(source))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="need pyarrow: pip install"):
        open_stream(str(tmp_path / "a.parquet"))


def test_a_table_beside_class_folders_is_not_looked_at(root: Path, make_images: Any) -> None:
    make_images("cat", 2)
    (root / "embeddings.parquet").write_bytes(b"")
    assert open_stream(str(root)).layout == "class folders"
