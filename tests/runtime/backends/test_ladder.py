"""The ladder: a real inference decides, every rung that was passed over says why, strict forbids a fallback."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from duallora_edge.errors import BackendError
from duallora_edge.runtime.backends import ladder as backends
from duallora_edge.runtime.backends.contract import UnavailableError, check_golden, nodes_on_cpu
from duallora_edge.runtime.backends.ladder import Rung, open_backend
from duallora_edge.runtime.bundle import (
    MAX_DIFFERENCE,
    MAX_FEATURE_DIFFERENCE,
    MAX_NOVELTY_DIFFERENCE,
    OUTPUTS,
    Bundle,
    Content,
    Golden,
    Outputs,
)
from duallora_edge.runtime.device.cuda import Gpu
from duallora_edge.runtime.preprocess import Pixels

CPU = backends.LADDER["cpu"]
HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def failing(error: Exception) -> Callable[[Bundle, int | None], backends.Infer]:
    def opener(bundle: Bundle, threads: int | None) -> backends.Infer:
        raise error

    return opener


def wrong(bundle: Bundle, threads: int | None) -> backends.Infer:
    """A rung that starts and computes, but not the right numbers."""
    run = CPU(bundle, threads)

    def shifted(images: Pixels) -> Outputs:
        outputs = run(images)
        probabilities = np.roll(outputs.probabilities, 1, axis=1)
        return Outputs(probabilities, outputs.task_probabilities, outputs.novelty, outputs.features)

    return shifted


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("images", [1, 5])
def test_outputs_equal_the_reference(
    shared_bundle: Path, numpy_outputs: Callable[[Pixels], dict[str, np.ndarray]], backend: str, images: int
) -> None:
    opened = open_backend(Bundle.open(shared_bundle), backend, threads=1)
    frames = np.random.default_rng(images).integers(0, 256, (images, 16, 16, 3), dtype=np.uint8)
    outputs = opened.infer(frames)
    for name, expected in numpy_outputs(frames).items():
        np.testing.assert_allclose(getattr(outputs, name), expected, atol=1e-5)
    assert opened.check.passed and opened.check.images == 4


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")
def test_a_missing_provider_is_told(shared_bundle: Path) -> None:
    bundle = Bundle.open(shared_bundle)
    opened = open_backend(bundle, "cuda")
    assert opened.name == "cpu"
    assert "built without CUDAExecutionProvider" in opened.not_used["cuda"]
    assert str(opened).startswith("cpu (ONNX Runtime); not cuda: ")
    assert open_backend(bundle, "cpu", strict=True).not_used == {}
    assert open_backend(bundle, "auto", strict=True).name == "cpu"
    with pytest.raises(BackendError, match=r"cuda: .* built without .*leave out 'strict'"):
        open_backend(bundle, "cuda", strict=True)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="this ONNX Runtime has no CUDA")
def test_cuda_gives_the_golden_outputs(shared_bundle: Path) -> None:
    assert open_backend(Bundle.open(shared_bundle), "cuda", strict=True).check.passed


@pytest.mark.parametrize(
    ("opener", "reason", "is_fallback"),
    [
        (failing(RuntimeError("no kernel image\nsecond line")), "no kernel image", True),
        (failing(RuntimeError()), "RuntimeError", True),
        (failing(UnavailableError("not installed")), "not installed", False),
        (wrong, "wrong results in fp32, largest difference", True),
    ],
)
def test_the_ladder(
    shared_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    opener: Callable[[Bundle, int | None], backends.Infer],
    reason: str,
    is_fallback: bool,
) -> None:
    bundle = Bundle.open(shared_bundle)
    monkeypatch.setattr(backends, "LADDER", {"cuda": opener, "cpu": CPU})
    opened = open_backend(bundle, "auto")
    assert opened.name == "cpu" and opened.not_used["cuda"].startswith(reason)
    assert "second line" not in opened.not_used["cuda"]
    assert opened.to_json()["not_used"] == opened.not_used
    with pytest.raises(BackendError, match="cuda: "):
        open_backend(bundle, "cuda", strict=True)
    if is_fallback:
        with pytest.raises(BackendError, match="cuda: "):
            open_backend(bundle, "auto", strict=True)
    else:
        assert open_backend(bundle, "auto", strict=True).name == "cpu"


class Cuda:
    """ONNX Runtime as if it had CUDA: the CPU computes, and ``left`` says whether a node has no kernel for the GPU."""

    __version__ = "1.20.0"
    SessionOptions, OrtValue = onnxruntime.SessionOptions, onnxruntime.OrtValue

    def __init__(self, left: bool) -> None:
        self.left = left
        self.options: list[dict[str, str]] = []

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, graph: bytes, settings: Any, providers: Any, enable_fallback: int) -> Any:  # noqa: N802
        ((provider, options),) = providers
        self.options.append(options)
        assert not enable_fallback
        if not self.left:
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
        # A provider of every ONNX Runtime that has no kernels for these nodes.
        session = onnxruntime.InferenceSession(graph, settings, providers=["AzureExecutionProvider"])
        return SimpleNamespace(
            run=session.run, get_providers=lambda: [provider, "CPU"], end_profiling=session.end_profiling
        )


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Cuda]:
    def install(left: bool) -> Cuda:
        imitation = Cuda(left)
        monkeypatch.setitem(sys.modules, "onnxruntime", imitation)
        monkeypatch.setattr(backends, "find_gpu", lambda: Gpu("Imaginary Orin", "sm87", 8, 8 * 10**9))
        return imitation

    return install


def test_the_options_of_cuda(shared_bundle: Path, with_cuda: Callable[[bool], Cuda]) -> None:
    imitation = with_cuda(False)
    opened = open_backend(Bundle.open(shared_bundle), "cuda", strict=True)
    assert (opened.name, opened.on_cpu, str(opened)) == ("cuda", (), "cuda (ONNX Runtime)")
    assert imitation.options == [
        {"use_tf32": "0", "gpu_mem_limit": "4000000000", "arena_extend_strategy": "kSameAsRequested"}
    ]


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="no provider without kernels"
)
def test_nodes_that_stay_on_the_cpu(shared_bundle: Path, with_cuda: Callable[[bool], Cuda]) -> None:
    """The refusal and the profile are ONNX Runtime's own."""
    with_cuda(True)
    bundle = Bundle.open(shared_bundle)
    opened = open_backend(bundle, "cuda")
    assert opened.name == "cuda" and opened.check.passed
    assert len(opened.on_cpu) > 1 and opened.to_json()["on_cpu"] == list(opened.on_cpu)
    assert re.match(rf"cuda \(ONNX Runtime\); {len(opened.on_cpu)} of the graph's nodes run on the CPU \(", str(opened))
    assert "; " + nodes_on_cpu(opened.on_cpu) in backends.rung(str(shared_bundle), "cuda")["check"]
    with pytest.raises(BackendError, match=r"cuda: \d+ of the graph's nodes run on the CPU .*leave out 'strict'"):
        open_backend(bundle, "cuda", strict=True)


