"""What a lesson tells about the gate, against a slow count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from duallora_edge.learner.methods.lesson import validate_gate
from duallora_edge.learner.network.dynamic_memory import DynamicMemory
from duallora_edge.learner.statistics.calibration import TEMPERATURES
from duallora_edge.learner.statistics.gaussian import ClassStatistics, GaussianClassifier


def test_validation_of_the_gate() -> None:
    """Three classes of two tasks; every image is one of the second task, which has the last two classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    x = torch.from_numpy(rng.normal(size=(60, 4)) + 1.5 * rng.normal(size=(3, 4))[labels]).float()
    gaussian = GaussianClassifier.fit([ClassStatistics.of(x, torch.from_numpy(labels), 3)])
    memory = DynamicMemory(gaussian, [1, 2], 1.0, torch.device("cpu"))
    new = x[labels > 0]
    found = validate_gate(memory, new)
    right, nll = 0, [0.0] * len(TEMPERATURES)
    for row in (new @ memory.weight.T + memory.bias).double().tolist():
        for column, temperature in enumerate(TEMPERATURES):
            likelihoods = [math.exp((value - max(row)) / temperature) for value in row]
            own = sum(likelihoods[1:]) / sum(likelihoods)
            nll[column] -= math.log(own)
            right += column == 0 and own > 0.5
    assert found.task_accuracy == pytest.approx(right / len(new)) and 0.5 < right / len(new) < 1
    assert found.nll.tolist() == pytest.approx(nll, rel=1e-4)
