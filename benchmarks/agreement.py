"""Agreement of a bundle with the trained model on test images that took no part in the export.

    python benchmarks/agreement.py RUN BUNDLE --images 1000

Every graph of the bundle, and what ONNX Runtime's dynamic INT8 quantisation makes of the fp32 one: why none of our
bundles has it. The images are spread evenly over the test images of all tasks; all see the same decoded pixels. The
time is that of single images in ONNX Runtime on the CPU with two threads, as a ratio to fp32 (medians of interleaved
runs): what fp16 is for, a GPU, is not measured here.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import quantize_dynamic

from duallora_edge.export.parity import Arrays, Parity, onnx_outputs, torch_outputs
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.methods import compose
from duallora_edge.learner.reading import read_images, source_groups
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.runtime.bundle import INPUT, Bundle
from duallora_edge.runtime.preprocess import Pixels


@click.command()
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path, exists=True))
@click.argument("bundle_path", metavar="BUNDLE", type=click.Path(path_type=Path, exists=True))
@click.option("--images", default=1000, show_default=True, type=click.IntRange(1))
def main(run_path: Path, bundle_path: Path, images: int) -> None:
    run, bundle = RunDirectory.open(run_path), Bundle.open(bundle_path)
    model = compose(run.backbone(), run.records()).eval()
    names = {run.read_info(task).name for task in run.active_tasks()}
    pixels, labels = [], []
    for settings in source_groups(run, names):
        for task in read_images(replace(run.config, **settings), run.info, Callback()).tasks:
            if task.name in names:
                pixels.append(task.test.pixels)
                labels += task.test.labels
    chosen = np.unique(np.linspace(0, len(labels) - 1, images, dtype=np.int64))
    place = [(part, row) for part in pixels for row in range(len(part))]
    sample = np.stack([place[index][0][place[index][1]] for index in chosen])
    truth = [bundle.manifest.classes.index(labels[i]) for i in chosen]
    reference = torch_outputs(model, sample)
    click.echo(f"{len(sample)} test images; PyTorch is right on {accuracy(reference, truth)}")
    graphs = {name: onnx.load(bundle.graph(name)) for name in dict.fromkeys(("fp32", bundle.manifest.precision))}
    graphs["int8 (in no bundle)"] = quantised(graphs["fp32"])
    times = latencies(graphs, sample)
    for name, graph in graphs.items():
        exported = onnx_outputs(graph, sample)
        parity = Parity.between(reference, exported)
        click.echo(
            f"{name}: top-1 agreement {100 * parity.top1_agreement:.2f} %, task agreement "
            f"{100 * parity.task_agreement:.2f} %, largest difference of a class probability "
            f"{parity.max_probability_difference:.1e}, of a task probability "
            f"{parity.max_task_probability_difference:.1e}; right on {accuracy(exported, truth)}; "
            f"time {times[name] / times['fp32']:.2f}"
        )


def accuracy(outputs: Arrays, truth: Sequence[int]) -> str:
    return f"{100 * float((outputs['probabilities'].argmax(1) == truth).mean()):.1f} %"


def quantised(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The products of the blocks in INT8, weights a channel, activations a run; the classifier stays fp32."""
    products = [node for node in graph.graph.node if node.op_type in ("Gemm", "MatMul")]
    others = [node.name for node in products if not any(name.startswith("blocks.") for name in node.input)]
    with tempfile.TemporaryDirectory() as folder:
        before, after = (Path(folder) / name for name in ("fp32.onnx", "int8.onnx"))
        onnx.save(graph, before)
        quantize_dynamic(before, after, per_channel=True, op_types_to_quantize=["Gemm", "MatMul"],
                         nodes_to_exclude=others, extra_options={"MatMulConstBOnly": True})  # fmt: skip
        return onnx.load(after)


def latencies(graphs: dict[str, onnx.ModelProto], sample: Pixels, rounds: int = 100) -> dict[str, float]:
    """Median seconds of single images; graphs with a fixed batch of more get that many."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 2
    sessions = {
        name: onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for name, graph in graphs.items()
    }
    rows = next(iter(sessions.values())).get_inputs()[0].shape[0]
    images = sample[: rows if isinstance(rows, int) else 1]
    times: dict[str, list[float]] = {name: [] for name in graphs}
    rng = np.random.default_rng(0)
    for number in range(rounds + 10):
        for name in rng.permutation(list(sessions)):
            started = time.perf_counter()
            sessions[name].run(None, {INPUT: images})
            if number >= 10:
                times[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in times.items()}


if __name__ == "__main__":
    main()
