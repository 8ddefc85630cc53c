"""Augmentation of a whole batch on its device, reproducible on every device."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

LEVELS = ("none", "light")
_AREA = (0.7, 1.0)
_LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))
_JITTER = 0.2
_GREY = (0.299, 0.587, 0.114)  # luma, ITU-R BT.601


class Augment:
    """Random views of images.

    ``level``: ``"none"`` returns the images as they are; ``"light"`` crops 70 to 100 % of the area (aspect
    ratio 3:4 to 4:3), scales that back, and changes brightness, contrast and saturation by up to 20 %.
    ``horizontal_flip`` mirrors half of the images: leave it off for digits, letters and signs.
    """

    def __init__(self, level: str, horizontal_flip: bool = False) -> None:
        if level not in LEVELS:
            raise ValueError(f"level must be one of {LEVELS}, not {level!r}")
        self.level = level
        self.horizontal_flip = horizontal_flip

    def __call__(
        self, images: torch.Tensor, generator: torch.Generator, rows: slice = slice(None), total: int | None = None
    ) -> torch.Tensor:
        """New images ``uint8 [B, S, S, 3]`` from ``uint8 [B, S, S, 3]``, on the same device.

        All randomness is drawn at once from ``generator``, on the generator's device: with a CPU generator the
        draws are the same wherever the images are. Image i uses row i of the draws; images that are only the
        ``rows`` of a batch of ``total`` look as they do in the whole batch.
        """
        count = len(images) if total is None else total
        draws = torch.rand(count, 8, generator=generator, device=generator.device)[rows].to(images.device)
        mirror = self.horizontal_flip & (draws[:, 0] < 0.5)
        if self.level == "none":
            return torch.where(mirror[:, None, None, None], images.flip(2), images)
        view = _resample(images.permute(0, 3, 1, 2).float(), _crops(draws[:, 1:5], mirror))
        return _jitter(view, draws[:, 5:8]).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def _crops(draws: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """Affine maps ``[B, 2, 3]`` from the output square to a random box, in coordinates from -1 to 1."""
    area = _AREA[0] + (_AREA[1] - _AREA[0]) * draws[:, 0]
    aspect = torch.exp(_LOG_ASPECT[0] + (_LOG_ASPECT[1] - _LOG_ASPECT[0]) * draws[:, 1])
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    maps = torch.zeros(len(draws), 2, 3, device=draws.device)
    maps[:, 0, 0] = torch.where(mirror, -width, width)
    maps[:, 1, 1] = height
    maps[:, 0, 2] = (2 * draws[:, 2] - 1) * (1 - width)
    maps[:, 1, 2] = (2 * draws[:, 3] - 1) * (1 - height)
    return maps


def _resample(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Bilinear samples of float ``[B, 3, S, S]`` at the places that ``maps`` give."""
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _jitter(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Scale brightness, then contrast around the mean luma, then saturation around each pixel's luma."""
    factors = 1 + _JITTER * (2 * draws - 1)
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    weights = torch.tensor(_GREY, device=images.device)[:, None, None]
    images = images * brightness
    centre = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = centre + (images - centre) * contrast
    luma = (images * weights).sum(1, keepdim=True)
    return luma + (images - luma) * saturation
