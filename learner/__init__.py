"""Learning: PyTorch is imported when something that needs it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duallora_edge.learner.callbacks import Callback
    from duallora_edge.learner.learner import Learner

__all__ = ["Callback", "Learner"]

_MODULES = {"Callback": "callbacks", "Learner": "learner"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
