"""TensorRT's parser and builder read what is exported: TensorRT-RTX builds engines ahead of time without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from duallora_edge.device_profiles import resolve_target
from duallora_edge.export.bundle import write_bundle
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.runtime.backends.engine_build import build_engine, build_engines
from duallora_edge.runtime.backends.engine_cache import RefusedModelError
from duallora_edge.runtime.bundle import Bundle

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")

CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(tmp_path / "cache"))


def test_engines_of_all_gpus(run: RunDirectory, model: ComposedModel, tmp_path: Path) -> None:
    write_bundle(run, model, resolve_target("rtx-sm86"), tmp_path / "bundle", None, precision="fp16", batch=1)
    bundle = Bundle.open(tmp_path / "bundle")
    engines = [build_engine(bundle, capability) for capability in CAPABILITIES if capability != "sm75"]
    assert len({engine.plan for engine in engines}) == len(CAPABILITIES) - 1
    assert all(engine.bytes > 10_000 and not engine.from_cache for engine in engines)
    assert build_engine(bundle, "sm86").from_cache
    with pytest.raises(RefusedModelError, match=r"SM75.*export the run for another target"):
        build_engine(bundle, "sm75")


def test_a_graph_for_turing_has_no_fp32_product(run: RunDirectory, model: ComposedModel, tmp_path: Path) -> None:
    write_bundle(run, model, resolve_target("rtx-sm75"), tmp_path / "bundle", None, precision="fp16", batch=1)
    assert build_engine(Bundle.open(tmp_path / "bundle"), "sm75").bytes > 10_000


@pytest.mark.parametrize(
    ("target", "jetpack", "precision", "batch", "split"),
    [
        ("orin-nano-8gb", "6.2", "fp32", None, False),
        ("orin-nano-8gb", "6.2", "fp16", None, True),
        ("orin-nano-8gb", "7.2", "fp16", 4, False),
        ("xavier-nx", "5.1", "fp16", 1, False),
        ("xavier-nx", "5.1", "fp32", 2, True),
    ],
)
def test_graphs_of_every_kind(
    run: RunDirectory,
    model: ComposedModel,
    tmp_path: Path,
    target: str,
    jetpack: str,
    precision: str,
    batch: int | None,
    split: bool,
) -> None:
    resolved = resolve_target(target, jetpack)
    write_bundle(run, model, resolved, tmp_path / "bundle", None, precision=precision, batch=batch, split=split)
    engines = build_engines(Bundle.open(tmp_path / "bundle"), "sm86")
    assert len(engines) == (2 if split else 1) and all(engine.bytes > 10_000 for engine in engines)
