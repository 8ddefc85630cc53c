"""The frames that tell most, kept on the device within a limit: the most novel ones, no two of them alike.

KEEP/kept.db   one SQLite file with pictures (JPEG, at most 640 pixels long), answers and features

A camera may keep frames while others read or remove some.

A threshold would miss most of a new class, and uncertainty finds less of it (benchmarks/RESULTS.md), so the novelty
alone decides, whatever the threshold of the bundle.
"""

from __future__ import annotations

import hashlib
import io
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from duallora_edge.errors import StoreError
from duallora_edge.files import own_folder, write_atomic
from duallora_edge.runtime.field.taught_folder import reduced
from duallora_edge.runtime.prediction import Prediction
from duallora_edge.runtime.preprocess import Pixels

FILE = "kept.db"
INTERVAL_S = 0.5
# Cosine of features above which two frames show the same.
ALIKE = 0.98
_QUALITY = 90
_TABLE = """
CREATE TABLE IF NOT EXISTS kept (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL, bundle TEXT, version INTEGER, label TEXT, confidence REAL,
    novelty REAL, features BLOB, jpeg BLOB
)"""

_COLUMNS = "id, time, bundle, version, label, confidence, novelty, features, jpeg"
_INSERT = f"INSERT INTO kept ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"

Halves = npt.NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class Kept:
    """A kept frame: its picture as ``jpeg``, and what bundle and version said about it at ``time`` (Unix seconds)."""

    id: int
    time: float
    bundle: str
    version: int
    label: str
    confidence: float
    novelty: float
    features: Halves
    jpeg: bytes


