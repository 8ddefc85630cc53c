"""Latency of an exported bundle beside the plain backbone, in one run on this machine.

    python benchmarks/latency.py BUNDLE... --weights vit_tiny_patch16_224.safetensors --json latency.json

The peer is the same backbone with its own head, exported by timm's ONNX exporter, at the size of the bundle and at
those of --peer-size; ratios are to the first. Every round runs each model once,
in a random order, so that all see the same state of the machine; the ratio is of medians, its spread the 5th to 95th
percentile of bootstrap resamples of rounds.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
import timm
from timm.utils.onnx import onnx_export

from duallora_edge.files import write_json
from duallora_edge.learner import embedded
from duallora_edge.runtime.bundle import MODEL, Bundle


def session(path: str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def export_peer(name: str, weights: Path | None, size: int, opset: int, path: Path) -> None:
    """The plain backbone with its own classifier, as timm's exporter writes it."""
    if name == embedded.NAME:
        model = embedded.create()
    else:
        overlay = {"file": str(weights)} if weights else None
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=size)
    onnx_export(model, str(path), opset=opset, input_size=(3, size, size))


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--weights", type=click.Path(path_type=Path, exists=True), help="Of the peer's backbone; else the hub.")
@click.option("--peer-size", "peer_sizes", multiple=True, type=int, help="Another size of the peer; repeat for more.")
@click.option("--rounds", default=400, show_default=True, type=click.IntRange(20))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    bundles: tuple[Path, ...], weights: Path | None, peer_sizes: tuple[int, ...], rounds: int, threads: int,
    json_path: Path | None,
) -> None:  # fmt: skip
    opened = [Bundle.open(path) for path in bundles]
    backbone = opened[0].manifest.provenance["backbone"]
    size, opset = backbone["size"], opened[0].manifest.target["opset"]
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    sessions, feeds, nodes = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number in dict.fromkeys([size, *peer_sizes]):
            peer, label = Path(folder) / f"{number}.onnx", f"plain, {number} px"
            export_peer(backbone["name"], weights, number, opset, peer)
            nodes[label] = len(onnx.load(peer, load_external_data=False).graph.node)
            sessions[label] = session(str(peer), threads)
            pixels = rng.random((1, 3, number, number), dtype=np.float32)
            feeds[label] = {sessions[label].get_inputs()[0].name: pixels}
    for bundle in opened:
        label = f"{bundle.manifest.name} ({len(bundle.manifest.tasks)} tasks)"
        sessions[label] = session(str(bundle.model_path), threads)
        feeds[label] = {"image": frames}
        nodes[label] = bundle.manifest.target["nodes"][MODEL]["total"]
    times: dict[str, list[float]] = {label: [] for label in sessions}
    for round_number in range(rounds + 20):
        for label in rng.permutation(list(sessions)):
            start = time.perf_counter()
            sessions[label].run(None, feeds[label])
            if round_number >= 20:
                times[label].append(1000 * (time.perf_counter() - start))
    rows = [summary(label, times[label], times[f"plain, {size} px"], nodes[label], rng) for label in sessions]
    click.echo(f"{backbone['name']}, {size} px, batch 1, opset {opset}, ONNX Runtime {onnxruntime.__version__} CPU, "
               f"{threads} threads, {rounds} rounds")  # fmt: skip
    click.echo(f"{'model':<28} {'nodes':>6} {'p50 ms':>8} {'p90 ms':>8} {'ratio':>7}  5 to 95 % of resamples")
    for row in rows:
        low, high = row["ratio_interval"]
        click.echo(
            f"{row['model']:<28} {row['nodes']:>6} {row['p50_ms']:>8.2f} {row['p90_ms']:>8.2f} {row['ratio']:>7.3f}  "
            f"{low:.3f} to {high:.3f}"
        )
    if json_path:
        write_json(json_path, {"backbone": backbone["name"], "size": size, "threads": threads, "rows": rows})
        click.echo(f"Wrote {json_path}")


def summary(label: str, own: list[float], peer: list[float], nodes: int, rng: np.random.Generator) -> dict[str, object]:
    a, b = np.array(own), np.array(peer)
    picks = rng.integers(0, len(a), (1000, len(a)))
    ratios = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
    return {
        "model": label,
        "nodes": nodes,
        "p50_ms": float(np.median(a)),
        "p90_ms": float(np.quantile(a, 0.9)),
        "ratio": float(np.median(a) / np.median(b)),
        "ratio_interval": [float(q) for q in np.quantile(ratios, [0.05, 0.95])],
    }


if __name__ == "__main__":
    main()
