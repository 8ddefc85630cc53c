"""How the tasks of a run were trained: ``reports/history.jsonl``, one point of a training in each line."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from duallora_edge.errors import RunError
from duallora_edge.files import parse_json, read_limited, write_atomic
from duallora_edge.learner.callbacks import Callback, Point

HISTORY = "reports/history.jsonl"
_MAX_BYTES = 1 << 28  # some 10,000 tasks


class History(Callback):
    """Writes the points of trainings into the history of the run at ``run_path``.

    A training that was stopped comes again to the points behind its checkpoint, and one that begins anew to all of
    them; their old lines go, so that each point has one line.
    """

    def __init__(self, run_path: Path) -> None:
        self._run_path = run_path
        self._task = ""

    def trained(self, point: Point) -> None:
        if point.task != self._task:
            self._task = point.task
            keep_lines(
                self._run_path,
                lambda line: line["task"] != point.task or (line["steps"] == point.steps and line["step"] < point.step),
            )
        line = asdict(point)
        if not math.isfinite(point.loss):  # which JSON cannot hold
            line["loss"] = None
        path = self._run_path / HISTORY
        path.parent.mkdir(exist_ok=True)
        # No link is followed: it leads to what is not ours.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def keep_lines(run_path: Path, is_kept: Callable[[Mapping[str, Any]], bool]) -> None:
    """Drop the other lines of the history of a run, and broken ones; a history that is left empty is deleted.

    Raises `RunError` when it cannot be read.
    """
    path = run_path / HISTORY
    try:
        content = read_limited(path, _MAX_BYTES)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); delete it.") from error
    kept = []
    for text in content.splitlines(keepends=True):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a kill or a power cut may break the last line
            if is_kept(parse_json(text)) and text.endswith(b"\n"):
                kept.append(text)
    if not kept:
        path.unlink()
    elif b"".join(kept) != content:
        write_atomic(path, b"".join(kept))
