"""The definitions name exactly the numbers that exist, and format them for people."""

import pytest

from duallora_edge.learner.report.definitions import DEFINITIONS
from duallora_edge.learner.report.metrics import Cell, Metrics, TaskClasses


def test_every_number_has_a_definition_in_the_same_order() -> None:
    metrics = Metrics((TaskClasses("t", ("c",)),), ((Cell(),),))
    assert list(metrics.summary) == list(DEFINITIONS)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("last_accuracy", 0.8814, "88.1 %"),
        ("last_accuracy", None, "–"),
        ("last_accuracy", 1.0, "100.0 %"),
        ("forgetting_from_best", -0.0001, "0.0 points"),
        ("backward_transfer", -0.123, "-12.3 points"),
    ],
)
def test_format(name: str, value: float | None, text: str) -> None:
    assert DEFINITIONS[name].format(value) == text
