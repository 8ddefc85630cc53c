"""One picture of a source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from duallora_edge.runtime.preprocess import Pixels


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture, ``pixels`` ``uint8 [H, W, 3]`` in RGB order, which nobody writes to.

    ``sequence`` counts the frames of the source from 0, with those that were dropped; ``captured`` is the moment at
    which the source handed it over, in seconds of `time.monotonic`, and ``timestamp`` the same in seconds since 1970.
    ``name`` is the file it came from, None for a stream.

    NumPy takes a frame as its array: ``np.asarray(frame)``.
    """

    pixels: Pixels = field(repr=False)
    sequence: int
    captured: float
    timestamp: float
    name: str | None = None

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.pixels, dtype=dtype, copy=True) if copy else np.asarray(self.pixels, dtype=dtype)
