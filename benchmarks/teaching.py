"""What a class is worth that was taught on the device, by the number of its frames.

    python benchmarks/teaching.py RUN TASK --frames 1,3,5,10,30

RUN learned TASK and others. A copy of it forgets TASK and is exported; then each class of TASK (up to ten) is taught to
that bundle on its own, from training images, and measured on test images: those of the class and those of all other
tasks. *recall*: images of the class that are found; *old*: points of accuracy that the other classes lose; *stated*:
mean confidence of all answers minus their accuracy; *ECE* of all answers; *false*: images of the other classes called
novel; *novel*: images of the class called novel. Beside it: cosine imprinting (Qi et al. 2018, arXiv 1712.07136), the
nearest normalised mean of the final feature, for old and new classes alike; and RUN, which learned TASK with all its
images.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean

import click
import numpy as np
import numpy.typing as npt

from duallora_edge.export.export import export_run
from duallora_edge.learner import Learner
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.data import PixelSet
from duallora_edge.learner.measurements import stored_metrics
from duallora_edge.learner.reading import read_images, source_groups
from duallora_edge.learner.report.metrics import Cell, Predictions
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.runtime.backends.ladder import open_backend
from duallora_edge.runtime.bundle import Bundle, Outputs
from duallora_edge.runtime.field.teaching import Teacher

CLASSES, BATCH = 10, 64
COLUMNS = ("recall", "old", "stated", "ECE", "false", "novel", "cosine recall", "cosine old")


def read(run: RunDirectory) -> dict[str, tuple[PixelSet, PixelSet]]:
    """The training and test images of each task."""
    names = {run.read_info(task).name for task in run.active_tasks()}
    found = {}
    for settings in source_groups(run, names):
        for task in read_images(replace(run.config, **settings), run.info, Callback()).tasks:
            if task.name in names:
                found[task.name] = task.train, task.test
    return found


class Answers:
    """A bundle on a backend."""

    def __init__(self, folder: Path) -> None:
        self.bundle = Bundle.open(folder)
        self.backend, self.teacher = open_backend(self.bundle, "cpu"), Teacher(self.bundle)

    def features(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return np.concatenate(
            [self.backend.infer(pixels[i : i + BATCH]).features for i in range(0, len(pixels), BATCH)]
        )


def cell(outputs: Outputs, labels: npt.NDArray[np.int64], threshold: float) -> Cell:
    tasks = outputs.task_probabilities
    return Cell.from_predictions(
        Predictions(labels, np.minimum(outputs.probabilities, 1), 0, tasks, outputs.novelty > threshold),
        range(outputs.probabilities.shape[1]),
    )


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("task")
@click.option("--frames", default="1,3,5,10,30", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(run: Path, task: str, frames: str, seed: int) -> None:
    opened = RunDirectory.open(run)
    data = read(opened)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        shutil.copytree(run, copy)
        Learner(copy).remove(task)
        records = RunDirectory.open(copy).records()
        answers = Answers(export_run(copy, Path(folder) / "bundle", "x86-cpu").path)
    classes, dim = answers.bundle.manifest.classes, records[0].head.shape[1] - 1
    means = {name: mean for r in records for name, mean in zip(r.info.classes, r.statistics.means.numpy(), strict=True)}
    imprinted = unit(np.array([means[name][:dim] for name in classes]))
    tests = [test for name, (_, test) in data.items() if name != task]
    old = answers.features(np.concatenate([test.pixels for test in tests]))
    truth = np.array([classes.index(label) for test in tests for label in test.labels])
    threshold = 0.95
    nothing = cell(answers.teacher.teach({})(outputs(old)), truth, threshold)
    cosine = float(((unit(old[:, :dim]) @ imprinted.T).argmax(axis=1) == truth).mean())
    click.echo(
        f"{task}: {len(classes)} other classes, {nothing.n} of their test images: accuracy "
        f"{100 * (nothing.accuracy or 0):.1f} % (cosine {100 * cosine:.1f} %), ECE "
        f"{100 * (nothing.calibration_error or 0):.1f} %, called novel {100 * (nothing.false_novelty or 0):.1f} %"
    )
    click.echo("| frames | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    train, test = data[task]
    new_train, new_test = answers.features(train.pixels), answers.features(test.pixels)
    labels = [np.array(each.labels) for each in (train, test)]
    for count in map(int, frames.split(",")):
        found = []
        for name in sorted(set(train.labels))[:CLASSES]:
            members = np.flatnonzero(labels[0] == name)
            chosen = new_train[np.random.default_rng(seed).permutation(members)[:count]]
            taught = answers.teacher.teach({name: chosen})
            own = new_test[labels[1] == name]
            others = cell(taught(outputs(old)), truth, threshold)
            mine = cell(taught(outputs(own)), np.full(len(own), len(classes)), threshold)
            both = others + mine
            with_new = np.concatenate([imprinted, unit(chosen[:, :dim].mean(axis=0, keepdims=True))])
            nearest = [(unit(x[:, :dim]) @ with_new.T).argmax(axis=1) for x in (own, old)]
            found.append(
                (
                    mine.correct / mine.n,
                    (nothing.correct - others.correct) / others.n,
                    (sum(both.bin_confidence) - both.correct) / both.n,
                    both.calibration_error or 0.0,
                    others.novel / others.n,
                    mine.novel / mine.n,
                    float((nearest[0] == len(classes)).mean()),
                    cosine - float((nearest[1] == truth).mean()),
                )
            )
        click.echo(
            f"| {count} | " + " | ".join(f"{100 * mean(column):.1f}" for column in zip(*found, strict=True)) + " |"
        )
    learned = next(each for each in stored_metrics(opened).per_task if each.name == task)
    click.echo(
        f"learned with all its images by '{opened.config.method}': {100 * (learned.now or 0):.1f} % of its test images"
    )


def outputs(features: npt.NDArray[np.float32]) -> Outputs:
    """Features as outputs of a graph, whose other outputs are not read."""
    empty = np.zeros((len(features), 1), np.float32)
    return Outputs(empty, empty, empty[:, 0], features)


def unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
