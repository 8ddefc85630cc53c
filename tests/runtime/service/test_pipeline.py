"""Frames go in order through three threads: files whole, a camera by its newest frame."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from duallora_edge.errors import BackendError, SourceError
from duallora_edge.runtime import Classifier, Prediction
from duallora_edge.runtime.classifier import Prepared
from duallora_edge.runtime.prediction import Timings
from duallora_edge.runtime.service import pipeline as pipeline_module
from duallora_edge.runtime.service.pipeline import MAX_FAILURES, ExponentialSmoothing, Pipeline, Region
from duallora_edge.runtime.sources import Frame, open_source

COLORS = {"red": (250, 5, 5), "green": (5, 250, 5), "blue": (5, 5, 250), "dark": (0, 0, 0)}


def picture(name: str) -> np.ndarray:
    return np.full((24, 36, 3), COLORS[name], np.uint8)


@pytest.fixture(scope="module")
def classifier(shared_bundle: Path) -> Classifier:
    return Classifier.load(shared_bundle, "cpu", 1)


class Failing(Classifier):
    """Fails at the answers whose number is in ``failing``."""

    failing: Sequence[int] = ()
    calls = 0

    def answer(self, prepared: Sequence[Prepared]) -> list[Prediction]:
        self.calls += 1
        if self.calls - 1 in self.failing:
            raise BackendError("The device hiccuped.")
        return super().answer(prepared)


@pytest.mark.parametrize(("every", "expected"), [(1, range(40)), (3, range(0, 40, 3)), (99, [0])])
def test_every_frame_of_a_file_in_order(classifier: Classifier, every: int, expected: Sequence[int]) -> None:
    names = [list(COLORS)[index % 4] for index in range(40)]
    with Pipeline(open_source([picture(name) for name in names]), classifier, every) as pipeline:
        answers = list(pipeline)
    assert [answer.frame.sequence for answer in answers] == list(expected)
    assert [answer.prediction.label for answer in answers] == [names[index] for index in expected]
    assert all(answer.age_ms >= 0 and answer.instant is answer.prediction for answer in answers)
    assert pipeline.cameras[0].dropped == 0


@pytest.mark.parametrize(("pause", "times"), [(0.0, 41), (3600.0, 0)])
def test_what_is_left_of_frames_is_given_back_now_and_then(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch, pause: float, times: int
) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(pipeline_module, "GIVE_BACK_S", pause)
    monkeypatch.setattr(pipeline_module, "give_back_memory", lambda collect: given_back.append(collect))
    with Pipeline(open_source([picture("red")] * 40), classifier) as pipeline:
        assert len(list(pipeline)) == 40
    assert not any(given_back) and (len(given_back) >= times if times else not given_back)


def test_a_slow_reader_of_a_camera_gets_the_newest(classifier: Classifier) -> None:
    source = open_source([picture("red")], live=True, rate=200, loop=True)
    with Pipeline(source, classifier) as pipeline:
        seen = []
        for answer in pipeline:
            seen.append(answer.frame.sequence)
            time.sleep(0.05)
            if len(seen) == 8:
                break
        stats = source.stats
    assert seen == sorted(seen) and seen[-1] > len(seen)
    assert pipeline.cameras[0].dropped + stats.dropped > 0
    assert stats.captured <= len(seen) + stats.dropped + pipeline.cameras[0].dropped + 4  # what is on its way


def test_the_same_answers_as_one_call(classifier: Classifier) -> None:
    generator = np.random.default_rng(0)
    frames = [generator.integers(0, 256, (30, 40 + n, 3), dtype=np.uint8) for n in range(20)]
    with Pipeline(open_source(frames), classifier) as pipeline:
        for answer, frame in zip(pipeline, frames, strict=True):
            assert np.array_equal(answer.prediction.probabilities, classifier(frame).probabilities)


def test_closing_ends_the_answers(classifier: Classifier) -> None:
    pipeline = Pipeline(open_source([picture("red")], live=True, rate=100, loop=True), classifier)
    closing = threading.Timer(0.2, pipeline.close)
    closing.start()
    assert sum(1 for _ in pipeline) > 0
    closing.join()
    pipeline.close()
    assert not any(thread.is_alive() for thread in pipeline._threads)


def test_a_source_that_breaks(classifier: Classifier) -> None:
    def frames() -> Iterator[np.ndarray]:
        yield picture("red")
        raise OSError("cable pulled")

    with Pipeline(open_source(frames()), classifier) as pipeline:
        answers = iter(pipeline)
        assert next(answers).prediction.label == "red"
        with pytest.raises(SourceError, match="cable pulled"):
            next(answers)


@pytest.mark.parametrize(
    ("failing", "answered"),
    [((), 30), ((0, 1, 7), 27), (range(5, 5 + MAX_FAILURES - 1), 21), (range(5, 5 + MAX_FAILURES), None)],
)
def test_a_device_that_fails(shared_bundle: Path, failing: Sequence[int], answered: int | None) -> None:
    classifier = Failing.load(shared_bundle, "cpu", 1)
    classifier.failing = failing  # type: ignore[attr-defined]
    with Pipeline(open_source([picture("red")] * 30), classifier) as pipeline:
        if answered is None:
            with pytest.raises(BackendError, match="hiccuped"):
                list(pipeline)
        else:
            assert len(list(pipeline)) == answered


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ((0, 0, 1, 1), (0, 0, 100, 200)),
        ((0.5, 0.25, 0.5, 0.5), (25, 100, 75, 200)),
        ((0.7, 0.9, 0.3, 0.1), (90, 140, 100, 200)),
        ((0.999, 0.999, 0.001, 0.001), (99, 199, 100, 200)),
    ],
)
def test_a_region(region: tuple[float, ...], expected: tuple[int, int, int, int]) -> None:
    pixels = np.arange(100 * 200 * 3, dtype=np.uint32).astype(np.uint8).reshape(100, 200, 3)
    top, left, bottom, right = expected
    part = Region(*region)(Frame(pixels, 0, 0.0, 0.0))
    assert np.array_equal(part.pixels, pixels[top:bottom, left:right])


@pytest.mark.parametrize(
    "region", [(-0.1, 0, 1, 1), (0, 0, 0, 1), (0.5, 0, 0.6, 1), (0, 1, 1, 1), (float("nan"), 0, 1, 1)]
)
def test_what_is_no_region(region: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must lie in the picture"):
        Region(*region)


def test_a_region_is_what_is_classified(classifier: Classifier) -> None:
    left, right = picture("red"), picture("blue")
    frame = np.concatenate([left, right], axis=1)
    with Pipeline(open_source([frame]), classifier, region=Region(0.5, 0, 0.5, 1)) as pipeline:
        (answer,) = pipeline
    assert answer.prediction.label == "blue" and answer.frame.pixels.shape == frame.shape


def test_every_must_be_positive(classifier: Classifier) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Pipeline(open_source([picture("red")]), classifier, every=0)


# -- several cameras ------------------------------------------------------------------------------------------


class Batching(Classifier):
    """Takes up to ``limit`` frames in one run, and notes how many it got."""

    limit = 8

    @property
    def max_batch(self) -> int:
        return self.limit

    def answer(self, prepared: Sequence[Prepared]) -> list[Prediction]:
        vars(self).setdefault("batches", []).append(len(prepared))
        time.sleep(0.005)
        return super().answer(prepared)


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_every_frame_of_several_files_in_batches(shared_bundle: Path, limit: int) -> None:
    classifier = Batching.load(shared_bundle, "cpu", 1)
    classifier.limit = limit  # type: ignore[attr-defined]
    counts = {"red": 30, "green": 5, "blue": 20, "dark": 1}
    sources = {name: open_source([picture(name)] * count) for name, count in counts.items()}
    with Pipeline(sources, classifier) as pipeline:
        answers = list(pipeline)
    for name, count in counts.items():
        mine = [answer for answer in answers if answer.camera == name]
        assert [answer.frame.sequence for answer in mine] == list(range(count))
        assert {answer.prediction.label for answer in mine} == {name}
    batches = classifier.batches  # type: ignore[attr-defined]
    assert sum(batches) == sum(counts.values()) and max(batches) <= limit
    assert limit == 1 or max(batches) > 1


def test_cameras_take_turns(shared_bundle: Path) -> None:
    """A model that is slower than all cameras together answers each as often."""
    classifier = Batching.load(shared_bundle, "cpu", 1)
    classifier.limit = 1  # type: ignore[attr-defined]
    rates = {"red": 500, "green": 150, "blue": 150, "dark": 150}
    sources = {name: open_source([picture(name)], live=True, rate=rate, loop=True) for name, rate in rates.items()}
    seen: list[str] = []
    with Pipeline(sources, classifier) as pipeline:
        for answer in pipeline:
            seen.append(answer.camera)
            if len(seen) == 80:
                break
    counts = Counter(seen[8:])
    assert len(counts) == 4 and max(counts.values()) - min(counts.values()) <= 4
    assert sum(camera.dropped + camera.source.stats.dropped for camera in pipeline.cameras) > 0


def test_cameras_are_smoothed_apart(classifier: Classifier) -> None:
    sources = {name: open_source([picture(name)] * 5) for name in ("red", "blue")}
    with Pipeline(sources, classifier, smoothing=ExponentialSmoothing(100.0)) as pipeline:
        assert all(answer.prediction.label == answer.camera for answer in pipeline)


def test_a_pipeline_needs_a_source(classifier: Classifier) -> None:
    with pytest.raises(ValueError, match="needs a source"):
        Pipeline({}, classifier)


# -- smoothing ------------------------------------------------------------------------------------------------


def prediction(probabilities: Sequence[float], version: int = 1) -> Prediction:
    values = np.array(probabilities, np.float32)
    return Prediction(
        "?", 0.0, "t", 1.0, 0.0, None, Timings(0, 0, 0), "b", version, values, tuple(map(str, range(len(values))))
    )


def test_smoothing_is_an_average_over_time() -> None:
    smoothing: Callable[[Prediction, float], Prediction] = ExponentialSmoothing(2.0)
    moments = [0.0, 0.5, 0.7, 3.0, 3.0, 9.0]
    values = [[1, 0], [0, 1], [0, 1], [0.2, 0.8], [1, 0], [0.5, 0.5]]
    mean = np.array(values[0])
    for index, (moment, value) in enumerate(zip(moments, values, strict=True)):
        if index:
            kept = np.exp(-(moment - moments[index - 1]) / 2.0)
            mean = kept * mean + (1 - kept) * np.array(value)
        smoothed = smoothing(prediction(value), moment)
        np.testing.assert_allclose(smoothed.probabilities, mean, atol=1e-6)
        assert smoothed.label == str(mean.argmax()) and smoothed.confidence == pytest.approx(mean.max())


@pytest.mark.parametrize(
    ("frames", "smoothed"),
    [("nnnnn", "nnnnn"), ("nknkk", "nnnnk"), ("kkkkn", "kkkkk"), ("knnnk", "kknnk"), ("?????", "?????")],
)
def test_smoothing_is_novel_where_most_frames_are(frames: str, smoothed: str) -> None:
    smoothing, novel = ExponentialSmoothing(0.25), {"n": True, "k": False, "?": None}  # 0.33 is the weight of a frame
    for moment, (frame, expected) in enumerate(zip(frames, smoothed, strict=True)):
        result = smoothing(replace(prediction([1, 0]), is_novel=novel[frame]), moment / 10)
        assert result.is_novel is novel[expected]


def test_smoothing_starts_anew_with_another_bundle() -> None:
    smoothing = ExponentialSmoothing(100.0)
    smoothing(prediction([1, 0], 1), 0.0)
    assert smoothing(prediction([0, 1], 2), 0.1).label == "1"
    assert len(smoothing(prediction([0, 0, 1], 2), 0.2).probabilities) == 3


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_a_time_constant_must_be_positive(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        ExponentialSmoothing(seconds)
