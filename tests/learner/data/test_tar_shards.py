"""WebDataset shards: what is read is what class folders hold, and hostile archives end in a sentence."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duallora_edge.errors import DataError
from duallora_edge.learner.data import open_stream, prepare, tar_shards
from duallora_edge.learner.data.images import ImageFile
from duallora_edge.learner.data.scenes import scenes
from duallora_edge.runtime.preprocess import Preprocessing

Members = Iterable[tuple[str, bytes]]
ALL = {"test_fraction": 0.0, "validation_fraction": 0.0}
NAMES = ["cat", "dog"]


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def shard(path: Path, members: Members, kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, label: str | int = "cat", seed: int = 0) -> Members:
    return [(f"{key}.png", png(seed)), (f"{key}.cls", str(label).encode())]


@pytest.mark.parametrize("place", ["{split}-{shard:06d}.tar", "photos-{split}-{shard:04d}.tar", "{split}/{shard}.tar"])
@pytest.mark.parametrize(
    "label",
    [
        lambda name: ("cls", str(NAMES.index(name))),
        lambda name: ("cls", f" {name}\n"),
        lambda name: ("txt", name),
        lambda name: ("json", json.dumps({"caption": "a picture", "label": NAMES.index(name)})),
        lambda name: ("json", json.dumps({"class": name})),
    ],
    ids=["number", "name", "txt", "json number", "json name"],
)
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_the_images_and_classes_are_those_of_folders(
    photos: Any,
    same_as_photos: Callable[[Path], None],
    tmp_path: Path,
    place: str,
    label: Callable[[str], tuple[str, str]],
    kind: int,
) -> None:
    folder = tmp_path / "shards"
    for split, files in photos.items():
        for number in range(2):  # keys occur in both shards
            members: list[tuple[str, bytes]] = []
            for index, (path, name) in enumerate(files[number::2]):
                extension, text = label(name)
                members += [(f"{index:05d}.png", path.read_bytes()), (f"{index:05d}.{extension}", text.encode())]
            shard(folder / place.format(split=split, shard=number), members, kind)
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    same_as_photos(folder)
    assert open_stream(str(folder)).layout == "WebDataset shards"
    assert open_stream(str(folder)).notes == ()


def test_one_archive_without_splits(tmp_path: Path) -> None:
    path = shard(tmp_path / "train-0.tar", [m for i in range(10) for m in sample(f"a/{i:03d}", i % 2, i)])
    stream = open_stream(str(path))
    (task,) = stream.tasks
    assert (task.name, len(task.train), len(task.test), task.test_given) == ("train-0", 8, 2, False)
    assert task.train.classes == ("0", "1")
    assert stream.notes == ("classes have only numbers; list their names in a file classes.txt beside them",)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert open_stream(str(path)).tasks[0].train.classes == ("cat", "dog")
    assert open_stream(str(tmp_path), task_name="site").tasks[0].train.classes == ("cat", "dog")
    with pytest.raises(DataError, match="is a single task"):
        open_stream(str(tmp_path), task_order=["a"])


def test_a_reference_is_read_in_place(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = 6, "Camera"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:02 10:15:00"
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)).save(file, "jpeg", exif=exif)
    (tmp_path / "same.jpg").write_bytes(file.getvalue())
    path = shard(
        tmp_path / "site.tar", [*sample("first"), ("b/kitchen-0012.jpg", file.getvalue()), ("b/kitchen-0012.cls", b"x")]
    )
    image = open_stream(str(path), **ALL).tasks[0].train.images[1]
    same = ImageFile(tmp_path / "same.jpg")
    assert isinstance(image, ImageFile)
    assert (image.name, image.where) == ("site.tar/b/kitchen-0012.jpg", f"{path}/b/kitchen-0012.jpg")
    assert (image.size(), image.traits(), image.taken()) == (same.size(), same.traits(), same.taken())
    assert image.taken() is not None and image.size() == (16, 24)
    np.testing.assert_array_equal(image.read(), same.read())
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(image)).read(), same.read())
    before = image.key()
    assert before != open_stream(str(path), **ALL).tasks[0].train.images[0].key()
    path.write_bytes(path.read_bytes() + bytes(512))
    assert image.key() != before
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be read .*; copy the file again"):
        image.read()


def test_frames_of_a_scene_are_neighbours(tmp_path: Path) -> None:
    """Also where they lie in two shards."""
    for number, keys in enumerate((["hall-1", "kitchen-1", "kitchen-2"], ["kitchen-3", "hall-2"])):
        shard(tmp_path / f"{number}.tar", [member for key in keys for member in sample(key)])
    images = open_stream(str(tmp_path), **ALL).tasks[0].train.images
    assert scenes(images) == [0, 1, 1, 1, 0]


def test_what_is_ignored_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "shards" / "train-0.tar"
    shard(
        path,
        [
            *sample("a"),
            ("a.depth.png", png(1)),
            ("a.caption.txt", b"x" * 1000),
            ("b.cls", b"cat"),
            ("c.png", png()),
            ("d.png", png()),
            ("d.json", b'{"width": 16}'),
            ("._a.png", b"resource fork"),
            ("README", b"x"),
        ],
    )
    with tarfile.open(path, "a") as archive:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("folder.png")
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
    shard(path.with_name("more.tar"), sample("a"))
    stream = open_stream(str(path.parent), **ALL)
    assert [image.name for image in stream.tasks[0].train.images] == ["train-0.tar/a.png"]
    assert stream.notes == (
        "ignored: 1 files whose names tell no split (more.tar, ...)",
        "ignored: 1 further images of samples",
        "ignored: 1 hidden members",
        "ignored: 3 members that are not files",
        "ignored: 2 samples without a class",
        "ignored: 1 samples without an image",
    )


def test_the_class_is_told_by_cls_then_json_then_txt(tmp_path: Path) -> None:
    members = [("a.png", png()), ("a.txt", b"a long caption\n" * 99), ("a.json", b'{"label": "dog"}')]
    assert open_stream(str(shard(tmp_path / "a.tar", members))).tasks[0].train.classes == ("dog",)
    members.append(("a.CLS", b"cat"))
    assert open_stream(str(shard(tmp_path / "a.tar", members))).tasks[0].train.classes == ("cat",)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x"), ("a.cls", b"5")], r"a\.tar/a has the class number 5, but .* lists 2 classes"),
        ([("a.png", b"x"), ("a.cls", b"-1")], "has the class number -1"),
        ([("a.png", b"x"), ("a.cls", b"\xff")], "tells no class"),
        ([("a.png", b"x"), ("a.cls", b"")], "tells no class"),
        ([("a.png", b"x"), ("a.txt", b"two\nlines")], "tells no class .*one line"),
        ([("a.png", b"x"), ("a.txt", b"x" * 201)], "tells no class"),
        ([("a.png", b"x"), ("a.json", b"{")], "tells no class"),
        ([("a.png", b"x"), ("a.json", b"[" * 100_000)], "nested too deeply"),
        ([("a.png", b"x"), ("a.json", b'{"label": ["cat", "dog"]}')], "tells no class"),
        ([("a.png", b"x"), ("a.json", b'{"label": true}')], "tells no class"),
        ([("a.png", b"x"), ("a.cls", b"x" * (2**20 + 1))], "larger than 1,048,576 bytes"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], "The sample 'a' of .* has 2 images"),
        ([("a.png", b"x"), ("a.png", b"x"), ("a.cls", b"1")], r"has two members 'a\.png'"),
        ([("a.png", b"x"), ("a.cls", b"a\x1bb")], "holds control characters"),
        ([("train/cat/a.png", b"x"), ("train/cat/b.png", b"x")], "if it is a packed folder, unpack it"),
        ([], "has no image with a class"),
    ],
)
def test_samples_that_do_not_tell_one_class(tmp_path: Path, members: Members, message: str) -> None:
    shard(tmp_path / "a.tar", members)
    (tmp_path / "classes.txt").write_text("cat\ndog")
    with pytest.raises(DataError, match=message):
        open_stream(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["/etc/passwd.png", "../../up.png", "a/../../b.png", "x" * 300 + ".png", "\udcff.png", "a\x1b[2Jb.png"]
)
def test_names_are_only_names(tmp_path: Path, name: str) -> None:
    """Nothing is read or written where the name of a member points to."""
    path = shard(tmp_path / "in" / "a.tar", [(name, png()), (name[:-3] + "cls", b"cat")])
    stream = open_stream(str(path))
    image = stream.tasks[0].train.images[0]
    assert image.read().shape == (16, 16, 3)
    assert image.name.encode() and image.where.encode()
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


@pytest.mark.parametrize("cut", [1, 100, 512, 700, 1024, 1500, 2048, 2600, 3000])
def test_an_archive_that_ends_early(tmp_path: Path, cut: int) -> None:
    path = shard(tmp_path / "a.tar", sample("a"), tarfile.USTAR_FORMAT)
    with tarfile.open(path) as archive:
        end = archive.getmembers()[-1].offset_data + 512  # after that come only zeros
    path.write_bytes(path.read_bytes()[:cut])
    assert cut < end + 512  # of the end mark at least one block is there otherwise
    with pytest.raises(
        DataError, match=r"cannot be read as an uncompressed tar archive .*; decompress or copy it again"
    ):
        open_stream(str(path))


def header(**changes: Any) -> bytes:
    """A header of an image whose size is written as a number of any sign."""
    info = tarfile.TarInfo("b.png")
    for name, value in changes.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "second",
    [
        header(size=2**60),
        header(size=-1024),
        header(size=-(2**40)),
        header(size=2**40, type=tarfile.XHDTYPE),
        header(size=-1, type=tarfile.XHDTYPE),
        header(size=2**21, type=tarfile.GNUTYPE_LONGNAME) + bytes(2**21),
        header(size=2**40, type=tarfile.GNUTYPE_LONGLINK),
        header(size=10, type=tarfile.XHDTYPE) + b"x".ljust(512, b"\0"),
        header(size=0, type=tarfile.GNUTYPE_LONGNAME) * 5000,
        b"\1" * 512,
        header()[:-1] + b"x",
    ],
    ids=[
        "huge",
        "back",
        "far back",
        "huge pax",
        "negative pax",
        "long name",
        "huge link",
        "odd pax",
        "nested",
        "no header",
        "checksum",
    ],
)
def test_a_damaged_second_member(tmp_path: Path, second: bytes) -> None:
    path = shard(tmp_path / "a.tar", sample("a"), tarfile.USTAR_FORMAT)
    with tarfile.open(path) as archive:
        end = archive.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[:end] + second + bytes(1024))
    with pytest.raises(DataError, match=r"cannot be read as an uncompressed tar archive"):
        open_stream(str(path))


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08 gzip", b"no archive" * 100, bytes(10_240)])
def test_what_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as an uncompressed tar|has no image with a class"):
        open_stream(str(tmp_path / "a.tar"))


def test_a_member_that_is_not_an_image_is_left_out(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar", [*sample("a", seed=1), *sample("b", seed=2), ("c.png", b"no image"), ("c.cls", b"cat")]
    )
    health = prepare(open_stream(str(path), **ALL), Preprocessing(32), tmp_path / "cache").health.tasks[0]
    assert (health.kept["train"], health.counts) == (2, {"unreadable": 1})
    assert health.examples["unreadable"] == [f"{path}/c.png"]


def test_thousands_of_members_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = png()
    members = [part for i in range(3000) for part in ((f"{i}.png", picture), (f"{i}.cls", b"%d" % (i % 7)))]
    path = shard(tmp_path / "a.tar", members, tarfile.USTAR_FORMAT)
    task = open_stream(str(path)).tasks[0]
    assert len(task.train) + len(task.validation) + len(task.test) == 3000
    monkeypatch.setattr(tar_shards, "MAX_IMAGES", 2999)
    with pytest.raises(DataError, match="more than 2,999 images"):
        open_stream(str(path))
    monkeypatch.setattr(tar_shards, "MAX_MEMBERS", 5999)
    with pytest.raises(DataError, match="more than 5,999 members"):
        open_stream(str(path))


@pytest.mark.parametrize("beside", ["cat/", "train/cat/"])
def test_an_archive_beside_class_folders_is_not_looked_at(root: Path, make_images: Any, beside: str) -> None:
    make_images(beside, 2)
    shard((root / beside).parent / "backup.tar", sample("a"))
    assert open_stream(str(root)).layout in ("class folders", "split folders")
