"""Export: from a run directory to a verified bundle. What it needs is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duallora_edge.export.bundle import Exported
    from duallora_edge.export.export import export_run

__all__ = ["Exported", "export_run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from duallora_edge.export import bundle, export

    return getattr(export if name == "export_run" else bundle, name)
