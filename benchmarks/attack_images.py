"""Mutated image files, read as an application would: each is an image or a `DataError`, never anything else.

    python benchmarks/attack_images.py [COUNT] [SEED]

Images of every format that this Pillow can write are damaged: bits, lengths, sizes, ends. Processes with a limit on
their memory read them. Image N of a seed is always the same. Linux only, as it asks /proc for the peak of each image.
"""

from __future__ import annotations

import io
import os
import resource
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from duallora_edge.errors import DataError
from duallora_edge.runtime.preprocess import MAX_BYTES, read_image
from duallora_edge.text import UNSAFE

PROCESSES = 2
ADDRESS_SPACE = 4 * 2**30  # beyond it an allocation fails, long before the machine is harmed
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

Generator = np.random.Generator


@dataclass(frozen=True)
class Reading:
    """How reading image ``index`` ended: ``"read"``, ``"DataError"``, or the words of what must not happen."""

    index: int
    kind: str
    outcome: str
    peak_bytes: int
    seconds: float


def photos(count: int = 4) -> list[Image.Image]:
    """Real photos where DUALLORA_EDGE_ASSETS names some, else noise that was made smooth."""
    if assets := os.environ.get("DUALLORA_EDGE_ASSETS"):
        with tarfile.open(Path(assets) / "images" / "dtd10.tar") as archive:
            names = [member for member in archive if member.name.endswith((".jpg", ".png"))]
            files = [archive.extractfile(names[index * len(names) // count]) for index in range(count)]
            return [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files if file is not None]
    noise = np.random.default_rng(0).integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    return [Image.fromarray(part).resize((160, 120), Image.Resampling.BICUBIC) for part in noise]


def originals() -> list[tuple[str, bytes, tuple[int, int]]]:
    """Format and variant, content, and size of the undamaged images."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    jpeg: list[tuple[str, dict[str, Any]]] = [
        ("RGB", {"exif": exif}),
        ("RGB", {"progressive": True, "subsampling": 0}),
        ("CMYK", {}),
        ("L", {}),
    ]
    deep = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
    variants: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "JPEG": jpeg,
        "MPO": [("RGB", {"save_all": True})],
        "PNG": [(mode, {}) for mode in deep] + [("P", {"transparency": 3}), ("RGB", {"exif": exif})],
        "WEBP": [("RGB", {"exif": exif}), ("RGBA", {}), ("RGB", {"lossless": True}), ("RGB", {"save_all": True})],
        "BMP": [(mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
        "TIFF": [(mode, {}) for mode in (*deep, "I", "F", "CMYK", "YCbCr", "LAB")]
        + [("RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")]
        + [("RGB", {"big_tiff": True, "exif": exif}), ("1", {"compression": "group4"})],
        "GIF": [("P", {}), ("L", {}), ("P", {"transparency": 3, "save_all": True})],
        "PPM": [(mode, {}) for mode in ("1", "L", "RGB", "I;16")],
        "AVIF": [("RGB", {"exif": exif}), ("RGBA", {}), ("RGB", {"save_all": True})],
        "JPEG2000": [("L", {}), ("RGB", {"tile_size": (64, 64)}), ("RGBA", {}), ("RGB", {"irreversible": True})],
    }
    Image.init()
    found = []
    for photo in photos():
        for kind in (kind for kind in variants if kind in Image.SAVE):
            for mode, options in variants[kind]:
                picture = _in_mode(photo, mode)
                more = {"append_images": [picture.rotate(180)]} if options.get("save_all") else {}
                content = io.BytesIO()
                picture.save(content, kind, **options, **more)
                found.append((f"{kind} {mode}", content.getvalue(), photo.size))
    return found


def _in_mode(photo: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    if mode in ("LA", "RGBA"):
        photo = photo.copy()
        photo.putalpha(photo.convert("L"))
    return photo.convert(mode)


def _flip(data: bytearray, rng: Generator) -> None:
    # Headers are a small part of a file, so half of the damage is done there.
    end = len(data) if rng.integers(2) else min(len(data), 600)
    for _ in range(rng.integers(1, 16)):
        data[rng.integers(end)] ^= 1 << rng.integers(8)


def _cut(data: bytearray, rng: Generator) -> None:
    del data[rng.integers(len(data)) :]


def _remove(data: bytearray, rng: Generator) -> None:
    start = rng.integers(len(data))
    del data[start : start + rng.integers(1, 200)]


def _repeat(data: bytearray, rng: Generator) -> None:
    start = rng.integers(len(data))
    data[start:start] = data[start : start + rng.integers(1, 200)] * int(rng.integers(1, 50))


def _put_number(data: bytearray, rng: Generator) -> None:
    """A length, count or offset becomes an extreme one."""
    layout = rng.choice(["<H", ">H", "<I", ">I"])
    place = rng.integers(min(len(data), 600))
    number = struct.pack(layout, int(rng.choice(EXTREMES)) & (2 ** (8 * struct.calcsize(layout)) - 1))
    data[place : place + len(number)] = number


def _resize(data: bytearray, rng: Generator, size: tuple[int, int]) -> None:
    """The width or the height becomes an extreme or a large one wherever the file states it."""
    value = int(rng.choice(size))
    new = int(rng.choice([*EXTREMES, rng.integers(1, 70_000), 20_000]))
    encodings = [(struct.pack(x, value), struct.pack(x, new & m)) for x, m in _INTEGERS] + [
        (b"%d" % value, b"%d" % new),
        (struct.pack("<I", value - 1)[:3], struct.pack("<I", new)[:3]),  # of WebP
    ]
    old, put = encodings[rng.integers(len(encodings))]
    start = bytes(data[:2000])
    data[:2000] = start.replace(old, put, int(rng.integers(1, 4)))


_INTEGERS = ((">I", 0xFFFFFFFF), ("<I", 0xFFFFFFFF), (">H", 0xFFFF), ("<H", 0xFFFF))


def _with_checksums(data: bytearray) -> None:
    """Make the checksums of a PNG right, without which no decoder looks further."""
    place = 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(data):
            return
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4


def mutated(index: int, seed: int, sources: list[tuple[str, bytes, tuple[int, int]]]) -> tuple[str, bytes]:
    """Kind and content of image ``index``."""
    rng = np.random.default_rng((seed, index))
    kind, content, size = sources[index % len(sources)]
    data = bytearray(content)
    steps: list[Callable[[bytearray, Generator], None]] = [_flip, _cut, _remove, _repeat, _put_number]
    for _ in range(rng.integers(1, 4)):
        choice = rng.integers(len(steps) + 3)
        if choice < len(steps):
            steps[choice](data, rng)
        elif choice == len(steps):
            other = sources[rng.integers(len(sources))][1]
            place, start = rng.integers(len(data)), rng.integers(len(other))
            data[place : place + 100] = other[start : start + rng.integers(1, 400)]
        else:
            _resize(data, rng, size)
        if not data:
            break
    if kind.startswith("PNG") and rng.integers(2):
        _with_checksums(data)
    return kind, bytes(data)


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _read(index: int, kind: str, content: bytes, file: Path) -> Reading:
    """Read an image from memory or from ``file``, for which some decoders have other ways."""
    file.write_bytes(content)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = _memory("VmRSS"), time.perf_counter()
    try:
        pixels = read_image(file if index % 3 == 0 else io.BytesIO(content))
        right = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        outcome = "read" if right else f"{pixels.dtype} {pixels.shape}"
    except DataError as error:
        outcome = f"unsafe words {str(error)!r}" if UNSAFE.search(str(error)) else "DataError"
    except BaseException as error:  # exactly what is looked for
        outcome = f"{type(error).__name__}: {error}"
    return Reading(index, kind, outcome, _memory("VmHWM") - before, time.perf_counter() - start)


def _work(first: int, count: int, seed: int, channel: Connection) -> None:
    warnings.simplefilter("ignore")  # Pillow warns of much that is odd
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    sources = originals()
    with tempfile.TemporaryDirectory() as folder:
        for index in range(first, count, PROCESSES):
            kind, content = mutated(index, seed, sources)
            channel.send(index)
            channel.send(_read(index, kind, content, Path(folder, "image")))
    channel.close()


def readings(count: int, seed: int) -> list[Reading]:
    """Read ``count`` images; one that ends its process is a reading, too."""
    context = get_context("spawn")
    found: list[Reading] = []
    running: dict[Connection, tuple[Any, int | None]] = {}

    def start(first: int) -> None:
        if first < count:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(first, count, seed, theirs))
            process.start()
            theirs.close()
            running[ours] = (process, None)

    for number in range(PROCESSES):
        start(number)
    while running:
        for channel in wait(list(running)):
            assert isinstance(channel, Connection)
            process, current = running[channel]
            try:
                message = channel.recv()
            except EOFError:
                del running[channel]
                process.join()
                if current is not None:
                    found.append(Reading(current, "?", f"process ended with code {process.exitcode}", 0, 0.0))
                    start(current + PROCESSES)
                elif process.exitcode:
                    raise RuntimeError(
                        f"A process ended with code {process.exitcode} before it read anything"
                    ) from None
                continue
            running[channel] = (process, message if isinstance(message, int) else None)
            if isinstance(message, Reading):
                found.append(message)
    return found


def main(count: int = 20_000, seed: int = 0) -> int:
    """Read ``count`` mutated images and print what happened; returns how many ended in what must not happen."""
    found = readings(count, seed)
    by_kind = Counter((reading.kind.split()[0], reading.outcome) for reading in found)
    wrong = [reading for reading in found if reading.outcome not in ("read", "DataError")]
    print(f"{'format':<10}{'read':>8}{'DataError':>11}")
    for kind in sorted({reading.kind.split()[0] for reading in found}):
        print(f"{kind:<10}{by_kind[kind, 'read']:>8}{by_kind[kind, 'DataError']:>11}")
    largest, slowest = max(found, key=lambda r: r.peak_bytes), max(found, key=lambda r: r.seconds)
    print(f"{len(found)} images, seed {seed}: {len(wrong)} ended in something else")
    for reading in wrong[:20]:
        print(f"  image {reading.index} ({reading.kind}): {reading.outcome[:300]}")
    above = sum(reading.peak_bytes > MAX_BYTES for reading in found)
    print(
        f"largest peak: {largest.peak_bytes / 1e6:.0f} MB, image {largest.index} ({largest.kind}), {above} above limit"
    )
    print(f"slowest: {slowest.seconds:.1f} s, image {slowest.index} ({slowest.kind})")
    return len(wrong) + above


if __name__ == "__main__":
    sys.exit(min(1, main(*map(int, sys.argv[1:3]))))
