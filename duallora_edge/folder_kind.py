"""Tells a run of the learner from a bundle for a device, for the commands that take one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

FolderKind = Literal["run", "bundle"]

_FILES: dict[FolderKind, tuple[str, ...]] = {"run": ("HEAD.json", "run.yaml"), "bundle": ("manifest.json",)}


def folder_kind(path: str | Path) -> FolderKind | None:
    """What the folder at ``path`` is, by the names of its files alone; None for anything else."""
    for kind, names in _FILES.items():
        if all((Path(path) / name).is_file() for name in names):
            return kind
    return None
