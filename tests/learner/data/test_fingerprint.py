"""Fingerprints: copies in other formats are known again, other pictures are not."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from duallora_edge.learner.data.fingerprint import (
    CLOSE,
    FINGERPRINT_BYTES,
    HASH_BYTES,
    Bytes,
    fingerprint,
    hashes,
    resembling,
)
from duallora_edge.runtime.preprocess import Preprocessing


def picture(seed: int, width: int = 200, height: int = 160) -> Image.Image:
    """A smooth random picture, as photographs are at the size of a thumbnail."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def of(image: Image.Image, size: int = 128) -> Bytes:
    frame = np.asarray(image.convert("RGB"))
    return fingerprint(frame, Preprocessing(size)(frame))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


COPIES = {
    "JPEG 90": lambda image: jpeg(image, 90),
    "JPEG 40": lambda image: jpeg(image, 40),
    "half": lambda image: image.resize((100, 80), Image.Resampling.BICUBIC),
    "twice": lambda image: image.resize((400, 320), Image.Resampling.LANCZOS),
    "darker": lambda image: image.point(lambda value: 0.8 * value),
    "half, then JPEG": lambda image: jpeg(image.resize((100, 80)), 75),
}


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES)
def test_copies_are_known_again(change: object) -> None:
    originals = [picture(seed) for seed in range(30)]
    known = np.stack([of(image) for image in originals])
    copies = np.stack([of(change(image)) for image in originals])  # type: ignore[operator]
    assert resembling(copies, known).all() and resembling(known, copies).all()
    assert not set(hashes(copies)) & set(hashes(known))
    others = np.stack([of(change(picture(seed))) for seed in range(100, 130)])  # type: ignore[operator]
    assert not resembling(others, known).any()


def test_an_image_of_one_color_is_known_by_its_hash_alone() -> None:
    black, white, again = (of(Image.new("RGB", (64, 64), color)) for color in ("black", "white", "black"))
    assert np.array_equal(black, again) and resembling(again[None], black[None]).all()
    assert not resembling(white[None], black[None]).any()


def test_a_fingerprint_stays_what_it_is() -> None:
    """It is stored with every task, so it must not depend on versions or machines."""
    row = of(picture(0))
    assert row.shape == (FINGERPRINT_BYTES,) and row.dtype == np.uint8
    small = np.asarray(Image.fromarray(np.arange(0, 192, dtype=np.uint8).reshape(8, 8, 3)))
    assert fingerprint(small, small).tobytes().hex()[:32] == "3d71a97b6ae6893ec8393309ecfd632e"
    assert fingerprint(small, small).tobytes().hex()[32:64] == "bedf964c00e4e550458d11a3e85e141d"


def test_the_share_of_different_bits_is_the_angle() -> None:
    """SimHash, Charikar 2002, beside the angle itself."""
    rng = np.random.default_rng(0)
    base, other = rng.normal(size=(2, 16, 16, 3))
    for share in (0.05, 0.2, 0.5):
        frames = [(128 + 30 * value).clip(0, 255).astype(np.uint8) for value in (base, base + share * other)]
        one, two = (frame.reshape(-1, 3) - frame.reshape(-1, 3).mean(axis=0) for frame in frames)
        angle = math.acos((one * two).sum() / math.sqrt((one**2).sum() * (two**2).sum()))
        bits = np.unpackbits(np.bitwise_xor(*(fingerprint(frame, frame)[HASH_BYTES:] for frame in frames))).sum()
        assert bits == pytest.approx(512 * angle / math.pi, abs=4 * math.sqrt(512 * angle / math.pi))


@settings(max_examples=50)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_resembling_is_a_search_over_all_pairs(n: int, m: int, flips: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    known = rng.integers(0, 256, (m, FINGERPRINT_BYTES), dtype=np.uint8)
    rows = rng.integers(0, 256, (n, FINGERPRINT_BYTES), dtype=np.uint8)
    if n and m:
        bits = np.unpackbits(known[0])
        bits[8 * HASH_BYTES + rng.permutation(512)[:flips]] ^= 1
        rows[0] = np.packbits(bits)
    different = [[np.unpackbits(a ^ b)[8 * HASH_BYTES :].sum() for b in known] for a in rows]
    assert resembling(rows, known).tolist() == [any(bits <= CLOSE for bits in row) for row in different]
