"""The frozen vision transformer: loading, checking that it is supported, and its prefix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

from duallora_edge.errors import BackboneError
from duallora_edge.files import sha256_file
from duallora_edge.learner import embedded
from duallora_edge.learner.network.backbone_info import BackboneInfo
from duallora_edge.learner.network.base_adaptation import BaseAdaptation

# Of the covariance in `Backbone.second_order`, whose variances are about 1 since the directions are whitened.
SECOND_ORDER_EPS = 1e-3
NEWTON_STEPS = 5


class Backbone(nn.Module):
    """A frozen timm `VisionTransformer`, split into a prefix that never changes and a suffix to be adapted.

    ``native_size`` is the side of the input in pixels for which its weights were trained.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    directions: Tensor

    def __init__(self, model: VisionTransformer, info: BackboneInfo, native_size: int) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.info, self.native_size = info, native_size
        self.register_buffer("pixel_mean", 255 * torch.tensor(info.mean), persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(info.std), persistent=False)
        self.register_buffer("directions", torch.zeros(0, self.dim), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def dim(self) -> int:
        return int(self.model.embed_dim)

    @property
    def special_tokens(self) -> int:
        """Number of class and register tokens, which come before the patch tokens."""
        return int(self.model.num_prefix_tokens)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.model.patch_embed.patch_size[0])

    @property
    def pools_class_token(self) -> bool:
        """Whether the final feature is the class token (else the mean of the patch tokens)."""
        return self.model.global_pool == "token"

    @property
    def suffix(self) -> list[Block]:
        """The blocks to be adapted."""
        return list(self.model.blocks)[self.info.prefix_blocks :]

    @property
    def summary_dim(self) -> int:
        """Length of the prefix summary phi."""
        pairs = len(self.directions) * (len(self.directions) + 1) // 2
        return len(self.info.summary_blocks) * self.dim * (3 if self.model.has_class_token else 2) + pairs

    @torch.no_grad()
    def adapt(self, base: BaseAdaptation, sha256: str) -> None:
        """Fold a base adaptation into the weights, for good; ``sha256`` is that of its file.

        Raises:
            BackboneError: It belongs to another backbone or another input size.
        """
        attentions = [block.attn for block in self.model.blocks]
        made_for = (base.backbone, base.size, base.prefix_blocks)
        if made_for != (self.info.sha256, self.info.size, self.info.prefix_blocks):
            raise BackboneError(
                f"The base adaptation was made for the weights {base.backbone[:12]} at {base.size} px with "
                f"{base.prefix_blocks} frozen blocks, not for {self.info.name} ({self.info.sha256[:12]}) at "
                f"{self.info.size} px with {self.info.prefix_blocks}; 'duallora-edge adapt' makes one."
            )
        fits = [down.shape[1] for down, _ in base.updates] == [attn.qkv.in_features for attn in attentions]
        fits = fits and base.positions.shape == self.model.pos_embed.shape and base.directions.shape[1] == self.dim
        if not fits:
            raise BackboneError("The base adaptation is damaged (it does not have the shapes of the backbone).")
        for attn, (down, up) in zip(attentions, base.updates, strict=True):
            # Multiplied where they were read, on the CPU, so that a run has the same weights on every device.
            attn.qkv.weight += (up.T @ down).to(attn.qkv.weight)
        self.model.pos_embed.copy_(base.positions)
        self.directions = base.directions.to(self.device)
        self.info = replace(self.info, base=sha256)

    def prefix(self, images: Tensor, precision: str = "fp32") -> tuple[Tensor, Tensor]:
        """Tokens at the end of the prefix, float32 [B, L, d], and the prefix summary phi, float32 [B, summary_dim].

        ``images`` are RGB frames uint8 [B, S, S, 3]. phi joins the `summary` of several blocks of the prefix (early
        blocks see colour and texture, which the last one has mixed already) and the `second_order` of the last. The
        matrix multiplications of the blocks run in ``precision`` (`autocast`).
        """
        x = self.embed(images)
        summaries = []
        for index, block in enumerate(self.model.blocks[: self.info.prefix_blocks]):
            with autocast(precision, self.device):
                x = block(x)
            if index in self.info.summary_blocks:
                summaries.append(self.summary(x))
        if len(self.directions):
            summaries.append(self.second_order(x))
        return x, torch.cat(summaries, dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """Tokens float32 [B, L, d] before the first block, of RGB frames uint8 [B, S, S, 3]."""
        tokens: Tensor = self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(self.normalised(images))))
        return tokens

    def normalised(self, images: Tensor) -> Tensor:
        """Frames uint8 [B, S, S, 3] as float32 [B, 3, S, S]; whole rows at once, since three numbers fill no vector."""
        width = images.shape[2]
        rows = (images.flatten(2).to(self.pixel_mean.dtype) - self.pixel_mean.repeat(width)) / (
            self.pixel_std.repeat(width)
        )
        return rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2)

    def summary(self, tokens: Tensor) -> Tensor:
        """Summary of the tokens of one block: class token, mean and standard deviation of the patch tokens.

        float32 [B, 3d] of [B, L, d]. Each of the three parts is normalised to zero mean and unit variance over its
        channels, so that one covariance serves all. Without a class token the summary has the last two parts only.
        """
        patches = tokens[:, self.special_tokens :]
        mean = patches.mean(dim=1)
        deviation = (patches - mean[:, None]).square().mean(dim=1).sqrt()  # std_mean takes four times as long
        parts = [tokens[:, 0], mean, deviation] if self.model.has_class_token else [mean, deviation]
        return torch.cat([F.layer_norm(part, part.shape[-1:], eps=1e-6) for part in parts], dim=1)

    def second_order(self, tokens: Tensor) -> Tensor:
        """How the patch tokens of one image vary together: the root of their covariance in m ``directions``.

        The upper triangle, float32 [B, m (m + 1) / 2], of the matrix root of Z^T Z / n + eps I with the centred and
        projected patch tokens Z [n, m]. The root evens out the eigenvalues, as in iSQRT-COV (Li et al. 2018, arXiv
        1712.01034), and is found by the same Newton-Schulz iteration.
        """
        patches = tokens[:, self.special_tokens :]
        z = (patches - patches.mean(dim=1, keepdim=True)) @ self.directions.T
        unit = torch.eye(z.shape[2], device=z.device)
        covariance = z.transpose(1, 2) @ z / z.shape[1] + SECOND_ORDER_EPS * unit
        trace = covariance.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
        root, inverse = covariance / trace, unit.expand_as(covariance)
        for _ in range(NEWTON_STEPS):
            factor = 1.5 * unit - 0.5 * inverse @ root
            root, inverse = root @ factor, factor @ inverse
        rows, columns = torch.triu_indices(*unit.shape)
        triangle: Tensor = (root * trace.sqrt())[:, rows, columns]
        return triangle

    def feature(self, tokens: Tensor) -> Tensor:
        """Final normalised feature f, float32 [B, d], of the tokens [B, L, d] after the last block."""
        x = self.model.norm(tokens)
        pooled = x[:, 0] if self.pools_class_token else x[:, self.special_tokens :].mean(dim=1)
        return self.model.fc_norm(pooled)


