"""Writing a bundle: graph, golden outputs, manifest and a page for the person at the device, all or nothing."""

from __future__ import annotations

import datetime
import io
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from duallora_edge import __version__
from duallora_edge.device_profiles import Estimate, Target, estimate
from duallora_edge.errors import BundleError, ExportError
from duallora_edge.export.graph import build_model
from duallora_edge.export.parity import Parity, generated_images, onnx_outputs, torch_outputs
from duallora_edge.export.workload import node_counts, workload
from duallora_edge.files import atomic_directory
from duallora_edge.learner.model import NOVELTY_THRESHOLD, ComposedModel
from duallora_edge.learner.run import Run
from duallora_edge.runtime.bundle import GOLDEN, MANIFEST, MODEL, Bundle, Calibration, FileRecord, Manifest, Task
from duallora_edge.runtime.preprocess import Frame, Preprocessing

GOLDEN_IMAGES = 8
GENERATED_IMAGES = 64
README = "README.md"


@dataclass(frozen=True)
class Exported:
    """What an export made: the manifest, and the estimates for the target (one a power mode)."""

    manifest: Manifest
    estimates: tuple[Estimate, ...]


def export_run(
    run: Run, model: ComposedModel, target: Target, output: Path, real_images: Frame | None, version: int | None = None
) -> Exported:
    """Build, verify and write the bundle of a run for a target.

    ``real_images`` uint8 [N, S, S, 3] join the parity check and are not stored. ``version`` defaults to one more
    than the bundle that is replaced. Raises `ExportError` when something else than a bundle is there or the graph
    does not answer as the model, and leaves what is there untouched then.
    """
    previous = _previous_version(output)
    mixture = model.classifier.mixture
    graph = build_model(model, target.opset, target.ir_version)
    parity = _verify(model, graph, real_images)
    work = workload(graph)
    modes = ["normal", *(["super"] if "super" in target.profile.modes else [])]
    estimates = tuple(estimate(target.profile, work, mode=mode) for mode in modes)
    golden = generated_images(GOLDEN_IMAGES, run.info.size, seed=1)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, image=golden, **torch_outputs(model, golden))  # type: ignore[arg-type]
    with atomic_directory(output) as staging:
        (staging / MODEL).write_bytes(graph.SerializeToString())
        (staging / GOLDEN).write_bytes(buffer.getvalue())
        (staging / README).write_text(_readme(run, model, target, estimates), encoding="utf-8")
        manifest = Manifest(
            bundle_version=version or previous + 1,
            name=run.path.resolve().name,
            classes=model.catalogue.classes,
            tasks=_tasks(model),
            preprocessing=Preprocessing(run.info.size, run.config.resize, run.info.interpolation),
            feature_size=model.network.backbone.dim + model.network.backbone.summary_dim,
            calibration=Calibration(
                temperature=mixture.temperature,
                # With a single class there is nothing its images could be nearer to than others.
                novelty_threshold=NOVELTY_THRESHOLD if len(model.catalogue.class_of) > 1 else None,
                method="two temperatures on held-back training images",
                extra={
                    "spread": mixture.spread,
                    "share": mixture.share,
                    "task_temperature": model.network.memory.temperature,
                },
            ),
            files={name: FileRecord.of(staging / name) for name in (MODEL, GOLDEN, README)},
            target={
                **target.to_json(),
                "precision": "fp32",
                "estimates": [entry.to_json() for entry in estimates],
                "nodes": node_counts(graph),
                "flops": work.flops,
                "parameters": work.weight_bytes // 2,
            },
            parity=parity,
            provenance=_provenance(run),
        )
        (staging / MANIFEST).write_text(
            json.dumps(manifest.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
    return Exported(manifest, estimates)


def _verify(model: ComposedModel, graph: onnx.ModelProto, real_images: Frame | None) -> dict[str, Any]:
    generated = generated_images(GENERATED_IMAGES, model.network.backbone.info.size)
    results = {}
    for what, images in (("generated", generated), ("real", real_images)):
        if images is not None and len(images):
            parity = Parity.between(torch_outputs(model, images), onnx_outputs(graph, images))
            parity.check(what)
            results[what] = parity.to_json()
    return {"reference": f"PyTorch {torch.__version__}, fp32", "backend": "ONNX Runtime CPU", **results}


def _tasks(model: ComposedModel) -> tuple[Task, ...]:
    catalogue = model.catalogue
    return tuple(
        Task(name, tuple(catalogue.class_of[catalogue.task_of == index].tolist()))
        for index, name in enumerate(catalogue.tasks)
    )


def _previous_version(output: Path) -> int:
    """Version of the bundle that will be replaced, 0 without one. What is not a whole bundle is never replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return 0
    if not (output / MANIFEST).is_file():
        raise ExportError(f"{output} exists and is not a bundle; give another name with -o.")
    try:
        return Bundle.open(output, verify=False).manifest.bundle_version
    except BundleError as error:
        raise ExportError(
            f"{output} holds no readable bundle ({str(error).rstrip('.')}); delete it or give another name with -o."
        ) from error


def _provenance(run: Run) -> dict[str, Any]:
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


def _readme(run: Run, model: ComposedModel, target: Target, estimates: tuple[Estimate, ...]) -> str:
    lines = [
        f"# {run.path.resolve().name}",
        "",
        f"An image classifier of {len(model.catalogue.classes)} classes from {len(model.catalogue.tasks)} tasks, "
        f"for {target.profile.title}" + (f" with JetPack {target.jetpack}." if target.jetpack else "."),
        "",
        "    pip install 'duallora-edge[cpu]'",
        "    duallora-edge predict THIS_FOLDER photo.jpg",
        "    duallora-edge benchmark THIS_FOLDER",
        "",
        "In an application:",
        "",
        "    from duallora_edge.runtime import Classifier",
        '    classifier = Classifier.load("THIS_FOLDER")',
        "    prediction = classifier(frame)  # RGB, uint8 [H, W, 3], any size",
        "",
        f"`model.onnx` (opset {target.opset}, IR {target.ir_version}, fp32) takes uint8 frames "
        f"`image [N, {run.info.size}, {run.info.size}, 3]` in RGB order; normalisation is inside. It returns "
        "calibrated `probabilities`, `task_probabilities`, `novelty` and `features`. Loading compares its answers "
        "with `golden.npz`.",
        "",
        "Estimates, not measured on the device:",
        "",
        *(f"* {entry.text}" for entry in estimates),
        "",
    ]
    return "\n".join(lines)
