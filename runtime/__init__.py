"""What runs on the device: NumPy and Pillow, and an inference library that is imported when it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duallora_edge.runtime.bundle import Bundle
    from duallora_edge.runtime.classifier import Classifier, Health, Swap
    from duallora_edge.runtime.prediction import Prediction
    from duallora_edge.runtime.preprocess import Preprocessing
    from duallora_edge.runtime.sources import Frame, Source, open_source

__all__ = ["Bundle", "Classifier", "Frame", "Health", "Prediction", "Preprocessing", "Source", "Swap", "open_source"]

_MODULES = {
    "Bundle": "bundle",
    "Classifier": "classifier",
    "Prediction": "prediction",
    "Swap": "classifier",
    "Health": "classifier",
    "Preprocessing": "preprocess",
    "Frame": "sources",
    "Source": "sources",
    "open_source": "sources",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
