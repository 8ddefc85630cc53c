"""How long an engine takes after a new task: the whole one, or the suffix of a split bundle.

    python benchmarks/engines.py RUN --rounds 5

Built ahead of time by TensorRT-RTX for compute capability 8.6, which needs no GPU; another builder on another machine
has other times. The last task of the run is the new one. Rounds are interleaved; printed are the median time of each
kind and its ratio to the whole engine, with the smallest and the largest ratio of a round.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from statistics import median

import click

from duallora_edge.device_profiles import resolve_target
from duallora_edge.export.bundle import write_bundle
from duallora_edge.learner.methods import compose
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.runtime.backends.engine_build import build_engine, build_engines
from duallora_edge.runtime.bundle import Bundle

CAPABILITY = "sm86"


@click.command()
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
def main(run_path: Path, rounds: int) -> None:
    run = RunDirectory.open(run_path)
    records, target = run.records(), resolve_target("rtx-sm86")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DUALLORA_EDGE_CACHE"] = folder
        bundles = []
        for name, known in (("before", records[:-1]), ("after", records)):
            model = compose(run.backbone(), known).eval()
            write_bundle(run, model, target, Path(folder) / name, None, precision="fp16", batch=1, split=True)
            bundles.append(Bundle.open(Path(folder) / name))
        before, after = bundles
        prefix, suffix = after.gpu_graphs
        build_engines(before, CAPABILITY)
        found = build_engines(after, CAPABILITY)
        assert [engine.from_cache for engine in found] == [True, False], "the prefix changed with the task"
        times: dict[str, list[float]] = {"whole": [], "prefix": [], "suffix": []}
        for _ in range(rounds):
            for kind, graph in (("whole", after.graph("fp16")), ("prefix", prefix), ("suffix", suffix)):
                engine = build_engine(after, CAPABILITY, force=True, graph=graph)
                times[kind].append(engine.seconds)
                megabytes = engine.bytes / 1e6
                if len(times[kind]) == 1:
                    click.echo(f"{kind}: {megabytes:.1f} MB")
    for kind, seconds in times.items():
        ratios = [own / whole for own, whole in zip(seconds, times["whole"], strict=True)]
        click.echo(
            f"{kind}: {median(seconds):.2f} s, {median(ratios):.2f} of the whole "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
