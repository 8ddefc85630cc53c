"""Where the numbers of a run are not to be trusted, in one sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.report.definitions import span
from duallora_edge.learner.report.intervals import difference, wilson
from duallora_edge.learner.report.metrics import Cell, Metrics

# What counts as off: shares of images, measured against the end of an interval of 95 %.
KINDER, MISCALIBRATED, FALSE_ALARMS = 0.03, 0.05, 0.1
# Images that a novelty threshold rests on: with fewer the interval of the 5 % it promises goes beyond 15 %.
ENOUGH = 50


def doubts(metrics: Metrics, infos: Sequence[TaskInfo]) -> list[str]:
    """Sentences on a run: validation beside test where both were measured, and what the test images contradict."""
    found: list[str] = []
    validation, right, test = 0, 0.0, Cell()
    for index, info in enumerate(infos):
        images, accuracy = int(info.validation.get("images") or 0), info.validation.get("accuracy")
        cell = metrics.rows[index][index]
        if images and accuracy is not None and cell.n:
            validation, right, test = validation + images, right + images * accuracy, test + cell
    of_validation, of_test = wilson(right, validation), test.interval("correct")
    if of_validation and of_test:
        first, second = right / validation, test.correct / test.n
        line = f"Validation images: {100 * first:.1f} % right when learned, test images: {100 * second:.1f} %"
        if difference(first, of_validation, second, of_test)[0] > KINDER:
            line += (
                "; these are harder, so confidence and novelty are too good on paper: give validation images "
                "from another day or place (DIR/val)"
            )
        found.append(line)
    error = metrics.intervals["calibration_error"]
    if error and error[0] > MISCALIBRATED:
        found.append(f"Confidence is off by {span(error)} % on the test images; do not act on it alone")
    if reason := unreliable_novelty(metrics, infos):
        found.append(f"Novelty is unreliable: {reason}; bundles of this run will not say what is novel")
    return found


def unreliable_novelty(metrics: Metrics | None, infos: Sequence[TaskInfo]) -> str:
    """Why the novelty threshold of a run is not to be relied on, "" where nothing speaks against it.

    It is a quantile of the images that were left out of the statistics, so these must be enough. And what was measured
    on test images, if there are ``metrics``, must not contradict it.
    """
    left_out = sum(int(info.validation.get("left_out") or 0) for info in infos)
    if left_out < ENOUGH:
        return f"it rests on {left_out} image{'s' if left_out != 1 else ''} alone"
    alarms = metrics.intervals["false_novelty"] if metrics else None
    if alarms and alarms[0] > FALSE_ALARMS:
        return f"{span(alarms)} % of the test images of known classes are called novel, where 5 % are promised"
    return ""
