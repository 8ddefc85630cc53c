"""From a stream of image references to checked pixels, decoding every image once."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from duallora_edge.errors import DataError
from duallora_edge.files import cache_folder
from duallora_edge.learner.data.cache import FACT_BYTES, Decoded, DecodedCache
from duallora_edge.learner.data.fingerprint import FINGERPRINT_BYTES, Bytes, fingerprint, hashes
from duallora_edge.learner.data.health import MIN_SIDE, Flag, HealthReport, judge, report_task
from duallora_edge.learner.data.images import ImageRef, ImageSet, Stream, TaskData
from duallora_edge.learner.data.scenes import scenes_by_class
from duallora_edge.learner.data.tables import release_groups
from duallora_edge.runtime.preprocess import Preprocessing

_SCHEMA = 2
_BATCH = 256


@dataclass(frozen=True, eq=False)
class PixelSet:
    """Checked images: ``pixels`` ``uint8 [N, S, S, 3]`` RGB, read-only, mapped from disk; ``labels``: N class names.

    ``fingerprints`` ``uint8 [N, 80]`` identify the images (see `fingerprint`), by default by ``pixels`` alone.
    ``scenes`` ``int64 [N]``: images of one number were taken together, by default none were.
    """

    pixels: Bytes
    labels: tuple[str, ...]
    fingerprints: Bytes = field(default_factory=lambda: np.zeros((0, FINGERPRINT_BYTES), np.uint8))
    scenes: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if len(self.scenes) != len(self.labels):
            object.__setattr__(self, "scenes", np.arange(len(self.labels)))
        if len(self.fingerprints) != len(self.labels):
            found = np.array([fingerprint(frame, frame) for frame in self.pixels], np.uint8)
            object.__setattr__(self, "fingerprints", found.reshape(-1, FINGERPRINT_BYTES))

    @classmethod
    def joined(cls, sets: Sequence[PixelSet]) -> PixelSet:
        """The images of several sets, one set after the other."""
        first = np.cumsum([0, *(s.scenes.max(initial=-1) + 1 for s in sets)])
        return cls(
            np.concatenate([s.pixels for s in sets]),
            tuple(label for s in sets for label in s.labels),
            np.concatenate([s.fingerprints for s in sets]),
            np.concatenate([s.scenes + start for s, start in zip(sets, first[:-1], strict=True)]),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, chosen: npt.NDArray[np.bool_]) -> PixelSet:
        """The images for which ``chosen`` [N] is true."""
        numbers = np.flatnonzero(chosen)
        labels = tuple(self.labels[i] for i in numbers)
        return PixelSet(self.pixels[numbers], labels, self.fingerprints[numbers], self.scenes[numbers])


@dataclass(frozen=True, eq=False)
class PreparedTask:
    """One task, ready to learn from.

    ``digest`` (hexadecimal SHA-256) identifies what the task teaches: the class names and full-size pixels of
    its readable training and validation images. It does not depend on paths, file times, order, the way they
    are split, copies, the preprocessing, or the other tasks of the stream. ``test_given`` and ``validation_given`` tell
    whether the source says which images these are.
    """

    name: str
    train: PixelSet
    validation: PixelSet
    test: PixelSet
    digest: str
    notes: tuple[str, ...] = ()
    test_given: bool = True
    validation_given: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, sorted."""
        return tuple(sorted(set(self.train.labels)))

    @property
    def counts(self) -> dict[str, int]:
        """The number of training images of each class, sorted by name."""
        return dict(sorted(Counter(self.train.labels).items()))


@dataclass(frozen=True, eq=False)
class PreparedStream:
    """The tasks in order, and the report of the health check."""

    tasks: tuple[PreparedTask, ...]
    health: HealthReport

    def merged(self) -> PreparedStream:
        """The same images as one task named ``all``."""
        digest = hashlib.sha256("".join(task.digest for task in self.tasks).encode()).hexdigest()
        train, validation, test = (
            PixelSet.joined([getattr(task, split) for task in self.tasks]) for split in ("train", "validation", "test")
        )
        merged = PreparedTask(
            "all",
            train,
            validation,
            test,
            digest,
            test_given=all(task.test_given for task in self.tasks),
            validation_given=all(task.validation_given for task in self.tasks),
        )
        return PreparedStream((merged,), self.health)

    def for_development(self, seed: int, share: float = 0.2) -> PreparedStream:
        """A stream to choose settings on: a run of each class's training images, placed by ``seed``, is its test."""
        generator = np.random.default_rng(seed)
        tasks = []
        for task in self.tasks:
            labels = np.array(task.train.labels)
            chosen = np.zeros(len(labels), dtype=bool)
            for name in task.classes:
                own = np.roll(np.flatnonzero(labels == name), generator.integers(1 << 30))
                chosen[own[: int(share * len(own))]] = True
            train, test = task.train.where(~chosen), task.train.where(chosen)
            tasks.append(replace(task, train=train, test=test, test_given=False))
        return PreparedStream(tuple(tasks), self.health)


