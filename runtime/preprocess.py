"""Reading an image and bringing it to the size of the model, the same way in training and on the device.

Normalisation is not here: it is folded into the exported graph, which takes uint8.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from duallora_edge.errors import DataError

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 89_000_000  # just under the number at which Pillow warns
# Formats of cameras and photo collections; others (EPS, PDF, ...) reach decoders that should not see untrusted files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocessing:
    """How a frame becomes the input of the model.

    ``resize`` is ``"crop"`` (the centre square, scaled) or ``"squash"`` (the whole frame, aspect ratio not kept).
    """

    size: int
    resize: str = "crop"
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 4096:
            raise ValueError(f"size must be 8..4096 pixels, not {self.size}")
        if self.resize not in ("crop", "squash"):
            raise ValueError(f"resize must be 'crop' or 'squash', not {self.resize!r}")
        if self.interpolation not in _RESAMPLING:
            raise ValueError(f"interpolation must be one of {sorted(_RESAMPLING)}, not {self.interpolation!r}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __call__(self, frame: Pixels) -> Pixels:
        """Scale an RGB frame ``uint8 [H, W, 3]`` to ``uint8 [size, size, 3]``.

        Downscaling is antialiased (Pillow's filters), so a large camera frame and a thumbnail agree.
        """
        if frame.shape == (self.size, self.size, 3):
            return np.ascontiguousarray(frame)
        # The filter treats every channel alone. So grey is scaled once, and what `to_rgb` turned round is scaled as
        # it lies in memory and turned round when it is small: the same numbers without a copy of the whole frame.
        if frame.strides[2] == 0:
            return np.repeat(self._scale(frame[:, :, 0])[:, :, None], 3, axis=2)
        if frame.strides[2] < 0:
            return np.ascontiguousarray(self._scale(frame[:, :, ::-1])[:, :, ::-1])
        return self._scale(frame)

    def _scale(self, frame: Pixels) -> Pixels:
        """Scale ``[H, W]`` or ``[H, W, 3]``."""
        height, width = frame.shape[:2]
        box = (0.0, 0.0, float(width), float(height))
        if self.resize == "crop":
            side = min(height, width)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
        image = Image.fromarray(np.ascontiguousarray(frame))
        return np.asarray(image.resize((self.size, self.size), _RESAMPLING[self.interpolation], box=box))


def to_rgb(frame: npt.NDArray[Any], color: str = "rgb") -> Pixels:
    """Bring an array from a camera or a file to ``uint8 [H, W, 3]`` in RGB order.

    Accepted: ``[H, W]`` or ``[H, W, 1]`` grey, ``[H, W, 3]`` in the order ``color`` (``"rgb"`` or ``"bgr"``),
    ``[H, W, 4]`` with alpha last (laid over white); uint8, or uint16 over its full range (scaled to 8 bits).
    The result may be a view of ``frame``, and for grey one that cannot be written to. Raises `DataError` for anything
    else.
    """
    if color not in ("rgb", "bgr"):
        raise ValueError(f"color must be 'rgb' or 'bgr', not {color!r}")
    if frame.dtype == np.uint16:
        frame = (frame >> 8).astype(np.uint8)
    if frame.dtype != np.uint8:
        raise DataError(f"A frame must be uint8 or uint16, not {frame.dtype}; scale it to 0..255 and convert.")
    if frame.ndim == 2:
        frame = frame[:, :, None]
    if frame.ndim != 3 or frame.shape[2] not in (1, 3, 4) or 0 in frame.shape:
        raise DataError(f"A frame must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], not {frame.shape}.")
    if frame.shape[0] * frame.shape[1] > MAX_PIXELS:
        raise DataError(f"A frame may have at most {MAX_PIXELS:,} pixels, not {frame.shape[:2]}.")
    if frame.shape[2] == 1:
        return np.broadcast_to(frame, (*frame.shape[:2], 3))
    if frame.shape[2] == 4:
        alpha, frame = frame[:, :, 3:], frame[:, :, :3]
        if alpha.min() < 255:  # cameras fill the fourth byte and mean nothing by it
            alpha = alpha.astype(np.uint16)
            frame = ((frame * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return frame if color == "rgb" else frame[:, :, ::-1]


def read_image(image: Path | BinaryIO) -> Pixels:
    """Read an image file, by its path or open, as ``uint8 [H, W, 3]`` RGB.

    It is upright (EXIF orientation applied), with alpha laid over white. Raises `DataError` when the file is missing,
    damaged, truncated, or larger than `MAX_PIXELS`.
    """
    name = image if isinstance(image, Path) else "The image"
    try:
        with Image.open(image, formats=_formats()) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(f"{name} has more than {MAX_PIXELS:,} pixels; scale it down.")
            ImageOps.exif_transpose(picture, in_place=True)
            return to_rgb(_to_array(picture))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist.") from error
    except UnidentifiedImageError as error:
        known = ", ".join(_formats())
        raise DataError(f"{name} cannot be read as an image (it is none of {known}); replace or delete it.") from error
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise DataError(f"{name} cannot be read as an image ({error}); replace or delete it.") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with; one that it was not would be an error for every file."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_array(image: Image.Image) -> npt.NDArray[Any]:
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):
        return np.clip(np.asarray(image, dtype=np.int64), 0, 65535).astype(np.uint16)
    if image.mode in ("PA", "LA", "RGBa", "La") or "transparency" in image.info:
        return np.asarray(image.convert("RGBA"))
    if image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGB")
    return np.asarray(image)
