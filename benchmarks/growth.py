"""What grows with the number of tasks: latency of the exported model, bytes of the run, seconds of learning a task.

    python benchmarks/growth.py --backbones vit_tiny_patch16_224,vit_small_patch16_224,vit_base_patch16_224

Cost only: random weights and random images. Ten tasks are learned; records of more tasks are copies of these under
other names, without bases, since bases cannot grow beyond the width. Then one more task is learned, with few steps,
whose time does not depend on the number of tasks (benchmarks/RESULTS.md); the seconds are those of everything else.
Latencies are medians of single images in ONNX Runtime on two threads, all states in turns, as ratios to ten tasks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import click
import numpy as np
import onnxruntime
import torch
from synthetic import NoCheckpoint, make_backbone, make_task

from duallora_edge.export.graph import build_model
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.methods import compose, learn_task
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.statistics.subspace import empty_basis
from duallora_edge.runtime.bundle import INPUT

LEARNED = 10


def copies(records: Sequence[TaskRecord], count: int, dim: int) -> list[TaskRecord]:
    """``count`` records with names of their own: those that there are, then copies without bases."""
    result = list(records[:count])
    for number in range(len(records), count):
        record = records[number % len(records)]
        names = tuple(f"{number}-{k}" for k in range(len(record.info.classes)))
        counts = dict(zip(names, record.info.counts.values(), strict=True))
        info = replace(record.info, name=f"copy {number}", classes=names, counts=counts)
        none = empty_basis(dim).float()
        blocks = tuple(replace(block, q_basis=none, v_basis=none) for block in record.blocks)
        if sum(len(past.blocks[0].residual.q_down) for past in result) >= TrainConfig().max_residual_rank:
            blocks = tuple(replace(b, residual=type(b.residual)(*(p[:0] for p in b.residual))) for b in blocks)
            info = replace(info, residual="none")
        result.append(replace(record, info=info, blocks=blocks))
    return result


def stored_bytes(record: TaskRecord) -> int:
    return sum(value.nbytes for part in record.tensors().values() for value in part.values())


def session(backbone: Backbone, records: Sequence[TaskRecord]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 3
    model = build_model(compose(backbone, records).eval(), 17, 8).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@click.command()
@click.option("--backbones", default="vit_tiny_patch16_224", show_default=True)
@click.option("--size", default=128, show_default=True, type=int)
@click.option("--counts", default="10,50,200", show_default=True, help="Numbers of tasks.")
@click.option("--residual", default="isolated", show_default=True)
@click.option("--rounds", default=50, show_default=True, type=click.IntRange(10))
@click.option("--images", default=50, show_default=True, type=click.IntRange(20), help="Of a task, ten classes.")
def main(backbones: str, size: int, counts: str, residual: str, rounds: int, images: int) -> None:
    rng = np.random.default_rng(0)
    frame = {INPUT: rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8)}
    config = TrainConfig(epochs=0, min_steps=2, precision="fp32", device="cpu", residual=residual)
    for name in backbones.split(","):
        backbone = make_backbone(name, size, None)
        backbone.directions = torch.randn(48, backbone.dim, generator=torch.Generator().manual_seed(0))
        known: list[TaskRecord] = []
        for number in range(LEARNED):
            known.append(
                learn_task(backbone, known, make_task(size, images, number), config, NoCheckpoint(), Callback())
            )
        sessions, lines = {}, {}
        for count in map(int, counts.split(",")):
            past = copies(known, count, backbone.dim)
            started = time.perf_counter()
            newest = learn_task(backbone, past[:-1], make_task(size, images, 1000), config, NoCheckpoint(), Callback())
            seconds = time.perf_counter() - started
            sessions[count] = session(backbone, past)
            total = sum(map(stored_bytes, past)) / 1e6
            lines[count] = (seconds, stored_bytes(newest) / 1e6, total)
        times: dict[int, list[float]] = {count: [] for count in sessions}
        for _ in range(rounds):
            for count in rng.permutation(list(sessions)):
                started = time.perf_counter()
                sessions[count].run(None, frame)
                times[count].append(1000 * (time.perf_counter() - started))
        first = next(iter(sessions))
        click.echo(f"{name}, {size} px, {backbone.dim + backbone.summary_dim} features")
        for count, (seconds, newest_mb, total) in lines.items():
            ratios = np.array(times[count]) / np.array(times[first])
            click.echo(
                f"  {count:>4} tasks: {seconds:6.1f} s a task, {newest_mb:5.2f} MB a task, {total:7.1f} MB in all, "
                f"{np.median(times[count]):6.1f} ms, {np.median(ratios):.2f} of {first} tasks"
            )


if __name__ == "__main__":
    main()
