"""One picture of a source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from duallora_edge.runtime.preprocess import Pixels


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture. NumPy accepts it as an array: ``np.asarray(frame)``.

    Attributes:
        pixels: ``uint8 [H, W, 3]`` in RGB order; do not write to it.
        sequence: Number of the frame in its source, from 0, counting dropped frames.
        captured: When GStreamer stamped the frame of a live pipeline, when the source got it otherwise; in seconds of
            `time.monotonic`.
        timestamp: The same moment in seconds since 1970.
        name: The file the frame came from, None for a stream.
    """

    pixels: Pixels = field(repr=False)
    sequence: int
    captured: float
    timestamp: float
    name: str | None = None

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.pixels, dtype=dtype, copy=True) if copy else np.asarray(self.pixels, dtype=dtype)
