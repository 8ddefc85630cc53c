"""Training by two processes beside one, on this CPU: images a second.

    python benchmarks/distributed.py --json distributed.json

The same images are put behind the frozen prefix and learned by one process of one thread, by two of one thread each,
and by one of two threads, in a random order every round, so that all see the same state of the machine. Ratios are of
medians over rounds, their spread the 5th to 95th percentile of bootstrap resamples of rounds. Starting the processes,
which takes seconds, is left out. The images are noise and the backbone is the small embedded one: this shows the speed
of one machine's CPU and nothing of GPUs or networks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from duallora_edge.files import write_json
from duallora_edge.learner import distributed
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import PixelSet, PreparedTask
from duallora_edge.learner.methods import learn_task
from duallora_edge.learner.network.backbone import load_backbone
from duallora_edge.learner.network.prefix_cache import Encoded

SETTINGS = {"1 x 1": (1, 1), "2 x 1": (2, 1), "1 x 2": (1, 2)}  # processes x threads
STAGES = ("prefix", "training")
CLASSES = ("a", "b", "c", "d")


class NoCheckpoint:
    def load(self) -> None:
        return None

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        pass


def measure(images: int, steps: int, batch: int) -> dict[str, float]:
    """Images a second behind the prefix, and in the steps of training."""
    backbone = load_backbone("embedded")
    size = backbone.info.size
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    train = PixelSet(pixels, tuple(CLASSES[i % len(CLASSES)] for i in range(images)))
    none = PixelSet(pixels[:0], ())
    Encoded(backbone, PixelSet(pixels[:128], train.labels[:128]), CLASSES)  # the first pass is slower
    started = time.perf_counter()
    Encoded(backbone, train, CLASSES)
    prefix = images / (time.perf_counter() - started)
    moments: list[float] = []

    class Clock(Callback):
        def step(self, step: int, steps: int, loss: Tensor, rate: float) -> None:
            moments.append(time.perf_counter())

    config = TrainConfig(device="cpu", precision="fp32", epochs=0, min_steps=steps, batch_size=batch)
    learn_task(backbone, [], PreparedTask("noise", train, none, none, ""), config, NoCheckpoint(), Clock())
    return {"prefix": prefix, "training": (steps - 5) * batch / (moments[-1] - moments[4])}


def start(processes: int, threads: int, words: list[str]) -> dict[str, float]:
    """What rank 0 of a new training says."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    answer = subprocess.run(
        [sys.executable, *launch, __file__, "--", "--worker", *words],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return {str(stage): float(rate) for stage, rate in json.loads(answer.stdout).items()}


@click.command()
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(3))
@click.option("--images", default=1024, show_default=True, type=click.IntRange(128))
@click.option("--steps", default=60, show_default=True, type=click.IntRange(10))
@click.option("--batch", default=32, show_default=True, type=click.IntRange(2))
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option("--worker", is_flag=True, hidden=True)
def main(rounds: int, images: int, steps: int, batch: int, json_path: Path | None, worker: bool) -> None:
    if worker:
        with distributed.process_group():
            rates = measure(images, steps, batch)
            if distributed.is_main():
                click.echo(json.dumps(rates))
        return
    words = ["--images", str(images), "--steps", str(steps), "--batch", str(batch)]
    rng = np.random.default_rng(0)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name in rng.permutation(list(SETTINGS)):
            measured[name].append(start(*SETTINGS[name], words))
    report: dict[str, object] = {"rounds": rounds, "torch": torch.__version__, "cores": os.cpu_count()}
    click.echo(
        f"{images} images, batches of {batch}, {rounds} rounds, {os.cpu_count()} cores, torch {torch.__version__}"
    )
    picks = rng.integers(0, rounds, (2000, rounds))
    for stage in STAGES:
        rates = {name: np.array([row[stage] for row in rows]) for name, rows in measured.items()}
        for name, values in rates.items():
            low, high = values.min(), values.max()
            click.echo(f"{stage:<8} {name}: {np.median(values):7.1f} images/s ({low:.1f} to {high:.1f})")
        for other in ("1 x 1", "1 x 2"):
            ratios = np.median(rates["2 x 1"][picks], axis=1) / np.median(rates[other][picks], axis=1)
            low, high = np.percentile(ratios, (5, 95))
            ratio = np.median(rates["2 x 1"]) / np.median(rates[other])
            click.echo(f"{stage:<8} 2 x 1 against {other}: {ratio:.2f} ({low:.2f} to {high:.2f})")
            report[f"{stage}: 2 x 1 against {other}"] = [float(ratio), float(low), float(high)]
        report[stage] = {name: values.tolist() for name, values in rates.items()}
    if json_path:
        write_json(json_path, report)


if __name__ == "__main__":
    main()
