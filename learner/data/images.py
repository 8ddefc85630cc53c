"""Images by reference, and the tasks and streams made of them. Nothing here decodes until ``read`` is called."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from duallora_edge.errors import DataError
from duallora_edge.runtime.preprocess import Pixels, open_image, read_image

_EXIF_ORIENTATION, _EXIF_CAMERA = 0x0112, 0x0110
_EXIF_DETAILS, _EXIF_TAKEN = 0x8769, 0x9003
_DATASET_LOCK = Lock()  # not every dataset may be indexed from two threads (FakeData sets the global seed)


@dataclass(frozen=True)
class ImageFile:
    """An image file."""

    path: Path

    @property
    def name(self) -> str:
        """Folder and file name: what splits are drawn by, the same on any machine."""
        return _printable(Path(*self.path.parts[-2:]))

    @property
    def where(self) -> str:
        """The path, for messages and reports."""
        return _printable(self.path)

    def key(self) -> str:
        """Identity for the cache: path, size and modification time. A missing file has one, too."""
        path = os.fsencode(os.path.abspath(self.path)).hex()  # noqa: PTH100 (the link, not what it points to)
        try:
            facts = self.path.stat()
        except OSError:
            return f"{path} missing"
        return f"{path} {facts.st_size} {facts.st_mtime_ns}"

    def open(self) -> BinaryIO:
        """The bytes of the image, opened for reading."""
        return self.path.open("rb")

    def read(self) -> Pixels:
        """Decode to ``uint8 [H, W, 3]`` RGB, upright; `DataError` when that is impossible."""
        return read_image(self.path)

    def size(self) -> tuple[int, int] | None:
        """Width and height when upright, from the header alone; None when that is impossible."""
        try:
            if not self.path.is_file():
                return None
            with self.open() as file, open_image(file) as image:
                exif = image.getexif() if "exif" in image.info else {}
                turned = exif.get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
                return (image.height, image.width) if turned else image.size
        except Exception:  # Pillow raises many types on damaged files
            return None

    def traits(self) -> set[str]:
        """What has to be converted, from the header alone: any of ``grey``, ``alpha``, ``rotated``."""
        with self.open() as file, open_image(file) as image:
            # Pillow would decode a PNG in search of EXIF, hence the first condition.
            turned = "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) != 1
            return _mode_traits(image) | ({"rotated"} if turned else set())

    def taken(self) -> tuple[str, datetime] | None:
        """Camera and time, where the file tells both."""
        try:
            with self.open() as file, open_image(file) as image, warnings.catch_warnings():
                if "exif" not in image.info:
                    return None
                warnings.simplefilter("ignore")  # Pillow warns of each broken entry
                exif = image.getexif()
                time = datetime.strptime(str(exif.get_ifd(_EXIF_DETAILS)[_EXIF_TAKEN]), "%Y:%m:%d %H:%M:%S")
                return str(exif[_EXIF_CAMERA]), time
        except (DataError, OSError, KeyError, ValueError, SyntaxError):  # what Pillow raises for broken EXIF
            return None


@dataclass(frozen=True)
class ImageBox(ImageFile):
    """A box of an image file; ``edges`` (left, top, right, bottom) are shares of its width and height."""

    edges: tuple[float, ...]
    number: int

    @property
    def name(self) -> str:
        """As of the file, and the number of the box at its end: boxes of one image are one scene."""
        return f"{super().name}#{self.number}"

    @property
    def where(self) -> str:
        """The path and the number of the box, for messages and reports."""
        return f"{super().where}#{self.number}"

    def key(self) -> str:
        """Identity for the cache: that of the file, and the edges."""
        return f"{super().key()} {self.edges}"

    def read(self) -> Pixels:
        """Decode the image and cut out the box; `DataError` when that is impossible."""
        frame = super().read()
        (left, top), (right, bottom) = self.corners(frame.shape[1], frame.shape[0])
        return frame[top:bottom, left:right]

    def corners(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The corners (left, top) and (right, bottom) in an image of so many pixels."""
        left, top, right, bottom = self.edges
        return (round(left * width), round(top * height)), (round(right * width), round(bottom * height))


