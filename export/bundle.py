"""Writing a bundle: graph, golden outputs, manifest and a page for the person at the device, all or nothing."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from duallora_edge import __version__
from duallora_edge.device_profiles import Estimate, Target, estimate
from duallora_edge.errors import BackendError, BundleError, ExportError
from duallora_edge.export.card import README, front_matter, metrics_of
from duallora_edge.export.graph import Part, build_model
from duallora_edge.export.parity import Parity, generated_images, onnx_outputs, torch_outputs
from duallora_edge.export.weights import move_weights
from duallora_edge.export.workload import full_precision_nodes, node_counts, optimized_nodes, workload
from duallora_edge.files import atomic_directory
from duallora_edge.learner.doubts import unreliable_novelty
from duallora_edge.learner.network.answers import (
    LEAST_REMOTENESS,
    MOST_REMOTENESS,
    NOVELTY_THRESHOLD,
    ComposedModel,
)
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.statistics.gaussian import compact_covariance
from duallora_edge.runtime.backends.ladder import open_backend
from duallora_edge.runtime.bundle import (
    GOLDEN,
    INPUT,
    MANIFEST,
    MODEL,
    MODEL_FP16,
    TEACH,
    Bundle,
    Calibration,
    FileRecord,
    Manifest,
    Task,
    gpu_graphs,
)
from duallora_edge.runtime.graph_check import METADATA
from duallora_edge.runtime.graph_weights import WEIGHTS, inlined
from duallora_edge.runtime.preprocess import Pixels, Preprocessing
from duallora_edge.runtime.tensor_file import blocks

GOLDEN_IMAGES = 8
GENERATED_IMAGES = 64
TEACH_DIRECTIONS = 64
RECIPE = "build-engine.sh"

Graphs = Mapping[tuple[str, Part], onnx.ModelProto]  # by precision and part, the prefix before the suffix


@dataclass(frozen=True)
class Exported:
    """What an export made: the bundle's folder, its manifest, and an estimate for each power mode of the target.

    ``kept``: folders with what came to lie in the replaced bundle meanwhile, and was no part of it.
    """

    path: Path
    manifest: Manifest
    estimates: tuple[Estimate, ...]
    kept: tuple[Path, ...] = ()

    @property
    def bundle(self) -> Bundle:
        """The bundle, opened and verified. Raises `BundleError` when it was changed since."""
        return Bundle.open(self.path)


def write_bundle(
    run: RunDirectory,
    model: ComposedModel,
    target: Target,
    output: Path,
    real_images: Pixels | None,
    version: int | None = None,
    *,
    precision: str = "fp32",
    batch: int | None = None,
    split: bool = False,
) -> Exported:
    """Build, verify and write the bundle of a run for a target.

    ``real_images`` uint8 [N, S, S, 3] join the parity check and are not stored. ``version`` defaults to one more
    than the bundle that is replaced. With ``precision`` fp16 a second graph is added for the GPU; ``batch`` fixes the
    number of images of one run; ``split`` adds the graph for the GPU in two parts. Raises `ExportError` when something
    else than a bundle is there or a graph does not answer as the model, and leaves what is there untouched then.
    """
    previous, replaced = _previous(output)
    graphs = _graphs(model, target, precision, batch, split)
    graph = graphs["fp32", "whole"]
    parity = _verify(model, graphs, real_images)
    work = workload(graph)
    modes = ["normal", *(["super"] if "super" in target.profile.modes else [])]
    estimates = tuple(estimate(target.profile, work, mode=mode) for mode in modes)
    golden = generated_images(GOLDEN_IMAGES, run.info.size, seed=1)
    nodes = {_file_name(*key): node_counts(each) for key, each in graphs.items()}
    in_onnxruntime = optimized_nodes(graph)
    recipes = {name: _recipe(graphs[precision, "whole"], precision, target).encode() for name in _extra_files(target)}
    preprocessing = Preprocessing(run.info.size, run.config.resize, run.info.interpolation)
    for (_, part), each in graphs.items():
        if part == "whole":  # a prefix stays the same whatever was learned
            onnx.helper.set_model_props(each, metadata(model.catalogue.classes, preprocessing))
    weights = move_weights({_file_name(*key): each for key, each in graphs.items()})
    written = {_file_name(*key): each.SerializeToString(deterministic=True) for key, each in graphs.items()}
    records = {name: FileRecord.of(b"".join(inlined(content, weights))) for name, content in written.items()}
    written |= {WEIGHTS: bytes(weights.content), **recipes}
    written[GOLDEN] = b"".join(blocks({INPUT: golden, **torch_outputs(model, golden)}))
    if (teach := _teach(run, model)) is not None:
        written[TEACH] = teach
    written[README] = _readme(run, model, target, estimates, precision, batch).encode()
    manifest = Manifest(
        bundle_version=version or previous + 1,
        name=run.path.resolve().name,
        classes=model.catalogue.classes,
        tasks=_tasks(model),
        preprocessing=preprocessing,
        feature_size=model.network.backbone.dim + model.network.backbone.summary_dim,
        calibration=_calibration(run, model),
        files={name: FileRecord.of(content) for name, content in written.items()},
        graphs=records,
        backends=target.profile.backends,
        batch=batch,
        precision=precision,
        workspace_mb=target.profile.workspace_mb,
        split=split,
        target={
            **target.to_json(),
            "estimates": [entry.to_json() for entry in estimates],
            "nodes": nodes,
            "nodes_in_onnxruntime": in_onnxruntime,
            "flops": work.flops,
            "parameters": work.weight_bytes // 2,
        },
        parity=parity,
        provenance=_provenance(run),
    )
    return Exported(output, manifest, estimates, _write(output, replaced, manifest, written))


def metadata(classes: Sequence[str], preprocessing: Preprocessing) -> dict[str, str]:
    """What a whole graph says of itself to viewers and other runtimes: JSON in printable ASCII, by `METADATA`."""
    values = (list(classes), preprocessing.to_json())
    return {key: json.dumps(value) for key, value in zip(METADATA, values, strict=True)}


def _write(
    output: Path, replaced: Sequence[str], manifest: Manifest, contents: Mapping[str, bytes]
) -> tuple[Path, ...]:
    """Write a bundle as a whole, once it was read back and answered as a device will use it.

    The manifest has the hashes of what is in memory, so that reading back also proves what the disk holds. Returns
    folders in which foreign files are kept. Raises `ExportError` when reading back fails; what was there stays then.
    """
    text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    kept: list[Path] = []
    with atomic_directory(output, replaces=replaced, on_kept=kept.append) as staging:
        for name, content in {**contents, MANIFEST: text.encode()}.items():
            (staging / name).write_bytes(content)
        try:
            open_backend(Bundle.open(staging), "cpu")
        except (BundleError, BackendError) as error:
            raise ExportError(f"The bundle as written cannot be used, so nothing was replaced: {error}") from error
    return tuple(kept)


def _file_name(precision: str, part: Part) -> str:
    if part == "whole":
        return gpu_graphs(precision, split=False)[0]
    return gpu_graphs(precision, split=True)[part == "suffix"]


def _graphs(model: ComposedModel, target: Target, precision: str, batch: int | None, split: bool) -> Graphs:
    """The whole graph in fp32 and in ``precision``, and with ``split`` the two parts of the latter."""
    wanted: dict[tuple[str, Part], None] = {("fp32", "whole"): None, (precision, "whole"): None}
    if split:
        wanted |= {(precision, "prefix"): None, (precision, "suffix"): None}
    sums = target.profile.compute_capability == "7.5"
    return {
        (name, part): build_model(
            model, target.opset, target.ir_version, half=name == "fp16", batch=batch, part=part, sums=sums
        )
        for name, part in wanted
    }


def _verify(model: ComposedModel, graphs: Graphs, real_images: Pixels | None) -> dict[str, Any]:
    """Agreement of each whole graph, and of two parts in a row, with the model.

    Kernels of a CPU round to half precision, but add in fp32.
    """
    chains: dict[str, tuple[onnx.ModelProto, ...]] = {}
    for (precision, part), graph in graphs.items():
        if part == "whole":
            chains[precision] = (graph,)
        else:
            chains[f"{precision}_split"] = (*chains.get(f"{precision}_split", ()), graph)
    generated = generated_images(GENERATED_IMAGES, model.network.backbone.info.size)
    results: dict[str, Any] = {}
    for what, images in (("generated", generated), ("real", real_images)):
        if images is None or not len(images):
            continue
        reference = torch_outputs(model, images)
        for name, chain in chains.items():
            parity = Parity.between(reference, onnx_outputs(chain, images))
            parity.check(what, name.partition("_")[0])
            results[what if name == "fp32" else f"{what}_{name}"] = parity.to_json()
    return {"reference": f"PyTorch {torch.__version__}, fp32", "backend": "ONNX Runtime CPU", **results}


def _teach(run: RunDirectory, model: ComposedModel) -> bytes | None:
    """What a device needs to add classes to the classifier; None where that is not made of these statistics alone."""
    records = run.records()
    if records[-1].info.classifier != "lda":
        return None
    compact = compact_covariance([record.statistics for record in records], TEACH_DIRECTIONS)
    mixture = model.classifier.mixture
    return b"".join(
        blocks(
            {
                "factor": compact.factor.half().numpy(),
                "diagonal": compact.diagonal.float().numpy(),
                "distance": np.array([compact.distance], np.float32),
                "mixture": np.array([mixture.temperature, mixture.spread, mixture.share], np.float32),
                "remoteness": np.array([LEAST_REMOTENESS, MOST_REMOTENESS], np.float32),
            }
        )
    )


def _calibration(run: RunDirectory, model: ComposedModel) -> Calibration:
    mixture = model.classifier.mixture
    infos = [run.read_info(task) for task in run.active_tasks()]
    metrics = metrics_of(run)
    doubt = unreliable_novelty(metrics, infos)
    if len(model.catalogue.class_of) == 1:
        doubt = "with a single class there is nothing that its images could be nearer to than others"
    measured = {
        key: metrics.summary[key] if metrics else None
        for key in ("calibration_error", "false_novelty", "novelty_detected")
    }
    return Calibration(
        temperature=mixture.temperature,
        novelty_threshold=None if doubt else NOVELTY_THRESHOLD,
        method="two temperatures on images left out, in units of the distance from what was learned",
        confidence_deciles=() if metrics is None else metrics.last.confidence_deciles,
        extra={
            "spread": mixture.spread,
            "share": mixture.share,
            "task_temperature": model.network.dynamic_memory.temperature,
            "novelty_unreliable": doubt,
            "measured": measured,
        },
    )


def _tasks(model: ComposedModel) -> tuple[Task, ...]:
    catalogue = model.catalogue
    return tuple(
        Task(name, tuple(catalogue.class_of[catalogue.task_of == index].tolist()))
        for index, name in enumerate(catalogue.tasks)
    )


def _previous(output: Path) -> tuple[int, tuple[str, ...]]:
    """Version and files of the bundle that will be replaced, 0 and none without one.

    Raises `ExportError` for what is not a bundle that an export wrote, and nothing else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return 0, ()
    if not (output / MANIFEST).is_file():
        raise ExportError(f"{output} exists and is not a bundle; give another name with -o.")
    try:
        manifest = Bundle.open(output).manifest
    except BundleError as error:
        raise ExportError(
            f"{output} holds no readable bundle ({str(error).rstrip('.')}); delete it or give another name with -o."
        ) from error
    names = (MANIFEST, *manifest.files)
    if foreign := sorted(path.name for path in output.iterdir() if path.name not in names):
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise ExportError(
            f"{output} also holds what no export wrote ({', '.join(foreign[:5])}{more}); move it away, or give another "
            "name with -o."
        )
    return manifest.bundle_version, names


