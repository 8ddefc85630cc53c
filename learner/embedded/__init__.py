"""The embedded backbone: a small ViT that is part of the package, so that demo and tests need no network.

MODEL_CARD.md says what it was made from and what it can do; train.py made it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora_edge.errors import BackboneError
from duallora_edge.files import read_json, sha256_file

if TYPE_CHECKING:
    from timm.models import VisionTransformer

NAME = "embedded"
WEIGHTS = Path(__file__).with_name("vit_micro_patch8_64.safetensors")
SHA256: str = read_json(WEIGHTS.with_suffix(".json"))["sha256"]

ARCHITECTURE: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 0,
    "global_pool": "token",
}
"""Arguments of `timm.models.VisionTransformer`; a pre-norm ViT with class token, qkv bias and MLP ratio 4."""

DATA_CONFIG: dict[str, Any] = {
    "input_size": (3, 64, 64),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}
"""How an image becomes the input, with the keys of `timm.data.resolve_model_data_config`."""


def create() -> VisionTransformer:
    """The embedded ViT, weights in fp32, in evaluation mode: ``[N, 3, 64, 64]`` to features ``[N, 192]``.

    Raises `BackboneError` when the weights file is missing or is not the one that the package was made with.
    """
    from safetensors.torch import load_file
    from timm.models import VisionTransformer

    if not WEIGHTS.exists() or sha256_file(WEIGHTS) != SHA256:
        raise BackboneError(f"{WEIGHTS} is missing or altered; install duallora-edge again.")
    model = VisionTransformer(**ARCHITECTURE)
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    model.pretrained_cfg = dict(DATA_CONFIG)
    model.eval()
    return model
