"""Frames of every kind in, one typed answer out, from one thread or from eight."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from duallora_edge.errors import BackendError, DataError
from duallora_edge.runtime import Classifier, Frame, Prediction
from duallora_edge.runtime.backends.contract import GoldenCheck
from duallora_edge.runtime.backends.ladder import Backend
from duallora_edge.runtime.bundle import Bundle, Outputs


@pytest.fixture(scope="module")
def classifier(shared_bundle: Path) -> Classifier:
    return Classifier.load(shared_bundle, threads=1)


def flat(color: tuple[int, ...], height: int = 40, width: int = 64, dtype: npt.DTypeLike = np.uint8) -> np.ndarray:
    return np.full((height, width, len(color)), color, dtype=dtype)


@pytest.mark.parametrize(
    ("frame", "label", "task"),
    [
        (flat((250, 5, 5)), "red", "warm"),
        (flat((5, 5, 250)), "blue", "cold"),
        (flat((5, 5, 250), 720, 1280), "blue", "cold"),
        (flat((5, 5, 250), 1, 1), "blue", "cold"),
        (flat((0, 0, 0))[:, :, 0], "dark", "cold"),
        (flat((0,)), "dark", "cold"),
        (flat((250, 5, 5, 255)), "red", "warm"),
        (flat((65000, 10, 10), dtype=np.uint16), "red", "warm"),
        (flat((250, 5, 5))[::-2, ::-3], "red", "warm"),
        (np.asfortranarray(flat((250, 5, 5))), "red", "warm"),
    ],
)
def test_frames_of_every_kind(classifier: Classifier, frame: np.ndarray, label: str, task: str) -> None:
    prediction = classifier(frame)
    assert (prediction.label, prediction.task) == (label, task)
    assert 0.9 < prediction.confidence <= 1 and 0.5 < prediction.task_confidence <= 1


@pytest.mark.parametrize("frame", [None, "photo.jpg", np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3)), []])
def test_what_is_no_frame(classifier: Classifier, frame: object) -> None:
    with pytest.raises(DataError):
        classifier(frame)  # type: ignore[arg-type]


def test_a_prediction_is_complete(classifier: Classifier, numpy_outputs: Callable[..., dict[str, np.ndarray]]) -> None:
    frame = flat((30, 60, 40), 16, 16)
    prediction = classifier(frame)
    expected = numpy_outputs(frame[None])
    np.testing.assert_allclose(prediction.probabilities, expected["probabilities"][0], atol=1e-5)
    assert prediction.novelty == pytest.approx(30 / 255)
    assert prediction.top(1) == [(prediction.label, prediction.confidence)]
    assert len(prediction.top(99)) == 4
    ranked = np.sort(expected["probabilities"][0])[::-1]
    np.testing.assert_allclose([value for _, value in prediction.top(4)], ranked, atol=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        prediction.top(0)
    document = json.loads(json.dumps(prediction.to_json(top=2)))
    assert len(document["top"]) == 2 and document["is_novel"] is False
    assert set(document["timings"]) == {"preprocess_ms", "infer_ms", "postprocess_ms"}
    assert all(value >= 0 for value in document["timings"].values())


@pytest.mark.parametrize(("threshold", "grey", "expected"), [(0.5, 200, True), (0.5, 20, False), (None, 200, None)])
def test_novelty(make_bundle: Callable[..., Path], threshold: float | None, grey: int, expected: bool | None) -> None:
    classifier = Classifier.load(make_bundle(novelty_threshold=threshold))
    assert classifier(flat((grey,))).is_novel is expected


def test_bgr_frames(shared_bundle: Path, classifier: Classifier) -> None:
    assert Classifier.load(shared_bundle, color="bgr")(flat((5, 5, 250))).label == "red"
    assert classifier(flat((5, 5, 250))).label == "blue"
    with pytest.raises(ValueError, match="'rgb' or 'bgr'"):
        Classifier.load(shared_bundle, color="yuv")


def test_what_a_classifier_tells(classifier: Classifier, shared_bundle: Path) -> None:
    assert classifier.classes == ("red", "green", "blue", "dark")
    assert classifier.tasks == ("warm", "cold")
    assert classifier.bundle.path == shared_bundle
    assert classifier.backend.name in str(classifier.backend)


def same(one: Prediction, other: Prediction) -> bool:
    return np.array_equal(one.probabilities, other.probabilities) and one.novelty == other.novelty


def test_a_batch_equals_single_frames(classifier: Classifier) -> None:
    frames = [flat((200, 10, 60), 30, 50), flat((10, 10, 10), 16, 16), flat((90,), 100, 20)]
    batch = classifier.batch(frames)
    for prediction, frame in zip(batch, frames, strict=True):
        np.testing.assert_allclose(prediction.probabilities, classifier(frame).probabilities, atol=1e-6)
    assert classifier.batch([]) == []


@pytest.mark.parametrize("as_frame", [False, True])
def test_crops_are_answered_as_one_batch(shared_bundle: Path, as_frame: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the boxes, and also of a frame in another channel order."""
    classifier = Classifier.load(shared_bundle, color="rgb" if as_frame else "bgr")
    pixels = np.zeros((40, 90, 3), np.uint8)
    for column, colour in enumerate(((250, 5, 5), (5, 250, 5), (5, 5, 250))):
        pixels[:, 30 * column : 30 * column + 30] = colour
    frame = Frame(pixels, 0, 0.0, 0.0) if as_frame else pixels[:, :, ::-1]
    calls: list[int] = []
    answer = classifier.answer
    monkeypatch.setattr(classifier, "answer", lambda prepared: calls.append(len(prepared)) or answer(prepared))
    boxes = np.array([[60, 0, 90, 40], [-5.5, -9, 29.9, 99], [31.2, 3, 58.7, 20]], np.float32)
    assert [prediction.label for prediction in classifier.crops(frame, boxes)] == ["blue", "red", "green"]
    assert classifier.crops(frame, np.empty((0, 4), np.float32)) == [] and calls == [3, 0]


def test_eight_threads_answer_as_one(classifier: Classifier) -> None:
    generator = np.random.default_rng(0)
    frames = [generator.integers(0, 256, (20 + n % 7, 30, 3), dtype=np.uint8) for n in range(200)]
    alone = [classifier(frame) for frame in frames]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(classifier, frames))
    assert all(map(same, alone, together))


@settings(max_examples=30, deadline=None)
@given(
    frame=arrays.arrays(
        st.sampled_from([np.uint8, np.uint16]),
        st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(
            lambda size: st.sampled_from([size, (*size, 1), (*size, 3), (*size, 4)])
        ),
    )
)
def test_every_frame_gets_a_distribution(classifier: Classifier, frame: np.ndarray) -> None:
    prediction = classifier(frame)
    assert prediction.probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert prediction.confidence == prediction.probabilities.max()


def test_outputs_that_are_not_numbers_are_an_error(shared_bundle: Path) -> None:
    broken = Outputs(
        np.full((1, 4), np.nan, np.float32),
        np.ones((1, 2), np.float32),
        np.ones(1, np.float32),
        np.ones((1, 3), np.float32),
    )
    backend = Backend("cpu", lambda images: broken, GoldenCheck(1, 1, 0, 0, 0, 1), {})
    with pytest.raises(BackendError, match="not numbers"):
        Classifier(Bundle.open(shared_bundle), backend)(flat((1, 2, 3)))
