"""Image folders: which of the three layouts a folder has, and its images."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from duallora_edge.errors import DataError
from duallora_edge.learner.data.images import ImageFile, ImageSet
from duallora_edge.learner.data.other_layouts import refuse_other_layouts
from duallora_edge.learner.data.split import SPLIT_NAMES, Found, FoundTask, split_of

SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_SPLITS = ("train", "val", "test")
_LAYOUTS = (
    "<class>/image, {train,val,test}/<class>/image, <task>/{train,val,test}/<class>/image, "
    "or a CSV file with the columns path,label[,split][,task]"
)


@dataclass
class Folder:
    """The visible content of a folder: sub-folders, and the names of its image files (both sorted)."""

    path: Path
    folders: dict[str, Folder] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its suffix, whatever the case."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 (a string, 100,000 times)


def is_file(path: Path) -> bool:
    """Whether there is such a file; there is none where the name is too long or holds a null byte."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def files_by_split(root: Path, suffix: str) -> tuple[dict[str, list[Path]], list[str]]:
    """The files that hold many images each, by their splits (``""`` where nothing tells one), and notes.

    They lie in ``root`` or in its folder ``data``, and their names tell the splits, or they lie in folders of splits;
    other folders belong to another layout. {} where there are none.
    """
    files, folders = files_and_folders(root, suffix)
    if not files and folders == ["data"]:
        files, folders = files_and_folders(root / "data", suffix)
    found: dict[str, list[Path]] = defaultdict(list)
    if not folders:
        for file in files:
            found[split_of(file.stem)].append(file)
    elif not files and all(name.lower() in SPLIT_NAMES for name in folders):
        for name in folders:
            inner, below = files_and_folders(root / name, suffix)
            if inner and not below:
                found[SPLIT_NAMES[name.lower()]] += inner
    unnamed = found.pop("", []) if len(found) > 1 else []
    notes = [f"ignored: {len(unnamed)} files whose names tell no split ({unnamed[0].name}, ...)"] if unnamed else []
    return dict(found), notes


def files_and_folders(path: Path, suffix: str) -> tuple[list[Path], list[str]]:
    """The files of a suffix, and the names of the folders; both sorted, without hidden ones."""
    with os.scandir(path) as entries:
        visible = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
        folders = [entry.name for entry in visible if entry.is_dir()]
        files = [Path(entry.path) for entry in visible if entry.name.lower().endswith(suffix) and entry.is_file()]
    return files, folders


