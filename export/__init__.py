"""Export: from a run to a verified bundle or an adapter of PEFT. What it needs is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duallora_edge.lazy import lazy_names

if TYPE_CHECKING:
    from duallora_edge.export.bundle import Exported
    from duallora_edge.export.export import export_run
    from duallora_edge.export.peft import PeftAdapter, export_peft

__all__ = ["Exported", "PeftAdapter", "export_peft", "export_run"]

_MODULES = {"Exported": "bundle", "PeftAdapter": "peft", "export_peft": "peft", "export_run": "export"}

__getattr__ = lazy_names(__name__, _MODULES)
