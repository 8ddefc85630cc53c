"""Fitting a backbone to its input size without labels: the network at that size learns from itself at its own size.

A ViT that was trained at 224 px loses accuracy at 128 px, even where the images show no more detail at 224. Most of it
comes back when the small network (the student) imitates what the untouched one (the teacher) makes of the same frames
enlarged to its native size. This happens once, before the first task, so nothing that is learned later drifts.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from duallora_edge.errors import BackboneError, ConfigError, DataError
from duallora_edge.files import cache_folder, open_lock, own_folder, write_atomic
from duallora_edge.learner import distributed
from duallora_edge.learner.callbacks import Callback, report_progress
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data.fingerprint import Bytes
from duallora_edge.learner.data.frames import spread_frames
from duallora_edge.learner.device import pick_device, pick_precision
from duallora_edge.learner.methods.training import (
    ADAM_EPS,
    cosine_rate,
    derive_seed,
    restore_progress,
    save_progress,
)
from duallora_edge.learner.network.adapters import AdaptedBlock
from duallora_edge.learner.network.backbone import Backbone, autocast, load_backbone
from duallora_edge.learner.network.base_adaptation import BaseAdaptation, read_base
from duallora_edge.learner.network.prefix_cache import TokenStore
from duallora_edge.learner.run_directory import FileCheckpoint
from duallora_edge.learner.statistics.subspace import second_moment, top_directions
from duallora_edge.learner.timing import phase
from duallora_edge.runtime.preprocess import Preprocessing
from duallora_edge.runtime.sources import open_source

RANK = 16
STEPS = 340
BATCH = 32
LEARNING_RATE = 2e-3
KEPT_PATCHES = 0.5
MAX_FRAMES = 2000
MIN_FRAMES = 32
DIRECTION_FRAMES = 300
# Raised whenever the same frames and settings would give another adaptation.
_VERSION = 2


def is_needed(backbone: Backbone, config: TrainConfig) -> bool:
    """Whether a new run fits its backbone to the input size."""
    return config.base in ("auto", "all") and backbone.native_size != backbone.info.size


def base_for(
    backbone: Backbone, frames: Sequence[Bytes], config: TrainConfig, callback: Callback
) -> tuple[BaseAdaptation, bytes]:
    """The base adaptation of a backbone from frames, with the content of its file; made before, it is in the cache.

    Where ``config.base`` is ``none`` or the backbone has its native size, it holds nothing but the directions of the
    second-order summary.

    Stopped at any moment, the same call continues. Of several processes one makes it and the others wait.

    Args:
        backbone: at its working size; its weights stay as they are.
        frames: sets of RGB frames, uint8 [n, S, S, 3] at the working size; at most `MAX_FRAMES` of them all, drawn by
            the seed, are used.
        config: where the weights are, seed, precision and limits of memory.
        callback: hears of the steps.
    """
    return distributed.on_main(lambda: _from_cache(backbone, frames, config, callback))


def adapt_source(
    source: str, output: Path, config: TrainConfig, callback: Callback, images: int = MAX_FRAMES
) -> tuple[BaseAdaptation, str]:
    """Adapt the backbone of a configuration on the frames of a source, and write it for the setting ``base``.

    Of a folder or a video the frames are spread evenly over the whole of it; of a camera it is one a second
    (`spread_frames`). Stopped at any moment, the same call continues, if the source gives the same frames again.

    Args:
        source: anything that `open_source` opens: a folder of images, a video, a camera.
        output: the file to write; an older base adaptation there is replaced.
        config: backbone, weights, size, prefix_blocks, second_order, resize, seed, device, precision, limits of memory.
        callback: hears of frames and steps.
        images: how many frames to use at most.

    Returns:
        The base adaptation, and the sha256 of its file.

    Raises:
        ConfigError: There is nothing to adapt, ``images`` is out of its range, or ``output`` is something else.
        BackboneError: The backbone cannot be loaded.
        SourceError: The source cannot be opened or read.
        DataError: It gives too few frames.
    """
    least = 2 * MIN_FRAMES  # of a long source only half as many may remain
    if not least <= images <= MAX_FRAMES:
        raise ConfigError(f"images must be a whole number from {least} to {MAX_FRAMES}, not {images}.")
    _check_output(output)
    device = pick_device(config.device)
    config = replace(config, precision=pick_precision(config.precision, device))
    weights = Path(config.weights) if config.weights else None
    backbone = load_backbone(config.backbone, weights=weights, size=config.size, prefix_blocks=config.prefix_blocks)
    if backbone.info.size == backbone.native_size:
        raise ConfigError(
            f"{config.backbone} was trained for {backbone.native_size} px, so there is nothing to adapt at that size; "
            "name another one with --size."
        )
    preprocessing = Preprocessing(backbone.info.size, config.resize, backbone.info.interpolation)
    with open_source(source) as opened:
        callback.say(f"Images from {opened.description}" + (", one a second" if opened.live else ""))
        frames = spread_frames(opened, preprocessing, images, partial(report_progress, callback, "collect"))
        refused = opened.stats.refused
    if len(frames) < MIN_FRAMES:
        damaged = f" ({refused} more cannot be read)" if refused else ""
        raise DataError(
            f"{opened.description} gave {len(frames)} images{damaged}, which is too few to adapt a backbone; give "
            f"{MIN_FRAMES} or more."
        )
    base, content = base_for(backbone.to(device), [frames], config, callback)
    write_atomic(output, content)
    return base, hashlib.sha256(content).hexdigest()


def _check_output(path: Path) -> None:
    """Raises `ConfigError` when a file could not be written to ``path``, or would replace something of the user's."""
    if not path.parent.is_dir():
        raise ConfigError(f"The folder of {path} does not exist; make it, or give another name with -o.")
    if os.path.lexists(path):
        try:
            read_base(path)
        except BackboneError as error:
            raise ConfigError(f"{path} exists and is not a base adaptation; give another name with -o.") from error


