"""Fingerprints by which images are known again: exactly, and after they were resized or encoded anew."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

Bytes = npt.NDArray[np.uint8]

HASH_BYTES, LOOK_BYTES = 16, 64
FINGERPRINT_BYTES = HASH_BYTES + LOOK_BYTES
# Two looks that differ in so few of their 512 bits belong to the same picture. 95 of 100 copies encoded as JPEG of
# quality 75 differ in 7 to 17 bits (29 and 32 where the originals have 32 or 64 px), the most similar two of 1,500
# different images in 21 to 43, but for frames of one traffic sign (benchmarks/RESULTS.md).
CLOSE = 20
_SIDE = 16
_FLAT = 1.0
_BLOCK = 4096


def fingerprint(frame: Bytes, pixels: Bytes) -> Bytes:
    """The fingerprint, uint8 [80], of an image.

    Args:
        frame: the image in full size, uint8 [H, W, 3]; its hash are the first 16 bytes.
        pixels: the image as the model sees it, uint8 [S, S, 3]. Its look are the other 64: the signs of 512 projections
            of a thumbnail of 16 x 16 px, less the mean of each color (SimHash, Charikar 2002). The share of different
            bits is the angle between two thumbnails. An image of one color has none, and a look from its hash.
    """
    height, width, _ = frame.shape
    content = hashlib.blake2b(f"{height}x{width}".encode(), digest_size=HASH_BYTES)
    content.update(np.ascontiguousarray(frame).data)
    exact = content.digest()
    small = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    thumbnail = np.asarray(small, np.float32).reshape(-1, 3)
    thumbnail = thumbnail - thumbnail.mean(axis=0)
    if np.sqrt(np.square(thumbnail).mean()) < _FLAT:
        look = hashlib.shake_256(exact).digest(LOOK_BYTES)
    else:
        look = np.packbits(thumbnail.ravel() @ _projections() > 0).tobytes()
    return np.frombuffer(exact + look, np.uint8)


def hashes(fingerprints: Bytes) -> list[bytes]:
    """The hashes of images, from rows of bytes that begin with their fingerprints."""
    return [row[:HASH_BYTES].tobytes() for row in fingerprints]


def resembling(fingerprints: Bytes, others: Bytes) -> npt.NDArray[np.bool_]:
    """Which images look like one of the ``others``, bool [n], from rows of bytes that begin with their fingerprints."""
    found = np.zeros(len(fingerprints), bool)
    for start in range(0, len(others), _BLOCK):
        known = _signs(others[start : start + _BLOCK])
        for first in range(0, len(fingerprints), _BLOCK):
            # Products of signs: equal bits minus different ones.
            agreement = _signs(fingerprints[first : first + _BLOCK]) @ known.T
            found[first : first + _BLOCK] |= agreement.max(axis=1) >= 8 * LOOK_BYTES - 2 * CLOSE
    return found


def _signs(fingerprints: Bytes) -> npt.NDArray[np.float32]:
    bits = np.unpackbits(np.ascontiguousarray(fingerprints[:, HASH_BYTES:FINGERPRINT_BYTES]), axis=1)
    return bits.astype(np.float32) * 2 - 1


@cache
def _projections() -> npt.NDArray[np.float32]:
    """Random signs [768, 512] that are the same everywhere and always."""
    values = _SIDE * _SIDE * 3
    stream = hashlib.shake_256(b"what an image looks like").digest(values * LOOK_BYTES)
    return np.unpackbits(np.frombuffer(stream, np.uint8)).reshape(values, -1).astype(np.float32) * 2 - 1
