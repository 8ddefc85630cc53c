"""Proof that the exported graph gives the answers of the PyTorch model, on generated and on real images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch

from duallora_edge.errors import ExportError
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.runtime.bundle import INPUT, MAX_DIFFERENCE, OUTPUTS
from duallora_edge.runtime.preprocess import Pixels

MIN_TOP1_AGREEMENT = {"fp32": 0.999, "fp16": 0.98}
MIN_FEATURE_COSINE = {"fp32": 0.9999, "fp16": 0.999}
MAX_NOVELTY_DIFFERENCE = 0.05  # wide: for images seen in training it is a small difference of large numbers
BATCH = 32

Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Parity:
    """Agreement of two sets of outputs on ``images`` images; differences are absolute."""

    images: int
    top1_agreement: float
    task_agreement: float
    max_probability_difference: float
    max_task_probability_difference: float
    max_novelty_difference: float
    min_feature_cosine: float

    @classmethod
    def between(cls, reference: Arrays, other: Arrays) -> Parity:
        """Compare outputs by name, float32 arrays with the same number of rows."""
        top1 = reference["probabilities"].argmax(1) == other["probabilities"].argmax(1)
        tasks = reference["task_probabilities"].argmax(1) == other["task_probabilities"].argmax(1)
        f, g = reference["features"].astype(np.float64), other["features"].astype(np.float64)
        cosine = (f * g).sum(1) / np.maximum(np.linalg.norm(f, axis=1) * np.linalg.norm(g, axis=1), 1e-12)
        return cls(
            images=len(top1),
            top1_agreement=float(top1.mean()),
            task_agreement=float(tasks.mean()),
            max_probability_difference=_largest(reference, other, "probabilities"),
            max_task_probability_difference=_largest(reference, other, "task_probabilities"),
            max_novelty_difference=_largest(reference, other, "novelty"),
            min_feature_cosine=float(cosine.min()),
        )

    def check(self, what: str, precision: str = "fp32") -> None:
        """Raise `ExportError` when the agreement is not good enough for a precision; NaN is never good enough."""
        good = (
            self.top1_agreement >= MIN_TOP1_AGREEMENT[precision]
            and self.max_probability_difference <= MAX_DIFFERENCE[precision]
            and self.max_task_probability_difference <= MAX_DIFFERENCE[precision]
            and self.max_novelty_difference <= MAX_NOVELTY_DIFFERENCE
            and self.min_feature_cosine >= MIN_FEATURE_COSINE[precision]
        )
        if not good:
            remedy = "please report this backbone" if precision == "fp32" else "export with --precision fp32"
            raise ExportError(
                f"The exported {precision} graph differs from the trained model on {what} images (top-1 "
                f"agreement {100 * self.top1_agreement:.2f} %, largest differences: probability "
                f"{self.max_probability_difference:.2g}, task probability {self.max_task_probability_difference:.2g}, "
                f"novelty {self.max_novelty_difference:.2g}; smallest cosine of features "
                f"{self.min_feature_cosine:.6f}); nothing was written, {remedy}."
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _largest(reference: Arrays, other: Arrays, name: str) -> float:
    return float(np.abs(reference[name] - other[name]).max())


@torch.no_grad()
def torch_outputs(model: ComposedModel, images: Pixels) -> Arrays:
    """Outputs of the PyTorch model in fp32 on uint8 [N, S, S, 3]."""
    rows = [model(torch.from_numpy(images[i : i + BATCH].copy())) for i in range(0, len(images), BATCH)]
    return {name: torch.cat([getattr(row, name) for row in rows]).cpu().numpy() for name in OUTPUTS}


def onnx_outputs(models: onnx.ModelProto | Sequence[onnx.ModelProto], images: Pixels) -> Arrays:
    """Outputs of a graph in ONNX Runtime on the CPU, or of a chain of graphs, on uint8 [N, S, S, 3].

    In a chain each graph reads the outputs of the one before.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    sessions = [
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for model in ([models] if isinstance(models, onnx.ModelProto) else models)
    ]
    fixed = sessions[0].get_inputs()[0].shape[0]
    step = fixed if isinstance(fixed, int) else BATCH
    missing = -len(images) % step if isinstance(fixed, int) else 0
    padded = np.concatenate([images, images[:1].repeat(missing, axis=0)])
    rows: list[Arrays] = []
    for start in range(0, len(padded), step):
        values: dict[str, Any] = {INPUT: padded[start : start + step]}
        for session in sessions:
            names = [output.name for output in session.get_outputs()]
            values = dict(zip(names, session.run(names, values), strict=True))
        rows.append(values)
    return {name: np.concatenate([row[name] for row in rows])[: len(images)] for name in OUTPUTS}


def generated_images(count: int, size: int, seed: int = 0) -> Pixels:
    """Images uint8 [count, size, size, 3] that need no data: noise at four scales on colour gradients."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(0, 1, size, dtype=np.float32)
    images = []
    for index in range(count):
        start, right, down = rng.uniform(0, 255, (3, 3)).astype(np.float32)
        base = start + (right - start) * axis[None, :, None] / 2 + (down - start) * axis[:, None, None] / 2
        cell = max(1, size // (4 << (index % 4)))
        coarse = rng.normal(0, 50, (-(-size // cell), -(-size // cell), 3))
        noise = np.repeat(np.repeat(coarse, cell, axis=0), cell, axis=1)[:size, :size]
        images.append(np.clip(base + noise, 0, 255))
    return np.stack(images).astype(np.uint8)
