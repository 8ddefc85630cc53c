"""The classes that were taught to a classifier: their frames, kept in a folder, and what a model makes of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from duallora_edge.errors import DataError, DualLoraEdgeError
from duallora_edge.runtime.bundle import Bundle, FloatArray
from duallora_edge.runtime.field.taught_folder import (
    add_frames,
    check_name,
    read_taught,
    reduced,
    remove_class,
    signature,
)
from duallora_edge.runtime.field.teaching import Teacher
from duallora_edge.runtime.model import Model
from duallora_edge.runtime.preprocess import Pixels


class Lessons:
    """Frames of taught classes, and their features under the model that answers.

    A class that a bundle knows itself is left to it.
    """

    def __init__(self, folder: Path | None) -> None:
        """Lessons that are kept in ``folder``, or nowhere; `apply` takes over what is there."""
        self.folder = folder
        self.error: str | None = None
        self._images: dict[str, list[Pixels]] = {}
        self._model: Callable[[], Model | None] = lambda: None  # does not keep a model that was dropped
        self._teacher: Teacher | None = None
        self._features: dict[str, FloatArray] = {}
        self._seen: object = None
        self._lock = threading.Lock()

    @property
    def has_changed(self) -> bool:
        """Whether the folder holds something else than when it was read."""
        return self.folder is not None and signature(self.folder) != self._seen

    def apply(self, model: Model, bundle: Bundle | None = None) -> None:
        """Teach ``model`` what the folder and the memory hold; ``bundle`` is its own with contents, if they are there.

        Where that is impossible, the model answers without it, and ``error`` says why.
        """
        with self._lock:
            self.error = None
            try:
                self._read(model)
                self._teach(model, bundle)
            except (DualLoraEdgeError, OSError, MemoryError) as error:
                model.taught = None
                self.error = str(error) or type(error).__name__

    def add(self, model: Model, name: str, frames: Sequence[Pixels]) -> int:
        """Teach a class from further frames ``uint8 [H, W, 3]``, keep them, and return how many it rests on.

        Raises `DataError` where the name cannot be used or there are too many frames, `BundleError` where the bundle
        cannot be taught, `BackendError` where the device failed, ``OSError`` where the frames cannot be kept; the model
        and the folder stay as they were then, but for frames that were written before the disk was full.
        """
        if check_name(name) in model.bundle.manifest.classes:
            raise DataError(f"The bundle knows {name!r} already; give the new class another name.")
        if not frames:
            raise DataError(f"No frames of {name!r} were given; one is enough, ten are better.")
        with self._lock:
            before = self._images.get(name, [])
            frames, prepare = [reduced(frame) for frame in frames], model.bundle.manifest.preprocessing
            self._images[name] = [*before, *(prepare(frame) for frame in frames)]
            self._features.pop(name, None)
            taught = model.taught
            try:
                self._teach(model)
                if self.folder is not None:
                    add_frames(self.folder, name, frames)
                    self._seen = signature(self.folder)
            except BaseException:
                self._images[name] = before
                self._features.pop(name, None)
                if not before:
                    del self._images[name]
                model.taught = taught
                raise
            return len(self._images[name])

    def remove(self, model: Model, name: str) -> None:
        """Forget a taught class. Raises `DataError` where there is none, or images of others are left of it."""
        with self._lock:
            if self.folder is not None:
                remove_class(self.folder, name)
                self._seen = signature(self.folder)
            elif name not in self._images:
                raise DataError(f"No class {name!r} was taught; there are: {', '.join(self._images) or 'none'}.")
            self._images.pop(name, None)
            self._features.pop(name, None)
            self._teach(model)

    def _read(self, model: Model) -> None:
        """Take over what the folder holds, in the size of the model."""
        prepare = model.bundle.manifest.preprocessing
        if self.folder is not None:
            self._seen = signature(self.folder)
            found = read_taught(self.folder, prepare)
        else:
            found = {name: [prepare(image) for image in images] for name, images in self._images.items()}
        for name in {*self._features} - {name for name in found if _equal(found[name], self._images.get(name, []))}:
            del self._features[name]
        self._images = found

    def _teach(self, model: Model, bundle: Bundle | None = None) -> None:
        if model is not self._model():
            self._model, self._teacher, self._features = weakref.ref(model), None, {}
        wanted = {name: images for name, images in self._images.items() if name not in model.bundle.manifest.classes}
        if not wanted:
            model.taught = None
            return
        if self._teacher is None:
            self._teacher = Teacher(bundle or Bundle.open(model.bundle.path, tried=model.bundle.digest))
        for name in wanted:
            if name not in self._features:
                # One by one, since a runtime keeps the memory of its largest batch.
                rows = [model.backend.infer(image[None]).features for image in wanted[name]]
                self._features[name] = np.concatenate(rows)
        model.taught = self._teacher.teach({name: self._features[name] for name in wanted})


def _equal(images: Sequence[Pixels], others: Sequence[Pixels]) -> bool:
    return len(images) == len(others) and all(map(np.array_equal, images, others))
