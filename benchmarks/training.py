"""Training beside PEFT's LoRA and full fine-tuning, in one run on this machine.

    python benchmarks/training.py --backbone vit_tiny_patch16_224 --size 128 --precision fp32 --json training.json

All train the same timm backbone with Adam, the same batch and the same precision of products on random images (speed
does not depend on what they show). PEFT's LoRA has the ranks of both our adapters together, on the fused query, key and
value projections of every block, since timm has no others; with timm's attention kernel and with a plain one, which
a CPU may prefer. Ours learns from cached prefix tokens, or runs the prefix in every step, as where they do not fit.

Every round runs a few steps of each, in a random order, so that all see the same state of the machine. Ratios are of
medians, their spread the 5th to 95th percentile of bootstrap resamples of rounds. Memory is the peak (VmHWM) of a
process of its own that trains in one way only, less that of one that only makes the backbone. Then: the time of a step,
and of a whole task, after 0, 9 and 49 learned tasks, and the share of each phase of a whole task.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from synthetic import CLASSES, NoCheckpoint, make_backbone, make_task
from timm.layers import set_fused_attn
from torch.nn import functional as F

from duallora_edge.files import write_json
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.methods import learn_task
from duallora_edge.learner.methods.dual_lora import DualLora
from duallora_edge.learner.methods.lesson import Lesson
from duallora_edge.learner.methods.training import DownProjections, train_adapters
from duallora_edge.learner.network.backbone import Backbone, autocast
from duallora_edge.learner.network.features import suffix_features
from duallora_edge.learner.network.prefix_cache import Encoded
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.timing import profiling

CPU = torch.device("cpu")
STEPS = 2
PASTS = (0, 9, 49)
Burst = Callable[[], Any]


def ours(
    name: str, size: int, weights: Path | None, config: TrainConfig, images: int, past: Sequence[TaskRecord] = (),
    *, cached: bool = True,
) -> Burst:  # fmt: skip
    """A few steps of `train_adapters`, the training of DualLoRA, after ``past`` tasks."""
    backbone = make_backbone(name, size, weights, config.prefix_blocks)
    task = make_task(size, images, len(past))
    train = Encoded(backbone, task.train, task.classes, precision=config.precision)
    validation = Encoded(backbone, task.validation, task.classes, precision=config.precision)
    lesson = Lesson(backbone, past, task, train, validation, config, NoCheckpoint(), Callback())
    method = DualLora()
    if past:  # the rank is what counts for the time, not the directions
        features = torch.zeros(images, backbone.dim)
        downs = [DownProjections(b.orthogonal.q_down, b.orthogonal.v_down, b.residual.q_down) for b in past[0].blocks]
    else:
        blocks = method.training_blocks(lesson)
        features, moments = suffix_features(backbone, blocks, train, config.precision, "class")
        downs = [method.down_projections(lesson, "isolated", i, q, v) for i, (q, v) in enumerate(moments)]
    if not cached:
        train.tokens = None
    blocks = method.training_blocks(lesson)
    return partial(train_adapters, lesson, blocks, downs, features, method.loss(lesson))


def peer(
    name: str, size: int, weights: Path | None, config: TrainConfig, images: int, *, lora: bool, fused: bool
) -> Burst:
    """A few steps of PEFT's LoRA, or of all weights, on the plain timm model with a head of the task's classes."""
    set_fused_attn(fused)  # read when the model is made
    try:
        backbone, task = make_backbone(name, size, weights), make_task(size, images)
    finally:
        set_fused_attn(True)
    model = backbone.model
    model.reset_classifier(CLASSES)
    model.requires_grad_(True)
    if lora:
        rank = config.rank_orthogonal + config.rank_residual
        settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv"], modules_to_save=["head"])
        model = get_peft_model(model, settings)
    model.train()
    labels = torch.tensor([task.classes.index(label) for label in task.train.labels])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate, fused=True)

    def burst() -> None:
        order = torch.randperm(images)
        for step in range(config.min_steps):
            batch = order[step * config.batch_size :][: config.batch_size]
            pixels = (torch.from_numpy(task.train.pixels[batch.numpy()]).float() - backbone.pixel_mean) / (
                backbone.pixel_std
            )
            with autocast(config.precision, CPU):
                logits = model(pixels.permute(0, 3, 1, 2))
                loss = F.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return burst


SUBJECTS: dict[str, Callable[..., Burst]] = {
    "ours, prefix cached": ours,
    "ours, prefix in every step": partial(ours, cached=False),
    "PEFT LoRA": partial(peer, lora=True, fused=True),
    "PEFT LoRA, plain attention": partial(peer, lora=True, fused=False),
    "full fine-tuning": partial(peer, lora=False, fused=True),
}
PEERS = tuple(SUBJECTS)[2:]


def peak_mb() -> float:
    """The highest resident memory of this process so far, in MB."""
    with Path("/proc/self/status").open(encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024 / 1e6


def memory_of(subject: str | None, threads: int, arguments: tuple[Any, ...], results: Any) -> None:
    """Send the peak memory of this process, in MB, after some steps; without a subject, of the backbone alone."""
    torch.set_num_threads(threads)
    if subject is None:
        make_backbone(*arguments[:3])
    else:
        burst = SUBJECTS[subject](*arguments)
        for _ in range(3):
            burst()
    results.put(peak_mb())


def measured_memory(subject: str | None, threads: int, arguments: tuple[Any, ...]) -> float:
    """What `memory_of` sends from a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=memory_of, args=(subject, threads, arguments, results))
    process.start()
    megabytes: float = results.get()
    process.join()
    return megabytes


