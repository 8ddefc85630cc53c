"""The measured states of a run: ``reports/rows.json``, by the digest of the state that each row is of."""

from __future__ import annotations

from collections.abc import Mapping

from duallora_edge.errors import RunError
from duallora_edge.files import read_json, write_json
from duallora_edge.learner.distributed import main_only
from duallora_edge.learner.report.metrics import Cell, Metrics, Row, TaskClasses
from duallora_edge.learner.run_directory import RunDirectory


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


def stored_metrics(run: RunDirectory) -> Metrics:
    """The metrics of a run's states as they were measured last. Raises `RunError` when a state was not measured."""
    active, known = run.active_tasks(), measured_rows(run)
    infos = [run.read_info(task) for task in active]
    try:
        rows = tuple(known[run.digest(active[:k])] for k in range(1, len(active) + 1))
        return Metrics(tuple(TaskClasses(info.name, info.classes) for info in infos), rows)
    except (KeyError, ValueError) as error:
        raise RunError(f"The run {run.path} was not measured; 'duallora-edge evaluate {run.path}' does it.") from error
