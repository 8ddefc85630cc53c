"""The peak memory of `duallora-edge train` under several budgets, each in a process of its own.

    python benchmarks/memory_budget.py --budgets 1GB,2GB,4GB --json memory_budget.json

A stream of random images is learned with each budget and without one. The peak is VmHWM, the highest resident memory
that Linux saw of the process; pages of files that are only cached do not count. Images are decoded beforehand, in a
process of their own. Accuracy means nothing here; the class means show how much the parts of a batch change.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from duallora_edge.errors import ConfigError
from duallora_edge.files import read_json, write_json
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.memory_budget import FILE, UNITS, parse_bytes, resident_bytes
from duallora_edge.learner.reading import read_images
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.train import new_backbone, train_run

CLASSES = 4
CHOSEN = ("micro_batch", "forward_batch", "recompute", "cache_bytes")


def write_images(folder: Path, tasks: int, images: int, side: int) -> None:
    """A stream of tasks of random images, a tenth as many for the test; a class is a mean colour."""
    rng = np.random.default_rng(0)
    for task in range(tasks):
        for number in range(images + images // 10):
            kind = number % CLASSES
            split = "train" if number < images else "test"
            path = folder / f"task-{task}" / split / f"{task}-{kind}" / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 128, (side // 8, side // 8, 3)) + rng.integers(0, 30, 3) * kind
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((side, side)).save(path)


def learn(run: Path, config: TrainConfig, threads: int, results: Any) -> None:
    """Send the peak memory in bytes and the seconds of a call of `train`, or why it was refused."""
    torch.set_num_threads(threads)
    started = time.monotonic()
    try:
        train_run(run, config, [], Callback())
    except ConfigError as error:
        results.put((str(error), resident_bytes("VmHWM"), 0.0))
    else:
        results.put((None, resident_bytes("VmHWM"), time.monotonic() - started))


def decode(config: TrainConfig, results: Any) -> None:
    """Fill the cache of decoded images."""
    read_images(config, new_backbone(config, Callback()).info, Callback())
    results.put(None)


def in_process(function: Any, *arguments: Any) -> Any:
    """What ``function`` puts into the queue that it gets as its last argument, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    answer = results.get()
    process.join()
    return answer


@click.command()
@click.option("--budgets", default="1GB,2GB,4GB", show_default=True)
@click.option("--backbone", default="vit_tiny_patch16_224", show_default=True)
@click.option("--weights", required=True, type=click.Path(path_type=Path, exists=True), help="Of the backbone.")
@click.option("--size", default=224, show_default=True, type=int)
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16"]))
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(1))
@click.option("--images", default=2000, show_default=True, type=click.IntRange(40), help="Of a task.")
@click.option("--tasks", default=2, show_default=True, type=click.IntRange(1))
@click.option("--steps", default=8, show_default=True, type=click.IntRange(1), help="Of a task; the peak needs few.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    budgets: str, backbone: str, weights: Path, size: int, precision: str, batch_size: int,
    images: int, tasks: int, steps: int, threads: int, json_path: Path | None,
) -> None:  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", tasks, images, size)
        settings: dict[str, Any] = {
            "data": str(folder / "images"), "backbone": backbone, "weights": str(weights), "size": size,
            "precision": precision, "batch_size": batch_size,
            "epochs": 0, "min_steps": steps, "device": "cpu",
        }  # fmt: skip
        in_process(decode, TrainConfig(**settings))
        reference = None
        click.echo(
            f"{backbone}, {size} px, {precision}, {tasks} tasks of {images} images, {steps} steps of {batch_size}"
        )
        click.echo(f"{'budget':<8} {'peak':>8} {'expected':>9} {'inside':>7} {'seconds':>8}  plan")
        for budget in [None, *budgets.split(",")]:
            run = folder / f"run-{budget}"
            problem, peak, seconds = in_process(learn, run, TrainConfig(**settings, memory_budget=budget), threads)
            row: dict[str, Any] = {"budget": budget, "peak_mb": peak / UNITS["MB"], "seconds": seconds}
            if problem:
                click.echo(f"{budget:<8} {problem}")
                rows.append({**row, "refused": problem})
                continue
            means = RunDirectory.open(run).records()[-1].statistics.means
            reference = means if reference is None else reference
            plan = read_json(run / FILE) if budget else {}
            row |= {
                "plan": plan,
                "inside": budget is None or peak <= parse_bytes(budget),
            }
            difference = float((means - reference).abs().max())
            row |= {"largest_difference": difference, "spread": float(reference.std())}
            rows.append(row)
            chosen = [f"{key} {plan[key]}" for key in CHOSEN if plan.get(key) is not None]
            expected = (
                f"{plan['expected'] / UNITS['MB']:>6.0f} MB {'yes' if row['inside'] else 'NO':>7}" if plan else ""
            )
            click.echo(
                f"{budget or 'none':<8} {row['peak_mb']:>5.0f} MB {expected:<17} {seconds:>8.1f}  {', '.join(chosen)}"
            )
            click.echo(
                f"         class means differ by {row['largest_difference']:.1e}, they vary by {row['spread']:.2f}"
            )
    if json_path:
        write_json(json_path, {"backbone": backbone, "size": size, "precision": precision, "rows": rows})
        click.echo(f"Wrote {json_path}")


if __name__ == "__main__":
    main()
