"""Latency, throughput, energy and memory of a bundle on this machine, with what makes the numbers comparable.

The scenarios are those of MLPerf Inference, but nothing here is an MLPerf result: see `benchmark_scenarios`.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from duallora_edge import __version__
from duallora_edge.device_profiles import detect
from duallora_edge.errors import BudgetError
from duallora_edge.runtime.benchmark.estimate import EstimateCheck, check_estimates
from duallora_edge.runtime.benchmark.scenarios import (
    MULTI_STREAM,
    OFFLINE,
    QUERY_IMAGES,
    SCENARIOS,
    SINGLE_STREAM,
    Offline,
    Stream,
    offline,
    phases,
    stream,
)
from duallora_edge.runtime.benchmark.statistics import Latency
from duallora_edge.runtime.bundle import MODEL
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.device.sampler import Series, Watch, throttling
from duallora_edge.runtime.device.state import ROOT, DeviceState, read_state
from duallora_edge.runtime.process_memory import Memory, read_memory

SCHEMA = 1
LABEL = "quick local measurement, not MLPerf"
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-python", "numpy", "pillow")


@dataclass(frozen=True)
class Device:
    """The state of the device ``before`` and ``after`` the measurements, and what it did ``during`` them.

    ``during``: kind with its unit -> name -> statistics of the readings. ``warnings`` say what slowed it down.
    """

    before: DeviceState
    after: DeviceState
    during: Mapping[str, Mapping[str, Series]]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Everything `run_benchmark` found.

    ``single_stream`` and ``multi_stream``: prepared images, the model only; ``offline``: images per second. A scenario
    that was not asked for is None. ``phases``: ``preprocess``, ``infer``, ``postprocess`` and ``end_to_end`` of camera
    frames of ``frame`` (width, height). ``memory``: readings ``before_load``, ``after_load``, ``after_runs`` (single
    images only) and, where there were batches, ``after_batches``. ``estimate``: what the exporter expected of its
    target device, and whether that is this one.
    """

    bundle: Mapping[str, Any]
    backend: Mapping[str, Any]
    machine: Mapping[str, Any]
    load_ms: float
    seconds: float
    single_stream: Stream | None
    multi_stream: Stream | None
    offline: Offline | None
    frame: tuple[int, int]
    phases: Mapping[str, Latency]
    memory: Mapping[str, Memory]
    device: Device
    estimate: EstimateCheck

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"schema": SCHEMA, "label": LABEL, "duallora_edge": __version__, **asdict(self)}


def run_benchmark(
    path: Path,
    backend: str = "auto",
    threads: int | None = None,
    strict: bool = False,
    seconds: float = 5.0,
    frame: tuple[int, int] = (1280, 720),
    scenarios: Sequence[str] = SCENARIOS,
    root: Path = ROOT,
) -> Report:
    """Load a bundle and measure it: its phases and the ``scenarios``, each for ``seconds``.

    ``frame`` is (width, height) of the generated camera frame, ``root`` the file system that describes the device; the
    rest as in `Classifier.load`, with its errors.
    """
    memory = {"before_load": read_memory()}
    start = time.perf_counter()
    # No trial: this process has nothing else to lose, and loading is what it measures.
    classifier = Classifier.load(path, backend, threads, strict, trial=False)
    load_ms = 1000 * (time.perf_counter() - start)
    memory["after_load"] = read_memory()
    before = read_state(root)
    with Watch(root) as watch:
        found = _measure(classifier, seconds, frame, scenarios, watch, memory)
    after, during = read_state(root), watch.series()
    here, target = machine(root), classifier.bundle.manifest.target
    return Report(
        bundle=describe_bundle(classifier, path),
        backend={**classifier.backend.to_json(), "threads": threads},
        machine=here,
        load_ms=load_ms,
        seconds=seconds,
        **found,
        frame=frame,
        memory=memory,
        device=Device(before, after, during, throttling(before, during, after)),
        estimate=check_estimates(target, here["profile"], before, classifier.backend, found["single_stream"]),
    )


def _measure(
    classifier: Classifier,
    seconds: float,
    frame: tuple[int, int],
    scenarios: Sequence[str],
    watch: Watch,
    memory: dict[str, Memory],
) -> dict[str, Any]:
    """The fields of the report that are measured; adds the readings between them to ``memory``."""
    run = classifier.backend.run
    picture = np.random.default_rng(0).integers(0, 256, (frame[1], frame[0], 3), dtype=np.uint8)
    image = classifier.bundle.manifest.preprocessing(picture)
    found: dict[str, Any] = dict.fromkeys(("single_stream", "multi_stream", "offline"))
    if SINGLE_STREAM in scenarios:
        found["single_stream"] = stream(run, image, 1, seconds, watch)
    found["phases"] = phases(classifier, picture, seconds)
    memory["after_runs"] = read_memory()
    if MULTI_STREAM in scenarios:
        found["multi_stream"] = stream(run, image, QUERY_IMAGES, seconds, watch)
    if OFFLINE in scenarios:
        found["offline"] = offline(run, image, seconds, watch)
    if MULTI_STREAM in scenarios or OFFLINE in scenarios:
        memory["after_batches"] = read_memory()
    return found


def describe_bundle(classifier: Classifier, path: Path) -> dict[str, Any]:
    """What of the bundle at ``path`` the numbers depend on."""
    manifest = classifier.bundle.manifest
    return {
        "path": str(path),
        "name": manifest.name,
        "bundle_version": manifest.bundle_version,
        "classes": len(manifest.classes),
        "tasks": len(manifest.tasks),
        "input": [manifest.batch or "N", manifest.preprocessing.size, manifest.preprocessing.size, 3],
        "model_bytes": manifest.files[MODEL].bytes,
    }


def machine(root: Path = ROOT) -> dict[str, Any]:
    """What the numbers depend on: device, CPU, usable cores, and the versions of what ran."""
    packages = {name: version for name in PACKAGES if (version := _version(name))}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"kernel": platform.release(), "python": platform.python_version(), **packages}
    return {**detect(root).to_json(), "usable_cores": cores, "versions": versions}


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
    if milliseconds is not None:
        latency = report.single_stream.latency if report.single_stream else None
        p90 = latency.p90.value if latency else None
        if p90 is None:
            problems.append("the latency cannot be checked, because the single stream was not measured")
        elif p90 > milliseconds:
            problems.append(f"p90 is {p90:.2f} ms, the budget {milliseconds:g} ms")
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
