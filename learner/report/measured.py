"""What was measured of a run before, which needs no network to read."""

from __future__ import annotations

from duallora_edge.errors import RunError
from duallora_edge.files import read_json
from duallora_edge.learner.report.metrics import Cell, Row
from duallora_edge.learner.run_directory import RunDirectory


def measured_rows(run: RunDirectory) -> dict[str, Row]:
    """Rows measured earlier, by the digest of the state they were measured on: one cell for each task of the state.

    Raises `RunError` when they are damaged.
    """
    path = run.path / "reports" / "rows.json"
    if not path.is_file():
        return {}
    try:
        rows = {str(key): tuple(map(Cell.from_json, row)) for key, row in read_json(path).items()}
        head = run.head()
        for number in range(1, len(head) + 1):
            row = rows.get(run.digest(head[:number]))
            if row is not None and len(row) != number:
                raise ValueError(f"the state after {number} tasks has {len(row)} cells")
        return rows
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise RunError(
            f"{path} is damaged ({error}); delete it and run 'duallora-edge evaluate {run.path}'."
        ) from error
