"""Video files, network streams and V4L2 cameras, read by OpenCV, which is imported when one is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duallora_edge.errors import SourceError
from duallora_edge.extras import install_hint
from duallora_edge.runtime.preprocess import to_rgb
from duallora_edge.runtime.sources.capture import Capture, Picture, mask

OPEN_TIMEOUT_S = 10.0
COUNT_TOLERANCE = 0.01  # containers that do not count their frames let OpenCV estimate the number


def import_cv2() -> Any:
    """OpenCV. Raises `SourceError` when it cannot be imported."""
    try:
        import cv2
    except ImportError as error:
        raise SourceError(f"Cameras, streams and videos need OpenCV ({error}): {install_hint('camera')}") from error
    return cv2


class _OpenCV(Capture):
    def __init__(self, capture: Any, name: str | None = None) -> None:
        self._cv2 = import_cv2()
        self._capture = capture
        self._name = name
        self.frames = 0

    def read(self) -> Picture | None:
        there, frame = self._capture.read()
        if not there:
            return None
        self.frames += 1
        if frame.ndim == 3 and frame.shape[2] == 3:  # much faster than NumPy
            return Picture(to_rgb(self._cv2.cvtColor(frame, self._cv2.COLOR_BGR2RGB)), self._name)
        return Picture(to_rgb(frame, "bgr"), self._name)

    def close(self) -> None:
        self._capture.release()


class Video(_OpenCV):
    """All frames of a video file. Raises `SourceError` when it has none."""

    def __init__(self, path: Path) -> None:
        cv2 = import_cv2()
        # An absolute path, which OpenCV cannot take for the address of something else.
        super().__init__(cv2.VideoCapture(str(path.absolute())), str(path))
        self._expected = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self._first = super().read()
        if self._first is None:
            self.close()
            raise SourceError(f"No frame of {path} can be read; it is damaged, cut off or not a video.")

    def read(self) -> Picture | None:
        picture, self._first = self._first, None
        picture = picture or super().read()
        if picture is None and self.frames + max(1.0, self._expected * COUNT_TOLERANCE) < self._expected:
            self.note = (
                f"only {self.frames} of {self._expected:.0f} frames of {self._name} could be read; it may be damaged"
            )
        return picture


class Stream(_OpenCV):
    """A stream at an address, over TCP. ``stall`` seconds without data end it. Raises `SourceError`."""

    def __init__(self, address: str, stall: float) -> None:
        cv2 = import_cv2()
        timeouts = {cv2.CAP_PROP_OPEN_TIMEOUT_MSEC: OPEN_TIMEOUT_S, cv2.CAP_PROP_READ_TIMEOUT_MSEC: stall}
        parameters = [number for key, seconds in timeouts.items() for number in (key, int(seconds * 1000))]
        # FFmpeg as OpenCV calls it asks RTSP servers for TCP; OPENCV_FFMPEG_CAPTURE_OPTIONS can change that.
        super().__init__(cv2.VideoCapture(address, cv2.CAP_FFMPEG, parameters))
        if not self._capture.isOpened():
            raise SourceError(f"{mask(address)} cannot be opened; check the address, the password and the network.")


class Camera(_OpenCV):
    """A V4L2 camera. ``options`` may name width, height, fps and fourcc (as ``"MJPG"``). Raises `SourceError`."""

    def __init__(self, device: str, options: Mapping[str, Any]) -> None:
        cv2 = import_cv2()
        if not Path(device).exists():
            there = ", ".join(map(str, sorted(Path("/dev").glob("video*")))) or "none"
            raise SourceError(
                f"{device} does not exist; connect the camera or choose another one (available: {there})."
            )
        if not os.access(device, os.R_OK | os.W_OK):
            raise SourceError(f"This user may not use {device}; add the user to the group 'video'.")
        super().__init__(cv2.VideoCapture(device, cv2.CAP_V4L2))
        if not self._capture.isOpened():
            raise SourceError(f"{device} cannot be opened; another program uses it, or it is not a camera.")
        if "fourcc" in options:  # before the size, which depends on it
            self._capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*options["fourcc"]))
        properties = {
            "width": cv2.CAP_PROP_FRAME_WIDTH,
            "height": cv2.CAP_PROP_FRAME_HEIGHT,
            "fps": cv2.CAP_PROP_FPS,
        }
        for name in properties.keys() & options.keys():
            self._capture.set(properties[name], options[name])
