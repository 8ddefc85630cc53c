"""Tables of Hugging Face datasets, Arrow or Parquet, with the bytes of one image in each row. Needs pyarrow."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, BinaryIO, cast

from duallora_edge.errors import DataError
from duallora_edge.extras import install_hint
from duallora_edge.files import parse_json, read_json
from duallora_edge.learner.data.class_names import ClassNames
from duallora_edge.learner.data.folders import checked_name, files_by_split, is_file, is_image_name
from duallora_edge.learner.data.images import ImageFile, ImageSet, InnerImage
from duallora_edge.learner.data.manifest import COLUMNS
from duallora_edge.learner.data.split import SPLIT_NAMES, Found, FoundTask

MAX_ROWS = 2_000_000
MAX_GROUP_BYTES = 2**29
_IMAGE_NAMES = ("image", "img")
_ROWS_AT_ONCE = 16
_LABELS_AT_ONCE = 1024
_KEPT_GROUPS = 2  # of Parquet: threads that decode neighbours work on the end of one and the start of the next
_KEPT_FILES = 1000  # of Arrow, which are only mapped
_groups: OrderedDict[tuple[str, str, int], Any] = OrderedDict()
_GROUPS_LOCK = Lock()


@dataclass(frozen=True)
class TableImage(InnerImage):
    """The image in a ``row`` of a ``group``: a row group of a Parquet file; an Arrow file is a single group."""

    column: str
    group: int
    row: int

    def key(self) -> str:
        """Identity for the cache: that of the file, and the place in it."""
        return f"{super().key()} {self.column} {self.group} {self.row}"

    def open(self) -> BinaryIO:
        """The bytes of the image, opened for reading; `DataError` where the file cannot be read or has none."""
        import pyarrow

        with _reading(self.path):
            with _GROUPS_LOCK:
                images = _group(super().key(), self)
            value = images[self.row]
            if not value.is_valid:
                raise DataError(f"{self.where} holds no image; write the file again, with the images in it.")
            return cast(BinaryIO, pyarrow.BufferReader(value.as_buffer()))

    def taken(self) -> tuple[str, datetime] | None:
        """Camera and time, where the file tells both; nothing in Parquet, where a whole group would have to be read."""
        return super().taken() if self.path.suffix == ".arrow" else None


def find_in_tables(source: Path, task_name: str) -> Found | None:
    """List the images of a Parquet file, of those in a folder, or of a folder of ``save_to_disk``. None where none is.

    Of several columns of images or classes, those called ``image`` or ``img``, and as `COLUMNS` says, are taken. Rows
    without a class are ignored. Raises `DataError` when pyarrow is missing, or a file cannot be read or does not tell
    one class per image.
    """
    notes: list[str] = []
    if not source.is_dir():
        files = {"": [source]}
    elif not (files := _saved_files(source, notes)):
        files, notes = files_by_split(source, ".parquet")
    if not files:
        return None
    try:
        import pyarrow  # noqa: F401 (its absence is told at once)
    except ModuleNotFoundError as error:
        raise DataError(f"Arrow and Parquet files need pyarrow: {install_hint('parquet')}.") from error
    root = source if source.is_dir() else source.parent
    listed = ClassNames.beside(root)
    without_class = rows = 0
    sets = {}
    for split, paths in files.items():
        images: list[ImageFile] = []
        labels: list[str] = []
        for path in paths:
            for label, image in _rows(path, root, listed):
                rows += 1
                if rows > MAX_ROWS:
                    raise DataError(f"{source} has more than {MAX_ROWS:,} rows; divide it into several folders.")
                if label is None:
                    without_class += 1
                else:
                    images.append(image)
                    labels.append(label)
        sets[split] = ImageSet(tuple(images), tuple(labels))
    if without_class:
        notes.append(f"ignored: {without_class} rows without a class")
    layout = "Hugging Face dataset (Arrow)" if paths[0].suffix == ".arrow" else "Parquet"
    return Found(layout, (FoundTask.of(task_name, sets),), False, (*notes, *listed.notes()))


def _saved_files(root: Path, notes: list[str]) -> dict[str, list[Path]]:
    """The Arrow files of a folder that ``save_to_disk`` wrote, by split; {} for another folder."""
    found: dict[str, list[Path]] = {}
    try:
        if is_file(root / "state.json") and is_file(root / "dataset_info.json"):
            return {"": _data_files(root)}
        if not is_file(root / "dataset_dict.json"):
            return {}
        for name in read_json(root / "dataset_dict.json")["splits"]:
            if name.lower() in SPLIT_NAMES:
                found.setdefault(SPLIT_NAMES[name.lower()], []).extend(_data_files(root / name))
            else:
                notes.append(f"ignored: the split {name[:40]}")
        if not found:
            raise ValueError("it names no split train, val or test")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{root} cannot be read as a folder of save_to_disk ({str(error)[:200]}); save the dataset again."
        ) from error
    return found


def _data_files(folder: Path) -> list[Path]:
    names = [str(entry["filename"]) for entry in read_json(folder / "state.json")["_data_files"]]
    if not names:
        raise ValueError(f"{folder} has no files")
    for name in names:
        if Path(name).name != name or not is_file(folder / name):
            raise ValueError(f"there is no file {name[:80]!r} in {folder}")
    return [folder / name for name in names]


def _rows(path: Path, root: Path, listed: ClassNames) -> Iterator[tuple[str | None, ImageFile]]:
    """Class and image of each row; None for the class where there is none."""
    with _reading(path):
        schema = _schema(path)
        features = _features(path, schema.metadata or {})
        image, label = _columns(path, schema, features)
        names = features[label]["names"] if label in features and features[label].get("names") else []
        classes = ClassNames(names, str(path)) if names else listed
        has_paths = any(
            not _part(batch.column(0), "bytes")[0].is_valid
            and (paths := _part(batch.column(0), "path")) is not None
            and paths[0].is_valid
            for _, batch in islice(_batches(path, [image], 1), 1)
        )
        number = before = last = 0
        for group, batch in _batches(path, [label, f"{image}.path"], _LABELS_AT_ONCE):
            if group != last:
                last, before = group, number
            values = batch.column(label).to_pylist()
            paths = _part(batch.column(image), "path") if image in batch.schema.names else None
            places = [None] * len(values) if paths is None else paths.to_pylist()
            for value, place in zip(values, places, strict=True):
                name = _class(value, classes, f"Row {number} of {path}")
                if has_paths:
                    yield name, _file(path, root, place)
                else:
                    inner = PurePosixPath((place or "").replace("\\", "/")).name or str(number)
                    yield name, TableImage(path, inner, image, group, number - before)
                number += 1


def _class(value: int | str | None, classes: ClassNames, where: str) -> str | None:
    """The name of a class; Hugging Face writes -1 where there is none."""
    if isinstance(value, int):
        return None if value == -1 else classes.of_number(value, where)
    return checked_name(value) if value else None


def _file(table: Path, root: Path, name: str | None) -> ImageFile:
    """The image beside a table that has only its path."""
    folder, place = (Path(os.path.abspath(path)) for path in (root, root / (name or "")))  # noqa: PTH100 (links stay)
    if not place.is_relative_to(folder) or not is_image_name(place.name) or not is_file(place):
        raise DataError(
            f"{table} holds paths instead of images, and there is no image {(name or '')[-80:]!r} in {root}; save the "
            "data set with save_to_disk, which puts the images in it."
        )
    return ImageFile(place)


def _columns(path: Path, schema: Any, features: dict[str, Any]) -> tuple[str, str]:
    """The columns of image and class. Raises `DataError` when there are none or several to choose from."""
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(part.name == "bytes" and holds_bytes(part.type) for part in kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    def tells_class(name: str, kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        fits = types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)
        return fits and (name.lower() in COLUMNS["label"] or features.get(name, {}).get("_type") == "ClassLabel")

    chosen = []
    for what, wanted, found in (
        ("image", _IMAGE_NAMES, [column.name for column in schema if holds_bytes(column.type)]),
        ("label", COLUMNS["label"], [column.name for column in schema if tells_class(column.name, column.type)]),
    ):
        named = [column for name in wanted for column in found if column.lower() == name]
        if not named and len(found) != 1:
            raise DataError(
                f"{path} has {'several columns' if found else 'no column'} that may be the {what} "
                f"({', '.join(schema.names)[:300]}); call the right one {what!r}."
            )
        chosen.append((named or found)[0])
    return chosen[0], chosen[1]


def _features(path: Path, metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """What Hugging Face notes about the columns: in the file, else beside it."""
    if content := metadata.get(b"huggingface"):
        features = parse_json(content)["info"]["features"]
    elif path.suffix == ".arrow":
        features = read_json(path.parent / "dataset_info.json")["features"]
    else:
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # pyarrow raises many types on damaged files
        kind = "Arrow" if path.suffix == ".arrow" else "Parquet"
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read as {kind} ({reason}); copy or write it again.") from error


def _schema(path: Path) -> Any:
    if path.suffix == ".arrow":
        return _arrow(path).schema
    from pyarrow.parquet import read_schema

    return read_schema(path)


def _arrow(path: Path) -> Any:
    """The table in an Arrow file, mapped into memory."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()


