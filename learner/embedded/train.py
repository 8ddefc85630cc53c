"""Make the embedded backbone: a small ViT distilled from a ViT-Ti/16, without labels.

    python -m duallora_edge.learner.embedded.train --weights VIT_TINY.safetensors -o OUT.safetensors \\
        --images=DATA/{cifar100,gtsrb,rsscn7,dtd10,clothing10,scene6}/train \\
        --images=DATA/pacs/{photo,art_painting,cartoon,sketch}/train

The teacher sees a view at 128 px, the student the same view at 64 px; both cut it into 8 x 8 patches, so their tokens
correspond one to one. The student learns to give the teacher's final normalised tokens. MODEL_CARD.md says more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import VisionTransformer
from torch import Tensor, nn

from duallora_edge.files import sha256_file, write_atomic, write_json
from duallora_edge.learner.embedded import ARCHITECTURE, DATA_CONFIG
from duallora_edge.runtime.preprocess import Preprocessing, read_image

TEACHER = "vit_tiny_patch16_224"
TEACHER_SIZE = 128
HELD_BACK = 10  # every tenth image of a folder is not trained on; measure.py tests on it
BATCH = 64
POOL = 1024  # views; the student uses each PASSES times, as the teacher's answer is half of the work
PASSES = 3
STEPS_A_POOL = PASSES * POOL // BATCH
PEAK_RATE = 1e-3
WARM_UP = 100  # steps
DECAY = 20 * STEPS_A_POOL  # steps
WEIGHT_DECAY = 0.05
SUFFIXES = {".png", ".jpg", ".jpeg"}


def image_paths(folder: Path) -> list[Path]:
    """The image files anywhere below ``folder``, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise click.UsageError(f"{folder} holds no images; name folders of PNG or JPEG files.")
    return paths


def split(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """The images to train on, and those held back."""
    return [path for index, path in enumerate(paths) if index % HELD_BACK], paths[::HELD_BACK]


def load_images(paths: list[Path], size: int) -> Tensor:
    """Decode images to ``uint8 [N, 3, size, size]`` RGB (centre square, bicubic)."""
    scale = Preprocessing(size)
    images = np.empty((len(paths), size, size, 3), np.uint8)
    for index, path in enumerate(paths):
        images[index] = scale(read_image(path))
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def create_teacher(weights: Path) -> VisionTransformer:
    """The frozen ViT-Ti/16 at `TEACHER_SIZE` px, its position embedding interpolated by timm."""
    file = {"file": str(weights)}
    model = timm.create_model(TEACHER, pretrained=True, pretrained_cfg_overlay=file, img_size=TEACHER_SIZE)
    return cast(VisionTransformer, model.eval().requires_grad_(False))


def initialise(teacher: VisionTransformer) -> VisionTransformer:
    """A student whose tensors all come from the teacher.

    The patch embedding is shrunk from 16 to 8 px by the pseudo-inverse of the resize (FlexiViT, Beyer et al.
    2023), so that the tokens of the half-size image stay close to those of the full-size one; the position
    embedding is interpolated; the first blocks and the final norm are copied.
    """
    student = VisionTransformer(**ARCHITECTURE)
    wanted = student.state_dict()
    state = {name: tensor for name, tensor in teacher.state_dict().items() if name in wanted}
    patch = ARCHITECTURE["patch_size"]
    state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"], [patch, patch])
    grid = [ARCHITECTURE["img_size"] // patch] * 2
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=grid)
    student.load_state_dict(state)
    return student


def random_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random views of images: ``uint8 [B, 3, H, W]`` to ``float [B, 3, H, W]`` in -1..1.

    Crop of 25..100 % of the area with an aspect of 3/4..4/3, mirror, brightness, contrast and colour, grey,
    negative, low resolution, and a mix with another image of the batch (a pasted rectangle or a blend). The
    teacher sees the result too, so no view can be wrong, only unlike the pictures that a camera gives.
    """
    B, _, H, W = images.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(B, *shape, generator=generator) * (high - low) + low

    def chosen(probability: float) -> Tensor:
        return torch.rand(B, 1, 1, 1, generator=generator) < probability

    area, aspect = uniform(0.25, 1.0), torch.exp(uniform(-0.29, 0.29))
    half = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).clamp(max=1.0)
    centre = uniform(-1, 1, 2) * (1 - half)
    mirror = torch.where(chosen(0.5).flatten(), -1.0, 1.0)
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = half[:, 0] * mirror, half[:, 1], centre
    grid = F.affine_grid(theta, [B, 3, H, W], align_corners=False)
    views = F.grid_sample(images.float() / 127.5 - 1, grid, padding_mode="reflection", align_corners=False)

    views = views * uniform(0.6, 1.4, 1, 1, 1) * uniform(0.85, 1.15, 3, 1, 1) + uniform(-0.3, 0.3, 1, 1, 1)
    views = torch.where(chosen(0.2), views.mean(1, keepdim=True), views)
    views = torch.where(chosen(0.1), -views, views)
    coarse = int(torch.randint(8, 48, (), generator=generator))
    coarse_views = F.interpolate(F.interpolate(views, coarse, mode="area"), (H, W), mode="bilinear")
    views = torch.where(chosen(0.2), coarse_views, views)

    other = views.roll(1, 0)
    row, column = torch.arange(H).view(1, 1, H, 1), torch.arange(W).view(1, 1, 1, W)
    height, width = uniform(0.2, 0.8, 1, 1, 1) * H, uniform(0.2, 0.8, 1, 1, 1) * W
    top, left = uniform(0, 1, 1, 1, 1) * (H - height), uniform(0, 1, 1, 1, 1) * (W - width)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    views = torch.where(chosen(0.3) & inside, other, views)
    return torch.lerp(views, other, chosen(0.15) * uniform(0.2, 0.5, 1, 1, 1)).clamp(-1, 1)


def tokens(model: VisionTransformer, views: Tensor) -> Tensor:
    """Final normalised tokens ``float32 [B, 1 + patches, D]`` of ``model``, computed in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return model.forward_features(views).float()


def new_pool(number: int, images: Tensor, teacher: VisionTransformer, seed: int) -> tuple[Tensor, Tensor]:
    """`POOL` views for the student, and the teacher's tokens for them; a function of ``seed`` and ``number``."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    small, wanted = [], []
    for _ in range(POOL // BATCH):
        index = torch.randint(len(images), (BATCH,), generator=generator)
        views = random_views(images[index], generator)
        small.append(F.interpolate(views, ARCHITECTURE["img_size"], mode="bicubic", antialias=True))
        with torch.no_grad():
            wanted.append(tokens(teacher, views))
    return torch.cat(small), torch.cat(wanted)


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, constant, linear decay (the WSD schedule of Hu et al. 2024).

    As the decay has a fixed length, a run stopped before it and resumed with another ``steps`` equals a run of those.
    """
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP, (steps - step) / DECAY)


