"""Metrics against slow references written from the formulas, and laws they must obey."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duallora_edge.errors import RunError
from duallora_edge.learner.report.intervals import difference, mean_of_independent, wilson
from duallora_edge.learner.report.metrics import BINS, Cell, Metrics, Predictions, TaskClasses, pool


def predictions(seed: int, n: int, task: int, sizes: list[int]) -> tuple[Predictions, range]:
    """Random answers on ``n`` images of one task, by a state that knows tasks of ``sizes`` classes."""
    generator = np.random.default_rng(seed)
    first = sum(sizes[:task])
    columns = range(first, first + sizes[task])
    labels = generator.integers(columns.start, columns.stop, n)
    logits = generator.normal(0, 2, (n, sum(sizes)))
    logits[np.arange(n), labels] += 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    tasks = generator.dirichlet(np.ones(len(sizes)), n)
    answers = Predictions(labels, probabilities.astype(np.float32), task, tasks.astype(np.float32))
    return answers, columns


def cell_with(correct: int, n: int, given: int | None = None) -> Cell:
    """A cell with the given counts, all answers with confidence 0.5."""
    bins = [0] * BINS
    bins[BINS // 2] = 1
    return Cell(
        n=n,
        correct=correct,
        correct_task_given=correct if given is None else given,
        bin_count=tuple(n * b for b in bins),
        bin_correct=tuple(correct * b for b in bins),
        bin_confidence=tuple(0.5 * n * b for b in bins),
    )


def metrics_of(accuracies: list[list[int]], given: list[list[int]] | None = None, n: int = 100) -> Metrics:
    """Metrics whose accuracy matrix is ``accuracies`` in percent; -1 stands for no test images."""
    given = given or accuracies
    rows = tuple(
        tuple(Cell() if a < 0 else cell_with(a * n // 100, n, b * n // 100) for a, b in zip(row, other, strict=True))
        for row, other in zip(accuracies, given, strict=True)
    )
    return Metrics(tuple(TaskClasses(f"t{i}", (f"c{i}",)) for i in range(len(rows))), rows)


def slow_calibration_error(answers: Predictions) -> float:
    """Guo et al. 2017, equation 3, bin by bin and image by image."""
    total = 0.0
    for m in range(BINS):
        lower, upper = m / BINS, (m + 1) / BINS
        inside = []
        for label, row in zip(answers.labels, answers.probabilities.astype(float), strict=True):
            if lower < row.max() <= upper:
                inside.append((row.argmax() == label, row.max()))
        if inside:
            accuracy = sum(right for right, _ in inside) / len(inside)
            confidence = sum(value for _, value in inside) / len(inside)
            total += len(inside) / len(answers.labels) * abs(accuracy - confidence)
    return total


def test_images_of_one_scene_count_once() -> None:
    answers, columns = predictions(0, 40, 1, [2, 5])
    frames = replace(answers, scenes=np.arange(40))
    twice = Predictions(
        *(np.repeat(getattr(answers, name), 2, axis=0) for name in ("labels", "probabilities")),
        answers.task,
        np.repeat(answers.task_probabilities, 2, axis=0),
        scenes=np.repeat(np.arange(40), 2),
    )
    single, pairs = Cell.from_predictions(frames, columns), Cell.from_predictions(twice, columns)
    assert (single.n, pairs.n, single.independent, pairs.independent) == (40, 80, 40, 40)
    assert pairs.interval("correct") == single.interval("correct")
    assert pool([single, pairs]).independent == 80
    of_pairs, of_single = (Metrics((TaskClasses("t", ("c",)),), ((cell,),)).intervals for cell in (pairs, single))
    assert of_pairs["last_accuracy"] == of_single["last_accuracy"]
    ends, other = of_pairs["calibration_error"], of_single["calibration_error"]
    assert ends and other and ends[1] - ends[0] == pytest.approx(other[1] - other[0], abs=0.05)
    with pytest.raises(ValueError, match="scenes"):
        replace(answers, scenes=np.arange(39))
    with pytest.raises(ValueError, match="independent"):
        replace(single, independent=41.0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("task", "sizes"), [(0, [3]), (0, [1, 4]), (1, [2, 5]), (2, [3, 1, 2, 4])])
def test_cell_against_a_loop_over_images(seed: int, task: int, sizes: list[int]) -> None:
    answers, columns = predictions(seed, 40, task, sizes)
    cell = Cell.from_predictions(answers, columns)
    correct = given = found = 0
    for label, row, tasks in zip(answers.labels, answers.probabilities, answers.task_probabilities, strict=True):
        correct += max(range(len(row)), key=row.__getitem__) == label
        given += max(columns, key=row.__getitem__) == label
        found += max(range(len(tasks)), key=tasks.__getitem__) == task
    assert (cell.n, cell.correct, cell.correct_task_given, cell.task_correct) == (40, correct, given, found)
    assert cell.accuracy == correct / 40
    assert cell.accuracy_task_given == given / 40
    assert cell.task_accuracy == found / 40
    assert cell.calibration_error == pytest.approx(slow_calibration_error(answers))


def test_classes_of_a_task_may_lie_anywhere() -> None:
    """Domain-incremental: a later task reuses columns of an earlier one."""
    probabilities = np.array([[0.1, 0.5, 0.1, 0.3], [0.4, 0.1, 0.3, 0.2]], dtype=np.float32)
    tasks = np.array([[0.9, 0.1], [0.2, 0.8]], dtype=np.float32)
    answers = Predictions(np.array([3, 0]), probabilities, 1, tasks)
    cell = Cell.from_predictions(answers, [3, 0])
    assert (cell.correct, cell.correct_task_given, cell.task_correct) == (1, 2, 1)


def test_probabilities_on_and_beyond_the_edges_of_bins() -> None:
    confidences = np.array([1 / BINS, 0.5, 1.0, 1.0000001], dtype=np.float64)
    probabilities = np.stack([confidences, np.zeros(4)], axis=1)
    cell = Cell.from_predictions(
        Predictions(np.zeros(4, np.int64), probabilities, 0, np.ones((4, 1), np.float32)),  # type: ignore[arg-type]
        [0, 1],
    )
    assert [m for m, count in enumerate(cell.bin_count) for _ in range(count)] == [0, 7, 14, 14]
    assert max(cell.bin_confidence) == 2.0


def test_no_images_make_the_empty_cell() -> None:
    answers, columns = predictions(0, 0, 0, [3, 2])
    cell = Cell.from_predictions(answers, columns)
    assert cell == Cell()
    assert cell.accuracy is cell.accuracy_task_given is cell.task_accuracy is cell.calibration_error is None


@pytest.mark.parametrize(
    ("labels", "probabilities", "task", "tasks", "message"),
    [
        ([0, 1], [[0.5, 0.5]], 0, [[1.0], [1.0]], "probabilities must be"),
        ([0], [[0.5, 0.5]], 0, [[1.0], [1.0]], "tasks must be"),
        ([0], [[math.nan, 0.5]], 0, [[1.0]], "must be probabilities"),
        ([0], [[-0.1, 1.1]], 0, [[1.0]], "must be probabilities"),
        ([2], [[0.5, 0.5]], 0, [[1.0]], "labels"),
        ([-1], [[0.5, 0.5]], 0, [[1.0]], "labels"),
        ([0], [[0.5, 0.5]], 1, [[1.0]], "task must be"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(
    labels: list[int], probabilities: list[list[float]], task: int, tasks: list[list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Predictions(np.array(labels), np.array(probabilities, np.float32), task, np.array(tasks, np.float32))


def test_a_label_outside_its_task_is_refused() -> None:
    answers, _ = predictions(0, 5, 0, [3, 2])
    with pytest.raises(ValueError, match="not among the classes"):
        Cell.from_predictions(answers, [3, 4])


@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_pooling_cells_equals_counting_all_images(seed: int, n: int, m: int) -> None:
    whole, columns = predictions(seed, n + m, 0, [3, 2])
    parts = [
        Predictions(whole.labels[s], whole.probabilities[s], 0, whole.task_probabilities[s])
        for s in (slice(0, n), slice(n, None))
    ]
    pooled = pool(Cell.from_predictions(part, columns) for part in parts)
    expected = Cell.from_predictions(whole, columns)
    assert (pooled.n, pooled.correct, pooled.bin_count) == (expected.n, expected.correct, expected.bin_count)
    assert pooled.bin_confidence == pytest.approx(expected.bin_confidence)


MATRIX = [[90], [70, 95], [80, 85, 60], [60, 88, 50, 99]]
GIVEN = [[90], [88, 96], [89, 95, 70], [85, 97, 70, 99]]


def test_summary_against_numbers_worked_out_by_hand() -> None:
    summary = metrics_of(MATRIX, GIVEN).summary
    assert summary == {
        "last_accuracy": pytest.approx((60 + 88 + 50 + 99) / 400),
        "last_accuracy_task_mean": pytest.approx((60 + 88 + 50 + 99) / 400),
        "last_accuracy_task_given": pytest.approx((85 + 97 + 70 + 99) / 400),
        "average_incremental_accuracy": pytest.approx((0.90 + 1.65 / 2 + 2.25 / 3 + 2.97 / 4) / 4),
        "forgetting_from_best": pytest.approx((0.30 + 0.07 + 0.10) / 3),
        "forgetting_since_learned": pytest.approx((0.30 + 0.07 + 0.10) / 3),
        "forgetting_task_given": pytest.approx((0.05 - 0.01 + 0.00) / 3),
        "backward_transfer": pytest.approx(-(0.30 + 0.07 + 0.10) / 3),
        "task_accuracy": 0.0,
        "calibration_error": pytest.approx(abs(2.97 / 4 - 0.5)),
        "false_novelty": 0.0,
        "novelty_detected": 0.0,
    }


def test_novelty_is_counted_on_known_and_on_unknown_images() -> None:
    def cell(n: int, novel: int, before: int = 0) -> Cell:
        return replace(cell_with(n, n), novel=novel, novel_before=before)

    tasks = (TaskClasses("one", ("a",)), TaskClasses("two", ("b",)), TaskClasses("again", ("a", "c")))
    rows = (
        (cell(100, 9),),
        (cell(100, 4), cell(50, 1, 45)),
        (cell(100, 6), cell(50, 2, 0), cell(10, 1, 7)),
    )
    metrics = Metrics(tasks, rows)
    assert metrics.summary["false_novelty"] == pytest.approx(9 / 160)
    assert metrics.summary["novelty_detected"] == pytest.approx(45 / 50)  # one class of the last task was known
    assert metrics.intervals["novelty_detected"] == wilson(45, 50)
    assert Metrics((tasks[0],), rows[:1]).summary["novelty_detected"] is None


def test_deciles_of_the_confidence() -> None:
    confidences = np.random.default_rng(0).beta(4, 1, 5000)
    probabilities = np.stack([confidences, 1 - confidences], axis=1).astype(np.float32)
    predictions = Predictions(np.zeros(5000, np.int64), probabilities, 0, np.ones((5000, 1), np.float32))
    found = Cell.from_predictions(predictions, [0, 1]).confidence_deciles
    expected = np.quantile(np.maximum(confidences, 1 - confidences), np.arange(1, 10) / 10)
    np.testing.assert_allclose(found, expected, atol=0.5 / BINS)
    assert Cell().confidence_deciles == ()


def test_intervals_are_those_of_the_numbers() -> None:
    metrics = metrics_of(MATRIX, GIVEN)
    for key, value in metrics.summary.items():
        low, high = metrics.intervals[key] or (1.0, 0.0)
        assert value is not None and low <= value <= high and high > low
    assert metrics.intervals["last_accuracy"] == pytest.approx(wilson(297, 400))
    assert metrics.per_task[2].now_interval == wilson(50, 100)
    drops = [difference(a, wilson(round(100 * a), 100) or (0, 1), b, wilson(round(100 * b), 100) or (0, 1))
             for a, b in ((0.9, 0.6), (0.95, 0.88), (0.6, 0.5))]  # fmt: skip
    assert metrics.intervals["forgetting_since_learned"] == mean_of_independent([0.3, 0.07, 0.1], drops)
    assert metrics.to_json()["intervals"]["last_accuracy"] == metrics.intervals["last_accuracy"]


def test_the_best_state_may_come_after_learning() -> None:
    metrics = metrics_of([[50], [80, 90], [60, 85, 90]])
    assert metrics.summary["forgetting_from_best"] == pytest.approx((0.20 + 0.05) / 2)
    assert metrics.summary["forgetting_since_learned"] == pytest.approx((-0.10 + 0.05) / 2)


def test_pooled_and_mean_accuracy_differ_for_unequal_tasks() -> None:
    rows = ((cell_with(9, 10),), (cell_with(9, 10), cell_with(30, 90)))
    metrics = Metrics((TaskClasses("a", ("x",)), TaskClasses("b", ("y",))), rows)
    assert metrics.summary["last_accuracy"] == pytest.approx(0.39)
    assert metrics.summary["last_accuracy_task_mean"] == pytest.approx((0.9 + 30 / 90) / 2)


def test_one_task_has_no_forgetting() -> None:
    metrics = metrics_of([[90]])
    for name in ("forgetting_from_best", "forgetting_since_learned", "forgetting_task_given", "backward_transfer"):
        assert metrics.summary[name] is None
    assert metrics.summary["last_accuracy"] == metrics.summary["average_incremental_accuracy"] == 0.9


def test_tasks_without_images_are_left_out() -> None:
    metrics = metrics_of([[90], [80, -1], [70, -1, 100]])
    assert metrics.summary["last_accuracy"] == pytest.approx(0.85)
    assert metrics.summary["forgetting_since_learned"] == pytest.approx(0.20)
    assert metrics.per_task[1].forgetting_from_best is None
    assert np.isnan(metrics.accuracy_matrix[2, 1])
    nothing = metrics_of([[-1], [-1, -1]])
    assert {*nothing.summary.values(), *nothing.intervals.values()} == {None}


@pytest.mark.parametrize("rows", [(), ((),), ((Cell(), Cell()),), ((Cell(),), (Cell(),))])
def test_rows_that_form_no_triangle_are_refused(rows: tuple[tuple[Cell, ...], ...]) -> None:
    with pytest.raises(ValueError, match="rows"):
        Metrics(tuple(TaskClasses("t", ("c",)) for _ in range(max(1, len(rows)))), rows)


def test_shared_classes_are_counted_once() -> None:
    rows = ((Cell(),), (Cell(), Cell()))
    shared = Metrics((TaskClasses("day", ("cat", "dog")), TaskClasses("night", ("dog", "owl"))), rows)
    assert (shared.class_count, shared.shares_classes) == (3, True)
    whole = cell_with(9, 10)
    measured = replace(shared, rows=((whole,), (whole, whole)))
    assert measured.summary["task_accuracy"] is measured.intervals["task_accuracy"] is None  # it is ambiguous
    separate = Metrics((TaskClasses("day", ("cat", "dog")), TaskClasses("night", ("owl",))), rows)
    assert (separate.class_count, separate.shares_classes) == (3, False)


triangles = st.integers(1, 6).flatmap(
    lambda size: st.tuples(*(st.lists(st.integers(-1, 100), min_size=k + 1, max_size=k + 1) for k in range(size)))
)


@given(triangles)
@settings(max_examples=100, deadline=None)
def test_laws_of_the_summary(triangle: tuple[list[int], ...]) -> None:
    metrics = metrics_of(list(triangle))
    summary = metrics.summary
    for name, value in summary.items():
        interval = metrics.intervals[name]
        assert (value is None) == (interval is None)
        if value is not None and interval is not None:
            assert interval[0] - 1e-9 <= value <= interval[1] + 1e-9
            lowest = -1 if "forgetting" in name or name == "backward_transfer" else 0
            assert lowest <= value <= 1
    if summary["forgetting_since_learned"] is not None:
        assert summary["backward_transfer"] == -summary["forgetting_since_learned"]
    for task in metrics.per_task:
        if task.forgetting_since_learned is not None:
            assert task.forgetting_from_best is not None
            assert task.forgetting_from_best >= task.forgetting_since_learned
    reread = Metrics.from_json(json.loads(json.dumps(metrics.to_json(), allow_nan=False)))
    assert reread == metrics
    assert reread.summary == summary


def test_json_keeps_real_cells_exactly() -> None:
    cell = Cell.from_predictions(*predictions(3, 50, 0, [4]))
    assert Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell


def _with(path: list[str | int], value: object) -> object:
    """The JSON of good metrics with one entry replaced."""
    root = json.loads(json.dumps(metrics_of(MATRIX).to_json()))
    inner = root
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return root


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        {},
        _with(["schema"], 99),
        _with(["rows"], []),
        _with(["rows", 0], [3]),
        _with(["rows", 0, 0, "n"], 1),
        _with(["rows", 0, 0, "n"], "100"),
        _with(["rows", 0, 0, "correct"], 101),
        _with(["rows", 0, 0, "correct"], True),
        _with(["rows", 0, 0, "bin_count"], [1, 2]),
        _with(["rows", 0, 0, "bin_confidence"], [math.nan] * BINS),
        _with(["rows", 0, 0, "surplus"], 0),
        _with(["tasks"], 7),
        _with(["tasks", 0], "name"),
    ],
)
def test_damaged_json_is_one_clear_error(damaged: object) -> None:
    with pytest.raises(RunError, match="run 'duallora-edge evaluate'"):
        Metrics.from_json(damaged)  # type: ignore[arg-type]
