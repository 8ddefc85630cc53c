"""Teaches what a camera sees: the frames of the next seconds become those of a taught class."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from duallora_edge.errors import DataError
from duallora_edge.runtime.field.taught_folder import add_frames, check_name, reduced, remove_class
from duallora_edge.runtime.preprocess import Pixels
from duallora_edge.runtime.service.monitor import Monitor
from duallora_edge.runtime.service.pipeline import Region

FRAMES = 20
MAX_SECONDS = 60.0


class Recorder:
    """Writes frames that a monitor passes on into a folder of taught classes, which a watcher takes over."""

    def __init__(self, monitor: Monitor, folder: Path, region: Region | None = None) -> None:
        """``region`` is the part of the frames that is classified."""
        self._monitor, self._folder, self._region = monitor, folder, region
        self._recording = threading.Lock()

    def record(self, name: str, seconds: float, camera: str) -> int:
        """Teach class ``name`` from up to `FRAMES` frames of a camera, evenly spread over the next seconds.

        Returns how many frames the class has now.

        Raises `DataError` for a name that cannot be used, while another class is recorded, and when no frame comes,
        ``OSError`` when nothing can be written.
        """
        check_name(name)
        if not 0 < seconds <= MAX_SECONDS:
            raise DataError(f"{seconds:g} seconds cannot be recorded; take up to {MAX_SECONDS:g}.")
        if not self._recording.acquire(blocking=False):
            raise DataError("Another class is being recorded; try again when it is done.")
        try:
            frames = self._collect(seconds, camera)
            if not frames:
                raise DataError(f"No frame came within {seconds:g} seconds.")
            return add_frames(self._folder, name, frames)
        finally:
            self._recording.release()

    def forget(self, name: str) -> None:
        """Forget what was recorded for class ``name``. Raises as `remove_class`."""
        remove_class(self._folder, name)

    def _collect(self, seconds: float, camera: str) -> list[Pixels]:
        frames: list[Pixels] = []
        last = self._monitor.last(camera)
        start = time.monotonic()
        while (passed := time.monotonic() - start) < seconds:
            answer = self._monitor.last(camera)
            if answer is not None and answer is not last and passed >= len(frames) * seconds / FRAMES:
                frame = self._region(answer.frame) if self._region else answer.frame
                frames.append(reduced(frame.pixels))
                last = answer
            time.sleep(min(0.01, seconds / FRAMES))
        return frames