def checked_name(name: str) -> str:
    """A class or task name in composed Unicode form (NFC), so that it is the same from every file system."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"The name {name!r} is not valid UTF-8; rename the folder.") from error
    return unicodedata.normalize("NFC", name)


def find_in_folder(root: Path, task_order: Sequence[str] | None, task_name: str) -> Found:
    """Recognise the layout of ``root`` and list its images.

    ``task_order`` picks and orders the tasks of a folder of tasks; other folders in ``root`` are then not
    looked at. ``task_name`` names the task of a folder that is a single task.
    Raises `DataError` for an empty folder, a mixed or unknown layout, or an unknown task.
    """
    ignored: Counter[str] = Counter()
    tree = _scan(root, 3, ignored, None if task_order is None else _known(root, task_order))
    refuse_other_layouts(root, list(tree.folders), {name for name, folder in tree.folders.items() if folder.images})
    layout, is_stream = _recognise(tree), False
    if layout == "task folders":
        is_stream = True
        names = list(tree.folders) if task_order is None else list(task_order)
        tasks = tuple(_split_task(tree.folders[name], checked_name(name)) for name in names)
    elif task_order is not None:
        raise DataError(f"The folders named by task_order hold no 'train' folder: {root} is a single task.")
    elif layout == "split folders":
        tasks = (_split_task(tree, task_name),)
    else:
        tasks = (FoundTask(task_name, _classes(tree), None, None),)
    notes = [f"ignored: {count} {what}" for what, count in sorted(ignored.items())]
    return Found(layout, tasks, is_stream, tuple(notes))


def _scan(path: Path, depth: int, ignored: Counter[str], only: Sequence[str] | None = None) -> Folder:
    """Read a folder and the folders below it, down to ``depth`` levels (so that a looping link ends)."""
    found = Folder(path)
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                ignored["hidden files or folders"] += 1
            elif entry.is_dir():
                if only is None or entry.name in only:
                    below = Path(entry.path)
                    found.folders[entry.name] = _scan(below, depth - 1, ignored) if depth else Folder(below)
                else:
                    ignored["folders not named by task_order"] += 1
            elif is_image_name(entry.name):
                found.images.append(entry.name)
            else:
                ignored["files that are not images"] += 1
    return found


def _known(root: Path, task_order: Sequence[str]) -> Sequence[str]:
    present = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")
    check_task_order(task_order, present)
    return task_order


def check_task_order(task_order: Sequence[str], present: Sequence[str]) -> None:
    """Raise `DataError` unless ``task_order`` names tasks out of ``present``, each once."""
    if not task_order:
        raise DataError(f"task_order is empty; name at least one of the tasks: {', '.join(present[:20])}.")
    for position, name in enumerate(task_order):
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(present[:20])}."
            raise DataError(f"task_order names the unknown task {name!r}; {hint}")
        if name in task_order[:position]:
            raise DataError(f"task_order names the task {name!r} twice; name it once.")


def _recognise(tree: Folder) -> str:
    nested = [name for name, folder in tree.folders.items() if folder.folders]
    flat = [name for name, folder in tree.folders.items() if folder.images]
    if not nested and not flat and not tree.images:
        raise DataError(f"{tree.path} holds no images; accepted are {_LAYOUTS}.")
    if tree.images:
        raise DataError(f"{tree.path / tree.images[0]} is outside a class folder; accepted are {_LAYOUTS}.")
    if nested and flat:
        raise DataError(
            f"{tree.path} mixes layouts: '{nested[0]}' holds folders but '{flat[0]}' holds images; "
            f"accepted are {_LAYOUTS}."
        )
    if flat:
        return "class folders"
    if all(name.lower() in SPLIT_NAMES for name in tree.folders):
        return "split folders"
    for name, folder in tree.folders.items():
        if "train" not in map(_split, folder.folders):
            raise DataError(
                f"{folder.path} holds no 'train' folder, so '{name}' is not a task; accepted are {_LAYOUTS}."
            )
    return "task folders"


def _split(name: str) -> str:
    return SPLIT_NAMES.get(name.lower(), "")


def _split_task(folder: Folder, name: str) -> FoundTask:
    if folder.images or (unknown := [split for split in folder.folders if not _split(split)]):
        odd = folder.images[0] if folder.images else unknown[0]
        raise DataError(f"{folder.path / odd} is beside the split folders; only train, val and test belong there.")
    splits: dict[str, Folder] = {}
    for below, content in folder.folders.items():
        if other := splits.get(_split(below)):
            raise DataError(f"{content.path} and {other.path} are both for {_split(below)}; make one folder of them.")
        splits[_split(below)] = content
    if "train" not in splits:
        raise DataError(f"{folder.path} has no 'train' folder; put the training images there.")
    train, validation, test = (
        _classes(splits[split], may_be_empty=split != "train") if split in splits else None for split in _SPLITS
    )
    return FoundTask(name, train or ImageSet(), validation, test or ImageSet())


def _classes(folder: Folder, may_be_empty: bool = False) -> ImageSet:
    if folder.images:
        raise DataError(f"{folder.path / folder.images[0]} is outside a class folder; put it into one.")
    images: list[ImageFile] = []
    labels: list[str] = []
    for name, members in folder.folders.items():
        if members.folders:
            raise DataError(
                f"{members.path} should hold images but holds the folder '{next(iter(members.folders))}'; "
                f"accepted are {_LAYOUTS}."
            )
        if not members.images and not may_be_empty:
            raise DataError(f"The class folder {members.path} holds no images; add some or delete the folder.")
        images += [ImageFile(members.path / file) for file in members.images]
        labels += [checked_name(name)] * len(members.images)
    return ImageSet(tuple(images), tuple(labels))
