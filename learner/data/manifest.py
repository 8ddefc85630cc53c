"""CSV manifests: ``path,label[,split][,task]``."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from duallora_edge.errors import DataError
from duallora_edge.learner.data.folders import check_task_order, checked_name, is_image_name
from duallora_edge.learner.data.images import ImageFile, ImageSet
from duallora_edge.learner.data.split import Found, FoundTask
from duallora_edge.text import UNSAFE

MAX_BYTES = 256 * 2**20
MAX_ROWS = 2_000_000
_SHOWN = 10
_COLUMNS = ("path", "label", "split", "task")
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class _Row:
    path: Path
    label: str
    split: str
    task: str


def find_in_manifest(file: Path, task_order: Sequence[str] | None, task_name: str) -> Found:
    """List the images of a CSV file whose first line names its columns; paths are relative to the file.

    ``split`` is train, val or test. Tasks come in the order of their first row, or as ``task_order`` says.
    Raises `DataError` for a file that is too large or not CSV, and for bad rows: all of them in one message.
    """
    if file.stat().st_size > MAX_BYTES:
        raise DataError(f"{file} is larger than {MAX_BYTES // 2**20} MiB; divide it into several files.")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            columns = _header(file, next(reader, []))
            rows = _checked_rows(file, columns, reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a CSV file in UTF-8 ({error}); save it as one.") from error
    if not rows:
        raise DataError(f"{file} lists no images; add rows under the header.")
    names = list(dict.fromkeys(row.task or task_name for row in rows))
    if task_order is not None:
        if "task" not in columns:
            raise DataError(f"task_order needs a 'task' column, which {file} does not have; add one.")
        check_task_order(task_order, names)
    tasks: dict[str, list[_Row]] = {name: [] for name in task_order or names}
    for row in rows:
        if (name := row.task or task_name) in tasks:
            tasks[name].append(row)
    found = tuple(_task(name, members, "split" in columns) for name, members in tasks.items())
    left_out = len(names) - len(tasks)
    notes = (f"ignored: {left_out} tasks not named by task_order",) if left_out else ()
    return Found("CSV manifest", found, "task" in columns, notes)


def _header(file: Path, cells: list[str]) -> list[str]:
    columns = [cell.strip().lower() for cell in cells]
    unknown = [column for column in columns if column not in _COLUMNS]
    if unknown or len(set(columns)) != len(columns) or not {"path", "label"} <= set(columns):
        raise DataError(f"The first line of {file} must be path,label[,split][,task], not {','.join(cells)[:80]!r}.")
    return columns


def _checked_rows(file: Path, columns: list[str], reader: Iterator[list[str]]) -> list[_Row]:
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
    values = dict(zip(columns, cells, strict=True))
    if empty := [column for column in columns if not values[column]]:
        return None, f"'{empty[0]}' is empty"
    split, task = values.get("split", ""), values.get("task", "")
    if split and split not in _SPLITS:
        return None, f"the split is {split[:40]!r}, not train, val or test"
    if task.startswith(".") or "/" in task or "\\" in task or not task.isprintable():
        return None, f"the task name {task[:40]!r} cannot be the name of a folder"
    if UNSAFE.search(values["label"]):
        return None, f"the label {values['label'][:40]!r} holds control characters"
    if not is_image_name(values["path"]):
        return None, f"{values['path'][-80:]!r} has no suffix of an image"
    path = base / values["path"]
    if not _is_file(path):
        return None, f"there is no file {values['path'][-80:]!r}"
    return _Row(path, checked_name(values["label"]), split, checked_name(task)), ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _task(name: str, rows: list[_Row], has_splits: bool) -> FoundTask:
    def images(split: str) -> ImageSet:
        chosen = [row for row in rows if row.split == split]
        return ImageSet(tuple(ImageFile(row.path) for row in chosen), tuple(row.label for row in chosen))

    if not has_splits:
        return FoundTask(name, images(""), None, None)
    validation = images("val")
    return FoundTask(name, images("train"), validation if len(validation) else None, images("test"))