def _provenance(run: RunDirectory) -> dict[str, Any]:
    return {
        "made_by": f"duallora-edge {__version__}",
        "made_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "run_digest": run.digest(),
        "method": run.config.method,
        "backbone": run.info.to_json(),
        "versions": {
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
    }


def _extra_files(target: Target) -> tuple[str, ...]:
    """What only some targets get: a recipe where TensorRT 8.5 is, whose Python this package does not run on."""
    return (RECIPE,) if target.tensorrt is not None and target.tensorrt.startswith("8.5") else ()


def _recipe(graph: onnx.ModelProto, precision: str, target: Target) -> str:
    """A shell script for the trtexec of TensorRT 8, whose Python is too old for the runtime of this package."""
    image = graph.graph.input[0].type.tensor_type.shape.dim
    size = image[1].dim_value
    pinned = ""
    arguments = [
        f"--onnx={MODEL_FP16 if precision == 'fp16' else MODEL}",
        '--saveEngine="${1:-model.engine}"',
        f"--memPoolSize=workspace:{target.profile.workspace_mb}",
        "--timingCacheFile=timing.cache",
        "--noTF32",
    ]
    if not image[0].dim_value:
        arguments += [f"--{which}Shapes=image:1x{size}x{size}x3" for which in ("min", "opt", "max")]
    if precision == "fp16":
        kept = ",".join(f"{name}:fp32" for name in full_precision_nodes(graph))
        pinned = f'# What is fp32 in the file stays fp32, layer norms among it.\nfp32="{kept}"\n'
        arguments += [
            "--fp16",
            "--precisionConstraints=obey",
            '--layerPrecisions="$fp32"',
            '--layerOutputTypes="$fp32"',
        ]
    lines = " \\\n    ".join(arguments)
    return f"""#!/bin/sh
# Builds a TensorRT engine with the trtexec of JetPack {target.jetpack} (TensorRT {target.tensorrt}).
# Untested on the device: compare what the engine answers with {GOLDEN} before you trust it.
#   sh {RECIPE} [ENGINE]
set -e
cd "$(dirname "$0")"
{pinned}"${{TRTEXEC:-/usr/src/tensorrt/bin/trtexec}}" \\
    {lines}
"""


def _constraints(target: Target) -> str:
    """The option of pip for a JetPack whose newest packages do not fit it."""
    major = (target.jetpack or "").split(".")[0]
    return f"-c jetson/constraints-jp{major}.txt " if major in ("6", "7") else ""


def _readme(
    run: RunDirectory,
    model: ComposedModel,
    target: Target,
    estimates: tuple[Estimate, ...],
    precision: str,
    batch: int | None,
) -> str:
    rows = batch or "N"
    gpu = [
        "",
        f"`{MODEL_FP16}` is the same with half-precision products (fp32 where it is needed), for GPUs.",
    ]
    if RECIPE in _extra_files(target):
        gpu += ["", f"`sh {RECIPE}` builds an engine of it with trtexec (untested on the device)."]
    elif target.tensorrt is not None or target.profile.kind == "rtx":
        gpu += ["", "    duallora-edge build THIS_FOLDER     # a TensorRT engine, once on the device; untested there"]
    lines = [
        front_matter(run, "duallora-edge", "image-classification", ["onnx", "continual-learning"], metrics_of(run)),
        f"# {run.path.resolve().name}",
        "",
        f"An image classifier of {len(model.catalogue.classes)} classes from {len(model.catalogue.tasks)} tasks, "
        f"for {target.profile.title}" + (f" with JetPack {target.jetpack}." if target.jetpack else "."),
        "",
        "The runtime, from the wheel that `pip wheel --no-deps .` makes in a checkout of duallora-edge"
        + (" (on a Jetson: its page docs/jetson.md):" if target.jetpack else ":"),
        "",
        f"    pip install {_constraints(target)}'./duallora_edge-{__version__}-py3-none-any.whl[cpu]'",
        "    duallora-edge predict THIS_FOLDER photo.jpg",
        "    duallora-edge benchmark THIS_FOLDER",
        "    duallora-edge doctor THIS_FOLDER      # what this machine can really run",
        "",
        "In an application:",
        "",
        "    from duallora_edge.runtime import Classifier",
        '    classifier = Classifier.load("THIS_FOLDER")',
        "    prediction = classifier(frame)  # RGB, uint8 [H, W, 3], any size",
        "",
        f"`model.onnx` (opset {target.opset}, IR {target.ir_version}, fp32) takes uint8 frames "
        f"`image [{rows}, {run.info.size}, {run.info.size}, 3]` in RGB order; normalisation is inside. It returns "
        "calibrated `probabilities`, `task_probabilities`, `novelty` and `features`. Loading compares its answers "
        f"with `{GOLDEN}`.",
        *(gpu if precision == "fp16" else []),
        "",
        "Estimates, not measured on the device:",
        "",
        *(f"* {entry.text}" for entry in estimates),
        "",
    ]
    return "\n".join(lines)
