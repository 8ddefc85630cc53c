"""The base adaptation: what fits a backbone to another input size than it was trained for. Made by `learner.adapt`.

Importing this module does not import torch, so that commands that only describe a run start fast.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from duallora_edge.device_profiles.reader import Section
from duallora_edge.errors import BackboneError
from duallora_edge.files import parse_json, read_limited

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 1 << 30
MAX_DIRECTIONS = 128
_ENTRY = "base_adaptation"


@dataclass(frozen=True)
class BaseAdaptation:
    """Low-rank updates of the fused qkv weights of all blocks, a position embedding, and what summaries look at.

    Attributes:
        updates: for each block of the backbone a pair (down [r, d], up [r, 3d]), float32; up^T down is added to the
            weight. r is 0 where nothing was adapted.
        positions: the position embedding, float32, of the shape that the backbone has at this size.
        directions: rows [m, d], float32, on which `Backbone.second_order` projects patch tokens; m may be 0.
        backbone: sha256 of the weights that it belongs to.
        size: side of the input in pixels that it is for.
        prefix_blocks: number of frozen blocks that it was made for.
        made_from: images and settings, for people; nothing depends on it.
    """

    updates: tuple[tuple[Tensor, Tensor], ...]
    positions: Tensor
    directions: Tensor
    backbone: str
    size: int
    prefix_blocks: int
    made_from: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """The content of a safetensors file; the same adaptation gives the same bytes."""
        from safetensors.torch import save

        tensors = {"positions": self.positions, "directions": self.directions}
        for index, (down, up) in enumerate(self.updates):
            tensors |= {f"blocks.{index}.down": down, f"blocks.{index}.up": up}
        # One entry, since safetensors writes entries in no fixed order.
        facts = {
            "backbone": self.backbone,
            "size": self.size,
            "prefix_blocks": self.prefix_blocks,
            "made_from": dict(self.made_from),
        }
        return save(
            {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()},
            {_ENTRY: json.dumps(facts, sort_keys=True, ensure_ascii=False)},
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> BaseAdaptation:
        """The inverse of `to_bytes`. Raises `ValueError` for anything else."""
        import torch
        from safetensors.torch import load

        try:
            tensors = load(content)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"it is not a safetensors file ({error})") from error
        length = int.from_bytes(content[:8], "little")  # checked by `load`
        facts = _facts(parse_json(content[8 : 8 + length]).get("__metadata__") or {})
        depth = (len(tensors) - 2) // 2
        names = {"positions", "directions"} | {f"blocks.{i}.{part}" for i in range(depth) for part in ("down", "up")}
        if tensors.keys() != names:
            raise ValueError("it does not hold the tensors of a base adaptation")
        for name, value in tensors.items():
            if value.dtype != torch.float32 or not bool(torch.isfinite(value).all()):
                raise ValueError(f"the tensor {name} must hold finite numbers of float32")
        updates = tuple((tensors[f"blocks.{i}.down"], tensors[f"blocks.{i}.up"]) for i in range(depth))
        for index, (down, up) in enumerate(updates):
            if down.dim() != 2 or up.shape != (len(down), 3 * down.shape[1]):
                raise ValueError(f"the update of block {index} is not of low rank")
        if tensors["directions"].dim() != 2 or len(tensors["directions"]) > MAX_DIRECTIONS:
            raise ValueError(f"the directions are not at most {MAX_DIRECTIONS} rows")
        return cls(updates, tensors["positions"], tensors["directions"], *facts)


def _facts(metadata: Mapping[str, str]) -> tuple[str, int, int, Mapping[str, Any]]:
    """Backbone, size, prefix_blocks and made_from in the metadata of the file. Raises `ValueError` without them."""
    if _ENTRY not in metadata:
        raise ValueError("it holds no base adaptation")
    problems: list[str] = []
    facts = Section(parse_json(metadata[_ENTRY].encode()), "", problems)
    backbone, size = facts.text("backbone"), facts.integer("size", 8, 4096)
    prefix_blocks, made_from = facts.integer("prefix_blocks", 1, 1000), facts.section("made_from").values
    if problems:
        raise ValueError("; ".join(problems[:5]))
    return backbone, size, prefix_blocks, made_from


def read_made_from(path: Path) -> Mapping[str, Any]:
    """What the base adaptation in a file was made from; its tensors are not read.

    Raises ``OSError`` when the file cannot be read and ``ValueError`` when it is something else.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError("there is no such file")
    try:
        with safe_open(path, "np") as file:
            return _facts(file.metadata() or {})[3]
    except SafetensorError as error:
        raise ValueError(f"it is not a safetensors file ({error})") from error


def read_base(path: Path) -> tuple[BaseAdaptation, bytes]:
    """A base adaptation and the content of its file, which is what its sha256 is of.

    Raises:
        BackboneError: The file cannot be read, or is something else.
    """
    try:
        content = read_limited(path, MAX_BYTES)
        return BaseAdaptation.from_bytes(content), content
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{path} cannot be used as a base adaptation ({error}); 'duallora-edge adapt' makes one."
        ) from error
