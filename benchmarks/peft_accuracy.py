"""Accuracy of training behind the cached prefix beside PEFT's LoRA in all blocks, on the same images.

    duallora-edge train --method joint --run RUN ...
    python benchmarks/peft_accuracy.py RUN --json peft_accuracy.json

RUN learned all its tasks at once (``joint``), which leaves forgetting out of the comparison: what remains is what is
given up by adapting query and value of the suffix alone, behind fixed down-projections. PEFT's LoRA has the rank of
both our adapters together on the fused query, key and value projections of every block, and learns from the same
training images for as many epochs, with the same batches, optimiser, rate, precision and seed, and a linear head of all
classes. Both are then read by their own head, by linear discriminants of the final feature f, and of f and the
summaries phi of the frozen prefix. Test images choose nothing.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
from peft import LoraConfig, get_peft_model
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from duallora_edge.files import write_json
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import PixelSet, PreparedTask
from duallora_edge.learner.methods import compose
from duallora_edge.learner.methods.training import derive_seed, head_logits
from duallora_edge.learner.network.backbone import Backbone, autocast
from duallora_edge.learner.network.features import collect_features
from duallora_edge.learner.network.prefix_cache import BATCH, Encoded
from duallora_edge.learner.reading import read_images, source_groups
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.statistics.gaussian import ClassStatistics, GaussianClassifier
from duallora_edge.learner.terminal import TerminalCallback


def train_peft(backbone: Backbone, task: PreparedTask, config: TrainConfig, labels: Tensor) -> VisionTransformer:
    """The backbone's network with PEFT's LoRA and a head, trained on the images of the task."""
    model = backbone.model
    model.reset_classifier(len(task.classes))
    model.head.weight.data.zero_()  # as ours starts
    rank = config.rank_orthogonal + config.rank_residual
    torch.manual_seed(config.seed)
    peft = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv"], modules_to_save=["head"])
    ).train()
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate, fused=True)
    epoch_steps = math.ceil(len(labels) / config.batch_size)
    total = max(config.epochs * epoch_steps, config.min_steps)
    order, generator = torch.empty(0, dtype=torch.long), torch.Generator()
    for step in range(total):
        epoch, position = divmod(step, epoch_steps)
        if position == 0:
            order = torch.randperm(len(labels), generator=generator.manual_seed(derive_seed(config.seed, 0, epoch)))
            click.echo(f"  PEFT, epoch {epoch + 1}")
        batch = order[position * config.batch_size :][: config.batch_size]
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
        with autocast(config.precision, backbone.device):
            logits = peft(backbone.normalised(frames(backbone, task.train, batch)))
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels[batch]).backward()
        optimizer.step()
    merged: VisionTransformer = peft.merge_and_unload().eval()
    return merged


def frames(backbone: Backbone, images: PixelSet, rows: Tensor) -> Tensor:
    """Frames uint8 [B, S, S, 3] on the backbone's device."""
    return torch.from_numpy(images.pixels[rows.numpy()]).to(backbone.device)


@torch.no_grad()
def peft_features(backbone: Backbone, model: VisionTransformer, images: PixelSet, precision: str) -> Tensor:
    """Final normalised features [n, d]."""
    found = []
    for rows in torch.arange(len(images)).split(BATCH):
        with autocast(precision, backbone.device):
            tokens = model.forward_features(backbone.normalised(frames(backbone, images, rows)))
            found.append(model.forward_head(tokens, pre_logits=True).float().cpu())
    return torch.cat(found)


def readings(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, head: Tensor, dim: int) -> dict[str, float]:
    """Accuracy by the trained head [K, d + 1] on f, and by discriminants on f and on [f ; phi]."""
    found = {"head on f": head_logits(test[:, :dim], head)}
    for name, part in (("discriminants of f", slice(0, dim)), ("discriminants of f and phi", slice(None))):
        gaussian = GaussianClassifier.fit([ClassStatistics.of(train[:, part], labels, len(head))], inflation=False)
        found[name] = test[:, part].double() @ gaussian.weight.T + gaussian.bias
    return {name: float((logits.argmax(dim=1) == truth).double().mean()) for name, logits in found.items()}


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path, exists=True))
@click.option("--weights", help="The backbone's weights, when the file was moved.")
@click.option("--learning-rate", type=float, help="Of PEFT, when not that of the run.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(path: Path, weights: str | None, learning_rate: float | None, threads: int, json_path: Path | None) -> None:
    torch.set_num_threads(threads)
    run = RunDirectory.open(path)
    config, records = run.config, run.records()
    if config.method != "joint":
        raise click.UsageError(f"{path} was trained with {config.method}; it must be a run of --method joint.")
    backbone = run.backbone(weights)
    (settings,) = source_groups(run, [record.info.name for record in records])
    task = read_images(replace(config, **settings), run.info, TerminalCallback()).merged().tasks[0]
    if task.classes != records[0].info.classes:
        raise click.UsageError(f"The images of {path} have changed since it was trained.")
    labels, truth = (
        torch.tensor([task.classes.index(label) for label in images.labels]) for images in (task.train, task.test)
    )
    with torch.no_grad():
        model = compose(backbone, records)
        sets = [Encoded(backbone, part, task.classes, precision=config.precision) for part in (task.train, task.test)]
        train, test = (collect_features(model.network, encoded, config.precision)[0] for encoded in sets)
    rows = {"ours, suffix behind a cached prefix": readings(train, labels, test, truth, records[0].head, backbone.dim)}

    set_fused_attn(config.precision == "fp32")  # what is faster on a CPU
    peer = run.backbone(weights)
    started = time.monotonic()
    network = train_peft(peer, task, replace(config, learning_rate=learning_rate or config.learning_rate), labels)
    click.echo(f"  {time.monotonic() - started:.0f} s")
    head = torch.cat([network.head.weight, network.head.bias[:, None]], dim=1).detach()
    features = [
        torch.cat([peft_features(peer, network, images, config.precision), encoded.phi], dim=1)
        for images, encoded in zip((task.train, task.test), sets, strict=True)
    ]
    rows["PEFT LoRA in all blocks"] = readings(features[0], labels, features[1], truth, head, backbone.dim)
    for name, row in rows.items():
        click.echo(f"{name:<38}" + "  ".join(f"{key} {100 * value:.1f} %" for key, value in row.items()))
    if json_path:
        write_json(json_path, {"run": path.name, "test_images": len(truth), "rows": rows})
        click.echo(f"Wrote {json_path}")


if __name__ == "__main__":
    main()
