"""What several tests of the learner measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.task_record import TaskRecord


@pytest.fixture(scope="session")
def accuracy(tiny_backbone: Backbone) -> Callable[..., float]:
    """``accuracy(records, task)``: share of the test images of a task that the model of the records gets right."""

    @torch.no_grad()
    def measure(records: Sequence[TaskRecord], task: PreparedTask, backbone: Backbone = tiny_backbone) -> float:
        model = compose(backbone, records)
        answers = model(torch.from_numpy(task.test.pixels.copy())).probabilities.argmax(dim=1)
        names = [model.catalogue.classes[i] for i in answers]
        return sum(a == b for a, b in zip(names, task.test.labels, strict=True)) / len(names)

    return measure
