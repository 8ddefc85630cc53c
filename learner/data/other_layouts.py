"""Layouts of other tools that are not read: each is refused in a sentence that names the way to one that is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

from duallora_edge.errors import DataError
from duallora_edge.learner.data.split import SPLIT_NAMES

CSV_WAY = "write a CSV file with the columns path,label and name it with --data"


def refuse_other_layouts(root: Path, folders: Sequence[str], flat: Collection[str]) -> None:
    """Raise `DataError` for a folder that is laid out for another tool and would be misunderstood.

    ``folders`` are the names of the folders in ``root``; those in ``flat`` hold images.
    """
    for folder in (root, *(root / name for name in folders)):
        for name in ("Annotations", "annotations"):
            if next((folder / name).glob("*.xml"), None) is not None:
                raise DataError(
                    f"{folder} is a Pascal VOC detection set ({name}/*.xml); convert it to COCO or YOLO and give "
                    "--crop-boxes, or sort its images into one folder per class."
                )
    packed = [path.name for path in root.glob("*.tar.gz")] + [path.name for path in root.glob("*.tgz")]
    if not folders and packed:
        raise DataError(
            f"{root} holds compressed archives ({packed[0]}, ...); decompress WebDataset shards with gunzip."
        )
    if len(folders) < 2 or len(flat) < len(folders):
        return
    names = {name.lower() for name in folders}
    if names <= set(SPLIT_NAMES):
        raise DataError(
            f"{root} has images in {', '.join(folders)} but no class folders in them; put them into <split>/<class>/, "
            f"or {CSV_WAY}."
        )
    if "images" in names and names <= {"images", "masks", "labels", "annotations"}:
        raise DataError(
            f"{root} is a segmentation set ({', '.join(folders)}), which does not tell one class per image; sort its "
            f"images into one folder per class, or {CSV_WAY}."
        )


def refuse_file(file: Path) -> NoReturn:
    """Raise `DataError` for a file that is neither a folder nor a file of a layout that is read."""
    suffix = file.suffix.lower()
    if suffix in (".gz", ".tgz"):
        raise DataError(
            f"{file} is a compressed archive; decompress it with gunzip if it is a WebDataset shard, else unpack it "
            "and name the folder."
        )
    if suffix in (".zip", ".7z", ".rar"):
        raise DataError(f"{file} is an archive; unpack it and name the folder, or {CSV_WAY}.")
    if suffix == ".arrow":
        raise DataError(f"{file} is one file of a Hugging Face dataset; name the folder that save_to_disk wrote.")
    raise DataError(
        f"{file} is neither a folder nor a file that holds or lists images (.csv, .json, .jsonl, .tar, .parquet); name "
        "one of these."
    )
