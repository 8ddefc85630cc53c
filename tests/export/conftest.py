"""Models to export: learned in a moment from generated images, with answers soft enough to show small errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duallora_edge.learner import methods
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.statistics.calibration import QUANTILES, SHAPES, TEMPERATURES, CalibrationCurve

SOFT = -torch.arange(len(TEMPERATURES), dtype=torch.float)  # held-back likelihoods that ask for the highest one


def soften(record: TaskRecord) -> TaskRecord:
    """The record with the highest temperature and a wide scale: probabilities, gates and novelty far from 0 and 1."""
    confidence = torch.linspace(100, 50, len(TEMPERATURES)).double().expand(len(SHAPES), -1)
    curve = CalibrationCurve(torch.zeros_like(confidence), confidence, torch.tensor([100.0, 50.0]).double())
    return replace(record, curve=curve, gate_nll=SOFT.clone(), novelty=torch.linspace(0, 4000, QUANTILES))


@pytest.fixture(scope="session")
def compose(
    tiny_backbone: Backbone, make_task: Callable[..., PreparedTask], learn: Callable[..., list[TaskRecord]]
) -> Callable[..., ComposedModel]:
    """``compose(["ab", "cd"], ["isolated", "previous"])``: a model of two tasks, one letter a class."""

    def make(
        tasks: Sequence[str],
        residuals: Sequence[str] = ("isolated", "isolated", "previous"),
        backbone: Backbone = tiny_backbone,
        method: str = "dual_lora",
        **options: Any,
    ) -> ComposedModel:
        records: list[TaskRecord] = []
        for index, classes in enumerate(tasks):
            kinds = range(2 * index, 2 * index + len(classes))
            task = make_task(f"task {index}", list(classes), kinds, train=6, validation=2)
            residual = residuals[index % len(residuals)]
            settings = {"residual": residual, "method": method, "learning_rate": 0.03, **options}
            records = learn([task], past=records, backbone=backbone, **settings)
        return methods.compose(backbone, [soften(record) for record in records]).eval()

    return make


@pytest.fixture
def run(tmp_path: Path, tiny_backbone: Backbone, two_tasks: list[TaskRecord]) -> RunDirectory:
    """A run on disk, named ``site``, that learned two tasks of two classes."""
    created = RunDirectory.create(tmp_path / "site", TrainConfig(), tiny_backbone.info)
    for record in two_tasks:
        created.commit(soften(record))
    return created


@pytest.fixture
def model(run: RunDirectory, tiny_backbone: Backbone) -> ComposedModel:
    """The model of ``run``."""
    return methods.compose(tiny_backbone, run.records()).eval()