def relative_work(backbone: Backbone, size: int) -> float:
    """Multiplications for an image of ``size`` pixels, as a share of those at the backbone's input size."""

    def work(side: int) -> int:
        tokens = (side // backbone.patch_size) ** 2 + backbone.special_tokens
        return tokens * (6 * backbone.dim + tokens)  # of a block, up to a factor: projections and MLP, attention

    return work(size) / work(backbone.info.size)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which matrix multiplications run in ``precision``: bf16, or unchanged for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def load_backbone(
    name: str,
    *,
    weights: Path | None = None,
    size: int | None = None,
    prefix_blocks: int | None = None,
    summaries: int = 1,
) -> Backbone:
    """Build a backbone by its timm name (``NAME[.tag]``) or ``"embedded"``, for square input of ``size`` pixels.

    Weights come from ``weights`` (a safetensors file), else from the hub; position embeddings are resampled to
    ``size``. ``prefix_blocks`` defaults to half of the blocks, -1 is all but one; ``summaries`` of them, evenly spaced
    and ending with the last one, make the prefix summary. Raises `BackboneError` for an unknown name, an unsupported
    architecture, weights that do not fit, or a hub that cannot be reached.
    """
    if name == embedded.NAME and weights is not None:
        raise BackboneError(
            "The embedded backbone has its own weights; name the backbone of --weights with --backbone."
        )
    model, digest, config = _embedded(size) if name == embedded.NAME else _from_timm(name, weights, size)
    native_size = int(config["input_size"][-1])
    _check_supported(model, name)
    depth = len(model.blocks)
    prefix = depth // 2 if prefix_blocks is None else prefix_blocks % depth if prefix_blocks < 0 else prefix_blocks
    if not 1 <= prefix < depth:
        raise BackboneError(f"prefix_blocks must be 1..{depth - 1} for {name} with {depth} blocks, not {prefix}.")
    info = BackboneInfo(
        name=name,
        sha256=digest,
        size=int(model.patch_embed.img_size[0]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"] if config["interpolation"] in ("bicubic", "bilinear") else "bicubic",
        prefix_blocks=prefix,
        summary_blocks=spaced_blocks(prefix, summaries),
    )
    return Backbone(model, info, native_size)


def spaced_blocks(prefix: int, count: int) -> tuple[int, ...]:
    """``count`` blocks (all where there are fewer) of a prefix of ``prefix`` blocks, evenly spaced up to the last."""
    return tuple(sorted({prefix * part // count - 1 for part in range(1, count + 1)} - {-1}))


def _embedded(size: int | None) -> tuple[VisionTransformer, str, dict[str, Any]]:
    model, config = embedded.create(), dict(embedded.DATA_CONFIG)
    if size is not None and size != model.patch_embed.img_size[0]:
        _check_size(size, model.patch_embed.patch_size[0])
        model.set_input_size(img_size=(size, size))
    return model, embedded.SHA256, config


def _from_timm(name: str, weights: Path | None, size: int | None) -> tuple[VisionTransformer, str, dict[str, Any]]:
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture.split('_')[0]}*")[:5]
        raise BackboneError(f"timm has no model named {architecture!r}; similar names: {', '.join(near) or 'none'}.")
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:  # an unknown tag
        raise BackboneError(f"timm cannot build {name!r} ({error}); see timm.list_pretrained().") from error
    _check_supported(model, name)
    config = timm.data.resolve_model_data_config(model)
    if size is not None:
        _check_size(size, model.patch_embed.patch_size[0])
        model.set_input_size(img_size=(size, size))
    if weights is not None:
        state, digest = _read_weights(weights), sha256_file(weights)
    else:
        state, digest = _from_hub(name)
    _load(model, state, f"{weights or name}", name)
    return model, digest, config


def _check_size(size: int, patch: int) -> None:
    if size % patch:
        raise BackboneError(f"The input size {size} must be a multiple of the patch size {patch}.")


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise BackboneError(f"The weights file {path} does not exist.")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise BackboneError(
            f"{path} is not a readable safetensors file ({error}); pickled checkpoints are refused, convert them first."
        ) from error


def _from_hub(name: str) -> tuple[dict[str, Tensor], str]:
    try:
        source = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # hub clients raise many types for "not reachable" and "not found"
        raise BackboneError(
            f"The weights of {name} could not be fetched from the hub ({type(error).__name__}); "
            "give a local file with --weights, or use --backbone embedded."
        ) from error
    state = source.state_dict()
    return state, _state_digest(state)


def _state_digest(state: dict[str, Tensor]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(model: VisionTransformer, state: dict[str, Tensor], source: str, name: str) -> None:
    """Load a state dict, resampling patch and position embeddings; classifier heads are left out."""
    try:
        filtered = checkpoint_filter_fn(state, model)
    except Exception as error:  # it guesses formats from names and shapes, and fails in many ways on other models
        raise BackboneError(f"The weights {source} do not fit {name}; name the backbone they belong to.") from error
    kept = {key: value.float() for key, value in filtered.items() if not key.startswith("head.")}
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(kept))
    unknown = sorted(set(kept) - set(wanted))
    shapes = sorted(k for k in set(wanted) & set(kept) if wanted[k].shape != kept[k].shape)
    if missing or unknown or shapes:
        details = [
            f"{len(keys)} {what} (e.g. {keys[0]})"
            for keys, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
            if keys
        ]
        raise BackboneError(
            f"The weights {source} do not fit {name}: tensors {', '.join(details)}; name the backbone they belong to."
        )
    if not all(torch.isfinite(value).all() for value in kept.values()):
        raise BackboneError(f"The weights {source} contain NaN or infinite values; fetch the file again.")
    model.load_state_dict(kept, strict=True)


def _check_supported(model: nn.Module, name: str) -> None:
    """Refuse what the forward passes here do not compute exactly."""
    problems: list[str] = []
    other = f"it is a {type(model).__name__}, not a plain vision transformer"
    if not isinstance(model, VisionTransformer):
        problems.append(other)
    else:
        checks: list[tuple[str, Callable[[], bool]]] = [
            (other, lambda: type(model) is VisionTransformer),  # a distilled DeiT pools two tokens
            ("its blocks are not plain pre-norm blocks", lambda: all(type(b) is Block for b in model.blocks)),
            (
                "its attention has no fused qkv projection",
                lambda: all(hasattr(b.attn, "qkv") for b in model.blocks),
            ),
            (
                "its attention is gated or normalised",
                lambda: all(
                    getattr(b.attn, "gate", None) is None
                    and isinstance(getattr(b.attn, "norm", nn.Identity()), nn.Identity)
                    for b in model.blocks
                ),
            ),
            (
                "its attention heads do not span the width",
                lambda: all(b.attn.num_heads * b.attn.head_dim == model.embed_dim for b in model.blocks),
            ),
            ("it pools by attention", lambda: model.attn_pool is None),
            (
                f"it pools by {model.global_pool!r}, not by class token or mean",
                lambda: model.global_pool in ("token", "avg") and not model.pool_include_prefix,
            ),
        ]
        problems = [text for text, holds in checks if not holds()]
    if problems:
        raise BackboneError(
            f"The backbone {name} is not supported: {'; '.join(problems)}. "
            "Use a timm ViT, DeiT, DINOv2 or CLIP image encoder."
        )
