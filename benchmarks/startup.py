"""Start-up time and memory of the runtime, of several installations side by side.

    python benchmarks/startup.py BUNDLE --python before/bin/python --python after/bin/python --rounds 20

Each round starts a process of every installation, in turn; the process imports the runtime, loads the bundle on the CPU
and answers one frame. Printed are medians, and for each further installation the ratios to the first: the median over
the rounds, and the 5th to 95th percentile of medians of resampled rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np

PROGRAM = """
import time
start = time.perf_counter()
import json, re, resource, sys
import numpy as np
from duallora_edge.runtime import Classifier
imported = time.perf_counter()
classifier = Classifier.load(sys.argv[1], "cpu", int(sys.argv[2]))
classifier(np.zeros((480, 640, 3), np.uint8))
ready = time.perf_counter()
pss = int(re.search(r"Pss:\\s+(\\d+)", open("/proc/self/smaps_rollup").read())[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
times = {"import s": imported - start, "load s": ready - imported, "whole s": ready - start}
print(json.dumps({**times, "PSS MB": pss / 1e3, "peak MB": peak / 1e3}))
"""


def measure(python: Path, bundle: Path, threads: int, cache: Path) -> dict[str, float]:
    """Start one process, whose trials are remembered in ``cache``."""
    done = subprocess.run(
        [python, "-c", PROGRAM, bundle, str(threads)],
        env={**os.environ, "DUALLORA_EDGE_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--python", "pythons", multiple=True, type=click.Path(path_type=Path), default=[sys.executable])
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=1, show_default=True)
def main(bundle: Path, pythons: tuple[Path, ...], rounds: int, threads: int) -> None:
    """Start the runtime again and again, and compare installations."""
    with tempfile.TemporaryDirectory() as name:
        caches = [Path(name) / str(index) for index in range(len(pythons))]
        rows = [
            [measure(python, bundle, threads, cache) for python, cache in zip(pythons, caches, strict=True)]
            for _ in range(1 + rounds)
        ]
    firsts, *found = rows
    rng = np.random.default_rng(0)
    resamples = rng.integers(0, rounds, (1000, rounds))
    for index, python in enumerate(pythons):
        click.echo(f"{python}: loading a bundle for the first time takes {firsts[index]['load s']:.2f} s")
        for key in firsts[0]:
            values = np.array([row[index][key] for row in found])
            text = f"  {key:<9} {np.median(values):8.3f}"
            if index:
                ratios = values / np.array([row[0][key] for row in found])
                low, high = np.percentile(np.median(ratios[resamples], axis=1), (5, 95))
                text += f"   {np.median(ratios):.3f} times the first ({low:.3f} to {high:.3f})"
            click.echo(text)


if __name__ == "__main__":
    main()
