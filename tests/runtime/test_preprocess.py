"""Reading and scaling: every kind of image file and array becomes upright RGB of the right size."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duallora_edge.errors import DataError
from duallora_edge.runtime import preprocess
from duallora_edge.runtime.preprocess import MAX_BYTES, MAX_PIXELS, MAX_SIDE, Preprocessing, cut, read_image, to_rgb


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


@pytest.mark.parametrize(("shape", "gap", "factor"), [((256, 256), 2, 8), ((256, 256), 4, 4), ((96, 96), 2, 3)])
def test_large_frames_are_averaged_first(shape: tuple[int, int], gap: float, factor: int) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = (side // factor for side in shape)
    averaged = frame.reshape(height, factor, width, factor, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    expected = Preprocessing(16, "squash", reducing_gap=0)(averaged).astype(int)
    assert abs(Preprocessing(16, "squash", reducing_gap=gap)(frame) - expected).max() <= 1


@pytest.mark.parametrize("side", [20, 40, 63])
def test_small_frames_are_not(side: int) -> None:
    frame = np.random.default_rng(side).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    assert np.array_equal(Preprocessing(16)(frame), Preprocessing(16, reducing_gap=0)(frame))


def test_a_frame_of_the_right_size_is_not_touched() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(Preprocessing(16)(frame[:, ::-1]), frame[:, ::-1])


@pytest.mark.parametrize(
    "values", [{"size": 4}, {"size": 5000}, {"resize": "fill"}, {"interpolation": "nearest"}, {"reducing_gap": 0.5}]
)
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


# -- limits -------------------------------------------------------------------------------------------------------


def as_frame(shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    """An array of any size that takes no memory."""
    return np.broadcast_to(np.zeros(1, dtype), shape)


class Refusing:
    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("can't convert a cuda:0 device type tensor\nto numpy")


def released() -> memoryview:
    view = memoryview(b"abc")
    view.release()
    return view


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ([[1, 2], [3]], "A frame must be"),
        (
            Refusing(),
            r"not a Refusing that NumPy cannot convert \(can't convert a cuda:0 device type tensor to numpy\)",
        ),
        (released(), "A frame must be"),
        (None, "not object"),
        ("photo.jpg", "not <U9"),
        (np.full((4, 4, 3), np.nan), "not float64"),
        (np.zeros((4, 4, 3), bool), "not bool"),
        (np.uint8(3), r"not \(\)"),
        (np.zeros((4, 0, 3), np.uint8), r"not \(4, 0, 3\)"),
        (np.zeros((4, 4, 2), np.uint8), r"not \(4, 4, 2\)"),
        (as_frame((10**7, 10**8, 3)), "scale it down"),
        (as_frame((10**7, 10**8, 4)), "scale it down"),
        (as_frame((10**7, 10**8), np.uint16), "scale it down"),
        (as_frame((1, MAX_SIDE + 1, 3)), "scale it down"),
    ],
)
@pytest.mark.filterwarnings("ignore:Creating an ndarray from ragged")
def test_what_is_no_frame(frame: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        to_rgb(frame)
    assert "\n" not in str(error.value)


def test_what_numpy_can_convert_is_a_frame() -> None:
    content = memoryview(bytes(range(12))).cast("B", (2, 2, 3))
    assert np.array_equal(to_rgb(content), np.arange(12).reshape(2, 2, 3))
    with pytest.raises(DataError, match="int64"):
        to_rgb([[1, 2], [3, 4]])  # plain numbers do not say whether 255 or 65535 is white


def test_alpha_is_laid_over_white_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (2000, 1000, 4), dtype=np.uint8)
    tracemalloc.start()
    whole = to_rgb(frame)
    assert tracemalloc.get_traced_memory()[1] < 30 * 2**20  # the result takes 6, products of 16 bits at once would 50
    tracemalloc.stop()
    monkeypatch.setattr(preprocess, "_BAND_PIXELS", 7000)
    assert np.array_equal(to_rgb(frame), whole)


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "CMYK", "YCbCr", "LAB")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", MODES)
def test_bands_and_orientations_change_no_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, orientation: int
) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (31, 17), dtype=np.uint8)
    colours = Image.fromarray(np.stack([grey, grey[::-1], grey[:, ::-1]], axis=2))
    deep = Image.fromarray(grey.astype(np.uint16) * 256)
    image = deep if mode == "I;16" else deep.convert("I") if mode == "I" else colours.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    kind = "png" if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "tif"
    image.save(tmp_path / f"image.{kind}", exif=exif)
    upright = image.transpose(TURNS[orientation]) if orientation in TURNS else image
    expected = to_rgb(preprocess._to_array(upright))
    monkeypatch.setattr(preprocess, "_BAND_PIXELS", 200)
    assert np.array_equal(read_image(tmp_path / f"image.{kind}"), expected)


def png(
    width: int, height: int, kind: int = 6, bits: int = 8, *chunks: tuple[bytes, bytes], pixels: bytes = b""
) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in parts)


def tiff(*entries: tuple[int, int, int, int], data: bytes = b"", big: bool = False) -> bytes:
    """A grey image of 8 x 8 pixels with these tags (tag, type, count, value) besides."""
    usual = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    usual += [(278, 4, 1, 8), (273, 4, 1, 8), (279, 4, 1, 64)]
    tags = sorted({tag[0]: tag for tag in [*usual, *entries]}.values())
    if big:
        head = b"II\x2b\0" + struct.pack("<HHQ", 8, 0, 16) + struct.pack("<Q", len(tags))
        return head + b"".join(struct.pack("<HHQQ", *tag) for tag in tags) + bytes(8) + data
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags))
    return head + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4) + data


def jpeg(*segments: bytes) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    parts = b"".join(b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data for data in segments)
    return file.getvalue()[:2] + parts + file.getvalue()[2:]


BOMB = zlib.compress(bytes(20_000_000))
HOSTILE: list[tuple[str, Callable[[], bytes], str]] = [
    ("RGBA of 81 million pixels", lambda: png(9000, 9000), "9000 x 9000 pixels, .* more than 512 MB.*; scale it down"),
    ("a long side", lambda: png(MAX_SIDE + 1, 1), "scale it down"),
    ("no size", lambda: png(0, 9), "cannot be read as an image"),
    ("the largest size", lambda: png(2**31 - 1, 2**31 - 1), "has too many pixels; scale it down"),
    ("a text bomb", lambda: png(8, 8, 0, 8, (b"zTXt", b"a\0\0" + BOMB)), "cannot be read as an image"),
    (
        "large EXIF",
        lambda: png(1, 1, 0, 8, (b"eXIf", b"II*\0" + bytes(2**21)), pixels=b"\0\0"),
        "its EXIF data is larger",
    ),
    ("2^31 strips", lambda: tiff((273, 4, 2**31, 8)), "full of metadata"),
    ("2^40 strips", lambda: tiff((273, 16, 2**40, 8), big=True), "full of metadata"),
    ("bits of many samples", lambda: tiff((258, 3, 10**6, 8), data=bytes(2 * 10**6)), "full of metadata"),
    (
        "tags that overlap",
        lambda: tiff(*((1000 + n, 7, 10**5, 8) for n in range(99)), data=bytes(10**5)),
        "full of metadata",
    ),
    (
        "directories in a circle",
        lambda: tiff(*((tag, 4, 1, 8) for tag in (34665, 34853, 40965))),
        "full of metadata|^$",
    ),
    ("many EXIF segments", lambda: jpeg(*[b"Exif\0\0" + bytes(99)] * 20), "full of metadata"),
]


@pytest.mark.parametrize(("content", "words"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_files_are_refused_in_little_memory(content: Callable[[], bytes], words: str) -> None:
    file = io.BytesIO(content())
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=words):
            read_image(file)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_with_usual_tags_is_read(big: bool) -> None:
    assert read_image(io.BytesIO(tiff((700, 7, 4, 0), big=big))).shape == (8, 8, 3)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "image.png").open("wb") as file:
        file.write(png(8, 8))
        file.truncate(MAX_BYTES // 3 + 1)  # takes no space
    with pytest.raises(DataError, match="is larger than"):
        read_image(tmp_path / "image.png")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "image.png")
    with pytest.raises(DataError, match=r"image\.png is not a file; give"):
        read_image(tmp_path / "image.png")


def test_words_for_a_terminal(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\\x1b\[31m\.png does not exist"):
        read_image(tmp_path / "\x1b[31m.png")


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_photo_beyond_the_limit_is_read_at_a_fraction(
    monkeypatch: pytest.MonkeyPatch, kind: str, subsampling: int
) -> None:
    wave = (np.sin(np.arange(401) / 40)[:, None] * np.cos(np.arange(299) / 30) * 100 + 128).astype(np.uint8)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.stack([wave, wave, 255 - wave], 2)).save(file, kind, subsampling=subsampling, exif=exif)
    monkeypatch.setattr(preprocess, "_SPARE_BYTES", 0)
    monkeypatch.setattr(preprocess, "_FILE_COPIES", 0)
    whole = read_image(file)
    assert whole.shape == (299, 401, 3)
    for limit, shape in (
        ((7.0, (299, 401)), (6.9, (150, 201))) if subsampling else ((10.0, (299, 401)), (8.0, (150, 201)))
    ):
        monkeypatch.setattr(preprocess, "MAX_BYTES", limit * wave.size + 1)
        image = read_image(file)
        assert image.shape == (*shape, 3)
        small, expected = (Preprocessing(32)(pixels).astype(int) for pixels in (image, whole))
        assert abs(small - expected).max() <= 6
    monkeypatch.setattr(preprocess, "MAX_BYTES", 2 * wave.size)
    with pytest.raises(DataError, match="scale it down"):
        read_image(file)


def test_the_limit_of_frames_is_that_of_files() -> None:
    assert 7 * MAX_PIXELS <= MAX_BYTES < 7 * (MAX_PIXELS + 1)


@pytest.mark.parametrize(
    ("box", "columns", "rows"),
    [
        ((0, 0, 20, 10), (0, 20), (0, 10)),
        ((3, 2, 7, 9), (3, 7), (2, 9)),
        ((3.9, 2.5, 7.1, 8.01), (3, 8), (2, 9)),
        ((-4, -1e9, 5, 1e30), (0, 5), (0, 10)),
        ((6.2, 6.2, 6.4, 6.4), (6, 7), (6, 7)),
        ((19.9, 9.9, 30, 30), (19, 20), (9, 10)),
    ],
)
def test_a_box_is_cut_out(box: tuple[float, ...], columns: tuple[int, int], rows: tuple[int, int]) -> None:
    frame = np.arange(10 * 20 * 3, dtype=np.uint8).reshape(10, 20, 3)
    (part,) = cut(frame, np.array([box], np.float32))
    assert np.array_equal(part, frame[slice(*rows), slice(*columns)]) and part.size


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([1, 2, 3, 4], r"must be \[N, 4\] .* not \(4,\); reshape a single box to \[1, 4\]"),
        (np.ones((2, 6)), r"not \(2, 6\)"),
        ([[1, 2, 3], [1]], "must be an array of numbers"),
        ([["a", "b", "c", "d"]], "must be an array of numbers"),
        ([[0, 0, 5, 5], [5, 0, 1, 5]], r"Box 1 \(5, 0, 1, 5\) holds no part of a frame of 20 x 10 pixels"),
        ([[3, 3, 3, 5]], "Box 0"),
        ([[20, 0, 30, 10]], "leave out boxes outside"),
        ([[-9, 0, 0, 10]], "leave out boxes outside"),
        ([[0, 0, np.nan, 5]], "Box 0"),
        ([[0, 0, np.inf, 5]], "Box 0"),
    ],
)
def test_what_is_no_box(boxes: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cut(np.zeros((10, 20, 3), np.uint8), boxes)


@pytest.mark.parametrize("boxes", [[], np.empty((0, 4), np.float32)])
def test_no_boxes(boxes: Any) -> None:
    assert cut(np.zeros((10, 20, 3), np.uint8), boxes) == []
