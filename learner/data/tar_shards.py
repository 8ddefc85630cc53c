"""WebDataset: tar archives whose members of one name are a sample. Nothing is unpacked, images are read in place."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from duallora_edge.errors import DataError
from duallora_edge.files import parse_json
from duallora_edge.learner.data.class_names import ClassNames
from duallora_edge.learner.data.folders import checked_name, files_by_split, is_image_name
from duallora_edge.learner.data.images import ImageSet, InnerImage
from duallora_edge.learner.data.manifest import COLUMNS
from duallora_edge.learner.data.split import Found, FoundTask

MAX_MEMBERS = 6_000_000
MAX_IMAGES = 2_000_000
MAX_LABEL_BYTES = 2**20
MAX_HEADER_BYTES = 2**20  # of a long name or another extended header, which tarfile would read at any size
MAX_NAME = 200  # characters of a class name; what is longer describes the image
_LABELS = ("cls", "json", "txt")  # by precedence: .txt is a caption where another file tells the class
_BLOCK = 512


@dataclass(frozen=True)
class ShardImage(InnerImage):
    """A member of a tar archive: ``length`` bytes from ``offset``."""

    offset: int
    length: int

    def key(self) -> str:
        """Identity for the cache: that of the archive, and the place in it."""
        return f"{super().key()} {self.offset} {self.length}"

    def open(self) -> BinaryIO:
        """The bytes of the member, opened for reading."""
        return io.BufferedReader(_Window(self.path, self.offset, self.length))


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset, self._length, self._place = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(0, self._length - self._place))
        self._file.seek(self._offset + self._place)
        count = self._file.readinto(memoryview(buffer)[:size])
        self._place += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass
class _Sample:
    """What the members of one name are: images, and the places of texts that may tell the class, by extension."""

    images: dict[str, ShardImage] = field(default_factory=dict)
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)


def find_in_shards(source: Path, task_name: str) -> Found | None:
    """List the images of a tar archive, or of those in a folder. None where a folder holds none.

    The class of an image is told by the member ``.cls``, ``.json`` or ``.txt`` of the same name. Members that are not
    files are ignored, as are samples without an image or a class. Raises `DataError` when an archive cannot be read or
    tells no classes, or a sample has two images or an unknown class number.
    """
    files, notes = files_by_split(source, ".tar") if source.is_dir() else ({"": [source]}, [])
    if not files:
        return None
    names = ClassNames.beside(source if source.is_dir() else source.parent)
    ignored: Counter[str] = Counter()
    sets = {}
    for split, shards in files.items():
        images: list[ShardImage] = []
        labels: list[str] = []
        for shard in shards:
            for label, image in _labelled(shard, names, ignored):
                images.append(image)
                labels.append(label)
            if len(images) > MAX_IMAGES:
                raise DataError(f"{source} has more than {MAX_IMAGES:,} images of a split; divide it into several.")
        sets[split] = ImageSet(tuple(images), tuple(labels))
    if not any(map(len, sets.values())):
        raise DataError(
            f"{source} has no image with a class (.cls, .json or .txt) as WebDataset has them; if it is a packed "
            "folder, unpack it and name the folder."
        )
    notes += [f"ignored: {count} {what}" for what, count in sorted(ignored.items()) if count]
    return Found("WebDataset shards", (FoundTask.of(task_name, sets),), False, (*notes, *names.notes()))


def _labelled(shard: Path, names: ClassNames, ignored: Counter[str]) -> Iterator[tuple[str, ShardImage]]:
    """The images of an archive that have a class."""
    with _Headers(shard.open("rb", buffering=0)) as file:
        for key, sample in _samples(shard, file, ignored).items():
            if not sample.images:
                ignored["samples without an image"] += 1
            elif (label := _label(file, f"{shard}/{key}", sample.texts, names)) is None:
                ignored["samples without a class"] += 1
            else:
                yield label, _image(shard, key, sample.images, ignored)


def _samples(shard: Path, file: _Headers, ignored: Counter[str]) -> dict[str, _Sample]:
    """The samples of an archive by their keys: folder, and name up to its first dot."""
    samples: dict[str, _Sample] = defaultdict(_Sample)
    for number, member in enumerate(_members(shard, file)):
        if number >= MAX_MEMBERS:
            raise DataError(f"{shard} has more than {MAX_MEMBERS:,} members; divide it into several archives.")
        base = member.name.rpartition("/")[2]
        stem, dot, extension = base.partition(".")
        if not member.isreg() or member.issparse():
            ignored["members that are not files"] += not member.isdir()
        elif not stem:
            ignored["hidden members"] += 1
        elif is_image_name(base) or extension.lower() in _LABELS:
            sample = samples[member.name.removesuffix(f"{dot}{extension}")]
            extension = extension.lower()
            if extension in sample.images or extension in sample.texts:
                raise DataError(f"{shard} has two members {member.name[:80]!r}; give each sample its own name.")
            if is_image_name(base):
                sample.images[extension] = ShardImage(shard, member.name, member.offset_data, member.size)
            else:
                sample.texts[extension] = (member.offset_data, member.size)
    return samples


class _Headers(io.BufferedReader):
    """A file from which tarfile reads headers; none of them is large."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError("a header is too large")
        return super().read(size)


