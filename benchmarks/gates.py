"""What telling the task costs: the last state of a run with gates by posterior, by oracle, open and closed.

    python benchmarks/gates.py out/cifar100-10/dual_lora-0

The oracle opens the residual adapters as for an image whose task is known; it names no task to the classifier. Class
statistics stay those of the run, which were collected under the posterior.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor, nn

from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.evaluate import Tests, add_tests
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.features import collect_features
from duallora_edge.learner.run_directory import RunDirectory


class Fixed(nn.Module):
    """A dynamic memory that is as sure of one task, or of every task at once, or of none."""

    def __init__(self, posterior: Tensor) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, phi: Tensor) -> Tensor:
        return self.posterior.expand(len(phi), -1)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@torch.no_grad()
def main(runs: tuple[Path, ...]) -> None:
    click.echo(f"{'run':<60} {'posterior':>9} {'oracle':>9} {'open':>9} {'closed':>9}")
    for path in runs:
        run = RunDirectory.open(path)
        backbone, records = run.backbone(), run.records()
        tests = Tests(backbone, run.config.precision)
        add_tests(run, tests, Callback())
        model = compose(backbone, records).eval()
        count = len(records)
        unit = torch.eye(count)
        memory = model.network.dynamic_memory
        # Gates are the posterior times a gate map; open ones are 1 for either kind of residual.
        maps = [block.gate_map for block in model.network.blocks]
        right = dict.fromkeys(("posterior", "oracle", "open", "closed"), 0)
        total = 0
        for index, record in enumerate(records):
            encoded = tests.encoded(record.info.name)
            truth = torch.tensor([model.catalogue.classes.index(name) for name in record.info.classes])[encoded.labels]
            total += len(truth)
            for name in right:
                model.network.dynamic_memory = memory if name == "posterior" else Fixed(unit[index])
                for block, gate_map in zip(model.network.blocks, maps, strict=True):
                    constant = {"open": torch.ones_like, "closed": torch.zeros_like}.get(name)
                    block.gate_map = constant(gate_map) if constant and gate_map is not None else gate_map
                features, _ = collect_features(model.network, encoded, run.config.precision)
                answers = model.classifier(features).probabilities.argmax(dim=1)
                right[name] += int((answers == truth).sum())
        shares = " ".join(f"{100 * value / total:>8.1f} %"[:9].rjust(9) for value in right.values())
        click.echo(f"{path.parent.name + '/' + path.name:<60} {shares}")


if __name__ == "__main__":
    main()
