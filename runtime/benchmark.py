"""Latency, throughput and memory of a bundle on this machine, with what makes the numbers comparable beside them.

The terms follow MLPerf Inference (single stream: one image after the other, judged by its p90), but the runs last
seconds, not ten minutes, so nothing here is an MLPerf result.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from duallora_edge import __version__
from duallora_edge.device_profiles import detect
from duallora_edge.errors import BackendError, BudgetError
from duallora_edge.runtime.backends import Run
from duallora_edge.runtime.bundle import MODEL
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.memory import Memory, read_memory
from duallora_edge.runtime.preprocess import Pixels

LABEL = "quick local measurement, not MLPerf"
BATCHES = (1, 2, 4, 8, 16)
WARMUP_RUNS = 10
MIN_RUNS = 20
P99_RUNS = 1000
MAX_COV = 0.10
MAX_DRIFT = 0.05
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-python", "numpy", "pillow")

Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Latency:
    """Statistics of ``n`` runs after ``warmup`` runs that do not count; times in ms.

    ``cov`` is std / mean, ``drift`` the median of the second half over that of the first, minus 1.
    Percentiles are interpolated linearly. ``notes`` say why a number deserves less trust.
    """

    n: int
    warmup: int
    mean: float
    std: float
    cov: float
    p50: float
    p90: float
    p99: float
    drift: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Throughput:
    """Images per second at a batch size, from the mean time of ``n`` batches; None with the reason when it failed."""

    batch: int
    n: int
    images_per_second: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything `run_benchmark` found.

    ``single_stream``: one prepared image a run, the model only. ``phases``: ``preprocess``, ``infer``,
    ``postprocess`` and ``end_to_end`` of camera frames of ``frame`` (width, height). ``memory``: readings
    ``before_load``, ``after_load``, ``after_runs`` (single images only) and ``after_batches``. ``estimates``: what
    the exporter expected of its target device, one a power mode, not measured.
    """

    bundle: Mapping[str, Any]
    backend: Mapping[str, Any]
    machine: Mapping[str, Any]
    load_ms: float
    single_stream: Latency
    frame: tuple[int, int]
    phases: Mapping[str, Latency]
    throughput: tuple[Throughput, ...]
    memory: Mapping[str, Memory]
    estimates: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"label": LABEL, "duallora_edge": __version__, **asdict(self)}


