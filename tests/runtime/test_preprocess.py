"""Reading and scaling: every kind of image file and array becomes upright RGB of the right size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duallora_edge.errors import DataError
from duallora_edge.runtime.preprocess import Preprocessing, read_image, to_rgb


@pytest.mark.parametrize(
    ("pixel", "dtype", "color", "expected"),
    [
        ((1, 2, 3), np.uint8, "rgb", (1, 2, 3)),
        ((1, 2, 3), np.uint8, "bgr", (3, 2, 1)),
        ((7,), np.uint8, "rgb", (7, 7, 7)),
        ((10, 20, 30, 255), np.uint8, "rgb", (10, 20, 30)),
        ((10, 20, 30, 0), np.uint8, "rgb", (255, 255, 255)),
        ((0, 100, 255, 128), np.uint8, "bgr", (255, 177, 127)),
        ((256, 65535, 0), np.uint16, "rgb", (1, 255, 0)),
    ],
)
def test_to_rgb(pixel: tuple[int, ...], dtype: type, color: str, expected: tuple[int, ...]) -> None:
    frame = np.full((2, 3, len(pixel)), pixel, dtype=dtype)
    result = to_rgb(frame, color)
    assert result.dtype == np.uint8 and result.shape == (2, 3, 3)
    assert tuple(result[1, 2].tolist()) == expected


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 9, (9, 9, 9)),
        ("1", 1, (255, 255, 255)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (1, 2, 3, 0), (255, 255, 255)),
        ("LA", (4, 255), (4, 4, 4)),
        ("P", 0, (0, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
    ],
)
def test_read_image_of_every_mode(tmp_path: Path, mode: str, value: object, expected: tuple[int, ...]) -> None:
    file = tmp_path / "image.png"
    Image.new(mode, (3, 2), value).save(file)  # type: ignore[arg-type]
    image = read_image(file)
    assert image.shape == (2, 3, 3) and tuple(image[0, 0].tolist()) == expected


def test_an_open_file_is_read_like_a_path(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    assert np.array_equal(read_image(io.BytesIO(content)), read_image(tmp_path / "image.png"))
    with pytest.raises(DataError, match=r"^The image cannot be read as an image"):
        read_image(io.BytesIO(content[:40]))


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held with its right side down
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    upright = read_image(tmp_path / "photo.png")
    assert upright.shape == (40, 20, 3)
    assert upright[:20].min() == 255 and upright[20:].max() == 0


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_keeps_the_centre_and_squash_keeps_everything(interpolation: str) -> None:
    frame = np.zeros((30, 90, 3), np.uint8)
    frame[:, 28:62] = 200  # Pillow's filters reach a little over the edge of the square
    assert Preprocessing(16, "crop", interpolation)(frame).min() == 200
    squashed = Preprocessing(18, "squash", interpolation)(frame)
    assert squashed.shape == (18, 18, 3)
    assert squashed[:, :3].max() == 0 and squashed[:, 8:10].min() == 200


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize(("channels", "color"), [(1, "rgb"), (3, "rgb"), (3, "bgr"), (4, "rgb"), (4, "bgr")])
def test_views_are_scaled_like_copies(resize: str, channels: int, color: str) -> None:
    frame = np.random.default_rng(channels).integers(0, 256, (45, 70, channels), dtype=np.uint8)
    rgb = to_rgb(frame[::2, ::-1], color)
    assert np.array_equal(Preprocessing(16, resize)(rgb), Preprocessing(16, resize)(np.array(rgb, order="C")))


def test_downscaling_averages() -> None:
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = Preprocessing(8, "crop", "bilinear")(to_rgb(board))
    assert abs(small.astype(int) - 127).max() <= 2


def test_a_frame_of_the_right_size_is_not_touched() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(Preprocessing(16)(frame[:, ::-1]), frame[:, ::-1])


@pytest.mark.parametrize("values", [{"size": 4}, {"size": 5000}, {"resize": "fill"}, {"interpolation": "nearest"}])
def test_settings_that_do_not_exist(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Preprocessing(**{"size": 16, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000"])
def test_formats(tmp_path: Path, kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    file = tmp_path / "image"
    Image.new("RGB", (40, 30), (200, 100, 50)).save(file, format=kind)
    image = read_image(file)
    assert image.shape == (30, 40, 3) and abs(image.astype(int) - (200, 100, 50)).max() < 10


def test_what_is_no_image_at_all() -> None:
    with pytest.raises(DataError, match=r"^The image cannot be read as an image \(it is none of JPEG, PNG.*\)"):
        read_image(io.BytesIO(b"%PDF-1.4 no image"))


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"x" * 50])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_image(tmp_path / "image.png")
