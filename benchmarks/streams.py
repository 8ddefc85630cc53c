"""The standard streams: DualLoRA beside sequential fine-tuning and the frozen network, one `train` command each.

    DUALLORA_EDGE_ASSETS=... python benchmarks/streams.py domains7 --out out/streams

Reads the archives of the asset folder, unpacks those of the stream, trains every method with the defaults and a
ViT-Ti/16 at 128 px, and prints a table with the wall time of each command.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import click

from duallora_edge.files import write_json
from duallora_edge.learner.commands import stored_metrics
from duallora_edge.learner.run import Run

STREAMS = {
    "domains7": ("gtsrb", "rsscn7", "dtd10", "signdigits", "clothing10", "scene6", "mnist"),
    "cifar100-10": ("cifar100",),
    "pacs4": ("pacs",),
}
COLUMNS = (
    "last_accuracy", "average_incremental_accuracy", "forgetting_since_learned", "forgetting_task_given",
    "task_accuracy", "calibration_error",
)  # fmt: skip


def unpack(assets: Path, stream: str, folder: Path) -> list[str]:
    """Unpack the archives of a stream; returns the options of `train` that name its tasks."""
    for name in STREAMS[stream]:
        if not (folder / name).is_dir():
            with tarfile.open(assets / "images" / f"{name}.tar") as archive:
                archive.extractall(folder, filter="data")
    if stream == "domains7":
        return ["--data", str(folder), "--task-order", ",".join(STREAMS[stream])]
    if stream == "pacs4":
        return ["--data", str(folder / "pacs"), "--task-order", "photo,art_painting,cartoon,sketch"]
    return ["--data", str(folder / "cifar100"), "--classes-per-task", "10", "--class-order", "seed:1993"]


@click.command()
@click.argument("stream", type=click.Choice(list(STREAMS)))
@click.option("--methods", default="dual_lora,sequential,frozen", show_default=True)
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--out", default="out/streams", show_default=True, type=click.Path(path_type=Path))
def main(stream: str, methods: str, seed: int, out: Path) -> None:
    assets = os.environ.get("DUALLORA_EDGE_ASSETS")
    if not assets:
        raise click.UsageError("Set DUALLORA_EDGE_ASSETS to the folder of the assets.")
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    data = unpack(Path(assets), stream, images)
    weights = Path(assets) / "weights" / "vit_tiny_patch16_224.safetensors"
    backbone = ["--backbone", "vit_tiny_patch16_224", "--weights", str(weights), "--size", "128"]
    rows = {}
    for method in methods.split(","):
        run = out / f"{stream}-{method}-{seed}"
        started = time.monotonic()
        command = [sys.executable, "-m", "duallora_edge", "train", *data, *backbone, "--run", str(run)]
        subprocess.run([*command, "--method", method, "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL)
        summary = stored_metrics(Run.open(run)).summary
        rows[method] = {**{key: summary[key] for key in COLUMNS}, "minutes": (time.monotonic() - started) / 60}
    click.echo(f"{stream}, seed {seed}; percent and points")
    click.echo(
        f"{'method':<12}{'last':>8}{'average':>9}{'forgetting':>12}{'task given':>12}{'task id':>9}{'ECE':>6}{'min':>7}"
    )
    for method, row in rows.items():
        numbers = [100 * value if (value := row[key]) is not None else float("nan") for key in COLUMNS]
        last, average, forgetting, given, task, ece = numbers
        click.echo(
            f"{method:<12}{last:>8.1f}{average:>9.1f}{forgetting:>12.1f}{given:>12.1f}{task:>9.1f}{ece:>6.1f}"
            f"{row['minutes']:>7.1f}"
        )
    write_json(out / f"{stream}-{seed}.json", rows)
    click.echo(f"Wrote {out / f'{stream}-{seed}.json'}")


if __name__ == "__main__":
    main()
