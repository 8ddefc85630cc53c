"""The frames of taught classes: a folder of images for each class, as `train` reads it."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from duallora_edge.errors import DataError
from duallora_edge.files import atomic_directory, write_atomic
from duallora_edge.runtime.preprocess import Pixels, read_image
from duallora_edge.text import UNSAFE

MAX_CLASSES = 64
MAX_FRAMES = 200
MAX_SIDE = 640
_WRITTEN = re.compile(r"[0-9a-f]{16}\.png")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def check_name(name: str) -> str:
    """The name, if it can be that of a taught class and its folder. Raises `DataError`."""
    if not name.strip() or name != name.strip() or name[0] == "." or len(os.fsencode(name)) > 100:
        raise DataError(f"{name!r} cannot name a class: use 1 to 100 bytes that begin with neither a dot nor a space.")
    if UNSAFE.search(name) or "/" in name or "\\" in name:
        raise DataError(f"{name!r} cannot name a class: leave out slashes and control characters.")
    return name


def reduced(frame: Pixels) -> Pixels:
    """A frame ``uint8 [H, W, 3]`` as it is kept: no longer than `MAX_SIDE` pixels, which no model needs."""
    if max(frame.shape[:2]) <= MAX_SIDE:
        return frame
    image = Image.fromarray(frame)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image)


def add_frames(folder: Path, name: str, frames: Iterable[Pixels]) -> int:
    """Keep frames ``uint8 [H, W, 3]`` of a class as they are; returns how many there are now.

    Each is written whole or not at all, under a name made of its content, so one that is there already is not kept
    twice; the first frames of a class come together. Raises `DataError` for a name that cannot be used or too many
    classes or frames, ``OSError`` where nothing can be written.
    """
    target = folder / check_name(name)
    present = taught_images(folder)
    if name not in present and len(present) >= MAX_CLASSES:
        raise DataError(f"{folder} holds {MAX_CLASSES} taught classes already; 'unteach' one, or train.")
    folder.mkdir(parents=True, exist_ok=True)
    known = {path.name for path in present.get(name, [])}
    contents = {f"{hashlib.sha256(frame.tobytes()).hexdigest()[:16]}.png": frame for frame in frames}
    if len(known | contents.keys()) > MAX_FRAMES:
        raise DataError(f"{target} would hold more than {MAX_FRAMES} frames; that is enough to teach, now train.")
    if known or target.exists():
        for path, frame in contents.items():
            write_atomic(target / path, _png(frame))
    else:  # a new class is there with all its frames, or not at all
        with atomic_directory(target) as staging:
            for path, frame in contents.items():
                (staging / path).write_bytes(_png(frame))
    return len(known | contents.keys())


def _png(frame: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def taught_images(folder: Path) -> dict[str, list[Path]]:
    """The images of each taught class by its name, both in the order of their names. A missing folder has none."""
    found: dict[str, list[Path]] = {}
    with suppress(FileNotFoundError):
        for each in sorted(folder.iterdir()):
            if each.is_dir() and not each.name.startswith("."):
                images = sorted(path for path in each.iterdir() if path.suffix.lower() in _IMAGES)
                if images:
                    found[each.name] = images
    return found


def read_taught(folder: Path, prepare: Callable[[Pixels], Pixels]) -> dict[str, list[Pixels]]:
    """The frames of each taught class as ``prepare`` makes them, read one by one.

    Raises `DataError` for a name or an image that cannot be used, or too many of them.
    """
    found = taught_images(folder)
    if len(found) > MAX_CLASSES or any(len(images) > MAX_FRAMES for images in found.values()):
        raise DataError(f"{folder} holds more than {MAX_CLASSES} classes or {MAX_FRAMES} frames of one; train instead.")
    return {check_name(name): [prepare(read_image(path)) for path in images] for name, images in found.items()}


def remove_class(folder: Path, name: str) -> None:
    """Delete the frames that `add_frames` wrote for a class.

    Raises `DataError` where there is no such class, and where other images are left, which stay.
    """
    target = folder / check_name(name)
    images = taught_images(folder)
    if name not in images:
        known = ", ".join(images) or "none"
        raise DataError(f"{folder} holds no taught class {name!r}; there are: {known}.")
    for path in images[name]:
        if _WRITTEN.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        target.rmdir()
    if name in taught_images(folder):
        raise DataError(f"{target} still holds images that were not taught here; move them away to unteach {name!r}.")


def signature(folder: Path) -> object:
    """Something that changes with the taught classes and their frames."""
    found = []
    with suppress(OSError):
        for name, images in taught_images(folder).items():
            found.append((name, [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in images]))
    return found
