"""Lists of images: CSV and JSON with the columns ``path,label[,split][,task]``, and the metadata of folders."""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from duallora_edge.errors import DataError
from duallora_edge.files import parse_json
from duallora_edge.learner.data.folders import check_task_order, checked_name, is_file, is_image_name
from duallora_edge.learner.data.images import ImageFile, ImageSet
from duallora_edge.learner.data.split import SPLIT_NAMES, Found, FoundTask
from duallora_edge.text import UNSAFE

MAX_BYTES = 256 * 2**20
MAX_ROWS = 2_000_000
_SHOWN = 10
# What each column may be called.
COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    "label": ("label", "class", "class_name", "category", "target", "choice"),
    "split": ("split",),
    "task": ("task",),
}
_BOX_COLUMNS = {"xmin", "x_min", "roi.x1", "bbox", "objects"}
_SPLITS = ("train", "val", "test")
MANIFESTS = (".csv", ".jsonl", ".json")
METADATA = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class _Row:
    path: Path
    label: str
    split: str
    task: str


@dataclass(frozen=True)
class _Part:
    """A list of images, and the split of all of them where its place tells it."""

    file: Path
    split: str = ""


def find_in_manifest(file: Path, task_order: Sequence[str] | None, task_name: str) -> Found:
    """List the images of a CSV file whose first line names its columns, or of JSON objects; paths start at the file.

    ``split`` is train, val or test. Tasks come in the order of their first row, or as ``task_order`` says.
    Raises `DataError` for a file that is too large or neither, and for bad rows: all of them in one message.
    """
    layouts = {".csv": "CSV manifest", ".jsonl": "list of JSON lines", ".json": "JSON list"}
    return _find(layouts[file.suffix.lower()], [_Part(file)], task_order, task_name)


def find_in_metadata(root: Path, task_order: Sequence[str] | None, task_name: str) -> Found | None:
    """List the images of a folder whose metadata.csv or metadata.jsonl tells their labels, as Hugging Face lays it out.

    The file lies in the folder, or one in each of its split folders. None where there is none, or none with labels.
    """
    parts = [_Part(root / name) for name in METADATA if is_file(root / name)]
    if not parts:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.name.lower() in SPLIT_NAMES and entry.is_dir())
        parts = [
            _Part(root / folder / name, SPLIT_NAMES[folder.lower()])
            for folder in names
            for name in METADATA
            if is_file(root / folder / name)
        ]
    if not parts or not all(_tells_labels(part.file) for part in parts):
        return None
    return _find("folder with metadata", parts, task_order, task_name)


def _tells_labels(file: Path) -> bool:
    with _Lines(file) as lines:
        names = {name.strip().lower() for name in lines.names}
        return not names.isdisjoint(COLUMNS["path"]) and not names.isdisjoint([*COLUMNS["label"], *_BOX_COLUMNS])


def _find(layout: str, parts: Sequence[_Part], task_order: Sequence[str] | None, task_name: str) -> Found:
    rows: list[_Row] = []
    ignored: dict[str, None] = {}
    known: set[str] = set()
    for part in parts:
        with _Lines(part.file) as lines:
            columns = _header(part.file, lines.names)
            found = _checked_rows(part.file, columns, lines)
        rows += [replace(row, split=part.split) for row in found] if part.split else found
        ignored |= dict.fromkeys(name for name, column in zip(lines.names, columns, strict=True) if not column)
        known |= {*columns, *(["split"] if part.split else [])}
    file = parts[0].file
    if not rows:
        raise DataError(f"{file} lists no images; add rows under the header.")
    names = list(dict.fromkeys(row.task or task_name for row in rows))
    if task_order is not None:
        if "task" not in known:
            raise DataError(f"task_order needs a 'task' column, which {file} does not have; add one.")
        check_task_order(task_order, names)
    tasks: dict[str, list[_Row]] = {name: [] for name in task_order or names}
    for row in rows:
        if (name := row.task or task_name) in tasks:
            tasks[name].append(row)
    left_out = len(names) - len(tasks)
    notes = [f"ignored: {left_out} tasks not named by task_order"] if left_out else []
    if ignored:
        shown = ", ".join(name[:40] for name in list(ignored)[:_SHOWN])
        notes.append(
            f"ignored: column{'s' if len(ignored) > 1 else ''} {shown}{', ...' if len(ignored) > _SHOWN else ''}"
        )
    found_tasks = tuple(_task(name, members, "split" in known) for name, members in tasks.items())
    return Found(layout, found_tasks, "task" in known, tuple(notes))


