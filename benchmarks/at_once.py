"""Trainings that share the processors: how long each takes, by how long threads wait in a loop.

    python benchmarks/at_once.py FOLDER --rounds 5

FOLDER is a source of images as for `duallora-edge train`. Each setting of GOMP_SPINCOUNT trains alone in turns, then
twice at once; 300000 is what GNU OpenMP takes by itself where it has no more threads than processors. Times are those
of the task alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import click

SETTINGS = (300_000, 1_000)
TRAIN = """
import sys
from duallora_edge.learner import Callback, Learner

class Seconds(Callback):
    def learned(self, task, seconds):
        print(seconds)

Learner(sys.argv[2], callbacks=[Seconds()], device="cpu", epochs=int(sys.argv[3])).learn(sys.argv[1], evaluate=False)
"""


def seconds(folder: Path, epochs: int, spin: int, at_once: int) -> list[float]:
    """How long each of so many trainings takes that start together."""
    environment = {**os.environ, "GOMP_SPINCOUNT": str(spin)}
    environment.pop("OMP_NUM_THREADS", None)
    with tempfile.TemporaryDirectory() as runs:
        trainings = [
            subprocess.Popen(
                [sys.executable, "-c", TRAIN, folder, f"{runs}/{number}", str(epochs)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for number in range(at_once)
        ]
        return [float(training.communicate()[0]) for training in trainings]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--epochs", default=10, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
def main(folder: Path, epochs: int, rounds: int) -> None:
    alone: dict[int, list[float]] = {spin: [] for spin in SETTINGS}
    for _ in range(rounds):
        for spin, times in alone.items():
            times += seconds(folder, epochs, spin, 1)
    first = alone[SETTINGS[0]]
    for spin, times in alone.items():
        ratios = [time / other for time, other in zip(times, first, strict=True)]
        both = seconds(folder, epochs, spin, 2)
        click.echo(
            f"GOMP_SPINCOUNT={spin}: alone {median(times):.1f} s, {median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) of {SETTINGS[0]}; two at once {median(both):.1f} s each, "
            f"{median(both) / median(times):.1f} times as long"
        )


if __name__ == "__main__":
    main()