@dataclass(frozen=True)
class InnerImage(ImageFile):
    """An image inside a larger file, in which it is called ``inner``. How it is opened is up to each kind of file."""

    inner: str

    @property
    def name(self) -> str:
        """Name of the file, and name in it: what splits are drawn by, the same on any machine."""
        return _printable(Path(f"{self.path.name}/{self.inner}"))

    @property
    def where(self) -> str:
        """The path and the name in the file, for messages and reports."""
        return f"{super().where}/{_printable(Path(self.inner))}"

    def read(self) -> Pixels:
        """Decode to ``uint8 [H, W, 3]`` RGB, upright; `DataError` when that is impossible."""
        try:
            with self.open() as file:
                return read_image(file)
        except OSError as error:
            raise DataError(f"{self.where} cannot be read ({error.strerror or error}); copy the file again.") from error


@dataclass(frozen=True)
class DatasetImage:
    """One image of a torchvision dataset whose items are ``(PIL image, label)``.

    ``title`` names dataset and split, ``place`` tells apart copies of it with other content.
    """

    dataset: Any
    title: str
    place: str
    index: int

    @property
    def name(self) -> str:
        """Title and index: what splits are drawn by, the same on any machine."""
        return f"{self.title}[{self.index}]"

    @property
    def where(self) -> str:
        """The name, for messages and reports."""
        return self.name

    def key(self) -> str:
        """Identity for the cache."""
        return f"{self.name} {self.place}"

    def read(self) -> Pixels:
        """Decode to ``uint8 [H, W, 3]`` RGB; `DataError` when that is impossible."""
        try:
            with _DATASET_LOCK:
                image = self.dataset[self.index][0]
            return np.asarray(image.convert("RGB"))
        except Exception as error:  # the dataset's own code: any type
            raise DataError(f"{self.name} cannot be read ({error}); fetch the dataset again.") from error

    def taken(self) -> None:
        """Nothing: a published data set does not tell."""

    def traits(self) -> set[str]:
        """Nothing: how a published dataset stores its images is no finding."""
        return set()


ImageRef = ImageFile | DatasetImage


def _printable(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def _mode_traits(image: Image.Image) -> set[str]:
    traits = set()
    if image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16"):
        traits.add("grey")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        traits.add("alpha")
    return traits


@dataclass(frozen=True)
class ImageSet:
    """Images and, in the same order, the names of their classes."""

    images: tuple[ImageRef, ...] = ()
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names that occur, sorted."""
        return tuple(sorted(set(self.labels)))

    def subset(self, indices: Iterable[int]) -> ImageSet:
        """The images at ``indices``, in that order."""
        chosen = list(indices)
        return ImageSet(tuple(self.images[i] for i in chosen), tuple(self.labels[i] for i in chosen))


@dataclass(frozen=True)
class TaskData:
    """The images of one task. ``validation`` is held back from training; ``test`` chooses nothing and may be empty.

    ``test_given`` and ``validation_given`` tell whether the source says which images these are.
    """

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    notes: tuple[str, ...] = ()
    test_given: bool = True
    validation_given: bool = True


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned. ``layout`` says how the source was understood."""

    layout: str
    source: str
    tasks: tuple[TaskData, ...]
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """A few lines of text: the layout found, and the classes and images of each task."""
        lines = [f"{self.source}: {self.layout}, {len(self.tasks)} task{'s' if len(self.tasks) != 1 else ''}"]
        for task in self.tasks:
            counts = f"{len(task.train)} train, {len(task.validation)} validation, {len(task.test)} test images"
            classes = len(task.train.classes)
            lines.append(f"  {task.name}: {classes} class{'es' if classes != 1 else ''}, {counts}")
            lines += [f"    {note}" for note in task.notes]
        return "\n".join(lines + [f"  {note}" for note in self.notes])
