"""Frames of one or several cameras, classified one after the other, while the next ones are captured and prepared.

For each camera a source captures and a thread prepares; the caller's thread runs the model for all of them. Each hands
over one frame at a time. With a live source, a newer frame replaces a waiting one, so an answer is never older than
these three steps take. With files, every frame is answered.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

from duallora_edge.errors import BackendError
from duallora_edge.runtime.bundle import FloatArray
from duallora_edge.runtime.classifier import Classifier, Prepared
from duallora_edge.runtime.closing import Closing
from duallora_edge.runtime.prediction import Prediction
from duallora_edge.runtime.process_memory import give_back_memory
from duallora_edge.runtime.sources.frame import Frame
from duallora_edge.runtime.sources.source import EndOfStream, Source

# After this many failures of the device in a row, no more frames are tried.
MAX_FAILURES = 10
_POLL_S = 0.2
# Frames are made in one thread and let go in another, which the C library's pools are not made for: with four cameras
# they came to hold some 30 MB that nobody used (benchmarks/RUNTIME.md, "Several cameras").
GIVE_BACK_S = 30.0

Smoothing = Callable[[Prediction, float], Prediction]


@dataclass(frozen=True)
class Region:
    """A part of the picture.

    Args:
        left: Left edge as a share of the width, from 0 to 1.
        top: Upper edge as a share of the height, from 0 to 1.
        width: Share of the width.
        height: Share of the height.

    Raises:
        ValueError: The region is empty or not inside the picture.
    """

    left: float
    top: float
    width: float
    height: float

    def __post_init__(self) -> None:
        inside = 0 <= self.left < 1 and 0 <= self.top < 1 and self.width > 0 and self.height > 0
        # Slightly over the edge is rounding, as in 0.7 + 0.3.
        if not (inside and self.left + self.width <= 1 + 1e-9 and self.top + self.height <= 1 + 1e-9):
            raise ValueError("a region must lie in the picture: left, top, width and height as shares from 0 to 1")

    def __call__(self, frame: Frame) -> Frame:
        """Cut this part out of a frame.

        Args:
            frame: The whole frame.

        Returns:
            The same frame with only the pixels of this part, at least one.
        """
        height, width = frame.pixels.shape[:2]
        top, left = min(int(self.top * height), height - 1), min(int(self.left * width), width - 1)
        bottom, right = round((self.top + self.height) * height), round((self.left + self.width) * width)
        return replace(frame, pixels=frame.pixels[top : max(bottom, top + 1), left : max(right, left + 1)])


@dataclass(frozen=True, eq=False)
class Answer:
    """A frame and what the model says about it.

    Attributes:
        frame: The whole frame, even where only a region is classified.
        prediction: The prediction after smoothing; without smoothing the same object as ``instant``.
        instant: The prediction for this frame alone.
        age_ms: Milliseconds from the capture of the frame to the answer.
        camera: The name of the camera.
    """

    frame: Frame
    prediction: Prediction
    instant: Prediction
    age_ms: float
    camera: str = "1"


class ExponentialSmoothing:
    """Exponential moving average of the class probabilities, over time rather than over frames.

    A frame that comes ``t`` seconds after the last one has the weight ``1 - exp(-t / seconds)``, so the answer follows
    a change by 63 % within ``seconds``, at any frame rate. The average starts again when the bundle changes.
    ``is_novel`` is what most frames of that time are. Task, novelty and timings stay those of the frame.
    """

    def __init__(self, seconds: float) -> None:
        """Start without an average.

        Args:
            seconds: The time constant of the average.

        Raises:
            ValueError: ``seconds`` is not a positive number.
        """
        if not (seconds > 0 and math.isfinite(seconds)):
            raise ValueError(f"seconds must be a positive number, not {seconds}")
        self.seconds = seconds
        self._mean: FloatArray | None = None
        self._novel = 0.0  # the share of novel frames
        self._bundle: tuple[object, ...] = ()
        self._captured = 0.0

    def __call__(self, prediction: Prediction, captured: float) -> Prediction:
        """Add a prediction to the average.

        Args:
            prediction: The prediction for one frame.
            captured: When the frame was captured, in seconds of a clock that does not jump (`Frame.captured`).

        Returns:
            The prediction with the averaged probabilities, and the label, confidence and ``is_novel`` that follow.
        """
        novel = float(bool(prediction.is_novel))
        bundle = (prediction.bundle, prediction.bundle_version, prediction.classes)
        if self._mean is None or bundle != self._bundle:
            self._mean, self._novel = prediction.probabilities, novel
        else:
            weight = -math.expm1(-max(0.0, captured - self._captured) / self.seconds)
            self._mean = self._mean + (prediction.probabilities - self._mean) * weight
            self._novel += (novel - self._novel) * weight
        self._bundle, self._captured = bundle, captured
        best = int(self._mean.argmax())
        return replace(
            prediction,
            label=prediction.classes[best],
            confidence=float(self._mean[best]),
            is_novel=None if prediction.is_novel is None else self._novel > 0.5,
            probabilities=self._mean,
        )


class Camera:
    """A source of a pipeline.

    Attributes:
        name: Its name in answers, health and metrics.
        source: Where its frames come from.
        dropped: Frames that were prepared, but replaced by a newer one before the model was free.
    """

    def __init__(self, name: str, source: Source, smoothing: Smoothing | None) -> None:
        self.name = name
        self.source = source
        self.dropped = 0
        self.smoothing = smoothing
        self.waiting: tuple[Frame, Prepared] | Exception | None = None
        self.ended = False


class Pipeline(Closing):
    """``for answer in Pipeline(source, classifier)`` gives answers until the sources end or `close` is called."""

    def __init__(
        self,
        source: Source | Mapping[str, Source],
        classifier: Classifier,
        every: int = 1,
        region: Region | None = None,
        smoothing: Smoothing | None = None,
    ) -> None:
        """Start to capture and prepare frames.

        Args:
            source: Where frames come from, or several sources by the names of their cameras (one alone is called "1").
                Frames of several cameras that wait at the same time go through the model together, as many as
                `Classifier.max_batch`; cameras take turns. `close` closes them.
            classifier: What answers.
            every: Answer only every n-th frame of each camera.
            region: The part of each frame to classify; None for the whole.
            smoothing: Called with a prediction and the time of its capture, returns the prediction to use; see
                `ExponentialSmoothing`. Each camera gets a copy of it.

        Raises:
            ValueError: ``every`` is below 1, or there is no source.
        """
        sources = {"1": source} if isinstance(source, Source) else dict(source)
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        if not sources:
            raise ValueError("a pipeline needs a source")
        self.cameras = [Camera(name, each, deepcopy(smoothing)) for name, each in sources.items()]
        self._turns = list(self.cameras)  # whose turn is next comes first
        self.classifier = classifier
        self._every = every
        self._region = region
        self._changed = threading.Condition()  # guards what waits
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._prepare, args=(camera,), name=f"duallora-edge {camera.name}", daemon=True)
            for camera in self.cameras
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Answer]:
        """Iterate over the answers; those of a camera come in the order of its frames.

        Returns:
            An iterator of `Answer`, which ends when all sources have. Frames on which the device fails have no answer.

        Raises:
            SourceError: A source broke.
            BackendError: The device failed `MAX_FAILURES` times in a row.
        """
        failures, given_back = 0, time.monotonic()
        while not self._stop.is_set():
            if time.monotonic() - given_back > GIVE_BACK_S:
                give_back_memory(collect=False)
                given_back = time.monotonic()
            taken = self._take()
            if taken is None:
                return
            if not taken:
                continue
            try:
                instants = self.classifier.answer([prepared for _, _, prepared in taken])
            except BackendError:
                failures += 1
                if failures == MAX_FAILURES:
                    raise
                continue
            failures, now = 0, time.monotonic()
            for (camera, frame, _), instant in zip(taken, instants, strict=True):
                prediction = camera.smoothing(instant, frame.captured) if camera.smoothing else instant
                yield Answer(frame, prediction, instant, 1000 * (now - frame.captured), camera.name)

    def stop(self) -> None:
        """End the answers after those in progress; a signal handler may call it."""
        self._stop.set()

    def close(self) -> None:
        """End the answers and close the sources. Does nothing the second time."""
        self.stop()
        for camera in self.cameras:
            camera.source.close()
        for thread in self._threads:
            thread.join()

    def _take(self) -> list[tuple[Camera, Frame, Prepared]] | None:
        """The frames that wait, at most a batch; cameras whose turn is over go to the end. None at the end of all."""
        taken: list[tuple[Camera, Frame, Prepared]] = []
        with self._changed:
            self._changed.wait_for(lambda: any(camera.waiting for camera in self.cameras), _POLL_S)
            for camera in list(self._turns):
                item = camera.waiting
                if item is None or len(taken) == self.classifier.max_batch:
                    continue
                camera.waiting = None
                if isinstance(item, EndOfStream):
                    camera.ended = True
                elif isinstance(item, Exception):
                    raise item
                else:
                    taken.append((camera, *item))
                    self._turns.remove(camera)
                    self._turns.append(camera)
            self._changed.notify_all()
            return None if not taken and all(camera.ended for camera in self.cameras) else taken

    def _prepare(self, camera: Camera) -> None:
        due = 0
        try:
            while not self._stop.is_set():
                frame = camera.source.read()
                if frame is None or frame.sequence < due:
                    continue
                due = frame.sequence + self._every
                part = self._region(frame) if self._region else frame
                self._hand_over(camera, (frame, self.classifier.prepare(part)), camera.source.live)
        except Exception as error:  # the end of the stream too; the iteration raises it
            self._hand_over(camera, error, False)

    def _hand_over(self, camera: Camera, item: tuple[Frame, Prepared] | Exception, replaces: bool) -> None:
        with self._changed:
            if replaces and camera.waiting is not None:
                camera.waiting = None
                camera.dropped += 1
            while not self._stop.is_set():
                if self._changed.wait_for(lambda: camera.waiting is None, _POLL_S):
                    camera.waiting = item
                    self._changed.notify_all()
                    return
