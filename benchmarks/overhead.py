"""What the runtime costs above ONNX Runtime itself: time of a call and memory of the process.

    python benchmarks/overhead.py BUNDLE --json overhead.json

Time: the same prepared image ``uint8 [1, S, S, 3]`` through a session, bare and through a `Classifier` that holds it,
in a random order every round, so that both see the same state of the machine; the ratio is of medians, its spread the
5th to 95th percentile of bootstrap resamples of rounds. Memory: PSS of a
fresh process each, after ten runs.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import click
import numpy as np
import onnxruntime

from duallora_edge.files import write_json
from duallora_edge.runtime import Bundle, Classifier

WARMUP = 30
_BARE = """
import sys, numpy, onnxruntime
o = onnxruntime.SessionOptions(); o.intra_op_num_threads = int(sys.argv[2]); o.log_severity_level = 3
o.inter_op_num_threads = 1
s = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", o, providers=["CPUExecutionProvider"])
size = s.get_inputs()[0].shape[1]
for _ in range(10): s.run(None, {"image": numpy.zeros((1, size, size, 3), numpy.uint8)})
"""
_RUNTIME = """
import sys, numpy
from duallora_edge.runtime import Classifier
c = Classifier.load(sys.argv[1], "cpu", int(sys.argv[2]))
for _ in range(10): c(numpy.zeros((480, 640, 3), numpy.uint8))
"""
_PSS = """
print(int(open("/proc/self/smaps_rollup").read().split("Pss:")[1].split()[0]) * 1024)
"""


def pss(program: str, bundle: Path, threads: int) -> int:
    """Bytes that a fresh process takes after a program."""
    command = [sys.executable, "-c", program + _PSS, str(bundle), str(threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@click.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=1000, show_default=True, type=click.IntRange(20))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("--processes", default=5, show_default=True, type=click.IntRange(1), help="For the memory.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(path: Path, rounds: int, threads: int, processes: int, json_path: Path | None) -> None:
    bundle = Bundle.open(path)
    size = bundle.manifest.preprocessing.size
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(str(bundle.model_path), options, providers=["CPUExecutionProvider"])
    # Two sessions have threads of their own, which the system places as it likes; one shows what is above it.
    with mock.patch.object(onnxruntime, "InferenceSession", return_value=session):
        classifier = Classifier.load(path, "cpu", threads)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    calls = {
        "bare": lambda: session.run(None, {"image": image[None]}),
        "runtime": lambda: classifier(image),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + WARMUP):
        for name in rng.permutation(list(calls)):
            start = time.perf_counter()
            calls[name]()
            if number >= WARMUP:
                times[name].append(1000 * (time.perf_counter() - start))
    bare, runtime = np.array(times["bare"]), np.array(times["runtime"])
    picks = rng.integers(0, rounds, (2000, rounds))
    ratios = np.median(runtime[picks], axis=1) / np.median(bare[picks], axis=1)
    low, high = np.percentile(ratios, (5, 95))
    memory = {
        name: [pss(program, path, threads) / 1e6 for _ in range(processes)]
        for name, program in (("bare", _BARE), ("runtime", _RUNTIME))
    }
    report = {
        "rounds": rounds,
        "threads": threads,
        "onnxruntime": onnxruntime.__version__,
        "p50_ms": {name: statistics.median(values) for name, values in times.items()},
        "ratio": float(np.median(runtime) / np.median(bare)),
        "ratio_interval": [float(low), float(high)],
        "difference_ms": float(np.median(runtime - bare)),
        "pss_mb": memory,
    }
    click.echo(
        f"{size} px, ONNX Runtime {onnxruntime.__version__} CPU, {threads} threads, {rounds} rounds\n"
        f"time    bare {report['p50_ms']['bare']:.3f} ms, runtime {report['p50_ms']['runtime']:.3f} ms, ratio "
        f"{report['ratio']:.4f} ({low:.4f} to {high:.4f}), median difference {report['difference_ms']:.3f} ms"
    )
    less, more = (statistics.median(memory[name]) for name in ("bare", "runtime"))
    click.echo(f"memory  bare {less:.1f} MB, runtime {more:.1f} MB: {more - less:+.1f} MB (PSS, {processes} processes)")
    if json_path:
        write_json(json_path, report)


if __name__ == "__main__":
    main()