def _delete_damaged(path: Path) -> None:
    """Delete a file of the cache that cannot be read, so that it is made again."""
    if path.exists():
        try:
            read_base(path)
        except BackboneError:
            path.unlink(missing_ok=True)


def _from_cache(
    backbone: Backbone, sets: Sequence[Bytes], config: TrainConfig, callback: Callback
) -> tuple[BaseAdaptation, bytes]:
    ends = np.cumsum([len(frames) for frames in sets])
    generator = np.random.default_rng(derive_seed(config.seed, 3))
    chosen = np.sort(generator.permutation(ends[-1])[:MAX_FRAMES])
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    frames = np.concatenate(
        [frames[numbers - end + len(frames)] for frames, numbers, end in zip(sets, parts, ends, strict=True)]
    )
    adapts = is_needed(backbone, config)
    facts = {
        "images": len(frames),
        "images_sha256": hashlib.sha256(frames.tobytes()).hexdigest(),
        "native_size": backbone.native_size,
        "prefix_blocks": backbone.info.prefix_blocks,
        "directions": config.second_order,
        "rank": RANK if adapts else 0,
        "steps": STEPS if adapts else 0,
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "kept_patches": KEPT_PATCHES,
        "seed": config.seed,
        "precision": config.precision,
        "device": backbone.device.type,
        "version": _VERSION,
    }
    info = replace(backbone.info, summary_blocks=())  # which do not matter here
    identity = json.dumps([info.to_json(), facts], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()
    folder = own_folder(cache_folder() / "bases")
    path = folder / f"{key}.safetensors"
    with open_lock(folder / f"{key}.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _delete_damaged(path)
        if not path.exists():
            progress = FileCheckpoint(folder / f"{key}.checkpoint", key)
            none = torch.zeros(0, backbone.dim)
            updates = tuple((none, none.repeat(1, 3)) for _ in backbone.model.blocks)
            positions = backbone.model.pos_embed.detach().cpu()
            if adapts:
                callback.say(
                    f"Adapting the backbone from {backbone.native_size} to {backbone.info.size} px on {len(frames)} "
                    "images, without labels"
                )
                weights = Path(config.weights) if config.weights else None
                teacher = load_backbone(config.backbone, weights=weights).to(backbone.device)
                updates, positions = distil(backbone, teacher, frames, config, progress, callback)
            base = BaseAdaptation(updates, positions, none, info.sha256, info.size, info.prefix_blocks, facts)
            base = replace(base, directions=principal_directions(backbone, base, frames, config))
            write_atomic(path, base.to_bytes())
            progress.delete()
        return read_base(path)


@torch.no_grad()
def principal_directions(backbone: Backbone, base: BaseAdaptation, frames: Bytes, config: TrainConfig) -> Tensor:
    """Whitened principal directions [m, d] of the patch tokens after the prefix, centred within each of the frames.

    On the CPU, float32; m is the setting ``second_order``, or d where that is less. At most `DIRECTION_FRAMES` frames
    are looked at, spread evenly.
    """
    fitted = copy.deepcopy(backbone)
    fitted.adapt(base, "")
    moment = torch.zeros(backbone.dim, backbone.dim, dtype=torch.float64)
    count = 0
    spread = torch.linspace(0, len(frames) - 1, min(len(frames), DIRECTION_FRAMES)).round().long()
    for part in spread.split(config.forward_batch):
        tokens, _ = fitted.prefix(torch.from_numpy(frames[part.numpy()]).to(backbone.device), config.precision)
        patches = tokens[:, backbone.special_tokens :]
        rows = (patches - patches.mean(dim=1, keepdim=True)).flatten(0, 1).cpu()
        moment += second_moment(rows)
        count += len(rows)
    rows = top_directions(moment / count, config.second_order)
    variances = ((rows @ moment / count) * rows).sum(dim=1, keepdim=True)
    return (rows / variances.sqrt()).float()


def distil(
    backbone: Backbone,
    teacher: Backbone,
    frames: Bytes,
    config: TrainConfig,
    progress: FileCheckpoint,
    callback: Callback,
) -> tuple[tuple[tuple[Tensor, Tensor], ...], Tensor]:
    """Train low-rank updates of all qkv weights and the position embedding so that the backbone imitates the teacher.

    The loss is the mean of 1 - cosine to the teacher's tokens, pooled to the grid of the student: of the final feature
    and the final patch tokens, and (the class token by half) of the tokens after the prefix, layer-normed. In every
    step only a random part of the patch tokens goes through the network, which is faster and also generalises better.

    Returns:
        The updates of each block, (down [r, d], up [r, 3d]), and the position embedding, on the CPU.
    """
    wanted = TeacherTokens(teacher, backbone, frames, config, callback)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, 4))
    dim, device = backbone.dim, backbone.device
    blocks = [AdaptedBlock(block) for block in backbone.model.blocks]
    weights = [block.weight for block in blocks]
    downs = [_parameter((2 * torch.rand(RANK, dim, generator=generator) - 1) / dim**0.5, device) for _ in blocks]
    ups = [_parameter(torch.zeros(RANK, 3 * dim), device) for _ in blocks]
    untouched = backbone.model.pos_embed
    positions = nn.Parameter(untouched.detach().clone())
    backbone.model.pos_embed = positions
    parameters = [*downs, *ups, positions]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, eps=ADAM_EPS, fused=True)
    start = restore_progress(progress, optimizer, parameters, alone=True)
    patches = wanted.patches
    micro = min(config.micro_batch or BATCH, BATCH)
    epoch_steps = math.ceil(len(frames) / BATCH)
    try:
        for step in range(start, STEPS):
            generator.manual_seed(derive_seed(config.seed, 5, step // epoch_steps))
            order = torch.randperm(len(frames), generator=generator)
            batch = order[step % epoch_steps * BATCH :][:BATCH]
            generator.manual_seed(derive_seed(config.seed, 6, step))
            kept = torch.randperm(patches, generator=generator)[: max(round(KEPT_PATCHES * patches), 1)].sort().values
            optimizer.param_groups[0]["lr"] = cosine_rate(LEARNING_RATE, step, STEPS)
            optimizer.zero_grad(set_to_none=True)
            for part in batch.split(micro):
                for block, weight, down, up in zip(blocks, weights, downs, ups, strict=True):
                    block.weight = weight + up.T @ down
                pixels = torch.from_numpy(frames[part.numpy()]).to(device)
                with phase("base adaptation"):
                    loss = step_loss(backbone, blocks, pixels, kept.to(device), wanted.rows(part), config)
                    (loss * (len(part) / len(batch))).backward()
            optimizer.step()
            if (step + 1) % config.checkpoint_steps == 0:
                save_progress(progress, step + 1, optimizer, parameters)
            report_progress(callback, "adapt", step + 1, STEPS)
    finally:
        backbone.model.pos_embed = untouched
    updates = tuple((down.detach().cpu(), up.detach().cpu()) for down, up in zip(downs, ups, strict=True))
    return updates, positions.detach().cpu()


class TeacherTokens:
    """What the student shall make of each frame, computed once: float16 [2 (special + patches) + 1, d] for each.

    These are the tokens after the prefix and the final normalised tokens, both pooled to the grid of the student, and
    the final feature.
    """

    def __init__(
        self, teacher: Backbone, student: Backbone, frames: Bytes, config: TrainConfig, callback: Callback
    ) -> None:
        self.special, self.side = student.special_tokens, student.info.size // student.patch_size
        self.patches = self.side**2
        length = 2 * (self.special + self.patches) + 1
        self._device = student.device
        self._blocks = [AdaptedBlock(block) for block in teacher.model.blocks]
        self._store = TokenStore(len(frames), (length, student.dim), config.cache_bytes)
        size, prefix = teacher.info.size, student.info.prefix_blocks
        # As many tokens at once as the student has in a pass.
        at_once = max(config.forward_batch * student.info.size**2 // size**2, 1)
        for first in range(0, len(frames), at_once):
            pixels = torch.from_numpy(frames[first : first + at_once]).to(teacher.device)
            self._store.append(self._tokens(teacher, enlarged(pixels, size), prefix, config.precision))
            report_progress(callback, "teacher", min(first + at_once, len(frames)), len(frames))

    @torch.no_grad()
    def _tokens(self, teacher: Backbone, pixels: Tensor, prefix: int, precision: str) -> Tensor:
        middle, last = _middle_and_last(self._blocks, teacher.embed(pixels), prefix, precision)
        final = teacher.model.norm(last)
        parts = [self._pooled(middle), self._pooled(final), teacher.feature(last)[:, None]]
        return torch.cat(parts, dim=1).half().cpu()

    def _pooled(self, tokens: Tensor) -> Tensor:
        """Tokens [B, special + n, d] with the patch tokens on the grid of the student."""
        patches = tokens[:, self.special :].transpose(1, 2)
        side = math.isqrt(patches.shape[2])
        grid = F.interpolate(
            patches.unflatten(2, (side, side)), (self.side, self.side), mode="bilinear", antialias=True
        )
        return torch.cat([tokens[:, : self.special], grid.flatten(2).transpose(1, 2)], dim=1)

    def rows(self, frames: Tensor) -> Tensor:
        """The tokens float32 of some frames by their numbers."""
        return self._store.rows(frames).to(self._device).float()


def enlarged(frames: Tensor, size: int) -> Tensor:
    """Frames uint8 [B, S, S, 3] resized to [B, size, size, 3] by bicubic interpolation."""
    planes = F.interpolate(frames.permute(0, 3, 1, 2).float(), (size, size), mode="bicubic", antialias=True)
    return planes.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def step_loss(
    student: Backbone,
    blocks: Sequence[AdaptedBlock],
    pixels: Tensor,
    kept: Tensor,
    wanted: Tensor,
    config: TrainConfig,
) -> Tensor:
    """The mean distance of what the student makes of frames from the ``wanted`` tokens, on the ``kept`` patches."""
    special = student.special_tokens
    chosen = torch.cat([torch.arange(special, device=kept.device), special + kept])
    tokens, prefix = student.embed(pixels)[:, chosen], student.info.prefix_blocks
    middle, last = _middle_and_last(blocks, tokens, prefix, config.precision, recompute=config.recompute)
    length = (wanted.shape[1] - 1) // 2
    wanted_middle, wanted_final = wanted[:, :length][:, chosen], wanted[:, length:-1][:, chosen]
    middle, wanted_middle = (F.layer_norm(tokens, tokens.shape[-1:]) for tokens in (middle, wanted_middle))
    loss = _distance(student.feature(last), wanted[:, -1])
    loss = loss + _distance(student.model.norm(last)[:, special:], wanted_final[:, special:])
    loss = loss + _distance(middle[:, special:], wanted_middle[:, special:])
    if student.model.has_class_token:
        loss = loss + 0.5 * _distance(middle[:, 0], wanted_middle[:, 0])
    return loss


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(found, wanted, dim=-1)).mean()


def _middle_and_last(
    blocks: Sequence[AdaptedBlock], tokens: Tensor, prefix: int, precision: str, *, recompute: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens float32 after the prefix and after the last block; with ``recompute`` as in `run_suffix`."""
    middle = tokens
    for index, block in enumerate(blocks):
        with autocast(precision, tokens.device):
            if recompute:
                tokens = checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False)[0]
            else:
                tokens = block(tokens)[0]
        tokens = tokens.float()
        if index == prefix - 1:
            middle = tokens
    return middle, tokens


def _parameter(value: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(value.to(device))
