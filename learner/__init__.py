"""Learning: PyTorch is imported when something that needs it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duallora_edge.lazy import lazy_names

if TYPE_CHECKING:
    from duallora_edge.learner.callbacks import Callback
    from duallora_edge.learner.learner import Learner

__all__ = ["Callback", "Learner"]

_MODULES = {"Callback": "callbacks", "Learner": "learner"}

__getattr__ = lazy_names(__name__, _MODULES)
