"""What the task identity and the temperatures are worth: the same features of a run, scored and calibrated otherwise.

    python benchmarks/calibrations.py RUN --json calibrations.json

On the images that the run measures itself on (test images, or a fifth of the training images with ``--develop``),
after its last task. ``task posterior`` is that of the dynamic memory, from the frozen prefix alone. Softmax within a
task times that posterior is the textbook way to calibrate heads by a task identity: here with the heads that the
adapters were trained with, at temperature 1 and 1.5, and with our classifier. No image chooses anything here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor

from duallora_edge.files import write_json
from duallora_edge.learner.methods import compose
from duallora_edge.learner.methods.scoring import CLASSIFIERS, ClassifierData
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.learner.network.features import collect_features
from duallora_edge.learner.network.prefix_cache import Encoded, PrefixCache
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.reading import read_images, source_groups
from duallora_edge.learner.report.metrics import Cell, Predictions, pool
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.statistics.calibration import Mixture
from duallora_edge.learner.terminal import TerminalCallback


def within_tasks(logits: Tensor, task_of: Tensor, posterior: Tensor, temperature: float) -> Tensor:
    """Probabilities of the components [B, K]: softmax within each task, times its posterior [B, T]."""
    parts = torch.zeros_like(logits)
    for task in range(posterior.shape[1]):
        own = task_of == task
        parts[:, own] = (logits[:, own] / temperature).softmax(dim=1) * posterior[:, [task]]
    return parts


def ways(model: ComposedModel, records: list[TaskRecord], features: Tensor) -> dict[str, Tensor]:
    """Probabilities of the components, by the name of the way."""
    catalogue, dim = model.catalogue, model.network.backbone.dim
    heads = CLASSIFIERS["heads"](ClassifierData.of(records, dim))
    posterior = model.network.dynamic_memory(features[:, dim:])
    own = model.classifier.logits(features)
    trained = features @ heads.weight.float().T + heads.bias.float()
    mixture = model.classifier.mixture
    one = mixture.temperature
    return {
        "heads, one softmax": trained.softmax(dim=1),
        "heads within tasks x task posterior": within_tasks(trained, catalogue.task_of, posterior, 1.0),
        "heads / 1.5 within tasks x task posterior": within_tasks(trained, catalogue.task_of, posterior, 1.5),
        "discriminants, one softmax": Mixture(1.0)(own),
        "discriminants within tasks x task posterior": within_tasks(own, catalogue.task_of, posterior, one),
        "discriminants, calibrated (the default)": mixture(own),
    }


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path, exists=True))
@click.option("--weights", help="The backbone's weights, when the file was moved.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@torch.no_grad()
def main(path: Path, weights: str | None, json_path: Path | None) -> None:
    run = RunDirectory.open(path)
    backbone, records = run.backbone(weights), run.records()
    model, infos = compose(backbone, records), [record.info for record in records]
    cells: dict[str, list[Cell]] = {}
    cache = PrefixCache()
    for settings in source_groups(run, [info.name for info in infos]):
        stream = read_images(replace(run.config, **settings), run.info, TerminalCallback())
        for task in stream.tasks:
            index = [info.name for info in infos].index(task.name)
            columns = [model.catalogue.classes.index(name) for name in infos[index].classes]
            precision = run.config.precision
            encoded = Encoded(backbone, task.test, infos[index].classes, cache=cache, precision=precision)
            features, _ = collect_features(model.network, encoded, precision)
            for name, components in ways(model, records, features).items():
                answers = Predictions(
                    torch.tensor(columns)[encoded.labels].numpy(),
                    (components @ model.catalogue.class_sums()).numpy(),
                    index,
                    (components @ model.catalogue.task_sums()).numpy(),
                )
                cells.setdefault(name, []).append(Cell.from_predictions(answers, columns))
    rows = {name: pool(found) for name, found in cells.items()}
    click.echo(f"{path.name}, {len(records)} tasks; percent\n{'':<45} {'accuracy':>9} {'ECE':>6} {'task':>6}")
    for name, cell in rows.items():
        accuracy, error, task = (
            100 * (value or 0) for value in (cell.accuracy, cell.calibration_error, cell.task_accuracy)
        )
        click.echo(f"{name:<45} {accuracy:>9.1f} {error:>6.1f} {task:>6.1f}")
    if json_path:
        write_json(json_path, {name: cell.to_json() for name, cell in rows.items()})


if __name__ == "__main__":
    main()
