"""Answers by class: counted, bounded, stored, and put beside those of the state before."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duallora_edge.learner.report.answers import (
    MOST,
    SIDE,
    Answers,
    Change,
    by_class,
    changes,
    confused_pairs,
)
from duallora_edge.learner.report.metrics import Cell, Metrics, Predictions, TaskClasses


def predictions(task: int, labels: list[int], answers: list[int], classes: int, **more: Any) -> Predictions:
    """Answers of falling confidence: 0.9, 0.899, ..."""
    confidence = 0.9 - 0.001 * np.arange(len(labels))
    probabilities = np.repeat((1 - confidence)[:, None] / (classes - 1), classes, axis=1).astype(np.float32)
    probabilities[np.arange(len(labels)), answers] = confidence
    return Predictions(np.array(labels), probabilities, task, np.full((len(labels), 3), 0.3, np.float32), **more)


def frames(numbers: np.ndarray) -> np.ndarray:
    """Grey frames of 128 px, the brightness of each is its number."""
    return np.repeat(numbers.astype(np.uint8), 128 * 128 * 3).reshape(-1, 128, 128, 3)


def brightness(jpeg: bytes) -> int:
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG" and image.size == (SIDE, SIDE)
        return round(np.asarray(image).mean())


TASKS = (TaskClasses("one", ("a", "b")), TaskClasses("two", ("c", "d")))


def stream(before: list[int], now: tuple[list[int], list[int]]) -> tuple[Metrics, Answers]:
    """Two tasks of two classes with ten test images a class, and the answers that the two states gave."""
    first = predictions(0, [0] * 10 + [1] * 10, before, 2)
    second = [predictions(i, [2 * i] * 10 + [2 * i + 1] * 10, now[i], 4) for i in (0, 1)]
    rows = [(first, [[0, 1]]), *((p, [[2 * p.task, 2 * p.task + 1]]) for p in second)]
    cells = [Cell.from_predictions(p, columns[0]) for p, columns in rows]
    answers = Answers.joined([Answers.of_task(p, None) for p in second]).after(Answers.of_task(first, None))
    return Metrics(TASKS, ((cells[0],), (cells[1], cells[2]))), answers


RIGHT = [0] * 10 + [1] * 10
FELL = stream(RIGHT, ([3] * 9 + [0] + [1] * 10, [2] * 8 + [3, 3] + [3] * 10))


def test_pictures_are_of_the_most_confident_mistakes_and_of_what_is_called_novel() -> None:
    labels = [0] * 40
    answers = [i % 2 for i in range(40)]
    novel = np.arange(40) >= 35
    found = Answers.of_task(predictions(0, labels, answers, 2, novel=novel), frames)
    assert found.counts == {(0, 0, 0): 20, (0, 0, 1): 20}
    assert [brightness(e.jpeg) for e in found.mistakes] == list(range(1, 40, 2))[:MOST]
    assert [brightness(e.jpeg) for e in found.novel] == [35, 36, 37, 38, 39]
    assert [(e.label, e.answer) for e in found.novel] == [(0, 1), (0, 0)] * 2 + [(0, 1)]
    assert found.mistakes[0].confidence == pytest.approx(0.899)
    assert found.mistakes[0].uri.startswith("data:image/jpeg;base64,")


def test_pictures_of_all_tasks_are_bounded() -> None:
    parts = [Answers.of_task(predictions(task, [0] * 30, [1] * 30, 2), frames) for task in range(3)]
    joined = Answers.joined(parts)
    assert len(joined.mistakes) == MOST and joined.counts[2, 0, 1] == 30
    assert [e.confidence for e in joined.mistakes] == sorted((e.confidence for e in joined.mistakes), reverse=True)
    assert {e.task for e in joined.mistakes} == {0, 1, 2}
    assert sum(len(e.jpeg) for e in joined.mistakes) < 100_000


def test_without_frames_there_are_no_pictures() -> None:
    novel = np.ones(2, np.bool_)
    found = Answers.of_task(predictions(0, [0, 0], [0, 1], 2, novel=novel), None)
    assert found.counts and not found.mistakes and not found.novel


def test_answers_read_back() -> None:
    answers = Answers.of_task(predictions(0, [0, 1, 1], [1, 1, 0], 2, novel=np.array([True, False, True])), frames)
    answers = answers.after(answers)
    assert answers.right_before == {(0, 0): 0, (0, 1): 1}
    assert Answers.from_json(json.loads(json.dumps(answers.to_json()))) == answers


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["counts"].pop(),
        lambda v: v["counts"].append([0, 0, 4, 1]),
        lambda v: v["counts"].append([2, 0, 0, 1]),
        lambda v: v["counts"].append([0, 1, 0, 0]),
        lambda v: v["counts"][0].__setitem__(3, 5),
        lambda v: v["mistakes"].append({"task": 0, "label": 9, "answer": 0, "confidence": 0.5, "jpeg": ""}),
        lambda v: v["mistakes"].append({"task": 0, "label": 0, "answer": 3, "confidence": float("nan"), "jpeg": ""}),
    ],
)
def test_answers_that_do_not_fit_the_metrics_are_seen(change: Callable[[Any], None]) -> None:
    metrics, answers = FELL
    value = answers.to_json()
    assert Answers.from_json(value).fits(metrics)
    change(value)
    assert not Answers.from_json(value).fits(metrics)


@pytest.mark.parametrize("value", [{}, {"counts": 3}, {"counts": [[1]]}, {"counts": [], "mistakes": [{}]}])
def test_what_are_no_answers_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Answers.from_json({"right_before": None, "mistakes": [], "novel": [], **value} if value else value)


def test_pairs_and_classes_begin_with_the_worst() -> None:
    metrics, answers = FELL
    pairs = confused_pairs(metrics, answers)
    assert [(p.label, p.answer, p.task, p.answer_task, p.images, p.of) for p in pairs] == [
        ("a", "d", 0, 1, 9, 10),
        ("c", "d", 1, 1, 2, 10),
    ]
    results = by_class(metrics, answers)
    assert [(one.name, one.task, one.right, one.n, one.taken_for) for one in results] == [
        ("a", 0, 1, 10, pairs[0]),
        ("c", 1, 8, 10, pairs[1]),
        ("b", 0, 10, 10, None),
        ("d", 1, 10, 10, None),
    ]
    assert results[0].interval == pytest.approx((0.0179, 0.4042), abs=1e-4)
    assert answers.confusion(metrics).tolist() == [[1, 0, 0, 9], [0, 10, 0, 0], [0, 0, 8, 2], [0, 0, 0, 10]]


def test_images_of_few_scenes_say_less_of_a_class() -> None:
    metrics, answers = FELL
    cells = tuple(Cell.from_json({**cell.to_json(), "independent": 5.0}) for cell in metrics.rows[1])
    few = by_class(Metrics(TASKS, (metrics.rows[0], cells)), answers)
    assert few[0].interval[1] - few[0].interval[0] > 0.5


def test_a_change_within_the_interval_is_not_told() -> None:
    tasks, classes = changes(*FELL)
    assert [(c.name, c.before, c.now, c.is_told) for c in tasks] == [("one", 1.0, 0.55, True)]
    assert [(c.name, c.before, c.now, c.is_told) for c in classes] == [("a", 1.0, 0.1, True), ("b", 1.0, 1.0, False)]
    assert changes(FELL[0], None)[1] == []
    small = changes(*stream(RIGHT, ([3] + [0] * 9 + [1] * 10, [2] * 10 + [3] * 10)))
    assert not any(change.is_told for kind in small for change in kind)


@pytest.mark.parametrize("entry", [((0, 9), 1), ((9, 0), 1), ((1, 2), 1), ((0, 0), 11), ((0, 0), -1), ((-1, 0), 1)])
def test_of_other_test_images_no_change_is_told(entry: tuple[tuple[int, int], int]) -> None:
    metrics, answers = FELL
    assert changes(metrics, replace(answers, right_before=dict([entry])))[1] == []


def test_a_gain_is_told() -> None:
    tasks, classes = changes(*stream([1] * 20, (RIGHT, [2] * 10 + [3] * 10)))
    assert [c.is_told for c in (*tasks, *classes)] == [True, False, True]
    assert tasks[0].interval[0] > 0


def test_the_first_task_changed_nothing() -> None:
    only = predictions(0, [0, 1], [0, 0], 2)
    metrics = Metrics(TASKS[:1], ((Cell.from_predictions(only, [0, 1]),),))
    assert changes(metrics, Answers.of_task(only, None)) == ([], [])


@pytest.mark.parametrize(("interval", "told"), [((-0.2, -0.1), True), ((-0.1, 0.0), False), ((0.01, 0.1), True)])
def test_told(interval: tuple[float, float], told: bool) -> None:
    assert Change("t", 0.5, 0.5, interval).is_told is told
