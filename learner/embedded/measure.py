"""Measure the frozen features of the embedded backbone: the table of MODEL_CARD.md.

    python -m duallora_edge.learner.embedded.measure --weights VIT_TINY.safetensors \\
        --images=DATA/{signdigits,mnist,gtsrb,clothing10}/train

Every folder holds one folder of images a class. Linear discriminant analysis is fitted on the features of the
images that training may use, and tested on the held-back tenth, which training has not seen.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from timm.models import VisionTransformer
from torch import Tensor

from duallora_edge.learner import embedded
from duallora_edge.learner.embedded.train import (
    TEACHER_SIZE,
    create_teacher,
    image_paths,
    initialise,
    load_images,
    split,
)

BATCH = 100


def features(model: VisionTransformer, images: Tensor) -> Tensor:
    """Class tokens ``float32 [N, D]`` of images ``uint8 [N, 3, S, S]``."""
    with torch.no_grad():
        return torch.cat([model(batch.float() / 127.5 - 1) for batch in images.split(BATCH)])


def lda_accuracy(model: VisionTransformer, size: int, folder: Path) -> float:
    """Accuracy (0..1) on the held-back images of ``folder``, seen at ``size`` px.

    The covariance is shrunk by the rule of Ledoit and Wolf (2004).
    """
    known, held_back = split(image_paths(folder))
    classifier = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    classifier.fit(features(model, load_images(known, size)).numpy(), [path.parent.name for path in known])
    tested = features(model, load_images(held_back, size)).numpy()
    return float(classifier.score(tested, [path.parent.name for path in held_back]))


@click.command()
@click.option("--images", "folders", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--weights", required=True, type=click.Path(exists=True, path_type=Path), help="The teacher's.")
def main(folders: tuple[Path, ...], weights: Path) -> None:
    """Accuracy of LDA on frozen features: teacher, student before training, embedded backbone."""
    teacher = create_teacher(weights)
    student = initialise(teacher).eval()
    teacher.reset_classifier(0)
    models = {
        f"teacher, {TEACHER_SIZE} px": (teacher, TEACHER_SIZE),
        "student before training, 64 px": (student, 64),
        "embedded, 64 px": (embedded.create(), 64),
    }
    for name, (model, size) in models.items():
        for folder in folders:
            click.echo(f"{name:32} {folder}: {100 * lda_accuracy(model, size, folder):.1f} %")


if __name__ == "__main__":
    main()
