"""Finding a profile by name, and turning a target into what the exporter has to write."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duallora_edge.device_profiles.catalog import list_profiles, names, packaged
from duallora_edge.device_profiles.detection import detect
from duallora_edge.device_profiles.profile import DeviceProfile, JetPack, jetpacks
from duallora_edge.device_profiles.reader import did_you_mean
from duallora_edge.errors import ProfileError

DEFAULT_JETSON = "orin-nano-8gb"


@dataclass(frozen=True)
class Target:
    """A device together with the software on it: what an exported model has to fit.

    ``jetpack`` and ``tensorrt`` are None for a device that is not a Jetson. ``reason`` says in words how the
    profile and the JetPack were chosen.
    """

    profile: DeviceProfile
    jetpack: str | None
    tensorrt: str | None
    opset: int
    ir_version: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        """The choice, with the profile by its name."""
        return {
            "profile": self.profile.name,
            "jetpack": self.jetpack,
            "tensorrt": self.tensorrt,
            "opset": self.opset,
            "ir_version": self.ir_version,
            "reason": self.reason,
        }


def load_profile(name: str) -> DeviceProfile:
    """The profile called ``name``: a name or alias in any case, ``jetson``, or the path of a YAML file.

    ``jetson`` is the Jetson this runs on, elsewhere `DEFAULT_JETSON`. Raises `ProfileError`.
    """
    if name.lower().endswith((".yaml", ".yml")):
        return DeviceProfile.from_file(Path(name))
    wanted = name.strip().lower()
    if wanted == "jetson":
        wanted = _jetson()[0]
    if wanted in names():
        return packaged(wanted)
    profiles = list_profiles()
    by_alias = {alias.lower(): profile for profile in profiles for alias in profile.aliases}
    if wanted in by_alias:
        return by_alias[wanted]
    hint = did_you_mean(wanted, ["jetson", *names(), *by_alias])
    hint = hint or " 'duallora-edge devices' lists the known ones; a path to a .yaml file works too."
    raise ProfileError(f"No device profile is called '{name[:80]}'.{hint}")


def resolve_target(target: str, jetpack: str | None = None) -> Target:
    """What to export for ``target`` (see `load_profile`) with a JetPack ("6.2", a release of it, or "6").

    Without ``jetpack``: the one installed on this machine when ``target`` is ``jetson`` and this is one,
    otherwise the default of the profile. Raises `ProfileError` when the device or the JetPack is unknown,
    the device does not run that JetPack, or it is too old to export for.
    """
    reason, installed = "", None
    if target.strip().lower() == "jetson":
        target, reason, installed = _jetson()
    profile = load_profile(target)
    reason = reason or f"{target} is {profile.title}"
    if profile.opset is not None and profile.ir_version is not None:
        if jetpack is not None:
            raise ProfileError(f"{profile.name} has no JetPack; leave out the JetPack version.")
        return Target(profile, None, None, profile.opset, profile.ir_version, reason)
    if jetpack is None:
        chosen = installed or str(profile.default_jetpack)
        reason += f"; JetPack {chosen} is " + ("installed here" if installed else "its default")
    else:
        chosen = jetpack
        reason += f"; JetPack {chosen} was asked for"
    line = _line(profile, chosen)
    if line.refused or line.opset is None or line.ir_version is None:
        remedy = _other_lines(profile)
        raise ProfileError(f"{profile.name} with JetPack {chosen} cannot be exported for: {line.refused}; {remedy}.")
    return Target(profile, line.version, line.tensorrt, line.opset, line.ir_version, reason)


def _jetson() -> tuple[str, str, str | None]:
    """Name of the profile that ``jetson`` means, why, and the JetPack installed here if it is this one."""
    here = detect()
    if here.is_jetson and here.profile:
        return here.profile, f"jetson means {here.profile}, the module this runs on", here.jetpack
    why = "no profile fits the Jetson this runs on" if here.is_jetson else "this machine is not a Jetson"
    return DEFAULT_JETSON, f"jetson means {DEFAULT_JETSON}, the default, because {why}", None


def _line(profile: DeviceProfile, wanted: str) -> JetPack:
    """The JetPack line of "6.2", "6.2.1" or "6" (then the newest of that number that the module runs)."""
    table = jetpacks()
    matches = [line for line in table if f"{wanted}.".startswith(f"{line}.") or line.startswith(f"{wanted}.")]
    if not matches or not re.fullmatch(r"\d+(\.\d+){0,2}", wanted):
        raise ProfileError(f"JetPack '{wanted[:20]}' is unknown; known are {', '.join(table)}.")
    supported = [line for line in matches if line in profile.jetpacks]
    line = table[(supported or matches)[-1]]
    if not supported and not line.refused:
        runs = ", ".join(profile.jetpacks)
        raise ProfileError(f"{profile.name} does not run JetPack {wanted}; it runs {runs}.")
    return line


def _other_lines(profile: DeviceProfile) -> str:
    usable = [line for line in profile.jetpacks if not jetpacks()[line].refused]
    if usable:
        return f"update the device to JetPack {usable[-1]}"
    return "this module has no newer JetPack; choose another device"