def prepare(
    stream: Stream,
    preprocessing: Preprocessing,
    cache_dir: Path | None = None,
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PreparedStream:
    """Decode and check the images of ``stream``, or take them from the cache, where nothing is decoded.

    Images that cannot be used are left out, see `health.judge`. ``workers`` threads decode (default: one a
    processor); ``on_progress(done, total)`` is called with numbers of images as they become ready.
    Raises `DataError` when a class loses all its training images or the cache cannot be written.
    """
    cache = DecodedCache(cache_dir or cache_folder())
    done, total = 0, sum(len(images) for task in stream.tasks for images in _splits(task).values())

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        decoded = [
            {split: _decode(images, preprocessing, cache, pool, advance) for split, images in _splits(task).items()}
            for task in stream.tasks
        ]
    facts = [{split: entry.facts for split, (_, entry) in splits.items()} for splits in decoded]
    verdicts = judge(stream.tasks, facts)
    health = HealthReport(tuple(map(report_task, stream.tasks, facts, verdicts)))
    tasks = tuple(
        PreparedTask(
            name=task.name,
            digest=_digest(task, own),
            notes=task.notes,
            test_given=task.test_given,
            validation_given=task.validation_given,
            **{
                split: _usable(images, *splits[split], verdict[split], cache) for split, images in _splits(task).items()
            },
        )
        for task, splits, own, verdict in zip(stream.tasks, decoded, facts, verdicts, strict=True)
    )
    cache.trim()
    release_groups()
    return PreparedStream(tasks, health)


def _splits(task: TaskData) -> dict[str, ImageSet]:
    return {"train": task.train, "validation": task.validation, "test": task.test}


def _decode(
    images: ImageSet,
    preprocessing: Preprocessing,
    cache: DecodedCache,
    pool: ThreadPoolExecutor,
    advance: Callable[[int], None],
) -> tuple[str, Decoded]:
    """The cache key of a set, and the set: every image, also the unusable ones (whose pixels are zero)."""
    identity = hashlib.sha256(json.dumps([_SCHEMA, preprocessing.to_json()], sort_keys=True).encode())
    for image in images.images:
        identity.update(f"\n{image.key()}".encode())
    key = identity.hexdigest()
    size = preprocessing.size
    if (cached := cache.load(key, len(images), size)) is not None:
        advance(len(images))
        return key, cached

    def batches() -> Iterator[Decoded]:
        for first in range(0, len(images), _BATCH):
            rows = list(
                pool.map(lambda image: _decode_one(image, preprocessing), images.images[first : first + _BATCH])
            )
            yield Decoded(np.stack([pixels for pixels, _ in rows]), np.stack([facts for _, facts in rows]))
            advance(len(rows))

    return key, cache.store(key, len(images), size, batches())


def _decode_one(image: ImageRef, preprocessing: Preprocessing) -> tuple[Bytes, Bytes]:
    """Pixels ``[S, S, 3]`` and facts ``[81]`` of one image."""
    pixels = np.zeros((preprocessing.size, preprocessing.size, 3), np.uint8)
    facts = np.zeros(FACT_BYTES, np.uint8)
    try:
        frame = np.ascontiguousarray(image.read())
        traits = image.traits()
    except (DataError, OSError):  # OSError: a file that vanishes between the two
        facts[-1] = Flag.UNREADABLE
        return pixels, facts
    facts[-1] = sum(Flag[trait.upper()] for trait in traits)
    if min(frame.shape[:2]) < MIN_SIDE:
        facts[-1] |= Flag.TINY
    else:
        pixels = preprocessing(frame)
    facts[:-1] = fingerprint(frame, pixels)
    return pixels, facts


def _usable(images: ImageSet, key: str, entry: Decoded, verdicts: list[str], cache: DecodedCache) -> PixelSet:
    """The images without a verdict. Where some have one, the rest gets a cache file of its own."""
    kept = [index for index, verdict in enumerate(verdicts) if not verdict]
    usable = images.subset(kept)
    if len(kept) == len(images):
        return PixelSet(entry.pixels, usable.labels, entry.facts[:, :-1], scenes_by_class(usable))
    size = entry.pixels.shape[1]
    own_key = hashlib.sha256(f"{key} without {verdicts}".encode()).hexdigest()
    own = cache.load(own_key, len(kept), size)
    if own is None:
        parts = [kept[first : first + _BATCH] for first in range(0, len(kept), _BATCH)]
        own = cache.store(own_key, len(kept), size, (Decoded(entry.pixels[part], entry.facts[part]) for part in parts))
    return PixelSet(own.pixels, usable.labels, own.facts[:, :-1], scenes_by_class(usable))


def _digest(task: TaskData, facts: Mapping[str, Bytes]) -> str:
    lines = {
        f"{content.hex()} {label}"
        for images, rows in ((task.train, facts["train"]), (task.validation, facts["validation"]))
        for label, content, flags in zip(images.labels, hashes(rows), rows[:, -1], strict=True)
        if not flags & Flag.UNREADABLE
    }
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