def _members(shard: Path, file: _Headers) -> Iterator[tarfile.TarInfo]:
    """The members of an archive. Raises `DataError` where it is damaged or ends early."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                if member.size < 0:  # tarfile would go back, and on from there forever
                    raise ValueError("a member has a negative size")
                yield member
                archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
            file.seek(archive.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):  # tarfile takes a damaged header for the end
                raise ValueError("it is damaged or ends early")
    except DataError:
        raise
    except Exception as error:  # tarfile raises many types on damaged headers
        raise DataError(
            f"{shard} cannot be read as an uncompressed tar archive ({str(error)[:200]}); decompress or copy it again."
        ) from error


def _image(shard: Path, key: str, images: dict[str, ShardImage], ignored: Counter[str]) -> ShardImage:
    """The image of a sample: that with the plain extension where there are others, such as depth.png beside jpg."""
    plain = [image for extension, image in images.items() if "." not in extension] or list(images.values())
    if len(plain) > 1:
        raise DataError(f"The sample {key[:80]!r} of {shard} has {len(plain)} images; leave one of them.")
    ignored["further images of samples"] += len(images) - 1
    return plain[0]


def _label(file: _Headers, where: str, texts: dict[str, tuple[int, int]], names: ClassNames) -> str | None:
    """The class that the texts of a sample tell; None where there are none."""
    try:
        if place := texts.get("cls"):
            text = _content(file, *place).decode().strip()
            return names.of_number(int(text), where) if re.fullmatch(r"-?\d{1,9}", text) else _name(text)
        if (place := texts.get("json")) and isinstance(value := parse_json(_content(file, *place)), dict):
            for label in (value[key] for key in COLUMNS["label"] if key in value):
                if isinstance(label, int) and not isinstance(label, bool):
                    return names.of_number(label, where)
                return _name(label)
        if place := texts.get("txt"):
            return _name(_content(file, *place).decode())
    except ValueError as error:
        raise DataError(f"{where[-160:]} tells no class ({str(error)[:200]}); correct it.") from error
    return None


def _content(file: _Headers, offset: int, length: int) -> bytes:
    if length > MAX_LABEL_BYTES:
        raise ValueError(f"it is larger than {MAX_LABEL_BYTES:,} bytes")
    return os.pread(file.fileno(), length, offset)


def _name(label: object) -> str:
    text = label.strip() if isinstance(label, str) else ""
    if not 0 < len(text) <= MAX_NAME or "\n" in text:
        raise ValueError(f"a class is a number or one line of 1 to {MAX_NAME} characters, not {str(label)[:40]!r}")
    return checked_name(text)
