"""What confidence and novelty are worth on pictures from elsewhere: a run under noise, blur, JPEG and darkness.

    python benchmarks/shifts.py out/cifar100-10/dual_lora-0 --images 1000

Reads the test images of the run, evenly spread over all of them, and changes them with torchvision. Answers are those
of the last state, no task named. *novel*: images called novel although their class was learned; the bundle's threshold
promises 5 % on pictures like those of the training. *right, if sure*: right answers among those with a confidence of
0.9 or more, and how many these are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as change

from duallora_edge.learner.evaluate import Tests, add_tests
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.answers import NOVELTY_THRESHOLD
from duallora_edge.learner.report.intervals import wilson
from duallora_edge.learner.report.metrics import Cell, Predictions
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.terminal import TerminalCallback

STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.02, 0.05, 0.1, 0.2, 0.3),  # standard deviation, of a range of 1
    "blur": (0.5, 1.0, 2.0, 3.0, 4.0),  # standard deviation in pixels of the input
    "JPEG": (50, 30, 15, 8, 4),  # quality
    "darkness": (0.8, 0.6, 0.4, 0.25, 0.15),  # factor of all values
}
BATCH = 64


def changed(frames: Tensor, kind: str, strength: float) -> Tensor:
    """Frames uint8 [B, S, S, 3] after one of `STRENGTHS`."""
    planes = frames.permute(0, 3, 1, 2).contiguous()
    if kind == "noise":
        planes = change.gaussian_noise(planes.float() / 255, sigma=strength).mul(255).round().to(torch.uint8)
    elif kind == "blur":
        planes = change.gaussian_blur(planes, [2 * round(3 * strength) + 1] * 2, [strength] * 2)
    elif kind == "JPEG":
        planes = torch.stack([change.jpeg(plane, int(strength)) for plane in planes])
    else:
        planes = change.adjust_brightness(planes, strength)
    return planes.permute(0, 2, 3, 1).contiguous()


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--images", default=1000, show_default=True, type=click.IntRange(50))
@torch.no_grad()
def main(runs: tuple[Path, ...], images: int) -> None:
    for path in runs:
        run = RunDirectory.open(path)
        backbone, records = run.backbone(), run.records()
        tests = Tests(backbone, run.config.precision)
        add_tests(run, tests, TerminalCallback())
        model = compose(backbone, records).eval()
        index = model.catalogue.classes.index
        encoded = [tests.encoded(record.info.name) for record in records]
        truth = torch.cat(
            [torch.tensor([*map(index, r.info.classes)])[e.labels] for r, e in zip(records, encoded, strict=True)]
        )
        where = [(e, number) for e in encoded for number in range(e.images)]
        chosen = torch.linspace(0, len(where) - 1, min(images, len(where))).round().long().tolist()
        frames = torch.cat([torch.from_numpy(where[i][0].frames(torch.tensor([where[i][1]]))) for i in chosen])
        click.echo(f"\n{path}: {len(frames)} test images")
        click.echo(f"{'':<14} {'accuracy':>22} {'ECE':>7} {'novel':>7} {'right, if sure':>20}")
        plain: dict[str, Callable[[Tensor], Tensor]] = {"as they are": lambda x: x}
        shifted = {
            f"{kind} {strength:g}": partial(changed, kind=kind, strength=strength)
            for kind, strengths in STRENGTHS.items()
            for strength in strengths
        }
        for name, look in {**plain, **shifted}.items():
            torch.manual_seed(0)
            answers = [model(look(part)) for part in frames.split(BATCH)]
            probabilities = torch.cat([answer.probabilities for answer in answers])
            novel = float((torch.cat([answer.novelty for answer in answers]) > NOVELTY_THRESHOLD).double().mean())
            labels = truth[chosen]
            one_task = torch.ones(len(labels), 1)
            cell = Cell.from_predictions(
                Predictions(labels.numpy(), probabilities.numpy(), 0, one_task.numpy()),
                range(probabilities.shape[1]),
            )
            sure = probabilities.amax(dim=1) >= 0.9
            right = float((probabilities.argmax(dim=1) == labels)[sure].double().mean()) if bool(sure.any()) else 0.0
            low, high = wilson(cell.correct, cell.n) or (0.0, 0.0)
            accuracy = f"{100 * (cell.accuracy or 0):.1f} ({100 * low:.1f} to {100 * high:.1f})"
            sure_text = f"{100 * right:.1f} of {100 * float(sure.double().mean()):.1f}"
            error, novel_text = f"{100 * (cell.calibration_error or 0):.1f}", f"{100 * novel:.1f}"
            click.echo(f"{name:<14} {accuracy:>22} {error:>7} {novel_text:>7} {sure_text:>20}")


if __name__ == "__main__":
    main()
