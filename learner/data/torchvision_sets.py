"""Datasets of torchvision by name, from disk, or downloaded by torchvision where that is possible."""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duallora_edge.errors import DataError
from duallora_edge.extras import install_hint
from duallora_edge.learner.data.images import DatasetImage, ImageSet
from duallora_edge.learner.data.split import Found, FoundTask

# Where torchvision's classes keep the labels; without one of these every item has to be read once for its label.
_LABELS = ("targets", "labels", "_labels")


def find_in_torchvision(name: str, root: Path, task_name: str) -> Found:
    """List a classification dataset of ``torchvision.datasets`` whose files are under ``root``.

    Classes with a ``train`` or ``split`` argument bring their own test images. Raises `DataError` when
    torchvision is missing, does not know the name, or finds no files and cannot download them.
    """
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:
        raise DataError(f"torchvision: sources need torchvision: {install_hint('train')}.") from error
    if name not in datasets.__all__:
        near = difflib.get_close_matches(name, datasets.__all__, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "for example CIFAR100, MNIST or GTSRB."
        raise DataError(f"torchvision has no dataset {name!r}; {hint}")
    make = getattr(datasets, name)
    arguments = inspect.signature(make).parameters
    if "train" in arguments:
        variants: list[dict[str, Any]] = [{"train": True}, {"train": False}]
    elif "split" in arguments:
        variants = [{"split": "train"}, {"split": "test"}]
    else:
        variants = [{}]
    sets = [_image_set(name, _open(make, name, root, variant), root, variant) for variant in variants]
    test = sets[1] if len(sets) == 2 else None
    return Found(f"torchvision {name}", (FoundTask(task_name, sets[0], None, test),), is_stream=False)


def _open(make: Callable[..., Any], name: str, root: Path, variant: dict[str, Any]) -> Any:
    arguments = inspect.signature(make).parameters
    if "root" in arguments:
        variant = {"root": str(root), **variant}
    try:
        try:
            return make(**variant)
        except (RuntimeError, OSError):
            if "download" not in arguments:
                raise
            root.mkdir(parents=True, exist_ok=True)
            return make(**variant, download=True)
    except Exception as error:  # torchvision's own code, the network, the disk: any type
        raise DataError(
            f"torchvision cannot open {name} in {root} ({error}); put the files of the dataset there, "
            f"as torchvision lays them out."
        ) from error


def _image_set(name: str, dataset: Any, root: Path, variant: dict[str, Any]) -> ImageSet:
    targets = _targets(name, dataset)
    names = getattr(dataset, "classes", None)
    if not names or max(targets, default=0) >= len(names):
        names = [f"class-{index:03d}" for index in range(max(targets, default=0) + 1)]
    which = "".join(f" {value}" for value in variant.values())
    content = hashlib.sha256(repr(targets).encode()).hexdigest()
    place = f"{root.absolute()} {content}"
    images = tuple(DatasetImage(dataset, f"{name}{which}", place, index) for index in range(len(targets)))
    return ImageSet(images, tuple(str(names[target]) for target in targets))


def _targets(name: str, dataset: Any) -> list[int]:
    try:
        for attribute in _LABELS:
            if (labels := getattr(dataset, attribute, None)) is not None:
                return [int(label) for label in labels]
        if samples := getattr(dataset, "_samples", None):
            return [int(label) for _, label in samples]
        return [int(dataset[index][1]) for index in range(len(dataset))]
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(f"torchvision {name} has no one class an image; choose a classification dataset.") from error