def distillation_loss(student: Tensor, teacher: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Smooth L1 distance of standardised tokens ``[B, T, D]``; the class token weighs as much as all patches.

    ``mean`` and ``std`` ``[2, D]`` are the teacher's, row 0 of its class token, row 1 of its patch tokens.
    """
    loss = F.smooth_l1_loss((student[:, 0] - mean[0]) / std[0], (teacher[:, 0] - mean[0]) / std[0])
    return loss + F.smooth_l1_loss((student[:, 1:] - mean[1]) / std[1], (teacher[:, 1:] - mean[1]) / std[1])


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[2, D]`` of tokens ``[N, T, D]``: row 0 class tokens, row 1 patch tokens."""
    parts = [features[:, 0], features[:, 1:].flatten(0, 1)]
    return torch.stack([part.mean(0) for part in parts]), torch.stack([part.std(0) for part in parts])


def save_checkpoint(path: Path, step: int, student: VisionTransformer, optimizer: torch.optim.Optimizer) -> None:
    state = {f"weight.{name}": value.detach() for name, value in student.named_parameters()}
    for name, value in student.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{key}.{name}"] = optimizer.state[value][key]
    write_atomic(path, save(state, {"step": str(step)}))


def load_checkpoint(path: Path, student: VisionTransformer, optimizer: torch.optim.Optimizer) -> int:
    state = load_file(path)
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    for name, value in student.named_parameters():
        value.data.copy_(state[f"weight.{name}"])
        moments = {key: state[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[value] = {"step": torch.tensor(float(step)), **moments}
    return step


def distil(
    student: VisionTransformer, teacher: VisionTransformer, images: Tensor, pools: int, seed: int, checkpoint: Path
) -> None:
    """Train ``student`` in place; continues from ``checkpoint`` if it exists, writes it after every pool."""
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    step = load_checkpoint(checkpoint, student, optimizer) if checkpoint.exists() else 0
    mean, std = statistics(new_pool(0, images, teacher, seed)[1])
    steps = pools * STEPS_A_POOL
    student.train()
    while step < steps:
        number = step // STEPS_A_POOL
        views, wanted = new_pool(number, images, teacher, seed)
        generator = torch.Generator().manual_seed(number)
        order = torch.cat([torch.randperm(POOL, generator=generator) for _ in range(PASSES)])
        total = torch.zeros(())
        for index in order.split(BATCH):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
            optimizer.zero_grad()
            loss = distillation_loss(tokens(student, views[index]), wanted[index], mean, std)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            total += loss.detach()
            step += 1
        save_checkpoint(checkpoint, step, student, optimizer)
        click.echo(f"step {step}/{steps}  loss {total.item() / STEPS_A_POOL:.4f}")


EXISTING = click.Path(exists=True, path_type=Path)


@click.command()
@click.option("--images", "folders", multiple=True, required=True, type=EXISTING, help="Repeat for more folders.")
@click.option("--weights", required=True, type=EXISTING, help="The teacher's.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--pools", default=43, show_default=True, help=f"{STEPS_A_POOL} steps each.")
@click.option("--seed", default=0, show_default=True)
def main(folders: tuple[Path, ...], weights: Path, output: Path, pools: int, seed: int) -> None:
    """Distil the embedded backbone from the images in the folders; a stopped run continues where it was."""
    images = load_images([path for folder in folders for path in split(image_paths(folder))[0]], TEACHER_SIZE)
    click.echo(f"{len(images)} images")
    teacher = create_teacher(weights)
    student = initialise(teacher)
    distil(student, teacher, images, pools, seed, output.with_suffix(".checkpoint.safetensors"))
    half = {name: value.half() for name, value in student.state_dict().items()}
    write_atomic(output, save(half))
    description: dict[str, Any] = {"architecture": ARCHITECTURE, "data_config": DATA_CONFIG}
    description |= {"parameters": sum(value.numel() for value in half.values()), "sha256": sha256_file(output)}
    write_json(output.with_suffix(".json"), description)
    click.echo(f"Wrote {output} ({output.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
