"""What confidence and novelty are worth after a few photos of each class.

    python benchmarks/few_images.py FOLDER --weights FILE --counts 5,10,20 --draws 10

FOLDER has one folder of images for each class. Each draw learns so many random images of each class with the defaults,
as `duallora-edge train` does, and is measured on others, up to 50 of each class. *confidence* is the mean that was
stated, *off* the mean over the draws of its distance from the accuracy, *false* the share of these images called novel.
"""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import click

from duallora_edge.learner import Learner
from duallora_edge.learner.doubts import unreliable_novelty

OTHERS = 50
COLUMNS = ("accuracy", "confidence", "off", "ECE", "false")


def draw(folder: Path, images: int, seed: int, target: Path) -> None:
    """Link a random selection of each class for training, and of the rest for the test."""
    for source in sorted(path for path in folder.iterdir() if path.is_dir()):
        paths = sorted(source.iterdir())
        random.Random(f"{seed} {source.name}").shuffle(paths)
        for split, chosen in (("train", paths[:images]), ("test", paths[images : images + OTHERS])):
            place = target / split / source.name
            place.mkdir(parents=True)
            for path in chosen:
                (place / path.name).symlink_to(path.resolve())


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--backbone", default="vit_tiny_patch16_224", show_default=True)
@click.option("--weights", type=click.Path(path_type=Path, exists=True))
@click.option("--size", default=128, show_default=True, type=int)
@click.option(
    "--base", default="auto", show_default=True, help="As for 'train'; a FILE saves the adaptation each draw."
)
@click.option("--method", default="dual_lora", show_default=True)
@click.option("--counts", default="5,10,20", show_default=True, help="Images of each class.")
@click.option("--draws", default=10, show_default=True, type=click.IntRange(2))
def main(
    folder: Path, backbone: str, weights: Path | None, size: int, base: str, method: str, counts: str, draws: int
) -> None:
    click.echo(
        "| images a class | accuracy | confidence | off | ECE | false | unreliable | draws |\n" + "|---" * 8 + "|"
    )
    for images in map(int, counts.split(",")):
        found: dict[str, list[float]] = defaultdict(list)
        for seed in range(draws):
            with tempfile.TemporaryDirectory() as temporary:
                draw(folder, images, seed, Path(temporary) / "data")
                learner = Learner(
                    Path(temporary) / "run",
                    backbone=backbone,
                    weights=None if weights is None else str(weights),
                    size=size,
                    base=base,
                    method=method,
                    seed=seed,
                )
                metrics = learner.learn(Path(temporary) / "data")
                cell = metrics.last
                accuracy, confidence = cell.correct / cell.n, sum(cell.bin_confidence) / cell.n
                found["accuracy"].append(100 * accuracy)
                found["confidence"].append(100 * confidence)
                found["off"].append(100 * abs(accuracy - confidence))
                found["ECE"].append(100 * (cell.calibration_error or 0))
                found["false"].append(100 * (cell.false_novelty or 0))
                found["unreliable"].append(bool(unreliable_novelty(metrics, learner.tasks)))
        cells = " | ".join(f"{mean(found[key]):.1f} ± {stdev(found[key]):.1f}" for key in COLUMNS)
        click.echo(f"| {images} | {cells} | {sum(found['unreliable'])} of {draws} | {draws} |")


if __name__ == "__main__":
    main()
