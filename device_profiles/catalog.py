"""The profiles that come with the package, each parsed when it is first asked for."""

from __future__ import annotations

from functools import lru_cache

from duallora_edge.device_profiles.profile import FOLDER, KINDS, DeviceProfile


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Names of the packaged profiles, without parsing them."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "jetpack"))


@lru_cache(maxsize=64)
def packaged(name: str) -> DeviceProfile:
    """The packaged profile with exactly this name."""
    return DeviceProfile.from_file(FOLDER / f"{name}.yaml")


def list_profiles() -> list[DeviceProfile]:
    """All packaged profiles: Jetson, RTX, then CPU; the newest generation first, then by memory."""

    def order(profile: DeviceProfile) -> tuple[int, float, int, str]:
        capability = float(profile.compute_capability or 0)
        return KINDS.index(profile.kind), -capability, profile.memory_bytes or 0, profile.name

    return sorted(map(packaged, names()), key=order)
