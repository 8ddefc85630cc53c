"""Checks the metadata of an image file before Pillow reads it.

Pillow turns metadata into Python objects that are 30 to 80 times as large as in the file. So the values of a TIFF and
the EXIF segments of a JPEG are counted first.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

MAX_VALUES = 2**17  # of a TIFF: offsets of strips or tiles, of which a large image has some 10,000
MAX_TAG_BYTES = 8 * 2**20
MAX_EXIF_SEGMENTS = 16  # of 64 kB; cameras write one
# TIFF type -> bytes of a value. Types 1, 2 and 7 stay bytes, of the others each value becomes an object.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_BYTES = (1, 2, 7)
_DIRECTORIES = (34665, 34853, 40965)  # tags that lead to further tags: EXIF, GPS, interoperability


def has_usual_metadata(file: BinaryIO) -> bool:
    """Whether an image file has few enough tags and segments for Pillow to read them in little memory."""
    file.seek(0)
    start = file.read(4)
    if start[:2] in (b"II", b"MM"):
        return _has_few_tags(file, "<" if start[:2] == b"II" else ">", 43 in start[2:])
    return start[:2] != b"\xff\xd8" or _has_few_exif_segments(file)


def _has_few_tags(file: BinaryIO, order: str, big: bool) -> bool:
    file.seek(8 if big else 4)
    directories = [_number(file, f"{order}{'Q' if big else 'L'}")]
    values = octets = 0
    for offset in directories:  # grows meanwhile
        if len(directories) > 1 + len(_DIRECTORIES):
            return False
        for tag, kind, count, value in _entries(file, offset, order, big):
            octets += count * _SIZES.get(kind, 0)
            values += count if kind in _SIZES and kind not in _BYTES else 1
            if values > MAX_VALUES or octets > MAX_TAG_BYTES:
                return False
            if tag in _DIRECTORIES and offset == directories[0]:
                directories.append(value)
    return True


def _entries(file: BinaryIO, offset: int, order: str, big: bool) -> list[tuple[int, int, int, int]]:
    """Tag, type, number of values, and the offset of them, of as many entries as are there."""
    if offset >= 2**63:
        return []
    layout = struct.Struct(f"{order}HHQQ" if big else f"{order}HHLL")
    file.seek(offset)
    count = _number(file, f"{order}{'Q' if big else 'H'}")
    content = file.read(min(count, MAX_VALUES + 1) * layout.size)
    return list(layout.iter_unpack(content[: len(content) // layout.size * layout.size]))


def _number(file: BinaryIO, layout: str) -> int:
    size = struct.calcsize(layout)
    return int(struct.unpack(layout, file.read(size).ljust(size, b"\0"))[0])


def _has_few_exif_segments(file: BinaryIO) -> bool:
    file.seek(2)
    found = 0
    while found <= MAX_EXIF_SEGMENTS:
        marker = file.read(2)
        if len(marker) < 2 or marker == b"\xff\xda":  # the pixels follow
            return True
        if marker[0] != 0xFF or marker[1] in (0, 0xFF):  # filling, which Pillow passes over
            file.seek(-1, io.SEEK_CUR)
        elif not 0xD0 <= marker[1] <= 0xD8:  # those have no content
            found += marker[1] == 0xE1
            file.seek(max(0, _number(file, ">H") - 2), io.SEEK_CUR)
    return False
