"""How long a run needs to learn one new class of twenty images, from the start of the command to its end.

    python benchmarks/new_class.py --backbone vit_small_patch16_224 --size 224 --json new_class.json

A run with two tasks of five classes learns the class with `duallora-edge train`, in a process of its own on some
cores of this machine, several times over from the same state. Beside it: how long the same command takes to load its
libraries and say what it is. The images are random, as are the weights unless some are given: accuracy means nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from duallora_edge.files import read_json, write_json


def write_classes(folder: Path, names: Sequence[str], images: int, side: int) -> None:
    """Random images, a class a folder."""
    rng = np.random.default_rng(len(names))
    for name in names:
        target = folder / "train" / name
        target.mkdir(parents=True)
        for number in range(images):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(target / f"{number:03d}.jpg")


def seconds_of(arguments: Sequence[str], environment: dict[str, str]) -> float:
    """How long a call of the command takes."""
    started = time.monotonic()
    command = [sys.executable, "-m", "duallora_edge", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    return time.monotonic() - started


@click.command()
@click.option("--backbone", default="vit_small_patch16_224", show_default=True)
@click.option("--weights", type=click.Path(path_type=Path, exists=True), help="Real weights instead of random ones.")
@click.option("--size", default=224, show_default=True, type=int, help="Input side in pixels.")
@click.option("--images", default=20, show_default=True, type=click.IntRange(2), help="Of the new class.")
@click.option("--cores", default=2, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    backbone: str, weights: Path | None, size: int, images: int, cores: int, rounds: int, json_path: Path | None
) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "DUALLORA_EDGE_CACHE": str(folder / "cache")}
        if weights is None:
            weights = folder / "random.safetensors"
            torch.manual_seed(0)
            save_file(timm.create_model(backbone, num_classes=0).state_dict(), weights)
        for task in ("a", "b"):
            write_classes(folder / "known" / task, [f"{task}{number}" for number in range(5)], images, size)
        write_classes(folder / "new", ["new"], images, size)
        known, run = folder / "known-run", folder / "run"
        settings = ["--backbone", backbone, "--weights", str(weights), "--size", str(size), "--epochs", "0"]
        seconds_of(
            ["train", "--data", str(folder / "known"), *settings, "--min-steps", "2", "--run", str(known)], environment
        )
        whole, loading, phases = [], [], []
        for _ in range(rounds):
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(known, run)
            call = ["train", "--data", str(folder / "new"), "--task-name", "new", "--run", str(run), "--profile"]
            whole.append(seconds_of(call, environment))
            phases.append(read_json(run / "reports" / "profile.json"))
            loading.append(seconds_of(["train", "--help"], environment))
    seconds = {
        key: float(np.median([sum(task["seconds"][key] for task in profile["tasks"]) for profile in phases]))
        for key in phases[0]["tasks"][0]["seconds"]
    }
    click.echo(
        f"{backbone}, {size} px, {images} images of one class, {cores} cores, {rounds} rounds: median "
        f"{np.median(whole):.1f} s ({min(whole):.1f} to {max(whole):.1f}), of which the libraries "
        f"{np.median(loading):.1f} s"
    )
    click.echo(", ".join(f"{key} {value:.2f} s" for key, value in seconds.items() if value > 0.005))
    if json_path:
        write_json(json_path, {"whole_s": whole, "loading_s": loading, "phases_s": seconds})
        click.echo(f"Wrote {json_path}")


if __name__ == "__main__":
    main()
