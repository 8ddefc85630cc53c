"""Agreement of a bundle with the trained model on test images that took no part in the export.

    python benchmarks/agreement.py RUN BUNDLE --images 1000

The images are spread evenly over the test images of all tasks; both sides see the same decoded pixels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import onnx

from duallora_edge.export.parity import Parity, onnx_outputs, torch_outputs
from duallora_edge.learner.methods import compose
from duallora_edge.learner.run import Run
from duallora_edge.learner.session import Listener, read_images, source_groups
from duallora_edge.runtime.bundle import Bundle


@click.command()
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path, exists=True))
@click.argument("bundle_path", metavar="BUNDLE", type=click.Path(path_type=Path, exists=True))
@click.option("--images", default=1000, show_default=True, type=click.IntRange(1))
def main(run_path: Path, bundle_path: Path, images: int) -> None:
    run, bundle = Run.open(run_path), Bundle.open(bundle_path)
    model = compose(run.backbone(), run.records()).eval()
    names = {run.read_info(task).name for task in run.head()}
    pixels, labels = [], []
    for settings in source_groups(run, names):
        for task in read_images(replace(run.config, **settings), run.info, Listener()).tasks:
            if task.name in names:
                pixels.append(task.test.pixels)
                labels += task.test.labels
    chosen = np.unique(np.linspace(0, len(labels) - 1, images, dtype=np.int64))
    place = [(part, row) for part in pixels for row in range(len(part))]
    sample = np.stack([place[index][0][place[index][1]] for index in chosen])
    reference, exported = torch_outputs(model, sample), onnx_outputs(onnx.load(bundle.model_path), sample)
    parity = Parity.between(reference, exported)
    truth = [bundle.manifest.classes.index(labels[i]) for i in chosen]
    click.echo(
        f"{parity.images} test images: top-1 agreement {100 * parity.top1_agreement:.2f} %, task agreement "
        f"{100 * parity.task_agreement:.2f} %, largest difference of a class probability "
        f"{parity.max_probability_difference:.1e}, of a task probability {parity.max_task_probability_difference:.1e}; "
        f"accuracy PyTorch {100 * (reference['probabilities'].argmax(1) == truth).mean():.1f} %, "
        f"exported {100 * (exported['probabilities'].argmax(1) == truth).mean():.1f} %"
    )


if __name__ == "__main__":
    main()