class _Lines:
    """The names of the columns of a CSV, JSON or JSON lines file, and an iterator over its rows.

    Raises `DataError` for a file that is too large or neither.
    """

    def __init__(self, file: Path) -> None:
        if file.stat().st_size > MAX_BYTES:
            raise DataError(f"{file} is larger than {MAX_BYTES // 2**20} MiB; divide it into several files.")
        self.file, self.names = file, list[str]()
        self._suffix = file.suffix.lower()

    def __enter__(self) -> _Lines:
        self._stream = self.file.open(encoding="utf-8-sig", newline="")
        self._rows = csv.reader(self._stream, strict=True) if self._suffix == ".csv" else self._json_rows()
        self.names = self._next() or []
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[list[str]]:
        while (row := self._next()) is not None:
            yield row

    def _next(self) -> list[str] | None:
        try:
            return next(self._rows, None)
        except (csv.Error, ValueError) as error:
            kind = {".csv": "a CSV file", ".jsonl": "a JSON lines file", ".json": "a JSON list of objects"}[
                self._suffix
            ]
            raise DataError(f"{self.file} is not {kind} in UTF-8 ({error}); save it as one.") from error

    def _json_rows(self) -> Iterator[list[str]]:
        """The keys of the first object, then the values of each."""
        names: list[str] = []
        for value in self._json_values():
            if not isinstance(value, dict):
                raise ValueError("an entry is not an object")
            if not names:
                names = list(value)
                yield names
            cells = [value.get(name) for name in names]
            yield [str(cell) if isinstance(cell, (str, int, float)) else "" for cell in cells]

    def _json_values(self) -> Iterator[Any]:
        if self._suffix == ".jsonl":
            for line in filter(None, map(str.strip, self._stream)):
                yield parse_json(line.encode())
            return
        values = parse_json(self._stream.read().encode())
        if not isinstance(values, list):
            raise ValueError("it does not begin with a list")
        yield from values


def _header(file: Path, cells: list[str]) -> list[str]:
    """The column that each cell names, ``""`` for one that is not needed."""
    names = [cell.strip().lower() for cell in cells]
    if {"data", "annotations"} <= set(names):
        raise DataError(f"{file} is a JSON export of Label Studio with all annotations; export it as JSON-MIN or CSV.")
    if boxes := _BOX_COLUMNS.intersection(names):
        raise DataError(
            f"{file} lists boxes (column {min(boxes)!r}), which are cropped from COCO and YOLO sets only; convert it "
            "to one of these and give --crop-boxes."
        )
    columns = [next((column for column, known in COLUMNS.items() if name in known), "") for name in names]
    typo = any(
        difflib.get_close_matches(name, ("split", "task"), n=1, cutoff=0.75)
        for name, column in zip(names, columns, strict=True)
        if not column
    )
    named = [column for column in columns if column]
    if typo or len(set(named)) != len(named) or not {"path", "label"} <= set(named):
        place = "first line" if file.suffix.lower() == ".csv" else "first object"
        raise DataError(f"The {place} of {file} must be path,label[,split][,task], not {','.join(cells)[:80]!r}.")
    return columns


def _checked_rows(file: Path, columns: list[str], reader: Iterable[list[str]]) -> list[_Row]:
    rows: list[_Row] = []
    problems: list[str] = []
    bad = 0
    for number, cells in enumerate(reader, start=2):
        if number > MAX_ROWS + 1:
            raise DataError(f"{file} has more than {MAX_ROWS:,} rows; divide it into several files.")
        if not any(cell.strip() for cell in cells):
            continue
        row, problem = _row(file.parent, columns, [cell.strip() for cell in cells])
        if row is not None:
            rows.append(row)
            continue
        bad += 1
        if len(problems) < _SHOWN:
            problems.append(f"  row {number}: {problem}")
    if bad:
        more = [f"  and {bad - _SHOWN} more"] if bad > _SHOWN else []
        raise DataError("\n".join([f"{file} has {bad} bad rows; correct or delete them:", *problems, *more]))
    return rows


def _row(base: Path, columns: list[str], cells: list[str]) -> tuple[_Row | None, str]:
    """The row, or ``None`` and what is wrong with it."""
    if len(cells) != len(columns):
        return None, f"{len(cells)} cells instead of {len(columns)}"
    values = {column: cell for column, cell in zip(columns, cells, strict=True) if column}
    if empty := [column for column in values if not values[column]]:
        return None, f"'{empty[0]}' is empty"
    split, task = values.get("split", ""), values.get("task", "")
    split = SPLIT_NAMES.get(split.lower(), split)
    if split and split not in _SPLITS:
        return None, f"the split is {split[:40]!r}, not train, val or test"
    if task.startswith(".") or "/" in task or "\\" in task or not task.isprintable():
        return None, f"the task name {task[:40]!r} cannot be the name of a folder"
    if UNSAFE.search(values["label"]):
        return None, f"the label {values['label'][:40]!r} holds control characters"
    if "://" in values["path"] or values["path"].startswith("/data/upload/"):
        return None, f"{values['path'][:80]!r} is an address on a server; download the image and give its path"
    if not is_image_name(values["path"]):
        return None, f"{values['path'][-80:]!r} has no suffix of an image"
    path = base / values["path"]
    if not is_file(path):
        return None, f"there is no file {values['path'][-80:]!r}"
    return _Row(path, checked_name(values["label"]), split, checked_name(task)), ""


def _task(name: str, rows: list[_Row], has_splits: bool) -> FoundTask:
    def images(split: str) -> ImageSet:
        chosen = [row for row in rows if row.split == split]
        return ImageSet(tuple(ImageFile(row.path) for row in chosen), tuple(row.label for row in chosen))

    return FoundTask.of(name, {split: images(split) for split in (_SPLITS if has_splits else ("",))})
