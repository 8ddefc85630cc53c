"""The scenarios of the benchmark, named as MLPerf Inference names them, and the phases of a camera frame.

Single stream: one image after the other; the result is the p90. Multi-stream: one query of eight images after the
other; the result is the p99 of the queries. Offline: all images in batches; the result is images per second. The runs
last seconds, not the ten minutes that MLPerf asks for, so nothing here is an MLPerf result.

Two further loads are not of MLPerf: frames at the pace of a camera, and several callers at once.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from duallora_edge.errors import BackendError
from duallora_edge.runtime.backends.contract import Infer
from duallora_edge.runtime.benchmark.statistics import Latency, Times, runs_least, summarize
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.device.sampler import MIN_SAMPLES, Power, Watch
from duallora_edge.runtime.preprocess import Pixels

SINGLE_STREAM, MULTI_STREAM, OFFLINE = SCENARIOS = ("single-stream", "multi-stream", "offline")
PHASES = ("preprocess", "infer", "postprocess", "end_to_end")
QUERY_IMAGES = 8
BATCHES = (1, 2, 4, 8, 16)
# Enough for an interval of the p90, the result of the single stream, in the shortest run.
MIN_RUNS = runs_least(0.9)
MIN_BATCHES = 5
# Warm-up ends when the medians of two consecutive blocks agree, or at the limits.
BLOCK = 5
SETTLED = 0.05
WARMUP_RUNS = 200
WARMUP_S = 5.0


@dataclass(frozen=True, eq=False)
class Runs:
    """Times in ms, float64 ``[n, k]``: the last of the k columns is the whole run, the others are its parts.

    ``start`` and ``end`` are times of ``time.perf_counter`` around the n runs, without the ``warmup`` runs before
    them, whose times had ``settled`` or not.
    """

    times: Times
    warmup: int
    settled: bool
    start: float
    end: float


@dataclass(frozen=True)
class Energy:
    """Energy per image in mJ: mean power times the time that an image takes; None with the reason."""

    millijoules: float | None
    power: Power | None
    reason: str | None = None


@dataclass(frozen=True)
class Stream:
    """Latency of queries of ``images`` images; None with the reason when the device could not run them."""

    images: int
    latency: Latency | None
    energy: Energy | None
    reason: str | None = None


@dataclass(frozen=True)
class Throughput:
    """Images per second for one batch size, from the total time of ``n`` batches; None with the reason if it failed."""

    batch: int
    n: int
    images_per_second: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Offline:
    """Images per second in the best of the batch sizes of ``sweep``, measured again, and the latency of its batches."""

    batch: int
    images_per_second: float
    latency: Latency
    energy: Energy
    sweep: tuple[Throughput, ...]


@dataclass(frozen=True)
class Paced:
    """Frames that are due ``fps`` times per second, each classified when it is due, or not at all if a newer one is.

    ``missed`` of ``frames`` frames had no answer when the next one was due. ``latency`` counts from the start of the
    call, ``from_due`` from the time when the frame was due.
    """

    fps: float
    frames: int
    missed: int
    latency: Latency
    from_due: Latency
    energy: Energy


@dataclass(frozen=True)
class Parallel:
    """Images per second of ``callers`` threads, each with one image after the other, and the latency of an image.

    None with the reason when the device could not run them.
    """

    callers: int
    images_per_second: float | None
    latency: Latency | None
    energy: Energy | None
    reason: str | None = None


def repeat(call: Callable[[], Sequence[float]], seconds: float, least: int = MIN_RUNS) -> Runs:
    """Call for ``seconds`` and at least ``least`` times, after a warm-up; ``call`` returns k times in ms."""
    warmup, settled = warm_up(call)
    start = time.perf_counter()
    times = timed(call, seconds, least)
    return Runs(times, warmup, settled, start, time.perf_counter())


def timed(call: Callable[[], Sequence[float]], seconds: float, least: int) -> Times:
    """What ``call`` returned, float64 ``[n, k]``, when it was called for ``seconds`` and at least ``least`` times."""
    samples: list[Sequence[float]] = []
    end = time.perf_counter() + seconds
    while len(samples) < least or time.perf_counter() < end:
        samples.append(call())
    return np.array(samples, dtype=np.float64)


def warm_up(call: Callable[[], Sequence[float]]) -> tuple[int, bool]:
    """Call until the times have settled, at most `WARMUP_RUNS` times or `WARMUP_S` seconds; how often, and whether."""
    times: list[float] = []
    end = time.perf_counter() + WARMUP_S
    while len(times) < WARMUP_RUNS and (len(times) < 2 or time.perf_counter() < end):
        times.append(call()[-1])
        if len(times) >= 2 * BLOCK:
            before, last = np.median(times[-2 * BLOCK : -BLOCK]), np.median(times[-BLOCK:])
            if abs(last / before - 1) <= SETTLED:
                return len(times), True
    return len(times), False


def run_batch(infer: Infer, images: Pixels, size: int = 1) -> Callable[[], Sequence[float]]:
    """A call for `repeat` that runs the next ``size`` of some images, uint8 ``[K, S, S, 3]``, and returns its time.

    After the last image comes the first one again.
    """
    starts = range(0, max(len(images), size), size)
    batches = itertools.cycle([images[np.arange(start, start + size) % len(images)] for start in starts])

    def call() -> Sequence[float]:
        batch = next(batches)
        start = time.perf_counter()
        infer(batch)
        return (1000 * (time.perf_counter() - start),)

    return call


def stream(infer: Infer, images: Pixels, size: int, seconds: float, watch: Watch) -> Stream:
    """Run queries of ``size`` of some images, uint8 ``[K, S, S, 3]``; ``watch`` knows the power."""
    try:
        runs = repeat(run_batch(infer, images, size), seconds, MIN_RUNS if size == 1 else MIN_BATCHES)
    except BackendError as error:
        return Stream(size, None, None, str(error))
    latency = _latency(runs, -1)
    return Stream(size, latency, _energy(watch, runs, size * len(runs.times)))


def offline(infer: Infer, images: Pixels, seconds: float, watch: Watch) -> Offline:
    """Find the best batch size for images ``[K, S, S, 3]`` in half of the time, and measure it in the other half.

    Raises `BackendError`.

    The best batch is measured again, because the largest of several noisy numbers is too large.
    """
    sweep = throughput(infer, images, seconds / 2)
    best = max(sweep, key=lambda row: row.images_per_second or 0.0)
    if best.images_per_second is None:
        raise BackendError(f"The model cannot run a single image ({best.reason}); try another backend.")
    runs = repeat(run_batch(infer, images, best.batch), seconds / 2, MIN_BATCHES)
    count = best.batch * len(runs.times)
    rate = 1000 * count / float(runs.times[:, -1].sum())
    return Offline(best.batch, rate, _latency(runs, -1), _energy(watch, runs, count), sweep)


def throughput(infer: Infer, images: Pixels, seconds: float) -> tuple[Throughput, ...]:
    """Images per second at the batch sizes `BATCHES`, each for its share of ``seconds``, of images ``[K, S, S, 3]``.

    The series ends at the first batch that the device cannot run.
    """
    found = []
    for batch in BATCHES:
        call = run_batch(infer, images, batch)
        try:
            call()  # the first call with a new size allocates memory
            times = timed(call, seconds / len(BATCHES), MIN_BATCHES)[:, -1]
        except BackendError as error:
            found.append(Throughput(batch, 0, None, str(error)))
            break
        found.append(Throughput(batch, len(times), 1000 * batch * len(times) / float(times.sum())))
    return tuple(found)


def phases(classifier: Classifier, frames: Sequence[Pixels], seconds: float) -> dict[str, Latency]:
    """Classify frames ``uint8 [H, W, 3]`` again and again, and time the three phases and the whole call."""
    turns = itertools.cycle(frames)

    def call() -> Sequence[float]:
        frame = next(turns)
        start = time.perf_counter()
        timings = classifier(frame).timings
        whole = 1000 * (time.perf_counter() - start)
        return timings.preprocess_ms, timings.infer_ms, timings.postprocess_ms, whole

    runs = repeat(call, seconds)
    return {name: _latency(runs, column) for column, name in enumerate(PHASES)}


def paced(
    classify: Callable[[Pixels], object], frames: Sequence[Pixels], fps: float, seconds: float, watch: Watch
) -> Paced:
    """Classify frames ``uint8 [H, W, 3]`` at the pace of a camera.

    As with a camera, a frame that comes during a call waits for its end, and is dropped when another one comes as well.
    """
    turns = itertools.cycle(frames)
    begin, period = time.perf_counter(), 1 / fps
    number = 0  # of the frame that was classified last

    def call() -> Sequence[float]:
        nonlocal number
        frame, before = next(turns), number
        number = max(number + 1, int((time.perf_counter() - begin) / period))
        due = begin + number * period
        time.sleep(max(0.0, due - time.perf_counter()))
        start = time.perf_counter()
        classify(frame)
        end = time.perf_counter()
        return number - before, 1000 * (end - due), 1000 * (end - start)

    runs = repeat(call, seconds, MIN_BATCHES)
    steps, from_due = runs.times[:, 0], runs.times[:, 1]
    missed = int((steps - 1).sum()) + int((from_due > 1000 * period).sum())
    energy = _energy(watch, runs, len(runs.times))
    return Paced(fps, int(steps.sum()), missed, _latency(runs, 2), _latency(runs, 1), energy)


def parallel(infer: Infer, images: Pixels, callers: int, seconds: float, watch: Watch) -> Parallel:
    """Run images ``[K, S, S, 3]`` one by one in ``callers`` threads at once, for ``seconds``."""
    try:
        _together(infer, images, callers, 0.0, BLOCK)
        start = time.perf_counter()
        found = _together(infer, images, callers, seconds, -(-MIN_RUNS // callers))
    except BackendError as error:
        return Parallel(callers, None, None, None, str(error))
    ends, times = np.array(sorted(found)).T  # in the order in which they ended
    runs = Runs(times[:, None], BLOCK * callers, True, start, float(ends[-1]))
    rate = len(times) / (runs.end - runs.start)
    return Parallel(callers, rate, _latency(runs, -1), _energy(watch, runs, len(times)))


def _together(infer: Infer, images: Pixels, callers: int, seconds: float, least: int) -> list[tuple[float, float]]:
    """Of every call of every caller, when it ended (``time.perf_counter``) and how many ms it took."""
    ready = threading.Barrier(callers)

    def work() -> list[tuple[float, float]]:
        call = run_batch(infer, images)
        found: list[tuple[float, float]] = []
        ready.wait()
        end = time.perf_counter() + seconds
        while len(found) < least or time.perf_counter() < end:
            (milliseconds,) = call()
            found.append((time.perf_counter(), milliseconds))
        return found

    with ThreadPoolExecutor(callers) as pool:
        futures = [pool.submit(work) for _ in range(callers)]
        return [call for future in futures for call in future.result()]


def _latency(runs: Runs, column: int) -> Latency:
    return summarize(runs.times[:, column], runs.warmup, runs.settled)


def _energy(watch: Watch, runs: Runs, images: int) -> Energy:
    power = watch.power(runs.start, runs.end)
    if power is None:
        few = f"fewer than {MIN_SAMPLES} power readings within {runs.end - runs.start:.1f} s"
        return Energy(None, None, few if "power_w" in watch.series() else "no monitor of the total power can be read")
    return Energy(1000 * power.watts * (runs.end - runs.start) / images, power)
