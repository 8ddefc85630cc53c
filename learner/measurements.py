"""The measured states of a run, by their digests: ``reports/rows.json``, and of one ``reports/answers.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping

from duallora_edge.errors import RunError
from duallora_edge.files import read_json, write_atomic, write_json
from duallora_edge.learner.distributed import main_only
from duallora_edge.learner.report.answers import Answers
from duallora_edge.learner.report.metrics import Cell, Metrics, Row, TaskClasses
from duallora_edge.learner.run_directory import ANSWERS, RunDirectory


@main_only
def measured_rows(run: RunDirectory) -> dict[str, Row]:
    """Rows measured earlier, by the digest of the state they were measured on: one cell for each task of the state.

    Raises `RunError` when they are damaged.
    """
    path = run.path / "reports" / "rows.json"
    if not path.is_file():
        return {}
    try:
        rows = {str(key): tuple(map(Cell.from_json, row)) for key, row in read_json(path).items()}
        active = run.active_tasks()
        for number in range(1, len(active) + 1):
            row = rows.get(run.digest(active[:number]))
            if row is not None and len(row) != number:
                raise ValueError(f"the state after {number} tasks has {len(row)} cells")
        return rows
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise RunError(
            f"{path} is damaged ({error}); delete it and run 'duallora-edge evaluate {run.path}'."
        ) from error


@main_only
def write_rows(run: RunDirectory, rows: Mapping[str, Row]) -> None:
    """Keep rows, by the digests of their states."""
    (run.path / "reports").mkdir(exist_ok=True)
    write_json(run.path / "reports" / "rows.json", {key: [c.to_json() for c in row] for key, row in rows.items()})


@main_only
def stored_answers(run: RunDirectory, state: str) -> Answers | None:
    """The answers of the state of this digest; None where there are those of another one, or nothing readable."""
    try:
        value = read_json(run.path / ANSWERS)
        return Answers.from_json(value) if value["state"] == state else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError):
        return None  # this costs another measurement at most


@main_only
def write_answers(run: RunDirectory, state: str, before: str, answers: Answers) -> None:
    """Keep the answers of a state in place of those of the one ``before``, beside which they are put."""
    (run.path / "reports").mkdir(exist_ok=True)
    answers = answers.after(stored_answers(run, before))
    value = json.dumps({"state": state, **answers.to_json()}, separators=(",", ":"), allow_nan=False)
    write_atomic(run.path / ANSWERS, value + "\n")


def stored_metrics(run: RunDirectory) -> Metrics:
    """The metrics of a run's states as they were measured last. Raises `RunError` when a state was not measured."""
    active, known = run.active_tasks(), measured_rows(run)
    infos = [run.read_info(task) for task in active]
    try:
        rows = tuple(known[run.digest(active[:k])] for k in range(1, len(active) + 1))
        return Metrics(tuple(TaskClasses(info.name, info.classes) for info in infos), rows)
    except (KeyError, ValueError) as error:
        raise RunError(f"The run {run.path} was not measured; 'duallora-edge evaluate {run.path}' does it.") from error
