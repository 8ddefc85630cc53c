"""Random views of images, reproducible on every device."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

_AREA = (0.7, 1.0)
_LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))
_JITTER = 0.2
_GREY = (0.299, 0.587, 0.114)  # luma, ITU-R BT.601


def random_views(images: torch.Tensor, draws: torch.Tensor, *, flip: bool) -> torch.Tensor:
    """New images ``uint8 [B, S, S, 3]`` from ``uint8 [B, S, S, 3]``, on the same device.

    A view shows 70 to 100 % of the area (aspect ratio 3:4 to 4:3) at the size of the whole, with brightness, contrast
    and saturation changed by up to 20 %. ``draws`` [B, 8], from 0 to 1, decide how each looks, whatever its neighbours
    are. ``flip`` mirrors half of them: leave it off for digits, letters and signs.
    """
    draws = draws.to(images.device)
    mirror = flip & (draws[:, 0] < 0.5)
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
