"""TensorRT's parser and builder read the model: TensorRT-RTX builds engines ahead of time without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from duallora_edge.device_profiles import resolve_target
from duallora_edge.export.bundle import export_run
from duallora_edge.learner.model import ComposedModel
from duallora_edge.learner.run import Run
from duallora_edge.runtime.bundle import MODEL, OUTPUTS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "jetpack", "opset"), [("orin-nano-8gb", "6.2", 17), ("xavier-nx", "5.1", 16), ("rtx-sm86", None, None)]
)
def test_the_model_of_a_bundle_becomes_an_engine(
    run: Run, model: ComposedModel, tmp_path: Path, target: str, jetpack: str | None, opset: int | None
) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")
    resolved = resolve_target(target, jetpack)
    assert opset in (None, resolved.opset)
    export_run(run, model, resolved, tmp_path / "bundle", None)

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(tmp_path / "bundle" / MODEL))
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    image = network.get_input(0)
    assert (image.name, tuple(image.shape), image.dtype) == ("image", (-1, 32, 32, 3), trt.uint8)
    assert {network.get_output(index).name for index in range(network.num_outputs)} == set(OUTPUTS)

    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("image", (1, 32, 32, 3), (1, 32, 32, 3), (8, 32, 32, 3))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None and engine.nbytes > 10_000
