"""Folders and files of other tools are refused in a sentence that names the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duallora_edge.errors import DataError
from duallora_edge.learner.data import open_stream


@pytest.mark.parametrize(
    ("folders", "files", "message"),
    [
        (["JPEGImages"], ["Annotations/000.xml"], "Pascal VOC .* convert it to COCO or YOLO"),
        (["images"], ["annotations/000.xml"], "Pascal VOC"),
        (["VOC2012/JPEGImages"], ["VOC2012/Annotations/000.xml"], "Pascal VOC"),
        ([], ["shard-000.tar.gz"], "compressed archives .*; decompress WebDataset shards with gunzip"),
        ([], ["shard-000.tgz"], "compressed archives"),
        (["train", "valid", "test"], [], "no class folders in them; put them into <split>/<class>/"),
        (["images", "masks"], [], "segmentation set"),
    ],
)
def test_folders(root: Path, make_images: Any, folders: list[str], files: list[str], message: str) -> None:
    for folder in folders:
        make_images(folder, 2)
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("{}")
    with pytest.raises(DataError, match=message):
        open_stream(str(root))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shard-000.tar.gz", "decompress it with gunzip if it is a WebDataset shard, else unpack it"),
        ("photos.zip", "is an archive; unpack it"),
        ("data-00000-of-00001.arrow", "name the folder that save_to_disk wrote"),
        ("list.txt", "neither a folder nor"),
    ],
)
def test_files(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=message):
        open_stream(str(tmp_path / name))
