"""Latency, throughput, energy and memory of a bundle on this machine, with what makes the numbers comparable.

The scenarios are those of MLPerf Inference, but nothing here is an MLPerf result; see `scenarios`.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from duallora_edge.device_profiles import detect
from duallora_edge.runtime.benchmark.report import Device, Report, check_estimates
from duallora_edge.runtime.benchmark.scenarios import (
    MULTI_STREAM,
    OFFLINE,
    QUERY_IMAGES,
    SCENARIOS,
    SINGLE_STREAM,
    offline,
    phases,
    stream,
)
from duallora_edge.runtime.bundle import MODEL
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.device.sampler import Watch, throttling
from duallora_edge.runtime.device.state import ROOT, read_state
from duallora_edge.runtime.process_memory import MemoryReadings, read_memory

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-python", "numpy", "pillow")


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
    # No trial: nothing else runs in this process, and the time to load is measured.
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
    memory: dict[str, MemoryReadings],
) -> dict[str, Any]:
    """The fields of the report that are measured; adds the readings between them to ``memory``."""
    infer = classifier.backend.infer
    picture = np.random.default_rng(0).integers(0, 256, (frame[1], frame[0], 3), dtype=np.uint8)
    image = classifier.bundle.manifest.preprocessing(picture)
    found: dict[str, Any] = dict.fromkeys(("single_stream", "multi_stream", "offline"))
    if SINGLE_STREAM in scenarios:
        found["single_stream"] = stream(infer, image, 1, seconds, watch)
    found["phases"] = phases(classifier, picture, seconds)
    memory["after_runs"] = read_memory()
    if MULTI_STREAM in scenarios:
        found["multi_stream"] = stream(infer, image, QUERY_IMAGES, seconds, watch)
    if OFFLINE in scenarios:
        found["offline"] = offline(infer, image, seconds, watch)
    if MULTI_STREAM in scenarios or OFFLINE in scenarios:
        memory["after_batches"] = read_memory()
    return found


def describe_bundle(classifier: Classifier, path: Path) -> dict[str, Any]:
    """The properties of the bundle at ``path`` on which the numbers depend."""
    manifest = classifier.bundle.manifest
    return {
        "path": str(path),
        "name": manifest.name,
        "bundle_version": manifest.bundle_version,
        "classes": len(manifest.classes),
        "tasks": len(manifest.tasks),
        "input": [manifest.batch or "N", manifest.preprocessing.size, manifest.preprocessing.size, 3],
        "model_bytes": manifest.graph(MODEL).bytes,
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
