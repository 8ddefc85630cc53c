"""Learning: PyTorch is imported when something that needs it is used."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from duallora_edge.lazy import lazy_names

if TYPE_CHECKING:
    from duallora_edge.learner.callbacks import Callback
    from duallora_edge.learner.learner import Learner

__all__ = ["Callback", "Learner"]

_MODULES = {"Callback": "callbacks", "Learner": "learner"}

__getattr__ = lazy_names(__name__, _MODULES)

# The threads of GNU OpenMP wait for each other in a loop that keeps their processors busy. Beside another busy program
# they wait for threads that cannot run: two trainings at once took up to 37 times as long (benchmarks/RESULTS.md). This
# is read when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
