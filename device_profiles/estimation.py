"""How long a vision transformer takes on a device and whether it fits: an estimate, never a measurement.

The time of one run is a roofline without overlap,

    t = FLOPs / (0.6 * peak fp16 FLOP/s) + weight bytes / (0.6 * memory bandwidth)

Every multiply-add counts as two FLOPs; the peak is dense. The two efficiencies of 0.6 are fitted to
throughputs that NVIDIA publishes for the Jetson Orin Nano 8GB (Jetson AI Lab, benchmarks; frames/s normal ->
Super): ViT-B/16 98 -> 158, ViT-B/32 171 -> 273, DINOv2-B/14 75 -> 126. The formula matches the first
two within 4 % and gives 7 to 13 % too many frames for DINOv2. These are three models on one module, and the
batch size is not stated, nor is the image size (224 pixels are assumed); for every other device the formula is
an extrapolation. Long sequences take longer than estimated (the authors of NanoOWL give 40 ms for OWL-ViT B/16 at
768 pixels on an AGX Orin), and below about 1 ms the time to launch kernels dominates.

fp32 takes the peak of the CUDA cores instead, with no published point to check it.

Memory: weights, activations, and the libraries of the runtime, against what the system leaves free.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from duallora_edge.device_profiles.profile import GIB, DeviceProfile
from duallora_edge.errors import ProfileError

EFFICIENCY = 0.6
SPREAD = 0.3
LAUNCH_BOUND_MS = 1.0
# Resident size of TensorRT and cuDNN in a process: anecdotal, from user reports on Jetson.
GPU_RUNTIME_BYTES = 600_000_000
# Resident size of Python, NumPy and ONNX Runtime 1.31 with one small CPU session: measured on x86-64.
CPU_RUNTIME_BYTES = 65_000_000
# Memory that firmware and a Linux without desktop take on a Jetson or computer, and that the driver and
# a desktop take on a graphics card: assumptions.
SYSTEM_BYTES = {"jetson": 1.5 * GIB, "cpu": 1.5 * GIB, "rtx": 0.5 * GIB}


@dataclass(frozen=True)
class Workload:
    """What one inference takes.

    ``flops``: floating-point operations per image (twice the multiply-adds). ``weight_bytes``: all weights in
    the precision that runs. ``activation_bytes``: estimated peak of intermediate results at this ``batch``.
    """

    flops: float
    weight_bytes: int
    activation_bytes: int
    batch: int = 1

    def __post_init__(self) -> None:
        if self.flops <= 0 or self.weight_bytes <= 0 or self.activation_bytes < 0 or self.batch < 1:
            raise ValueError(f"a workload needs positive sizes, not {self}")

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found. Times in ms are for one batch, ``fps`` counts images; None is unknown.

    ``fits`` is None when the memory of the device is unknown. Show ``note`` beside every number.
    """

    profile: str
    mode: str
    precision: str
    batch: int
    latency_ms: float | None
    low_ms: float | None
    high_ms: float | None
    fps: float | None
    memory_bytes: int
    available_bytes: int | None
    fits: bool | None
    note: str

    @property
    def text(self) -> str:
        """One sentence for people: latency with its range, memory, whether it fits, and the note."""
        latency = "latency unknown"
        if self.latency_ms is not None:
            latency = f"{self.latency_ms:.2f} ms for a batch of {self.batch} ({self.low_ms:.2f} to {self.high_ms:.2f})"
        fits = {True: "fits", False: "does not fit", None: "fit unknown"}[self.fits]
        memory = f"{self.memory_bytes / 1e6:.0f} MB"
        return f"{self.profile}, {self.mode} mode, {self.precision}: {latency}, {memory}, {fits}. {self.note}"

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def estimate(
    profile: DeviceProfile, workload: Workload, precision: str | None = None, mode: str = "normal"
) -> Estimate:
    """Estimate latency and memory of ``workload`` on a device.

    ``precision`` is ``"fp16"`` or ``"fp32"``, by default fp16 where the device offers it; ``mode`` is
    ``"normal"`` or ``"super"``. Raises `ProfileError` for a precision or mode that the device does not have.
    """
    precision = precision or profile.default_precision
    if precision not in profile.precisions:
        raise ProfileError(f"{profile.name} has no precision '{precision}'; use {profile.default_precision}.")
    if refusal := profile.precisions[precision]:
        raise ProfileError(f"{profile.name} does not offer {precision}: {refusal}")
    latency = _latency_ms(profile, workload, precision, mode)
    runtime = CPU_RUNTIME_BYTES if profile.kind == "cpu" else GPU_RUNTIME_BYTES
    memory = workload.weight_bytes + workload.activation_bytes + runtime
    available = None
    if profile.memory_bytes is not None:
        available = max(0, int(profile.memory_bytes - SYSTEM_BYTES[profile.kind]))
    return Estimate(
        profile=profile.name,
        mode=mode,
        precision=precision,
        batch=workload.batch,
        latency_ms=latency,
        low_ms=latency * (1 - SPREAD) if latency else None,
        high_ms=latency * (1 + SPREAD) if latency else None,
        fps=1000 * workload.batch / latency if latency else None,
        memory_bytes=memory,
        available_bytes=available,
        fits=memory <= available if available is not None else None,
        note=_note(profile, precision, latency),
    )


def _latency_ms(profile: DeviceProfile, workload: Workload, precision: str, mode: str) -> float | None:
    if not profile.modes:
        return None
    if mode not in profile.modes:
        raise ProfileError(f"{profile.name} has no mode '{mode}'; it has {', '.join(profile.modes)}.")
    peaks = profile.modes[mode]
    tflops = peaks.fp16_tflops if precision == "fp16" else peaks.fp32_tflops
    compute = workload.batch * workload.flops / (EFFICIENCY * tflops * 1e12)
    return 1000 * (compute + workload.weight_bytes / (EFFICIENCY * peaks.bandwidth_gbs * 1e9))


def _note(profile: DeviceProfile, precision: str, latency: float | None) -> str:
    note = "estimate, not measured"
    if latency is None:
        return f"{note}; no latency, because CPUs differ too much; measure with 'duallora-edge benchmark'"
    note += f" (±{SPREAD:.0%}, fitted to published ViT-B throughputs of the Jetson Orin Nano 8GB"
    note += ", extrapolated to this device)" if profile.compute_capability != "8.7" else ")"
    if precision != "fp16":
        note += f"; no published {precision} figure to check against"
    if latency < LAUNCH_BOUND_MS:
        note += "; lower bound, because below 1 ms launching kernels dominates"
    return note
