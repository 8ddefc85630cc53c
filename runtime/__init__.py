"""The part that runs on the device. It needs NumPy and Pillow; inference libraries are imported when used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duallora_edge.lazy import lazy_names

if TYPE_CHECKING:
    from duallora_edge.runtime.bundle import Bundle
    from duallora_edge.runtime.classifier import Classifier, Health, Swap
    from duallora_edge.runtime.prediction import Prediction
    from duallora_edge.runtime.preprocess import Preprocessing, read_image
    from duallora_edge.runtime.service.monitor import Monitor
    from duallora_edge.runtime.service.pipeline import Answer, ExponentialSmoothing, Pipeline, Region
    from duallora_edge.runtime.sources import Frame, Source, open_source

__all__ = [
    "Answer",
    "Bundle",
    "Classifier",
    "ExponentialSmoothing",
    "Frame",
    "Health",
    "Monitor",
    "Pipeline",
    "Prediction",
    "Preprocessing",
    "Region",
    "Source",
    "Swap",
    "open_source",
    "read_image",
]

# Imported on first use, so that importing the package stays quick.
_MODULES = {
    "Answer": "service.pipeline",
    "Bundle": "bundle",
    "Classifier": "classifier",
    "ExponentialSmoothing": "service.pipeline",
    "Frame": "sources",
    "Health": "classifier",
    "Monitor": "service.monitor",
    "Pipeline": "service.pipeline",
    "Prediction": "prediction",
    "Preprocessing": "preprocess",
    "Region": "service.pipeline",
    "Source": "sources",
    "Swap": "classifier",
    "open_source": "sources",
    "read_image": "preprocess",
}

__getattr__ = lazy_names(__name__, _MODULES)