class Keeper:
    """Keeps frames in a folder."""

    def __init__(self, folder: Path, megabytes: float, interval_s: float = INTERVAL_S) -> None:
        """Open a folder, made if there is none, that may take ``megabytes`` (10^6 bytes).

        Of ``interval_s`` seconds only the most novel frame is a candidate, so that a camera is not slowed down by
        writing; 0 for every frame. Raises `StoreError` when the file in it is damaged, ``OSError`` when nothing
        can be written.
        """
        own_folder(folder)
        self.path, self._limit, self._interval_s = folder / FILE, int(megabytes * 1e6), interval_s
        self._best: tuple[Pixels, Prediction, float] | None = None
        self._due = time.monotonic() + interval_s
        with _said(self.path):
            self._file = sqlite3.connect(self.path, isolation_level=None, timeout=1.0, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode = WAL")  # who reads does not make the camera wait
            self._file.execute(_TABLE)
            self._seen: int | None = None
            with self._changing():
                over = self._leaving(0, math.inf)  # the limit may be a lower one than before
                self._delete(over)
        self._forget(over)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, pixels: Pixels, prediction: Prediction) -> None:
        """Consider a frame ``uint8 [H, W, 3]`` and the answer to it. Raises `StoreError` when it cannot be written."""
        if prediction.features is None:
            return
        if self._best is None or prediction.novelty > self._best[1].novelty:
            self._best = pixels, prediction, time.time()
        if time.monotonic() >= self._due:
            best, self._best = self._best, None
            self._due = time.monotonic() + self._interval_s
            self._consider(*best)

    def close(self) -> None:
        """Write what is still considered, and close the file."""
        with closing(self._file):
            if self._best is not None:
                best, self._best = self._best, None
                self._consider(*best)

    def _consider(self, pixels: Pixels, prediction: Prediction, moment: float) -> None:
        with _said(self.path), self._changing():
            self._put(pixels, prediction, moment)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A change that happens whole or not at all, to what is there now; others may have removed frames meanwhile."""
        with self._file:
            self._file.execute("BEGIN IMMEDIATE")
            seen = int(self._file.execute("PRAGMA data_version").fetchone()[0])
            if seen != self._seen:
                self._seen = seen
                self._read()
            try:
                yield
            except BaseException:
                self._seen = None
                raise

    def _read(self) -> None:
        rows = self._file.execute(
            "SELECT id, novelty, bundle, version, length(jpeg) + length(features), features FROM kept"
        ).fetchall()
        self._ids = [row[0] for row in rows]
        self._novelty = [float(row[1]) for row in rows]
        self._made_by = [(row[2], row[3]) for row in rows]
        self._bytes = [int(row[4]) for row in rows]
        self._features = [np.frombuffer(row[5], np.float16) for row in rows]

    def _put(self, pixels: Pixels, prediction: Prediction, moment: float) -> None:
        assert prediction.features is not None
        features = (prediction.features / max(float(np.linalg.norm(prediction.features)), 1e-12)).astype(np.float16)
        twin = self._twin(features, (prediction.bundle, prediction.bundle_version))
        if twin is not None and prediction.novelty <= self._novelty[twin]:
            return
        jpeg = _jpeg(pixels, moment)
        size = len(jpeg) + features.nbytes
        leaving = self._leaving(size, prediction.novelty, twin)
        if sum(self._bytes) - sum(self._bytes[index] for index in leaving) + size > self._limit:
            return
        self._delete(leaving)
        row = self._file.execute(
            _INSERT,
            (
                None, moment, prediction.bundle, prediction.bundle_version, prediction.label, prediction.confidence,
                prediction.novelty, features.tobytes(), jpeg,
            ),
        )  # fmt: skip
        self._forget(leaving)
        self._ids.append(int(row.lastrowid or 0))
        self._novelty.append(prediction.novelty)
        self._made_by.append((prediction.bundle, prediction.bundle_version))
        self._bytes.append(size)
        self._features.append(features)

    def _leaving(self, size: int, novelty: float, twin: int | None = None) -> list[int]:
        """The least novel frames, all below ``novelty``, that have to leave for ``size`` bytes; the ``twin`` first."""
        leaving = [] if twin is None else [twin]
        excess = sum(self._bytes) - sum(self._bytes[index] for index in leaving) + size - self._limit
        for index in sorted(range(len(self._ids)), key=self._novelty.__getitem__):
            if excess <= 0 or self._novelty[index] >= novelty:
                break
            if index != twin:
                leaving.append(index)
                excess -= self._bytes[index]
        return leaving

    def _delete(self, leaving: list[int]) -> None:
        self._file.executemany("DELETE FROM kept WHERE id = ?", [(self._ids[index],) for index in leaving])

    def _forget(self, leaving: list[int]) -> None:
        for each in (self._ids, self._novelty, self._made_by, self._bytes, self._features):
            for index in sorted(leaving, reverse=True):
                del each[index]

    def _twin(self, features: Halves, made_by: tuple[str, int]) -> int | None:
        """The kept frame that shows the same, by the features of the same bundle."""
        same = [index for index, each in enumerate(self._made_by) if each == made_by]
        if not same:
            return None
        cosines = np.stack([self._features[index] for index in same]).astype(np.float32) @ features.astype(np.float32)
        nearest = int(cosines.argmax())
        return same[nearest] if cosines[nearest] > ALIKE else None


def _jpeg(pixels: Pixels, moment: float) -> bytes:
    """A frame as it is kept, with the time in its metadata, by which training tells what was taken together."""
    stamp = time.strftime("%Y:%m:%d %H:%M:%S", time.gmtime(moment))
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "duallora-edge"
    exif[ExifTags.Base.DateTime] = stamp
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = stamp
    buffer = io.BytesIO()
    Image.fromarray(reduced(pixels)).save(buffer, "JPEG", quality=_QUALITY, exif=exif)
    return buffer.getvalue()


def kept_frames(folder: Path) -> Iterator[Kept]:
    """The kept frames of a folder, the most novel first. Raises `StoreError` when there are none."""
    with _opened(folder) as file:
        for row in file.execute(f"SELECT {_COLUMNS} FROM kept ORDER BY novelty DESC, id"):
            yield Kept(*(*row[:7], np.frombuffer(row[7], np.float16), row[8]))


def remove_kept(folder: Path, ids: Iterable[int]) -> None:
    """Remove frames by their ids; those that are gone already are passed over. Raises as `kept_frames`."""
    with _opened(folder) as file:
        file.execute("PRAGMA secure_delete = ON")  # removed pictures are overwritten
        with file:
            file.execute("BEGIN IMMEDIATE")
            file.executemany("DELETE FROM kept WHERE id = ?", [(each,) for each in ids])
        if file.execute("SELECT count(*) FROM kept").fetchone()[0] == 0:
            file.execute("VACUUM")  # gives its room back
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def put_back(folder: Path, frames: Iterable[Kept]) -> None:
    """Bring back frames that `remove_kept` removed. Raises as `kept_frames`."""
    rows = [
        (each.id, each.time, each.bundle, each.version, each.label, each.confidence, each.novelty,
         each.features.tobytes(), each.jpeg)
        for each in frames
    ]  # fmt: skip
    with _opened(folder) as file, file:
        file.execute("BEGIN IMMEDIATE")
        file.executemany(_INSERT, rows)


def file_name(frame: Kept) -> str:
    """The name of a kept frame as a file, by its time and content."""
    digest = hashlib.sha256(frame.jpeg).hexdigest()
    return f"{time.strftime('%Y%m%d_%H%M%S', time.gmtime(frame.time))}-{digest[:12]}.jpg"


def copy_kept(folder: Path, output: Path) -> list[int]:
    """Write the kept frames as images, the most novel first by name; returns their ids. Raises as `kept_frames`."""
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for frame in kept_frames(folder):
        write_atomic(output / f"{1000 - round(1000 * frame.novelty):04d}-{file_name(frame)}", frame.jpeg)
        written.append(frame.id)
    return written


@contextmanager
def _opened(folder: Path) -> Iterator[sqlite3.Connection]:
    path = folder / FILE
    if not path.is_file():
        raise StoreError(f"{folder} holds no kept frames; 'run --keep {folder}' keeps some.")
    uri = f"{path.resolve().as_uri()}?mode=rw"
    with _said(path), closing(sqlite3.connect(uri, uri=True, timeout=5.0, isolation_level=None)) as file:
        file.execute(_TABLE)  # the camera was killed before it was there
        yield file


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """Turns the errors of SQLite into a `StoreError`."""
    try:
        yield
    except sqlite3.Error as error:
        remedy = "end the process that uses it" if "locked" in str(error) else "move it away"
        raise StoreError(f"{path} cannot be used ({error}); {remedy}, and try again.") from error
