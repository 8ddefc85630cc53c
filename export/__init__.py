"""Export: from a run directory to a verified bundle. What it needs is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duallora_edge.lazy import lazy_names

if TYPE_CHECKING:
    from duallora_edge.export.bundle import Exported
    from duallora_edge.export.export import export_run

__all__ = ["Exported", "export_run"]

_MODULES = {"Exported": "bundle", "export_run": "export"}

__getattr__ = lazy_names(__name__, _MODULES)
