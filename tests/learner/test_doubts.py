"""What is said of numbers that are not to be trusted."""

from __future__ import annotations

import pytest

from duallora_edge.learner.doubts import doubts, unreliable_novelty
from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.report.metrics import BINS, Cell, Metrics, TaskClasses


def info(validation: dict[str, float | None]) -> TaskInfo:
    return TaskInfo("t", ("a", "b"), "dual_lora", "none", 0, "", {}, validation)


def measured(correct: int, n: int, confidence: float, novel: int = 0) -> Metrics:
    place = min(int(confidence * BINS), BINS - 1)
    counts, right, sums = ([0] * BINS for _ in range(3))
    counts[place], right[place] = n, correct
    confidences = [float(value) for value in sums]
    confidences[place] = n * confidence
    cell = Cell(n, correct, correct, n, tuple(counts), tuple(right), tuple(confidences), novel)
    return Metrics((TaskClasses("t", ("a", "b")),), ((cell,),))


ENOUGH = {"images": 400, "accuracy": 0.9, "left_out": 400}


@pytest.mark.parametrize(
    ("metrics", "validation", "expected"),
    [
        (measured(90, 100, 0.9), ENOUGH, ["Validation images: 90.0 % right when learned, test images: 90.0 %"]),
        (measured(360, 500, 0.72), ENOUGH, ["; these are harder"]),
        (measured(360, 500, 0.95), ENOUGH, ["harder", "Confidence is off by"]),
        (measured(9, 10, 0.9), ENOUGH, ["Validation"]),  # ten images contradict nothing
        (measured(450, 500, 0.9, 200), ENOUGH, ["Validation", "Novelty is unreliable: 3"]),
        (measured(450, 500, 0.9, 40), ENOUGH, ["Validation"]),
        (measured(450, 500, 0.9), {"images": 0, "accuracy": None, "left_out": 400}, []),
        (measured(450, 500, 0.9), {"left_out": 30}, ["it rests on 30 images alone"]),
        (measured(450, 500, 0.9), {}, ["it rests on 0 images alone"]),
    ],
)
def test_doubts(metrics: Metrics, validation: dict[str, float | None], expected: list[str]) -> None:
    found = doubts(metrics, [info(validation)])
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found, strict=True))


@pytest.mark.parametrize(("images", "reliable"), [(0, False), (1, False), (40, False), (50, True), (10_000, True)])
def test_a_threshold_needs_images(images: int, reliable: bool) -> None:
    assert bool(unreliable_novelty(None, [info({"left_out": images})])) != reliable
