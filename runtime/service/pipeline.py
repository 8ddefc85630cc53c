"""Frames of a source, classified one after the other, while the next ones are captured and prepared.

Three threads work at once: the source captures, one thread prepares, and the caller's thread runs the model. Each hands
over one frame at a time. With a live source, a newer frame replaces a waiting one, so an answer is never older than
these three steps take. With files, every frame is answered.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from duallora_edge.errors import BackendError
from duallora_edge.runtime.bundle import FloatArray
from duallora_edge.runtime.classifier import Classifier, Prepared
from duallora_edge.runtime.closing import Closing
from duallora_edge.runtime.prediction import Prediction
from duallora_edge.runtime.sources.frame import Frame
from duallora_edge.runtime.sources.source import EndOfStream, Source

# After this many failures of the device in a row, the next frame is not tried.
MAX_FAILURES = 10
_POLL_S = 0.2


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
    """

    frame: Frame
    prediction: Prediction
    instant: Prediction
    age_ms: float


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


class Pipeline(Closing):
    """``for answer in Pipeline(source, classifier)`` gives answers until the source ends or `close` is called."""

    def __init__(
        self,
        source: Source,
        classifier: Classifier,
        every: int = 1,
        region: Region | None = None,
        smoothing: Callable[[Prediction, float], Prediction] | None = None,
    ) -> None:
        """Start to capture and prepare frames.

        Args:
            source: Where frames come from; `close` closes it.
            classifier: What answers.
            every: Answer only every n-th frame.
            region: The part of each frame to classify; None for the whole.
            smoothing: Called with a prediction and the time of its capture, returns the prediction to use; see
                `ExponentialSmoothing`.

        Raises:
            ValueError: ``every`` is below 1.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        self.source = source
        self.classifier = classifier
        self.dropped = 0  # prepared, but replaced by a newer frame before the model was free
        self._every = every
        self._region = region
        self._smoothing = smoothing
        self._prepared: queue.Queue[tuple[Frame, Prepared] | Exception] = queue.Queue(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._prepare, name="duallora-edge prepare", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Answer]:
        """Iterate over the answers, in the order of the frames.

        Returns:
            An iterator of `Answer`. A single frame on which the device fails has no answer.

        Raises:
            SourceError: The source broke.
            BackendError: The device failed on `MAX_FAILURES` frames in a row.
        """
        failures = 0
        while not self._stop.is_set():
            try:
                item = self._prepared.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if isinstance(item, EndOfStream):
                return
            if isinstance(item, Exception):
                raise item
            frame, prepared = item
            try:
                (instant,) = self.classifier.answer([prepared])
            except BackendError:
                failures += 1
                if failures == MAX_FAILURES:
                    raise
                continue
            failures = 0
            prediction = self._smoothing(instant, frame.captured) if self._smoothing else instant
            yield Answer(frame, prediction, instant, 1000 * (time.monotonic() - frame.captured))

    def stop(self) -> None:
        """End the answers after the one in progress; a signal handler may call it."""
        self._stop.set()

    def close(self) -> None:
        """End the answers and close the source. Does nothing the second time."""
        self.stop()
        self.source.close()
        self._thread.join()

    def _prepare(self) -> None:
        due = 0
        try:
            while not self._stop.is_set():
                frame = self.source.read()
                if frame is None or frame.sequence < due:
                    continue
                due = frame.sequence + self._every
                part = self._region(frame) if self._region else frame
                self._hand_over((frame, self.classifier.prepare(part)), self.source.live)
        except Exception as error:  # the end of the stream too; the iteration raises it
            self._hand_over(error, False)

    def _hand_over(self, item: tuple[Frame, Prepared] | Exception, replaces: bool) -> None:
        if replaces:
            with suppress(queue.Empty):
                self._prepared.get_nowait()
                self.dropped += 1
        while not self._stop.is_set():
            with suppress(queue.Full):
                return self._prepared.put(item, timeout=_POLL_S)
