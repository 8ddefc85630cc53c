"""COCO and YOLO folders: refused as they are, and learned box by box."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duallora_edge.errors import DataError
from duallora_edge.learner.data import boxes, open_stream, prepare
from duallora_edge.learner.data.images import ImageBox
from duallora_edge.runtime.preprocess import Preprocessing

COLOURS = {"cat": (200, 30, 30), "dog": (30, 30, 200)}
# Class, left, top, width and height in an image of 100 x 80 pixels.
BOXES = [("cat", 10, 10, 30, 20), ("dog", 60, 40, 50, 50), ("cat", 5, 60, 4, 12)]  # cut at the edge; too small


def write_image(path: Path, seed: int) -> None:
    """An image of noise with a rectangle of one colour in each box."""
    pixels = np.random.default_rng(seed).integers(0, 40, (80, 100, 3), dtype=np.uint8)
    for name, left, top, width, height in BOXES:
        pixels[top : top + height, left : left + width] += np.array(COLOURS[name], np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def coco(file: Path, names: list[str], **more: Any) -> None:
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    ids = {entry["name"]: entry["id"] for entry in categories}
    annotations = [
        {"image_id": number, "category_id": ids[str(name)], "bbox": list(box)}
        for number in range(len(names))
        for name, *box in BOXES
    ]
    images = [{"id": number, "file_name": name, "width": 100, "height": 80} for number, name in enumerate(names)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations, **more}))


def yolo(labels: Path, names: list[str]) -> None:
    labels.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{('cat', 'dog').index(name)} {(left + width / 2) / 100} {(top + height / 2) / 80} {width / 100} {height / 80}"
        for name, left, top, width, height in BOXES
    ]
    for name in names:
        (labels / name).with_suffix(".txt").write_text("\n".join(lines) + "\n")


def coco_folder(root: Path, annotations: str, images: str, count: int = 6) -> None:
    names = [f"{number:03d}.png" for number in range(count)]
    for number, name in enumerate(names):
        write_image(root / images / name, number + count * len(images))
    coco(root / annotations, names)


def yolo_folder(root: Path, labels: str, images: str, count: int = 6) -> None:
    names = [f"{number:03d}.png" for number in range(count)]
    for number, name in enumerate(names):
        write_image(root / images / name, number + count * len(images))
    yolo(root / labels, names)
    (root / "data.yaml").write_text("names: {0: cat, 1: dog}\nnc: 2\n")


Layout = Callable[[Path], None]
ONE: dict[str, Layout] = {
    "COCO beside": lambda root: coco_folder(root, "labels.json", "data"),
    "COCO of CVAT": lambda root: coco_folder(root, "annotations/instances_default.json", "images"),
    "YOLO": lambda root: yolo_folder(root, "labels", "images"),
}


def coco_2017(root: Path) -> None:
    coco_folder(root, "annotations/instances_train2017.json", "train2017")
    coco_folder(root, "annotations/instances_val2017.json", "val2017", 2)
    coco(root / "annotations/person_keypoints_train2017.json", ["000.png"])
    (root / "annotations/captions_train2017.json").write_text('{"images": [], "annotations": [{"caption": "a cat"}]}')


def coco_of_roboflow(root: Path) -> None:
    for split, count in (("train", 6), ("valid", 2), ("test", 3)):
        coco_folder(root, f"{split}/_annotations.coco.json", split, count)


def yolo_of_ultralytics(root: Path) -> None:
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        yolo_folder(root, f"labels/{split}", f"images/{split}", count)


def yolo_of_roboflow(root: Path) -> None:
    for split, count in (("train", 6), ("valid", 2), ("test", 3)):
        yolo_folder(root, f"{split}/labels", f"{split}/images", count)


SPLIT = {
    "COCO 2017": (coco_2017, 0),
    "COCO of Roboflow": (coco_of_roboflow, 3),
    "YOLO of Ultralytics": (yolo_of_ultralytics, 3),
    "YOLO of Roboflow": (yolo_of_roboflow, 3),
}


@pytest.mark.parametrize("layout", [*ONE.values(), *(layout for layout, _ in SPLIT.values())], ids=[*ONE, *SPLIT])
def test_a_detection_set_is_refused_with_the_way_to_learn_it(root: Path, layout: Layout) -> None:
    layout(root)
    with pytest.raises(DataError, match=r"is a (COCO|YOLO) detection set .*; give --crop-boxes to learn each box"):
        open_stream(str(root))


@pytest.mark.parametrize("layout", ONE.values(), ids=ONE)
def test_each_box_is_an_image_of_its_class(root: Path, layout: Layout, tmp_path: Path) -> None:
    layout(root)
    stream = open_stream(str(root), crop_boxes=True, validation_fraction=0.0)
    (task,) = stream.tasks
    assert Counter(task.train.labels) == {"cat": 5, "dog": 5} and Counter(task.test.labels) == {"cat": 1, "dog": 1}
    assert stream.notes == ("ignored: 6 boxes with a side under 8 px",)
    for image, label in zip(task.train.images, task.train.labels, strict=True):
        pixels = image.read()
        assert pixels.shape == ((20, 30, 3) if label == "cat" else (40, 40, 3))
        assert np.abs(pixels.mean(axis=(0, 1)) - np.array(COLOURS[label]) - 20).max() < 3
    prepared = prepare(stream, Preprocessing(32, "crop", "bicubic"), tmp_path / "cache")
    assert len(prepared.tasks[0].train) == 10


@pytest.mark.parametrize(("layout", "test"), SPLIT.values(), ids=SPLIT)
def test_splits_of_a_detection_set(root: Path, layout: Layout, test: int) -> None:
    layout(root)
    (task,) = open_stream(str(root), crop_boxes=True).tasks
    assert (len(task.train), len(task.validation), len(task.test)) == (12, 4, 2 * test)


def test_boxes_of_one_image_stay_together(root: Path) -> None:
    coco_folder(root, "labels.json", "data")
    value = json.loads((root / "labels.json").read_text())
    value["annotations"] = [entry | {"category_id": 3} for entry in value["annotations"]]
    (root / "labels.json").write_text(json.dumps(value))
    (task,) = open_stream(str(root), crop_boxes=True).tasks
    train, test = ({image.path for image in s.images if isinstance(image, ImageBox)} for s in (task.train, task.test))
    assert train and test and not train & test


def test_an_image_turned_upright_since_it_was_annotated(root: Path) -> None:
    coco_folder(root, "labels.json", "data")
    with Image.open(root / "data/000.png") as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.convert("RGB").save(root / "data/000.jpg", exif=exif)
    text = (root / "labels.json").read_text()
    (root / "labels.json").write_text(text.replace("000.png", "000.jpg"))
    assert "ignored: 3 boxes drawn on an image of another size" in open_stream(str(root), crop_boxes=True).notes


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"bbox": [1, 2, "x", 4]}, "1 annotations without a box"),
        ({"bbox": [1, 2, True, 4]}, "1 annotations without a box"),
        ({"bbox": None}, "1 annotations without a box"),
        ({"bbox": [1e300, 2, 30, 40]}, "1 annotations without a box"),
        ({"bbox": [500, 500, 30, 30]}, "7 boxes with a side under 8 px"),
        ({"bbox": [50, 50, -30, 30]}, "7 boxes with a side under 8 px"),
        ({"iscrowd": 1}, "1 boxes around crowds"),
        ({"category_id": 99}, "1 boxes of unnamed classes"),
        ({"image_id": "other"}, "1 boxes of images that are missing or unreadable"),
    ],
)
def test_coco_boxes_that_cannot_be_used(root: Path, change: dict[str, Any], note: str) -> None:
    coco_folder(root, "labels.json", "data")
    value = json.loads((root / "labels.json").read_text())
    value["annotations"][0] |= change
    (root / "labels.json").write_text(json.dumps(value))
    stream = open_stream(str(root), crop_boxes=True)
    assert f"ignored: {note}" in stream.notes
    assert len(stream.tasks[0].train) + len(stream.tasks[0].validation) + len(stream.tasks[0].test) == 11


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/secret.png", "a\0.png", "gone.png", "x" * 300 + ".png", "000.txt"]
)
def test_images_outside_the_folder_are_not_read(root: Path, name: str) -> None:
    coco_folder(root, "labels.json", "data")
    write_image(root / "secret.png", 9)
    value = json.loads((root / "labels.json").read_text())
    value["images"][0]["file_name"] = name
    (root / "labels.json").write_text(json.dumps(value))
    notes = open_stream(str(root), crop_boxes=True).notes
    assert "ignored: 3 boxes of images that are missing or unreadable" in notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": None}, "cannot be read as COCO"),
        ({"categories": [{"id": [], "name": "x"}]}, "cannot be read as COCO"),
        ({"annotations": {"bbox": 1}}, "cannot be read as COCO"),
        ({"images": [{"id": 0, "file_name": "000.png"}]}, "the key 'width' is missing"),
        ({"images": [{"id": 0, "file_name": "000.png", "width": 0, "height": 1}]}, "has no width and height"),
        ({"images": [{"id": 0, "file_name": "gone.png", "width": 1, "height": 1}]}, "are in none of"),
        ({"annotations": [{"bbox": [1, 1, 1, 1], "image_id": 0, "category_id": 3}]}, r"no usable box .*under 8 px"),
    ],
)
def test_a_coco_file_that_cannot_be_used(root: Path, change: dict[str, Any], message: str) -> None:
    coco_folder(root, "annotations/all.json", "images")
    coco(root / "annotations/all.json", ["000.png"], **change, note='"bbox"')
    text = (root / "annotations/all.json").read_text()
    (root / "annotations/all.json").write_text(text.replace('\\"bbox\\"', "x").replace('"note"', '"bbox"'))
    with pytest.raises(DataError, match=message):
        open_stream(str(root), crop_boxes=True)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("1 0.5 0.5 0.2 0.25", (20, 20)),
        ("1 0.5 0.5 0.2 0.25 0.93", (20, 20)),  # with a confidence
        ("1 0.1 0.1 0.5 0.1 0.5 0.6", (40, 40)),  # an outline
        ("2 0.5 0.5 0.2 0.25", None),
        ("-1 0.5 0.5 0.2 0.25", None),
        ("0.5 0.5 0.5 0.2 0.25", None),
        ("1 0.5 0.5 0.2", None),
        ("1 nan 0.5 0.2 0.2", None),
        ("cat 0.5 0.5 0.2 0.2", None),
    ],
)
def test_lines_of_yolo_labels(root: Path, line: str, size: tuple[int, int] | None) -> None:
    yolo_folder(root, "labels", "images")
    (root / "labels/000.txt").write_text(line + "\n\n")
    stream = open_stream(str(root), crop_boxes=True, test_fraction=0.0, validation_fraction=0.0)
    sizes = {image.name: image.read().shape[1::-1] for image in stream.tasks[0].train.images}
    assert sizes.get("images/000.png#0") == size
    assert ("ignored: 1 lines that are not a box of a named class" in stream.notes) == (size is None)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("data.yaml", "names: [cat]\nnc: 1", ""),
        ("data.yaml", "names: [cat, dog]\nkpt_shape: [2, 2]", ""),
        ("classes.txt", "cat\ndog\n", ""),
        ("data.yaml", "nc: 2", "'names'"),
        ("data.yaml", "names: {1: cat}", "cannot be read"),
        ("data.yaml", "names: 3", "must list the classes"),
        ("data.yaml", "names: *x", "cannot be read"),
        ("other.txt", "", "Nothing names the classes"),
    ],
)
def test_names_of_yolo_classes(root: Path, file: str, content: str, message: str) -> None:
    yolo_folder(root, "labels", "images")
    (root / "data.yaml").unlink()
    (root / file).write_text(content)
    if not message:
        assert open_stream(str(root), crop_boxes=True).tasks[0].train.classes in (("cat", "dog"), ("cat",))
        return
    with pytest.raises(DataError, match=message):
        open_stream(str(root), crop_boxes=True)


def test_classes_without_a_training_box_are_left_out(root: Path) -> None:
    yolo_of_ultralytics(root)
    for file in (root / "labels/train").iterdir():
        file.write_text(file.read_text().splitlines()[0])
    stream = open_stream(str(root), crop_boxes=True)
    assert stream.tasks[0].train.classes == stream.tasks[0].test.classes == ("cat",)
    assert "ignored: 5 boxes of classes without a training box" in stream.notes


def test_limits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco_folder(root, "labels.json", "data")
    monkeypatch.setattr(boxes, "MAX_BOXES", 10)
    with pytest.raises(DataError, match="more than 10 boxes"):
        open_stream(str(root), crop_boxes=True)
    monkeypatch.setattr(boxes, "MAX_JSON_BYTES", 2**20)
    with (root / "labels.json").open("a") as file:
        file.write(" " * 2**20)
    with pytest.raises(DataError, match="larger than"):
        open_stream(str(root), crop_boxes=True)


@pytest.mark.parametrize("settings", [{}, {"task_order": ["data"]}])
def test_nothing_to_crop(root: Path, make_images: Any, settings: dict[str, Any]) -> None:
    make_images("a", 2)
    with pytest.raises(DataError, match="has no boxes"):
        open_stream(str(root), crop_boxes=True, **settings)
    for source in ("torchvision:MNIST", str(root / "list.csv")):
        with pytest.raises(DataError, match="leave out --crop-boxes"):
            open_stream(source, crop_boxes=True)
