"""How many of the frames that a device keeps are of a class it was never taught.

    python benchmarks/keeping.py RUN TASK --kept 200 --share 0.02

RUN learned TASK and others; a copy of it forgets TASK and is exported. A stream is made of test images of the other
tasks and, as a share, of images of one class of TASK (each of up to ten in its turn). *share*: of the kept frames those
of the class; *found*: of the frames of the class those that are kept. Kept are, by `field.keeping`, the most novel
ones, no two alike; beside it random ones, the least certain ones, and some above the threshold of novelty.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import click
import numpy as np
import numpy.typing as npt
from teaching import Answers, outputs, read

from duallora_edge.export.export import export_run
from duallora_edge.learner import Learner
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.runtime.field.keeping import ALIKE

CLASSES = 10
Values = npt.NDArray[np.float64]


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("task")
@click.option("--kept", default=200, show_default=True)
@click.option("--share", default=0.02, show_default=True)
def main(run: Path, task: str, kept: int, share: float) -> None:
    data = read(RunDirectory.open(run))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        shutil.copytree(run, copy)
        Learner(copy).remove(task)
        answers = Answers(export_run(copy, Path(folder) / "bundle", "x86-cpu").path)
    known = answers.features(np.concatenate([test.pixels for name, (_, test) in data.items() if name != task]))
    new = answers.features(data[task][0].pixels)
    labels = np.array(data[task][0].labels)
    of_known, of_new = (answers.teacher.teach({})(outputs(each)) for each in (known, new))
    policies: dict[str, Callable[[Values, Values, np.random.Generator], Values]] = {
        "most novel, no two alike": lambda novelty, _, rng: novelty + 1e-9 * rng.random(len(novelty)),
        "random": lambda novelty, _, rng: rng.random(len(novelty)),
        "least certain": lambda _, confidence, rng: 1 - confidence,
        "some above the threshold": lambda novelty, _, rng: (novelty > 0.95) * rng.random(len(novelty)),
    }
    click.echo(f"{task}: {kept} frames kept of a stream with {100 * share:g} % of a new class\n")
    click.echo("| kept | share | found |\n|---|---|---|")
    for policy, score in policies.items():
        found = []
        for number, name in enumerate(sorted(set(labels))[:CLASSES]):
            rng = np.random.default_rng(number)
            mine = rng.permutation(np.flatnonzero(labels == name))[: int(share * len(known))]
            others = rng.permutation(len(known))[: round(len(mine) * (1 - share) / share)]
            novelty = np.concatenate([of_known.novelty[others], of_new.novelty[mine]]).astype(np.float64)
            confidence = np.concatenate(
                [of_known.probabilities[others].max(axis=1), of_new.probabilities[mine].max(axis=1)]
            )
            order = np.argsort(-score(novelty, confidence.astype(np.float64), rng), kind="stable")
            if policy == "most novel, no two alike":
                order = apart(np.concatenate([known[others], new[mine]]), order, kept)
            is_new = order[:kept] >= len(others)
            found.append((is_new.mean(), is_new.sum() / len(mine)))
        click.echo(
            f"| {policy} | " + " | ".join(f"{100 * mean(each):.0f} %" for each in zip(*found, strict=True)) + " |"
        )


def apart(features: npt.NDArray[np.float32], order: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The first of ``order`` that resemble none before them."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    chosen: list[int] = []
    for index in order:
        if not chosen or float((unit[chosen] @ unit[index]).max()) <= ALIKE:
            chosen.append(int(index))
        if len(chosen) == count:
            break
    return np.array(chosen)


if __name__ == "__main__":
    main()