def summarize(samples: npt.ArrayLike, warmup: int = 0) -> Latency:
    """The statistics of at least two run times, in ms and in the order in which they were measured."""
    times = np.asarray(samples, dtype=np.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"samples must be [n] with n of at least 2, not {list(times.shape)}")
    mean, std = float(times.mean()), float(times.std(ddof=1))
    first, second = np.median(times[: len(times) // 2]), np.median(times[len(times) // 2 :])
    cov, drift = std / mean, float(second / first - 1)
    notes = []
    if len(times) < P99_RUNS:
        notes.append(f"p99 of {len(times)} runs is a rough guess (fewer than {P99_RUNS})")
    if cov > MAX_COV:
        notes.append(f"unstable: the runs vary by {cov:.0%} of their mean; close other programs, fix the clocks")
    if abs(drift) > MAX_DRIFT:
        notes.append(f"unstable: the second half differs from the first by {drift:+.0%}; check clocks and temperature")
    p50, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
    return Latency(len(times), warmup, mean, std, cov, p50, p90, p99, drift, tuple(notes))


def single_stream(run: Run, images: Pixels, seconds: float) -> Latency:
    """Run one batch, ``uint8 [N, S, S, 3]``, after the other for ``seconds`` and at least `MIN_RUNS` times."""

    def call() -> float:
        start = time.perf_counter()
        run(images)
        return 1000 * (time.perf_counter() - start)

    return summarize(_repeat(call, seconds), WARMUP_RUNS)


def throughput(run: Run, image: Pixels, seconds: float) -> tuple[Throughput, ...]:
    """Images per second at the batch sizes `BATCHES`, each for its share of ``seconds``, of an image ``[S, S, 3]``.

    The first batch that the device cannot run ends the series.
    """
    found = []
    for batch in BATCHES:
        try:
            latency = single_stream(run, np.repeat(image[None], batch, axis=0), seconds / len(BATCHES))
        except BackendError as error:
            found.append(Throughput(batch, 0, None, str(error)))
            break
        found.append(Throughput(batch, latency.n, 1000 * batch / latency.mean))
    return tuple(found)


def phases(classifier: Classifier, frame: Pixels, seconds: float) -> dict[str, Latency]:
    """Classify a frame ``uint8 [H, W, 3]`` again and again, and time the three phases and the whole call."""

    def call() -> tuple[float, float, float, float]:
        start = time.perf_counter()
        timings = classifier(frame).timings
        whole = 1000 * (time.perf_counter() - start)
        return timings.preprocess_ms, timings.infer_ms, timings.postprocess_ms, whole

    columns = np.array(_repeat(call, seconds)).T
    names = ("preprocess", "infer", "postprocess", "end_to_end")
    return {name: summarize(column, WARMUP_RUNS) for name, column in zip(names, columns, strict=True)}


def _repeat(call: Callable[[], Sample], seconds: float) -> list[Sample]:
    for _ in range(WARMUP_RUNS):
        call()
    samples: list[Sample] = []
    end = time.perf_counter() + seconds
    while len(samples) < MIN_RUNS or time.perf_counter() < end:
        samples.append(call())
    return samples


def run_benchmark(
    path: Path,
    backend: str = "auto",
    threads: int | None = None,
    strict: bool = False,
    seconds: float = 5.0,
    frame: tuple[int, int] = (1280, 720),
) -> Report:
    """Load a bundle and measure it: single stream, phases and throughput, each for ``seconds``.

    ``frame`` is (width, height) of the generated camera frame; the rest as in `Classifier.load`, with its errors.
    """
    memory = {"before_load": read_memory()}
    start = time.perf_counter()
    classifier = Classifier.load(path, backend, threads, strict)
    load_ms = 1000 * (time.perf_counter() - start)
    memory["after_load"] = read_memory()
    manifest = classifier.bundle.manifest
    picture = np.random.default_rng(0).integers(0, 256, (frame[1], frame[0], 3), dtype=np.uint8)
    image = manifest.preprocessing(picture)
    latency = single_stream(classifier.backend.run, image[None], seconds)
    parts = phases(classifier, picture, seconds)
    memory["after_runs"] = read_memory()
    batches = throughput(classifier.backend.run, image, seconds)
    memory["after_batches"] = read_memory()
    estimates = manifest.target.get("estimates")
    return Report(
        bundle={
            "path": str(path),
            "name": manifest.name,
            "bundle_version": manifest.bundle_version,
            "classes": len(manifest.classes),
            "tasks": len(manifest.tasks),
            "input": ["N", manifest.preprocessing.size, manifest.preprocessing.size, 3],
            "model_bytes": manifest.files[MODEL].bytes,
        },
        backend={**classifier.backend.to_json(), "threads": threads},
        machine=machine(),
        load_ms=load_ms,
        single_stream=latency,
        frame=frame,
        phases=parts,
        throughput=batches,
        memory=memory,
        estimates=tuple(entry for entry in estimates if isinstance(entry, dict)) if isinstance(estimates, list) else (),
    )


def machine() -> dict[str, Any]:
    """What the numbers depend on: device, CPU, usable cores, and the versions of what ran."""
    packages = {name: version for name in PACKAGES if (version := _version(name))}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {**detect().to_json(), "usable_cores": cores, "versions": {"python": platform.python_version(), **packages}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_budgets(report: Report, milliseconds: float | None, megabytes: float | None) -> None:
    """Raise `BudgetError` with every budget that the report exceeds.

    ``milliseconds`` limits the p90 of the single stream, ``megabytes`` (10^6 bytes) the PSS of the whole process
    after single images: the interpreter and the libraries count, because the device has to hold them.
    """
    problems = []
    if milliseconds is not None and report.single_stream.p90 > milliseconds:
        problems.append(f"p90 is {report.single_stream.p90:.2f} ms, the budget {milliseconds:g} ms")
    if megabytes is not None:
        pss = report.memory["after_runs"].pss
        if pss.bytes is None:
            problems.append(f"memory cannot be checked, because {pss.reason}")
        elif pss.bytes > megabytes * 1e6:
            problems.append(f"PSS is {pss.bytes / 1e6:.1f} MB, the budget {megabytes:g} MB")
    if problems:
        raise BudgetError(
            f"Over budget: {'; '.join(problems)}; choose a smaller backbone or image, or a faster device."
        )
