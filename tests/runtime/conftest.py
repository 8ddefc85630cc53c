"""A bundle small enough to build in a test: the mean colour of the image decides between four classes.

The golden outputs come from NumPy, so that they are a second implementation of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from duallora_edge.files import read_json, write_json
from duallora_edge.runtime.bundle import GOLDEN, MANIFEST, MODEL, Calibration, FileRecord, Manifest, Task
from duallora_edge.runtime.preprocess import Preprocessing
from duallora_edge.runtime.tensor_file import TensorFile, blocks

SIZE = 16
CLASSES = ("red", "green", "blue", "dark")
TASKS = (Task("warm", (0, 1)), Task("cold", (2, 3, 1)))  # "green" was met in both
WEIGHTS = np.array([[20, 0, 0, -20], [0, 20, 0, -20], [0, 0, 20, -20]], dtype=np.float32)
BIAS = np.array([0, 0, 0, 10], dtype=np.float32)
TASK_SHARES = np.array([[1, 0], [0.5, 0.5], [0, 1], [0, 1]], dtype=np.float32)


@cache
def model_bytes() -> bytes:
    constants = {
        "weights": WEIGHTS,
        "bias": BIAS,
        "shares": TASK_SHARES,
        "full": np.float32([255]),
        "minus": np.float32([-1]),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Div", ["mean", "full"], ["features"]),
        helper.make_node("Gemm", ["features", "weights", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("MatMul", ["probabilities", "shares"], ["task_probabilities"]),
        # The smallest feature, by operators that exported graphs use.
        helper.make_node("Mul", ["features", "minus"], ["negative"]),
        helper.make_node("ReduceMax", ["negative"], ["largest"], axes=[1], keepdims=0),
        helper.make_node("Mul", ["largest", "minus"], ["novelty"]),
    ]
    widths = {"probabilities": [4], "task_probabilities": [2], "novelty": [], "features": [3]}
    graph = helper.make_graph(
        nodes,
        "mean_colour",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *width]) for name, width in widths.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def numpy_outputs(images: np.ndarray) -> dict[str, np.ndarray]:
    features = images.astype(np.float64).mean(axis=(1, 2)) / 255
    logits = features @ WEIGHTS + BIAS
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    outputs = {
        "probabilities": probabilities,
        "task_probabilities": probabilities @ TASK_SHARES,
        "novelty": features.min(axis=1),
        "features": features,
    }
    return {name: value.astype(np.float32) for name, value in outputs.items()}


def seal(folder: Path) -> None:
    """Bring the sizes and digests in the manifest up to date, as somebody who alters a bundle on purpose would."""
    document = read_json(folder / MANIFEST)
    for name in document["files"]:
        document["files"][name] = vars(FileRecord.of((folder / name).read_bytes()))
    write_json(folder / MANIFEST, document)


def write_golden(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    (folder / GOLDEN).write_bytes(b"".join(blocks(arrays)))


def write_bundle(folder: Path, novelty_threshold: float | None, target: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / MODEL).write_bytes(model_bytes())
    flat = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [0, 0, 0]], dtype=np.uint8)
    images = np.broadcast_to(flat[:, None, None], (4, SIZE, SIZE, 3)) + np.arange(SIZE, dtype=np.uint8)[:, None] % 5
    write_golden(folder, {"image": images, **numpy_outputs(images)})
    manifest = Manifest(
        bundle_version=3,
        name="colours",
        classes=CLASSES,
        tasks=TASKS,
        preprocessing=Preprocessing(SIZE, "crop", "bilinear"),
        feature_size=3,
        calibration=Calibration(1.5, novelty_threshold, "temperature", {"ece": 0.01}),
        files={name: FileRecord.of((folder / name).read_bytes()) for name in (MODEL, GOLDEN)},
        target=target,
        provenance={"run": "colours"},
    )
    write_json(folder / MANIFEST, manifest.to_json())
    return folder


@pytest.fixture
def change_golden() -> Callable[..., None]:
    """``change_golden(folder, novelty=..., image=None)``: put other arrays, or none, in place of these, and seal it."""

    def change(folder: Path, **arrays: np.ndarray | None) -> None:
        golden = {**TensorFile((folder / GOLDEN).read_bytes()).arrays(), **arrays}
        write_golden(folder, {name: array for name, array in golden.items() if array is not None})
        seal(folder)

    return change


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Write a bundle: ``make_bundle(name, novelty_threshold=..., target=...)`` returns its folder."""

    def make(name: str = "bundle", novelty_threshold: float | None = 0.5, target: dict[str, Any] | None = None) -> Path:
        return write_bundle(tmp_path / name, novelty_threshold, target or {})

    return make


@pytest.fixture
def bundle(make_bundle: Callable[..., Path]) -> Path:
    """The folder of a bundle that this test may damage."""
    return make_bundle()


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle that nobody changes."""
    return write_bundle(tmp_path_factory.mktemp("shared") / "bundle", 0.5, {})


@pytest.fixture(name="seal")
def _seal() -> Callable[[Path], None]:
    return seal


@pytest.fixture(name="numpy_outputs")
def _numpy_outputs() -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    return numpy_outputs