def interleaved(bursts: dict[str, Burst], rounds: int, rng: np.random.Generator) -> dict[str, list[float]]:
    """Seconds of every call, in rounds that call each once in a random order; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in bursts}
    for number in range(rounds + 1):
        for name in rng.permutation(list(bursts)):
            start = time.perf_counter()
            bursts[name]()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(own: list[float], other: list[float], rng: np.random.Generator) -> tuple[float, float, float]:
    """Ratio of the medians, and the 5th and 95th percentile over resamples of rounds."""
    a, b = np.array(own), np.array(other)
    picks = rng.integers(0, len(a), (1000, len(a)))
    low, high = np.quantile(np.median(a[picks], axis=1) / np.median(b[picks], axis=1), [0.05, 0.95])
    return float(np.median(a) / np.median(b)), float(low), float(high)


def learned(backbone: Backbone, config: TrainConfig, images: int, count: int) -> list[TaskRecord]:
    """``count`` tasks, all like one that is really learned; each names its own classes."""
    if not count:
        return []
    size = backbone.info.size
    record = learn_task(backbone, [], make_task(size, images), config, NoCheckpoint(), Callback())
    tasks = [make_task(8, CLASSES, number) for number in range(count)]
    return [replace(record, info=replace(record.info, name=t.name, classes=t.classes)) for t in tasks]


def grown(
    name: str, size: int, weights: Path | None, config: TrainConfig, images: int, rounds: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time of a step and of a whole task after some tasks, as ratios to the first task, and the share of its phases."""
    backbone = make_backbone(name, size, weights, config.prefix_blocks)
    records = learned(backbone, config, images, max(PASTS))
    steps = {str(past): ours(name, size, weights, config, images, records[:past]) for past in PASTS}
    whole = {}
    for past in PASTS:
        whole[str(past)] = partial(
            learn_task, backbone, records[:past], make_task(size, images, past),
            replace(config, min_steps=TrainConfig().min_steps), NoCheckpoint(), lambda *_: None,
        )  # fmt: skip
    step_times, task_times = interleaved(steps, rounds, rng), interleaved(whole, max(2, rounds // 6), rng)
    rows = []
    for past in map(str, PASTS):
        with profiling(CPU) as profile:
            whole[past]()
        phases = {phase: value for part in profile.seconds.values() for phase, value in part.items()}
        rows.append(
            {
                "learned_before": int(past),
                "step_ratio": ratio(step_times[past], step_times["0"], rng),
                "task_ratio": ratio(task_times[past], task_times["0"], rng),
                "task_s": float(np.median(task_times[past])),
                "phases": {phase: value / sum(phases.values()) for phase, value in phases.items() if value},
            }
        )
    return rows


@click.command()
@click.option("--backbone", "name", default="vit_tiny_patch16_224", show_default=True)
@click.option("--weights", type=click.Path(path_type=Path, exists=True), help="Real weights instead of random ones.")
@click.option("--size", default=128, show_default=True, type=int, help="Input side in pixels.")
@click.option("--prefix-blocks", type=click.IntRange(1), help="Frozen blocks of ours; half of them by default.")
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16"]))
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))
@click.option("--images", default=256, show_default=True, type=click.IntRange(CLASSES), help="Of the task.")
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(3))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("--growth/--no-growth", default=True, help="Measure after 0, 9 and 49 tasks too.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    name: str, weights: Path | None, size: int, prefix_blocks: int | None, precision: str, batch_size: int, images: int,
    rounds: int, threads: int, growth: bool, json_path: Path | None,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    config = TrainConfig(
        device="cpu", precision=precision, prefix_blocks=prefix_blocks, batch_size=batch_size, epochs=0, min_steps=STEPS
    )
    arguments = (name, size, weights, config, images)
    bursts = {subject: make(*arguments) for subject, make in SUBJECTS.items()}
    times = interleaved(bursts, rounds, rng)
    base = measured_memory(None, threads, arguments)
    rows = [
        {
            "subject": subject,
            "images_per_s": STEPS * batch_size / float(np.median(times[subject])),
            "memory_mb": measured_memory(subject, threads, arguments) - base,
            **{f"times {other}": ratio(times[other], times[subject], rng) for other in PEERS},
        }
        for subject in SUBJECTS
    ]
    click.echo(
        f"{name}, {size} px, {precision}, batch {batch_size}, {threads} threads, {rounds} rounds of {STEPS} steps"
    )
    click.echo(f"{'':<28} {'images/s':>9} {'memory':>9}  as fast as PEFT LoRA, with plain attention, full fine-tuning")
    for row in rows:
        ratios = "  ".join("{:.2f} ({:.2f} to {:.2f})".format(*v) for k, v in row.items() if k.startswith("times"))
        click.echo(f"{row['subject']:<28} {row['images_per_s']:>9.1f} {row['memory_mb']:>6.0f} MB  {ratios}")
    report: dict[str, Any] = {
        "backbone": name, "size": size, "prefix_blocks": prefix_blocks, "precision": precision,
        "batch_size": batch_size, "threads": threads, "rounds": rounds, "rows": rows,
    }  # fmt: skip
    if growth:
        report["growth"] = grown(*arguments, rounds, rng)
        for row in report["growth"]:
            phases = ", ".join(f"{phase} {100 * share:.1f} %" for phase, share in row["phases"].items())
            click.echo(
                "after {} tasks: step {:.3f} ({:.3f} to {:.3f}), ".format(row["learned_before"], *row["step_ratio"])
                + "whole task {:.2f} ({:.2f} to {:.2f}) times the first, ".format(*row["task_ratio"])
                + f"{row['task_s']:.1f} s: {phases}"
            )
    if json_path:
        write_json(json_path, report)
        click.echo(f"Wrote {json_path}")


if __name__ == "__main__":
    main()
