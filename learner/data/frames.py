"""Images without labels, taken evenly from a camera, a video or a folder of any length."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from duallora_edge.runtime.preprocess import Preprocessing
from duallora_edge.runtime.sources import Source

LIVE_INTERVAL_S = 1.0


def spread_frames(
    source: Source,
    preprocessing: Preprocessing,
    count: int,
    on_frame: Callable[[int, int], None] = lambda held, count: None,
) -> npt.NDArray[np.uint8]:
    """At most ``count`` frames of a source, spread evenly over the whole of it.

    Of a folder or a video every k-th frame is kept. Where ``count`` are held and more come, every other one is dropped
    and k is doubled, so that neither the length need be known nor more memory be taken; at least half of ``count``
    remain. Of a live source it is one frame in `LIVE_INTERVAL_S` seconds, until there are ``count``.

    Args:
        source: an open source; it is read to its end unless it is live.
        preprocessing: what brings a frame to the size of the model.
        count: the most frames to hold.
        on_frame: is called for each frame that is read with how many are held, and ``count``.

    Returns:
        RGB, ``uint8 [n, S, S, 3]``, in the order of the source.

    Raises:
        SourceError: The source broke before its end.
    """
    frames = np.empty((count, preprocessing.size, preprocessing.size, 3), np.uint8)
    held, every, due = 0, 1, -math.inf
    for number, frame in enumerate(source):
        if source.live:
            wanted = frame.captured >= due
        else:
            if held == count and number % every == 0:
                held = (count + 1) // 2
                for index in range(held):  # a single assignment would copy all of them first
                    frames[index] = frames[2 * index]
                every *= 2
            wanted = number % every == 0
        if wanted:
            frames[held] = preprocessing(frame.pixels)
            held, due = held + 1, frame.captured + LIVE_INTERVAL_S
        on_frame(held, count)
        if source.live and held == count:
            break
    return frames[:held]
