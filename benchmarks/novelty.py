"""Does a run notice images of classes it has not learned?

    python benchmarks/novelty.py RUN --json novelty.json

Takes the states of a run after each task but the last. Known are the test images of the tasks learned so far,
unknown those of all later tasks, which that state has never seen: no image chose anything here. The novelty of the
model is compared with the usual peer, one minus the highest probability (Hendrycks and Gimpel 2017). The false-alarm
rate is the share of known images beyond the threshold that the bundle carries.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from duallora_edge.files import write_json
from duallora_edge.learner.data import PixelSet
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.answers import NOVELTY_THRESHOLD, ComposedModel
from duallora_edge.learner.network.features import collect_features
from duallora_edge.learner.network.prefix_cache import Encoded, PrefixCache
from duallora_edge.learner.reading import read_images, source_groups
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.terminal import TerminalCallback

Scores = npt.NDArray[np.float64]


@torch.no_grad()
def scores(model: ComposedModel, encoded: Encoded, precision: str) -> tuple[Scores, Scores]:
    """Novelty and one minus the highest probability of every image."""
    features, _ = collect_features(model.network, encoded, precision)
    answers = model.classifier(features)
    return answers.novelty.double().numpy(), 1 - answers.probabilities.amax(dim=1).double().numpy()


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path, exists=True))
@click.option("--weights", help="The backbone's weights, when the file was moved.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(path: Path, weights: str | None, json_path: Path | None) -> None:
    run = RunDirectory.open(path)
    backbone, records = run.backbone(weights), run.records()
    names = [record.info.name for record in records]
    tests: dict[str, PixelSet] = {}
    for settings in source_groups(run, names):
        stream = read_images(replace(run.config, **settings), run.info, TerminalCallback())
        tests.update({task.name: task.test for task in stream.tasks})
    cache = PrefixCache()
    encode = partial(Encoded, backbone, cache=cache, precision=run.config.precision)
    encoded = {name: encode(tests[name], sorted(set(tests[name].labels))) for name in names}
    rows: list[dict[str, Any]] = []
    for k in range(1, len(records)):
        model = compose(backbone, records[:k])
        found = [scores(model, encoded[name], run.config.precision) for name in names]
        novelty, doubt = (np.concatenate([pair[i] for pair in found]) for i in range(2))
        unknown = np.concatenate([np.full(len(pair[0]), index >= k) for index, pair in enumerate(found)])
        rows.append(
            {
                "tasks": k,
                "known": int((~unknown).sum()),
                "unknown": int(unknown.sum()),
                "auroc": float(roc_auc_score(unknown, novelty)),
                "auroc_confidence": float(roc_auc_score(unknown, doubt)),
                "false_alarms": float((novelty[~unknown] > NOVELTY_THRESHOLD).mean()),
                "detected": float((novelty[unknown] > NOVELTY_THRESHOLD).mean()),
            }
        )
    click.echo(f"{path.name}, threshold {NOVELTY_THRESHOLD}; percent")
    click.echo(
        f"{'tasks':>5} {'known':>7} {'unknown':>8} {'AUROC':>7} {'peer':>7} {'false alarms':>13} {'detected':>9}"
    )
    for row in rows:
        click.echo(
            f"{row['tasks']:>5} {row['known']:>7} {row['unknown']:>8} {100 * row['auroc']:>7.1f} "
            f"{100 * row['auroc_confidence']:>7.1f} {100 * row['false_alarms']:>13.1f} {100 * row['detected']:>9.1f}"
        )
    if json_path:
        write_json(json_path, rows)
        click.echo(f"Wrote {json_path}")


if __name__ == "__main__":
    main()
