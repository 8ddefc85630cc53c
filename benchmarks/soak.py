"""A live source for a long time, with hot swaps under load: is any answer wrong, any frame lost, does memory grow?

    python benchmarks/soak.py BUNDLE OTHER --images FOLDER --minutes 20 --swaps 100 --json soak.json

The images of FOLDER in a loop are a camera of 30 frames a second. Before, each image is classified by each bundle
alone; every answer must equal one of the two exactly, that of the bundle it names. Every captured frame must be
answered or counted as dropped. Swaps come at random moments (seed 0). Memory is the PSS of the process every two
seconds; its slope is a least-squares line after the first tenth, with the 5th to 95th percentile over resamples of
blocks of a minute.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from duallora_edge.files import write_json
from duallora_edge.runtime import Classifier, open_source
from duallora_edge.runtime.bundle import FloatArray
from duallora_edge.runtime.process_memory import read_pss
from duallora_edge.runtime.service.monitor import Monitor
from duallora_edge.runtime.service.pipeline import Pipeline

SAMPLE_S = 2.0

# By the path of the bundle, then by the name of the image.
References = dict[str, dict[str, FloatArray]]


@dataclass
class Tally:
    """What was seen."""

    answers: int = 0
    wrong: int = 0
    out_of_order: int = 0
    by_bundle: dict[str, int] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)
    swap_s: list[float] = field(default_factory=list)
    swap_errors: list[str] = field(default_factory=list)


def references(bundles: tuple[Path, ...], images: Path, threads: int) -> References:
    found: References = {}
    for bundle in bundles:
        classifier = Classifier.load(bundle, "cpu", threads)
        with open_source(images) as source:
            found[str(bundle)] = {str(frame.name): classifier(frame).probabilities for frame in source}
    return found


def swap_at_random(
    classifier: Classifier, bundles: tuple[Path, ...], moments: np.ndarray, stop: threading.Event, tally: Tally
) -> None:
    begin = time.monotonic()
    for number, moment in enumerate(moments):
        if stop.wait(max(0.0, begin + moment - time.monotonic())):
            return
        start = time.monotonic()
        try:
            classifier.swap(bundles[(number + 1) % 2])
        except Exception as error:
            tally.swap_errors.append(str(error))
        tally.swap_s.append(time.monotonic() - start)


def slope(memory: list[tuple[float, int]]) -> tuple[float, float, float]:
    """MB an hour: the line through all samples, and the 5th and 95th percentile of resampled minutes."""
    times, values = (np.array(column, float) for column in zip(*memory, strict=True))
    late = times > times[-1] / 10
    times, values = times[late] / 3600, values[late] / 1e6
    blocks = [np.flatnonzero(times // (1 / 60) == block) for block in np.unique(times // (1 / 60))]
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(500):
        rows = np.concatenate([blocks[index] for index in rng.integers(0, len(blocks), len(blocks))])
        if np.ptp(times[rows]) > 0:
            lines.append(np.polyfit(times[rows], values[rows], 1)[0])
    low, high = np.percentile(lines, (5, 95))
    return float(np.polyfit(times, values, 1)[0]), float(low), float(high)


@click.command()
@click.argument("bundles", nargs=2, type=click.Path(path_type=Path, exists=True))
@click.option("--images", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--minutes", default=20.0, show_default=True)
@click.option("--swaps", default=100, show_default=True)
@click.option("--rate", default=30.0, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    bundles: tuple[Path, ...],
    images: Path,
    minutes: float,
    swaps: int,
    rate: float,
    threads: int,
    json_path: Path | None,
) -> None:
    bundles = tuple(bundle.resolve() for bundle in bundles)
    expected = references(bundles, images, threads)
    click.echo(f"{len(expected[str(bundles[0])])} images, answered by each bundle alone")
    classifier = Classifier.load(bundles[0], "cpu", threads)
    versions = {Classifier.load(b, "cpu", threads).bundle.manifest.name: str(b) for b in bundles}
    if len(versions) != 2:
        raise click.UsageError(
            "The bundles must have different names, or the answers would not tell which one answered."
        )
    tally, stop = Tally(), threading.Event()
    moments = np.sort(np.random.default_rng(0).uniform(1, 60 * minutes - 5, swaps))
    with Pipeline(open_source(images, rate=rate, loop=True, live=True), classifier) as pipeline:
        monitor = Monitor(pipeline)
        swapper = threading.Thread(target=swap_at_random, args=(classifier, bundles, moments, stop, tally))
        swapper.start()
        begin = sampled = time.monotonic()
        last = -1
        for answer in pipeline:
            monitor.add(answer)
            now, prediction = time.monotonic(), answer.prediction
            tally.answers += 1
            tally.out_of_order += answer.frame.sequence <= last
            last = answer.frame.sequence
            path = versions[prediction.bundle]
            tally.by_bundle[prediction.bundle] = tally.by_bundle.get(prediction.bundle, 0) + 1
            tally.wrong += not np.array_equal(prediction.probabilities, expected[path][str(answer.frame.name)])
            if now - sampled >= SAMPLE_S:
                sampled = now
                tally.memory.append((now - begin, read_pss().bytes or 0))
            if now - begin > 60 * minutes:
                break
        stop.set()
        swapper.join()
        (camera,) = pipeline.cameras
        stats, health = camera.source.stats, monitor.health()
        waiting = stats.captured - stats.dropped - camera.dropped - tally.answers
    middle, low, high = slope(tally.memory)
    report = {
        "minutes": minutes,
        "rate": rate,
        "answers": tally.answers,
        "wrong": tally.wrong,
        "out_of_order": tally.out_of_order,
        "by_bundle": tally.by_bundle,
        "captured": stats.captured,
        "dropped": stats.dropped + camera.dropped,
        "on_their_way": waiting,
        "swaps": health["classifier"]["swaps"],
        "swaps_asked": len(tally.swap_s),
        "swap_errors": tally.swap_errors,
        "swap_s": {"p50": float(np.median(tally.swap_s)), "max": max(tally.swap_s)} if tally.swap_s else None,
        "age_ms": health["cameras"]["1"]["age_ms"],
        "pss_mb": [tally.memory[0][1] / 1e6, tally.memory[-1][1] / 1e6],
        "pss_slope_mb_per_hour": {"line": middle, "p5": low, "p95": high},
    }
    for name, value in report.items():
        click.echo(f"{name:<22} {value}")
    if json_path:
        write_json(json_path, {**report, "memory": tally.memory})
    # At most one frame waits in the source, one in the pipeline, and each of the threads holds one.
    if tally.wrong or tally.out_of_order or tally.swap_errors or not 0 <= waiting <= 4:
        raise click.ClickException("There were wrong answers, lost frames or failed swaps.")


if __name__ == "__main__":
    main()
