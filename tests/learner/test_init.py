"""What importing the learner does before PyTorch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRINT = """
import os, sys, duallora_edge.learner
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=str,
)
def test_threads_do_not_wait_in_a_loop_for_long(given: dict[str, str], expected: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", PRINT], env=environment | given, capture_output=True, text=True)
    assert done.stdout.split() == [expected, "False"]
