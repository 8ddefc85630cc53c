"""Edge devices: what is known about them, which one this machine is, and how fast a model may run there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duallora_edge.lazy import lazy_names

if TYPE_CHECKING:
    from duallora_edge.device_profiles.catalog import list_profiles
    from duallora_edge.device_profiles.detection import Detected, detect
    from duallora_edge.device_profiles.estimation import Estimate, Workload, estimate
    from duallora_edge.device_profiles.profile import DeviceProfile, JetPack, Mode, jetpacks
    from duallora_edge.device_profiles.targets import Target, load_profile, resolve_target

__all__ = [
    "Detected",
    "DeviceProfile",
    "Estimate",
    "JetPack",
    "Mode",
    "Target",
    "Workload",
    "detect",
    "estimate",
    "jetpacks",
    "list_profiles",
    "load_profile",
    "resolve_target",
]

# Imported when it is asked for: each child of the runtime needs the reader alone.
_MODULES = {
    "Detected": "detection",
    "DeviceProfile": "profile",
    "Estimate": "estimation",
    "JetPack": "profile",
    "Mode": "profile",
    "Target": "targets",
    "Workload": "estimation",
    "detect": "detection",
    "estimate": "estimation",
    "jetpacks": "profile",
    "list_profiles": "catalog",
    "load_profile": "targets",
    "resolve_target": "targets",
}

__getattr__ = lazy_names(__name__, _MODULES)
