"""Latency, throughput, energy and memory of a bundle on this machine, with what makes the numbers comparable.

Most scenarios are those of MLPerf Inference, but nothing here is an MLPerf result; see `scenarios`.
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
from duallora_edge.runtime.benchmark.report import Device, Images, Report, check_estimates
from duallora_edge.runtime.benchmark.scenarios import (
    MULTI_STREAM,
    OFFLINE,
    QUERY_IMAGES,
    SCENARIOS,
    SINGLE_STREAM,
    offline,
    paced,
    parallel,
    phases,
    stream,
)
from duallora_edge.runtime.bundle import MODEL
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.device.sampler import Watch, throttling
from duallora_edge.runtime.device.state import ROOT, read_state
from duallora_edge.runtime.preprocess import Pixels, read_image
from duallora_edge.runtime.process_memory import MemoryReadings, read_memory
from duallora_edge.runtime.sources.files import find_images

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-python", "numpy", "pillow")
# Of a folder: images that stay decoded, which is memory that no application needs.
MAX_IMAGES = 100
MAX_IMAGES_BYTES = 64 * 2**20


def run_benchmark(
    path: Path,
    backend: str = "auto",
    threads: int | None = None,
    strict: bool = False,
    seconds: float = 5.0,
    frame: tuple[int, int] = (1280, 720),
    scenarios: Sequence[str] = SCENARIOS,
    images: Path | None = None,
    fps: float | None = None,
    callers: int | None = None,
    root: Path = ROOT,
) -> Report:
    """Load a bundle and measure it: its phases and the ``scenarios``, each for ``seconds``.

    ``frame`` is (width, height) of the generated camera frame, ``images`` a folder whose images are used in its place.
    ``fps`` adds frames at that rate, ``callers`` so many threads at once. ``root`` is the file system that describes
    the device; the rest as in `Classifier.load`, with its errors and those of `read_images`.
    """
    pictures = [_generated(frame)] if images is None else read_images(images)
    memory = {"before_load": read_memory()}
    start = time.perf_counter()
    # No trial: nothing else runs in this process, and the time to load is measured.
    classifier = Classifier.load(path, backend, threads, strict, trial=False)
    load_ms = 1000 * (time.perf_counter() - start)
    memory["after_load"] = read_memory()
    before = read_state(root)
    with Watch(root) as watch:
        found = _measure(classifier, seconds, pictures, scenarios, fps, callers, watch, memory)
    after, during = read_state(root), watch.series()
    here, target = machine(root), classifier.bundle.manifest.target
    return Report(
        bundle=describe_bundle(classifier, path),
        backend={**classifier.backend.to_json(), "threads": threads},
        machine=here,
        load_ms=load_ms,
        seconds=seconds,
        **found,
        frame=frame if images is None else None,
        images=None if images is None else _describe_images(images, pictures),
        memory=memory,
        device=Device(before, after, during, throttling(before, during, after)),
        estimate=check_estimates(target, here["profile"], before, classifier.backend, found["single_stream"]),
    )


def _measure(
    classifier: Classifier,
    seconds: float,
    pictures: Sequence[Pixels],
    scenarios: Sequence[str],
    fps: float | None,
    callers: int | None,
    watch: Watch,
    memory: dict[str, MemoryReadings],
) -> dict[str, Any]:
    """The fields of the report that are measured; adds the readings between them to ``memory``."""
    infer = classifier.backend.infer
    images = np.stack([classifier.bundle.manifest.preprocessing(picture) for picture in pictures])
    found: dict[str, Any] = dict.fromkeys(("single_stream", "multi_stream", "offline", "paced", "parallel"))
    if SINGLE_STREAM in scenarios:
        found["single_stream"] = stream(infer, images, 1, seconds, watch)
    found["phases"] = phases(classifier, pictures, seconds)
    if fps is not None:
        found["paced"] = paced(classifier, pictures, fps, seconds, watch)
    memory["after_runs"] = read_memory()
    if MULTI_STREAM in scenarios:
        found["multi_stream"] = stream(infer, images, QUERY_IMAGES, seconds, watch)
    if OFFLINE in scenarios:
        found["offline"] = offline(infer, images, seconds, watch)
    if callers is not None:
        found["parallel"] = parallel(infer, images, callers, seconds, watch)
    if MULTI_STREAM in scenarios or OFFLINE in scenarios or callers is not None:
        memory["after_batches"] = read_memory()
    return found


def _generated(frame: tuple[int, int]) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (frame[1], frame[0], 3), dtype=np.uint8)


def read_images(folder: Path) -> list[Pixels]:
    """Images below a folder, ``uint8 [H, W, 3]``, at random but always the same ones: as many as the limits allow.

    Raises `SourceError` when there are none, and `DataError` for one that cannot be read.
    """
    paths = find_images(folder)
    found: list[Pixels] = []
    for index in np.random.default_rng(0).permutation(len(paths))[:MAX_IMAGES]:
        image = read_image(paths[index])
        if found and sum(each.nbytes for each in (*found, image)) > MAX_IMAGES_BYTES:
            break
        found.append(image)
    return found


def _describe_images(folder: Path, images: Sequence[Pixels]) -> Images:
    pixels = sum(image.shape[0] * image.shape[1] for image in images)
    return Images(str(folder), len(images), round(pixels / len(images) / 1e6, 3))


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
