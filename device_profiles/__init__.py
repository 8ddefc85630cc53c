"""What is known about edge devices, which one this is, and what to expect from a model on it."""

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
