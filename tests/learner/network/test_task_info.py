"""Descriptions of tasks and backbones: they survive JSON, name what is wrong, and need no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from duallora_edge.learner.methods.scoring import CLASSIFIERS as SCORES
from duallora_edge.learner.network.task_info import CLASSIFIERS, TaskInfo
from duallora_edge.learner.network.task_record import TaskRecord


@pytest.mark.parametrize(
    "changes", [{}, {"classifier": "ridge", "gate": "open", "calibration": "none"}, {"counts": {}, "validation": {}}]
)
def test_a_description_survives_json(two_tasks: list[TaskRecord], changes: dict[str, object]) -> None:
    info = replace(two_tasks[1].info, **changes)  # type: ignore[arg-type]
    value = json.loads(json.dumps(info.to_json()))
    assert TaskInfo.from_json({**value, "of a later version": 1}) == info
    for key in value:
        with pytest.raises(ValueError, match=f"{key}: "):
            TaskInfo.from_json({name: part for name, part in value.items() if name != key})


def test_every_classifier_of_a_description_is_known() -> None:
    assert tuple(SCORES) == CLASSIFIERS


@pytest.mark.parametrize("module", ["task_info", "backbone_info"])
def test_descriptions_do_not_import_torch(module: str) -> None:
    code = f"import sys, duallora_edge.learner.network.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
