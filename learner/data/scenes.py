"""Scenes: images of one class that were taken together, by their names or by camera and time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from pathlib import PurePath

import numpy as np
import numpy.typing as npt

from duallora_edge.learner.data.images import ImageRef, ImageSet

# Two pictures of one camera that are not further apart belong to one scene.
GAP = timedelta(minutes=1)
_LAST_NUMBER = re.compile(r"\d+(?=\D*$)")


def scenes(images: Sequence[ImageRef]) -> list[int]:
    """The number of the scene of each image, by the camera and time that the file tells, else by its name.

    Names tell scenes where they end in a number and differ before it, as ``00003_00029.jpg`` or
    ``20260102_101500.jpg`` do, and several images share what stands before. An image of which nothing is known is a
    scene of its own.
    """
    fresh = count()
    found = [-1] * len(images)
    by_time = sorted(
        ((*taken, index) for index, image in enumerate(images) if (taken := image.taken()) is not None),
    )
    for position, (camera, time, index) in enumerate(by_time):
        before = by_time[position - 1] if position else None
        together = before is not None and before[0] == camera and time - before[1] <= GAP
        found[index] = found[before[2]] if before is not None and together else next(fresh)
    names = [_LAST_NUMBER.sub("", PurePath(image.name).name) for image in images]
    shared = Counter(names)
    numbered = len(shared) > 1 and max(shared.values()) > 1
    by_name: dict[str, int] = {}
    for index, name in enumerate(names):
        if found[index] < 0:
            known = by_name.get(name) if numbered else None
            found[index] = next(fresh) if known is None else known
            by_name[name] = found[index]
    return found


def scenes_by_class(images: ImageSet) -> npt.NDArray[np.int64]:
    """The number of the scene of each image, int64 [n], found in each class by itself."""
    found = np.zeros(len(images), np.int64)
    labels = np.array(images.labels)
    first = 0
    for label in images.classes:
        members = np.flatnonzero(labels == label)
        found[members] = first + np.array(scenes([images.images[index] for index in members]))
        first = int(found[members].max()) + 1
    return found
