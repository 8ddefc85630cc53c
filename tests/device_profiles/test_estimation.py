"""The estimates against published tables, with the operations counted by a second, slower implementation."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duallora_edge.device_profiles import Workload, estimate, list_profiles, load_profile
from duallora_edge.errors import ProfileError

# name: (width, depth, patch, image side, extra tokens, MLP factor, classes)
VITS = {
    "deit-t": (192, 12, 16, 224, 1, 4, 1000),
    "deit-s": (384, 12, 16, 224, 1, 4, 1000),
    "vit-b16": (768, 12, 16, 224, 1, 4, 1000),
    "vit-b32": (768, 12, 32, 224, 1, 4, 1000),
    "vit-l16": (1024, 24, 16, 224, 1, 4, 1000),
    "dinov2-b14": (768, 12, 14, 224, 1, 4, 0),
}


def vit(name: str) -> Workload:
    """Walk through a ViT matrix product by matrix product, counting multiply-adds and weights."""
    width, depth, patch, side, extra, factor, classes = VITS[name]
    patches = (side // patch) ** 2
    tokens = patches + extra
    products = [(patches, patch * patch * 3, width)]
    weights = [patch * patch * 3 * width + width, tokens * width, extra * width]
    for _ in range(depth):
        products += [(tokens, width, 3 * width), (tokens, width, tokens), (tokens, tokens, width)]
        products += [(tokens, width, width), (tokens, width, factor * width), (tokens, factor * width, width)]
        weights += [3 * width * width + 3 * width, width * width + width, 4 * width]
        weights += [factor * width * width + factor * width, factor * width * width + width]
    products.append((1, width, classes))
    weights += [2 * width, width * classes + classes]
    multiply_adds = sum(rows * inner * columns for rows, inner, columns in products)
    return Workload(flops=2.0 * multiply_adds, weight_bytes=2 * sum(weights), activation_bytes=5_000_000)


@pytest.mark.parametrize(
    ("name", "gmacs", "million"), [("deit-t", 1.26, 5.7), ("deit-s", 4.6, 22.1), ("vit-b16", 17.6, 86.6)]
)
def test_the_counting_meets_published_sizes(name: str, gmacs: float, million: float) -> None:
    workload = vit(name)
    assert workload.flops / 2e9 == pytest.approx(gmacs, rel=0.01)
    assert workload.weight_bytes / 2e6 == pytest.approx(million, rel=0.01)


# ms at batch 1, fp16, 224 pixels: DeiT-T, DeiT-S, ViT-B/16, ViT-L/16
PREDICTIONS = [
    ("orin-nano-4gb", "normal", ("1.4", "5.2", "20.0", "70")),
    ("orin-nano-4gb", "super", ("0.9", "3.3", "12.6", "44")),
    ("orin-nano-8gb", "normal", ("0.7", "2.6", "10.0", "35")),
    ("orin-nano-8gb", "super", ("0.4", "1.6", "6.3", "22")),
    ("orin-nx-8gb", "normal", ("0.5", "1.9", "7.5", "26")),
    ("orin-nx-16gb", "normal", ("0.5", "1.7", "6.7", "24")),
    ("agx-orin-32gb", "normal", ("0.25", "0.93", "3.6", "12.6")),
    ("agx-orin-64gb", "normal", ("0.19", "0.72", "2.8", "9.8")),
    ("xavier-nx", "normal", ("0.9", "3.5", "13.5", "47")),
    ("agx-xavier", "normal", ("0.5", "1.9", "7.3", "26")),
]


@pytest.mark.parametrize(
    ("device", "mode", "model", "expected"),
    [
        (device, mode, model, text)
        for device, mode, row in PREDICTIONS
        for model, text in zip(("deit-t", "deit-s", "vit-b16", "vit-l16"), row, strict=True)
    ],
)
def test_estimates_meet_the_table(device: str, mode: str, model: str, expected: str) -> None:
    digits = len(expected.partition(".")[2])
    found = estimate(load_profile(device), vit(model), mode=mode).latency_ms
    assert found is not None
    rounding = 0.5 * 10**-digits
    assert abs(found - float(expected)) <= rounding + 0.01 * float(expected)


@pytest.mark.parametrize(
    ("model", "mode", "published_fps"),
    [
        ("vit-b16", "normal", 98),
        ("vit-b16", "super", 158),
        ("vit-b32", "normal", 171),
        ("vit-b32", "super", 273),
        ("dinov2-b14", "normal", 75),
        ("dinov2-b14", "super", 126),
    ],
)
def test_published_throughputs(model: str, mode: str, published_fps: float) -> None:
    found = estimate(load_profile("orin-nano-8gb"), vit(model), mode=mode)
    assert found.fps == pytest.approx(published_fps, rel=0.14 if model == "dinov2-b14" else 0.04)


GPUS = [profile for profile in list_profiles() if profile.kind != "cpu"]


@given(
    st.sampled_from(GPUS),
    st.floats(1e6, 1e13),
    st.integers(1, 10**10),
    st.integers(0, 10**10),
    st.integers(1, 256),
    st.sampled_from(["fp16", "fp32"]),
)
def test_laws(profile, flops: float, weights: int, activations: int, batch: int, precision: str) -> None:  # type: ignore[no-untyped-def]
    found = estimate(profile, Workload(flops, weights, activations, batch), precision)
    twice = estimate(profile, Workload(flops, weights, activations, 2 * batch), precision)
    assert found.latency_ms is not None and found.low_ms is not None and found.high_ms is not None
    assert twice.latency_ms is not None and found.fps is not None and twice.fps is not None
    assert found.low_ms < found.latency_ms < found.high_ms
    assert found.latency_ms < twice.latency_ms <= 2 * found.latency_ms * (1 + 1e-9)
    assert twice.fps >= found.fps * (1 - 1e-9)
    assert math.isclose(found.fps * found.latency_ms, 1000 * batch, rel_tol=1e-9)
    assert "estimate, not measured" in found.note
    assert ("lower bound" in found.note) == (found.latency_ms < 1)
    assert found.available_bytes is not None and found.fits == (found.memory_bytes <= found.available_bytes)


def test_spread_is_thirty_percent() -> None:
    found = estimate(load_profile("orin-nano-8gb"), vit("vit-b16"))
    assert found.latency_ms is not None
    assert found.low_ms == pytest.approx(0.7 * found.latency_ms)
    assert found.high_ms == pytest.approx(1.3 * found.latency_ms)


@pytest.mark.parametrize(("gib", "fits"), [(1.0, True), (1.9, True), (2.0, False), (5.0, False)])
def test_a_4gb_module_keeps_room_for_system_and_libraries(gib: float, fits: bool) -> None:
    workload = Workload(flops=1e9, weight_bytes=int(gib * 2**30), activation_bytes=0)
    assert estimate(load_profile("orin-nano-4gb"), workload).fits is fits


@pytest.mark.parametrize("name", ["x86-cpu", "arm64-cpu"])
def test_a_cpu_gets_no_latency_and_a_reason(name: str) -> None:
    found = estimate(load_profile(name), vit("deit-t"))
    assert (found.latency_ms, found.fps, found.fits, found.precision) == (None, None, None, "fp32")
    assert "estimate, not measured" in found.note and "CPUs differ" in found.note
    assert found.memory_bytes > vit("deit-t").weight_bytes
    assert found.to_json()["latency_ms"] is None


def test_fp32_is_slower_and_said_to_be_unchecked() -> None:
    profile = load_profile("orin-nano-8gb")
    slow, fast = estimate(profile, vit("vit-b16"), "fp32"), estimate(profile, vit("vit-b16"))
    assert slow.latency_ms is not None and fast.latency_ms is not None and slow.latency_ms > fast.latency_ms
    assert "no published fp32" in slow.note


@pytest.mark.parametrize(
    ("device", "precision", "mode", "message"),
    [
        ("orin-nano-8gb", "int8", "normal", "does not offer int8: TensorRT users report"),
        ("orin-nano-8gb", "fp8", "normal", "compute capability 8.9"),
        ("orin-nano-8gb", "fp4", "normal", "no precision 'fp4'; use fp16"),
        ("agx-orin-64gb", "fp16", "super", "no mode 'super'; it has normal"),
        ("x86-cpu", "fp16", "normal", "does not offer fp16"),
    ],
)
def test_what_a_device_does_not_have(device: str, precision: str, mode: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        estimate(load_profile(device), vit("deit-t"), precision, mode)


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, -1, 1), (1, 1, 1, 0)])
def test_a_workload_is_positive(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="positive"):
        Workload(*sizes)
