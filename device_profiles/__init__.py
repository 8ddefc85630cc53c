"""Edge devices: what is known about them, which one this machine is, and how fast a model may run there."""

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