def _batches(path: Path, columns: Sequence[str], rows: int, group: int | None = None) -> Iterator[tuple[int, Any]]:
    """The rows of a file, or of one of its groups, at most so many at once, with the number of their group."""
    if path.suffix == ".arrow":
        table = _arrow(path)
        names = [name for name in table.schema.names if name in columns or f"{name}.path" in columns]
        for batch in table.select(names).to_batches(rows):
            batch.validate(full=True)  # what is mapped has offsets that nobody has checked
            yield 0, batch
        return
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for number in range(file.num_row_groups) if group is None else [group]:
            for batch in file.iter_batches(rows, row_groups=[number], columns=columns, use_threads=False):
                yield number, batch


def _part(column: Any, name: str) -> Any:
    """The bytes or the paths of images, which are either a structure of both, or bytes alone; None without paths."""
    from pyarrow import types

    if types.is_struct(column.type):
        return column.field(name) if column.type.get_field_index(name) >= 0 else None
    return column if name == "bytes" else None


def _group(key: str, image: TableImage) -> Any:
    """The bytes of the images of a group; the last few groups are kept. To be called by one thread at a time."""
    import pyarrow

    is_arrow = image.path.suffix == ".arrow"
    place = (key, image.column, image.group)
    if place not in _groups:
        parts: list[Any] = []
        size = 0
        rows = _LABELS_AT_ONCE if is_arrow else _ROWS_AT_ONCE
        for _, batch in _batches(image.path, [image.column], rows, image.group):
            parts.append(_part(batch.column(0), "bytes"))
            size += parts[-1].nbytes
            if size > MAX_GROUP_BYTES and not is_arrow:
                raise DataError(
                    f"A row group of {image.path} is larger than {MAX_GROUP_BYTES // 2**20} MiB; write it again with "
                    "row_group_size=100."
                )
        _groups[place] = pyarrow.chunked_array(parts)
    _groups.move_to_end(place)
    while len(_groups) > (_KEPT_FILES if is_arrow else _KEPT_GROUPS):
        _groups.popitem(last=False)
    return _groups[place]


def release_groups() -> None:
    """Give back the memory of the groups that are kept."""
    with _GROUPS_LOCK:
        _groups.clear()
