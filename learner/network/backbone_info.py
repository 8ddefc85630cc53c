"""What identifies a backbone, as the run directory stores it. Imports no torch, so that `status` starts fast."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from duallora_edge.device_profiles.reader import Section


@dataclass(frozen=True)
class BackboneInfo:
    """What identifies a backbone: two backbones with equal info compute the same function.

    Attributes:
        name: name in timm, or ``embedded``.
        sha256: of its weights.
        size: side of the input in pixels.
        mean, std: of the RGB values in 0..1.
        interpolation: how images are resized, ``bicubic`` or ``bilinear``.
        prefix_blocks: number of blocks that stay frozen for ever; the others are adapted.
        summary_blocks: blocks of the prefix (from 0, ascending) whose tokens the prefix summary describes.
        base: sha256 of the base adaptation that is folded into the weights; None without one.
    """

    name: str
    sha256: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    prefix_blocks: int
    summary_blocks: tuple[int, ...]
    base: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> BackboneInfo:
        """The inverse of `to_json`. Raises ValueError listing everything that is wrong."""
        problems: list[str] = []
        read = Section(value, "", problems)
        info = cls(
            name=read.text("name"),
            sha256=read.text("sha256"),
            size=read.integer("size", 8, 4096),
            mean=_of_channels(read, "mean"),
            std=_of_channels(read, "std"),
            interpolation=read.choice("interpolation", ("bicubic", "bilinear")),
            prefix_blocks=read.integer("prefix_blocks", 1, 1000),
            summary_blocks=tuple(map(int, read.numbers("summary_blocks", 0, 1000))),
            base=read.text("base") if read.has("base") and read.values["base"] is not None else None,
        )
        read.finish()
        if problems:
            raise ValueError("; ".join(problems[:5]))
        return info


def _of_channels(read: Section, key: str) -> tuple[float, float, float]:
    values = read.numbers(key, 0, 1)
    if len(values) != 3:
        read.problem(key, "must be three numbers")
        return (0.0, 0.0, 0.0)
    return values[0], values[1], values[2]