def test_onnxruntime_with_cuda_but_no_gpu(
    shared_bundle: Path, with_cuda: Callable[[bool], Cuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cuda(False)

    def none() -> Gpu:
        raise UnavailableError("no NVIDIA driver")

    monkeypatch.setattr(backends, "find_gpu", none)
    with pytest.raises(BackendError, match="cuda: no NVIDIA driver"):
        open_backend(Bundle.open(shared_bundle), "cuda", strict=True)


def test_no_rung_works(bundle: Path, change_golden: Callable[..., None]) -> None:
    change_golden(bundle, probabilities=Bundle.open(bundle).golden().probabilities[:, ::-1].copy())
    with pytest.raises(BackendError, match="cpu: wrong results"):
        open_backend(Bundle.open(bundle))


def test_a_model_that_is_none(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    with pytest.raises(BackendError, match=r"cpu: .*export the run again"):
        open_backend(replace(opened, contents={**opened.contents, "model.onnx": Content(b"no model")}))


def test_without_onnxruntime(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"cpu: ONNX Runtime cannot be imported .*; see 'duallora-edge doctor' or"):
        open_backend(Bundle.open(shared_bundle))


@pytest.mark.parametrize(("backend", "threads"), [("npu", None), ("cpu", 0)])
def test_wrong_arguments(shared_bundle: Path, backend: str, threads: int | None) -> None:
    with pytest.raises(BackendError):
        open_backend(Bundle.open(shared_bundle), backend, threads)


@pytest.mark.parametrize("images", [np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 16, 16, 3), np.float32)])
def test_a_run_that_fails(shared_bundle: Path, images: Pixels) -> None:
    with pytest.raises(BackendError, match="The model failed on CPUExecutionProvider"):
        open_backend(Bundle.open(shared_bundle)).infer(images)


@pytest.mark.parametrize(
    ("difference", "passed"),
    [(0.0, True), (0.9, True), (1.1, False), (np.nan, False)],
)
@pytest.mark.parametrize("output", ["probabilities", "task_probabilities", "novelty", "features"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_tolerance(precision: str, output: str, difference: float, passed: bool) -> None:
    limits = {"novelty": MAX_NOVELTY_DIFFERENCE, "features": MAX_FEATURE_DIFFERENCE[precision]}
    difference *= limits.get(output, MAX_DIFFERENCE[precision])
    golden = Golden(
        probabilities=np.array([[0.5, 0.5], [0.9, 0.1]], np.float32),
        task_probabilities=np.array([[1.0, 0.0], [0.0, 1.0]], np.float32),
        novelty=np.array([0.25, 0.5], np.float32),
        features=np.array([[3.0, 4.0], [0.0, 1.0]], np.float32),
        image=np.zeros((2, 8, 8, 3), np.uint8),
    )
    arrays = {name: getattr(golden, name).copy() for name in OUTPUTS}
    arrays[output][1] += np.float32(difference) * (np.float32(1) if output == "novelty" else np.float32([-1, 1]))
    if output == "features":
        arrays[output][1, 0] = 0  # along the vector alone, of length 1
    rows = iter(range(2))

    def run(images: Pixels) -> Outputs:
        row = next(rows)
        return Outputs(*(arrays[name][row : row + 1] for name in OUTPUTS))

    check = check_golden(run, golden, precision)
    assert check.passed is passed
    found = {"novelty": check.max_novelty_difference, "features": check.max_feature_difference}
    assert found.get(output, check.max_difference) == pytest.approx(difference, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("rung", "other", "below"),
    [
        (("cpu", "fp32"), ("tensorrt", "fp16"), True),
        (("tensorrt", "fp32"), ("tensorrt", "fp16"), True),
        (("tensorrt", "fp16"), ("tensorrt", "fp32"), False),
        (("cuda", "fp16"), ("tensorrt", "fp32"), True),
        (("tensorrt", "fp32"), ("cuda", "fp16"), False),
        (("cpu", "fp32"), ("cpu", "fp32"), False),
    ],
)
def test_which_rung_is_below(rung: tuple[str, str], other: tuple[str, str], below: bool) -> None:
    assert Rung(*rung).is_below(Rung(*other)) is below


def test_a_tie_in_the_golden_outputs_may_fall_either_way() -> None:
    golden = Golden(
        probabilities=np.array([[0.4999, 0.5001]], np.float32),
        task_probabilities=np.ones((1, 1), np.float32),
        novelty=np.zeros(1, np.float32),
        features=np.zeros((1, 1), np.float32),
        image=np.zeros((1, 8, 8, 3), np.uint8),
    )
    swapped = Outputs(golden.probabilities[:, ::-1], golden.task_probabilities, golden.novelty, golden.features)
    assert check_golden(lambda images: swapped, golden).passed
