"""Reading an image and bringing it to the size of the model, the same way in training and on the device.

Normalisation is not here: it is folded into the exported graph, which takes uint8.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from duallora_edge.errors import DataError
from duallora_edge.runtime.image_metadata import has_usual_metadata
from duallora_edge.text import escaped

Pixels = npt.NDArray[np.uint8]

MAX_BYTES = 512 * 2**20  # of memory for one image: file, decoder, pixels, conversions and result
MAX_PIXELS = MAX_BYTES // 7  # 76 million: four bytes of Pillow's and three of the result
MAX_SIDE = 65_535  # as in JPEG and GIF; the filters' tables grow with the longer side
MAX_FILE_BYTES = MAX_BYTES // 3
MAX_EXIF_BYTES = 2**20  # cameras write 64 kB at most
# Formats of cameras and photo collections; others (EPS, PDF, ...) reach decoders that should not see untrusted files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")
# Measured memory of decoders besides the pixels, in bytes per pixel; 4 for all others.
_DECODER_BYTES = {"WEBP": 26, "AVIF": 14, "JPEG2000": 24}
_STREAMED = ("BMP", "PPM", "TIFF")  # formats whose decoders keep no part of the file in memory
_FILE_COPIES = 3  # of a chunk of text that is the whole file
_SPARE_BYTES = 32 * 2**20
_BAND_PIXELS = 2**20
_ORIENTATION = 0x0112
_ROWS_PER_STRIP = 278
# EXIF orientation -> an upright array as the view that lies as the file has it.
_AS_STORED: dict[Any, Callable[[Pixels], Pixels]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocessing:
    """How a frame becomes the input of the model.

    Args:
        size: Side of the square input of the model, in pixels.
        resize: ``"crop"`` (the centre square, scaled) or ``"squash"`` (the whole frame, aspect ratio not kept).
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        reducing_gap: A frame that is more than so many times as large as the input is first averaged over squares of
            pixels until it is about that large; 0 to leave that out. With 2, a frame of 1920 x 1080 takes a third of
            the time, and its pixels change by 1 to 2 levels on average (benchmarks/RUNTIME.md).

    Raises:
        ValueError: A value is not one of these.
    """

    size: int
    resize: str = "crop"
    interpolation: str = "bicubic"
    reducing_gap: float = 2.0

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 4096:
            raise ValueError(f"size must be 8..4096 pixels, not {self.size}")
        if self.resize not in ("crop", "squash"):
            raise ValueError(f"resize must be 'crop' or 'squash', not {self.resize!r}")
        if self.interpolation not in _RESAMPLING:
            raise ValueError(f"interpolation must be one of {sorted(_RESAMPLING)}, not {self.interpolation!r}")
        if not (self.reducing_gap == 0 or 1 <= self.reducing_gap <= 100):
            raise ValueError(f"reducing_gap must be 0 or 1..100, not {self.reducing_gap}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __call__(self, frame: Pixels) -> Pixels:
        """Scale a frame to the input of the model.

        Downscaling is antialiased (Pillow's filters), so a large camera frame and a thumbnail agree.

        Args:
            frame: RGB, ``uint8 [H, W, 3]``.

        Returns:
            ``uint8 [size, size, 3]``.
        """
        if frame.shape == (self.size, self.size, 3):
            return np.ascontiguousarray(frame)
        # The filter treats each channel separately. So grey is scaled once, and reversed channels are scaled as they
        # lie in memory and reversed afterwards: the same numbers without a copy of the whole frame.
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
        gap = self.reducing_gap or None
        return np.asarray(image.resize((self.size, self.size), _RESAMPLING[self.interpolation], box, gap))


def to_rgb(frame: npt.ArrayLike, color: str = "rgb") -> Pixels:
    """Bring an array from a camera or a file to ``uint8 [H, W, 3]`` in RGB order.

    Accepted: ``[H, W]`` or ``[H, W, 1]`` grey, ``[H, W, 3]`` in the order ``color`` (``"rgb"`` or ``"bgr"``),
    ``[H, W, 4]`` with alpha last (laid over white); uint8, or uint16 over its full range (scaled to 8 bits); at most
    `MAX_PIXELS`. The result may be a view of ``frame``, and for grey one that cannot be written to. Raises `DataError`
    for anything else.
    """
    if color not in ("rgb", "bgr"):
        raise ValueError(f"color must be 'rgb' or 'bgr', not {color!r}")
    array = _as_frame(frame)
    if array.dtype == np.uint16:
        scaled = np.empty(array.shape, np.uint8)
        array = np.right_shift(array, 8, out=scaled, casting="unsafe")
    if array.shape[2] == 1:
        return np.broadcast_to(array, (*array.shape[:2], 3))
    if array.shape[2] == 4:
        # Cameras fill the fourth byte without meaning.
        array = array[:, :, :3] if array[:, :, 3].min() == 255 else _over_white(array)
    return array if color == "rgb" else array[:, :, ::-1]


def _as_frame(frame: npt.ArrayLike) -> npt.NDArray[Any]:
    """``[H, W, C]``, uint8 or uint16, of a size that may be converted."""
    try:
        array = np.asarray(frame)
    except Exception as error:  # what the caller's own class raises, or NumPy for rows of different lengths
        raise DataError(
            f"A frame must be an array, not a {type(frame).__name__} that NumPy cannot convert ({_one_line(error)})."
        ) from error
    if array.dtype not in (np.uint8, np.uint16):
        raise DataError(f"A frame must be uint8 or uint16, not {array.dtype}; scale it to 0..255 and convert.")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise DataError(f"A frame must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], not {array.shape}.")
    height, width = array.shape[:2]
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        raise DataError(
            f"A frame may have at most {MAX_PIXELS:,} pixels and {MAX_SIDE:,} per side, not {height} x {width}; "
            "scale it down."
        )
    return array


def cut(frame: Pixels, boxes: npt.ArrayLike) -> list[Pixels]:
    """Every pixel of ``frame`` (``[H, W, 3]``) that a box touches, as a view for each box.

    ``boxes``: pixels ``[N, 4]`` as left, top, right, bottom; what lies beyond the frame is left out. Raises `DataError`
    for what is not such an array, and for a box that is empty or outside of the frame.
    """
    try:
        edges = np.asarray(boxes, np.float64)
    except Exception as error:  # lists of different lengths, text, tensors on a GPU
        raise DataError(f"Boxes must be an array of numbers [N, 4] ({_one_line(error)}).") from error
    if edges.size == 0:
        return []
    if edges.ndim != 2 or edges.shape[1] != 4:
        raise DataError(
            f"Boxes must be [N, 4] (left, top, right, bottom), not {edges.shape}; reshape a single box to [1, 4]."
        )
    height, width = frame.shape[:2]
    first, last = np.maximum(edges[:, :2], 0), np.minimum(edges[:, 2:], (width, height))
    bad = np.flatnonzero(~(np.isfinite(edges).all(axis=1) & (first < last).all(axis=1)))
    if bad.size:
        left, top, right, bottom = edges[bad[0]]
        raise DataError(
            f"Box {bad[0]} ({left:g}, {top:g}, {right:g}, {bottom:g}) holds no part of a frame of {width} x {height} "
            "pixels; give left, top, right and bottom, and leave out boxes outside of the frame."
        )
    parts = np.hstack([np.floor(first), np.ceil(last)]).astype(int)
    return [frame[top:bottom, left:right] for left, top, right, bottom in parts]


def _over_white(frame: Pixels) -> Pixels:
    """``[H, W, 3]`` from ``[H, W, 4]``, a few rows at a time, because the products take 16 bits."""
    result = np.empty((*frame.shape[:2], 3), np.uint8)
    for rows in _bands(*frame.shape[:2]):
        alpha = frame[rows, :, 3:].astype(np.uint16)
        result[rows] = (frame[rows, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return result


def _bands(height: int, width: int) -> Iterator[slice]:
    """The rows of an image in parts of about `_BAND_PIXELS`."""
    rows = max(1, _BAND_PIXELS // width)
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def read_image(image: str | Path | BinaryIO) -> Pixels:
    """Read an image file.

    The result is upright (EXIF orientation applied), with alpha laid over white, and the first of several frames.
    Reading takes at most `MAX_BYTES` of memory. A JPEG that needs more (from 53 to 76 million pixels, depending on its
    colour sampling) is decoded at a half, a quarter or an eighth of its size, the same way everywhere.

    Args:
        image: The path of the file, or the file opened for reading bytes.

    Returns:
        ``uint8 [H, W, 3]`` in RGB order.

    Raises:
        DataError: The file is missing, damaged or truncated, or needs more memory than that.
    """
    image = Path(image) if isinstance(image, str) else image
    name = escaped(str(image)) if isinstance(image, Path) else "The image"
    try:
        if not isinstance(image, Path):
            return _read(image if image.seekable() else io.BytesIO(image.read(MAX_FILE_BYTES + 1)), name)
        if not stat.S_ISREG(image.stat().st_mode):
            raise DataError(f"{name} is not a file; give the path of an image.")
        # Not by its name: Pillow would map it into memory, where truncating the file meanwhile is fatal.
        with image.open("rb") as file:
            return _read(file, name)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist.") from error
    except UnidentifiedImageError as error:
        known = ", ".join(_formats())
        raise DataError(f"{name} cannot be read as an image (it is none of {known}); replace or delete it.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} has too many pixels; scale it down.") from error
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise DataError(f"{name} cannot be read as an image ({_one_line(error)}); replace or delete it.") from error


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image without decoding it, in one of `FORMATS`. Raises whatever Pillow raises."""
    return Image.open(file, formats=_formats())


def _one_line(error: Exception) -> str:
    return escaped(" ".join(str(error).split())[:200]) or type(error).__name__


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with; a missing one would cause an error for every file."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _read(file: BinaryIO, name: str) -> Pixels:
    size = file.seek(0, io.SEEK_END)
    if size > MAX_FILE_BYTES or not has_usual_metadata(file):
        raise DataError(
            f"{name} is larger than {MAX_FILE_BYTES:,} bytes or full of metadata; save it as JPEG or PNG without any."
        )
    with open_image(file) as picture:
        scale = next((scale for scale in _scales(picture) if _peak_bytes(picture, size, scale) <= MAX_BYTES), None)
        if scale is None or max(picture.size) > MAX_SIDE:
            raise DataError(
                f"{name} has {picture.width} x {picture.height} pixels, and reading it would take more than "
                f"{MAX_BYTES >> 20} MB or a side is longer than {MAX_SIDE:,}; scale it down."
            )
        if scale > 1:
            picture.draft(None, (picture.width // scale, picture.height // scale))
        picture.load()
        return _to_upright(picture)


def _scales(picture: Image.Image) -> tuple[int, ...]:
    return (1, 2, 4, 8) if isinstance(picture, JpegImageFile) else (1,)


def _peak_bytes(picture: Image.Image, file_bytes: int, scale: int) -> float:
    """What reading takes at most: first decoder and pixels, then pixels and result (or the result and its scaling)."""
    stored = 1 if picture.mode in ("1", "L", "P") else 2 if picture.mode.startswith("I;16") else 4
    converted = stored + 1 if _is_grey(picture) else 7
    decoder: float = _DECODER_BYTES.get(picture.format or "", 4)
    if isinstance(picture, JpegImageFile):
        # Coefficients of 16 bits, always of the full size, where an image comes in several scans.
        across, down = (max(layer[axis] for layer in picture.layer) for axis in (1, 2))
        decoder = 2 * sum(layer[1] * layer[2] for layer in picture.layer) / (across * down)
    if isinstance(picture, TiffImageFile):
        # A compressed strip and what becomes of it; a tile is smaller.
        decoder = max(decoder, 8 * min(1, picture.tag_v2.get(_ROWS_PER_STRIP, 2**32 - 1) / picture.height))
    held = 0 if picture.format in _STREAMED else _FILE_COPIES * file_bytes
    pixels = picture.width * picture.height
    shown = pixels / scale**2
    return _SPARE_BYTES + max(converted * shown, stored * shown + decoder * pixels + held)


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("I;16", "I;16L", "I;16B", "I") or (image.mode == "L" and "transparency" not in image.info)


def _to_upright(picture: Image.Image) -> Pixels:
    """Convert a decoded image a few rows at a time, each to where it belongs when the image is upright."""
    if len(picture.info.get("exif", b"")) > MAX_EXIF_BYTES:
        raise ValueError(f"its EXIF data is larger than {MAX_EXIF_BYTES} bytes")
    orientation = picture.getexif().get(_ORIENTATION)
    as_stored = _AS_STORED.get(orientation, lambda upright: upright)
    width, height = picture.size
    upright_size = (width, height) if orientation in (5, 6, 7, 8) else (height, width)
    grey = _is_grey(picture)
    upright = np.empty((*upright_size, 1 if grey else 3), np.uint8)
    stored = as_stored(upright)
    for rows in _bands(height, width):
        band = to_rgb(_to_array(picture.crop((0, rows.start, width, rows.stop))))
        stored[rows] = band[:, :, :1] if grey else band
    return np.broadcast_to(upright, (*upright_size, 3))


def _to_array(image: Image.Image) -> npt.NDArray[Any]:
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):
        return np.clip(np.asarray(image, dtype=np.int64), 0, 65535).astype(np.uint16)
    if image.mode in ("PA", "LA", "RGBa", "La") or "transparency" in image.info:
        return np.asarray(image.convert("RGBA"))
    if image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGB")
    return np.asarray(image)
