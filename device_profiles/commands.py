"""``duallora-edge devices``: the known devices, one of them in full, and this machine."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

import click

from duallora_edge.device_profiles.catalog import list_profiles
from duallora_edge.device_profiles.detection import Detected, detect
from duallora_edge.device_profiles.estimation import Estimate, Workload, estimate
from duallora_edge.device_profiles.profile import GIB, DeviceProfile, Mode, jetpacks
from duallora_edge.device_profiles.targets import load_profile

DLA_REFUSED = (
    "refused. These accelerators have no operators for the attention of a vision transformer; nearly all of the work "
    "would run on the GPU and wait for copies."
)
# A yardstick: ViT-S/16 at 224 pixels has 4.6 G multiply-adds and 22.05 M weights; the activations are those
# of one block (197 tokens x (384 + 1152 + 1536) values and 6 x 197 x 197 attention weights, fp16).
YARDSTICK_NAME = "ViT-S/16 at 224 px"
YARDSTICK = Workload(flops=9.2e9, weight_bytes=44_100_000, activation_bytes=1_700_000)


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def devices(name: str | None, as_json: bool) -> None:
    """List the known devices and this machine, or show the profile NAME with its sources.

    NAME is a name or alias from the list, 'jetson', or the path of your own profile (a .yaml file).

    \b
    Example:
      duallora-edge devices
      duallora-edge devices orin-nano-8gb
    """
    if name is None:
        profiles, here = list_profiles(), detect()
        if as_json:
            _print_json({"devices": [profile.to_json() for profile in profiles], "this_machine": here.to_json()})
        else:
            click.echo(overview(profiles, here))
        return
    profile = load_profile(name)
    if as_json:
        estimates = [found.to_json() for found in _yardsticks(profile)]
        _print_json({**profile.to_json(), "yardstick": YARDSTICK_NAME, "estimates": estimates})
    else:
        click.echo(page(profile))


def overview(profiles: Sequence[DeviceProfile], here: Detected) -> str:
    """A table of ``profiles``, and one line for this machine."""
    rows = [["NAME", "DEVICE", "MEMORY", "FP16 TFLOPS", "GB/s", "JETPACK", "ViT-S/16 ms"]]
    for profile in profiles:
        modes, estimates = list(profile.modes.values()), _yardsticks(profile)
        rows.append(
            [
                profile.name,
                profile.title,
                f"{profile.memory_bytes / GIB:g} GB" if profile.memory_bytes else "-",
                _alternatives([f"{mode.fp16_tflops:g}" for mode in modes]),
                _alternatives([f"{mode.bandwidth_gbs:g}" for mode in modes]),
                profile.default_jetpack or "-",
                _alternatives([f"{found.latency_ms:.2g}" for found in estimates if found.latency_ms]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        "",
        "In parentheses: values with the Super clocks. TFLOPS are dense peaks.",
        f"ViT-S/16 ms: {YARDSTICK_NAME} in fp16: estimate, not measured (±30 %); below 1 ms a lower bound.",
        "",
        f"This machine: {describe(here)}",
    ]
    return "\n".join(lines)


def describe(here: Detected) -> str:
    """One line for this machine."""
    facts = [here.model or here.cpu]
    facts.append(f"{here.cpu_cores} CPU cores" if here.cpu_cores else None)
    facts.append(f"{here.memory_bytes / GIB:.1f} GiB" if here.memory_bytes else None)
    facts.append(here.gpu)
    if here.is_jetson:
        facts.append(f"L4T {here.l4t or 'unknown'}, JetPack {here.jetpack or 'unknown'}")
    return f"{here.profile or 'no profile'} ({here.reason}): " + ", ".join(fact for fact in facts if fact)


def page(profile: DeviceProfile) -> str:
    """Everything in a profile; values that are derived or not verified are marked."""
    lines = [f"{profile.title} ({profile.name})"]
    if profile.aliases:
        lines.append(_row("also called", ", ".join(profile.aliases)))
    if profile.compute_capability:
        lines.append(
            _row(
                "GPU",
                f"compute capability {profile.compute_capability}, {profile.cuda_cores} CUDA cores, "
                f"{profile.tensor_cores} tensor cores, {profile.dla_cores} DLA",
            )
        )
    if profile.memory_bytes:
        where = "shared by CPU and GPU" if profile.memory_unified else "on the card"
        mark = _mark(profile, "memory.gb")
        lines.append(_row("memory", f"{profile.memory_bytes / GIB:g} GB{mark}, {where}"))
    lines += [_row(f"{name} mode", _mode_text(profile, name, mode)) for name, mode in profile.modes.items()]
    for precision, refusal in profile.precisions.items():
        lines.append(_row(precision, "offered" if refusal is None else f"refused. {refusal}"))
    if profile.dla_cores:
        lines.append(_row("DLA", DLA_REFUSED))
    lines += _software(profile)
    workspace = f", engines are built with at most {profile.workspace_mb} MB" if profile.kind != "cpu" else ""
    lines.append(_row("backends", ", ".join(profile.backends) + workspace))
    lines += ["", *_estimate_lines(profile)]
    if profile.notes:
        lines += ["", textwrap.fill(profile.notes, 110)]
    lines += [
        "",
        "Sources",
        *(textwrap.fill(f"  - {source}", 110, subsequent_indent=" " * 4) for source in profile.sources),
    ]
    return "\n".join(lines)


def _software(profile: DeviceProfile) -> list[str]:
    if profile.opset:
        return [_row("export", f"ONNX opset {profile.opset}, IR version {profile.ir_version}")]
    lines = []
    for version in profile.jetpacks:
        line = jetpacks()[version]
        parts = [
            f"TensorRT {line.tensorrt} (reads opsets {line.parser_opsets}), CUDA {line.cuda}, cuDNN {line.cudnn}",
            f"Ubuntu {line.ubuntu}, Python {line.python}",
            f"refused: {line.refused}" if line.refused else f"export with opset {line.opset}, IR {line.ir_version}",
        ]
        default = "The default. " if version == profile.default_jetpack and not line.refused else ""
        lines.append(_row(f"JetPack {version}", f"{'; '.join(parts)}. {default}{line.notes}"))
    return lines


def _mode_text(profile: DeviceProfile, name: str, mode: Mode) -> str:
    def value(key: str, unit: str) -> str:
        return f"{getattr(mode, key):g} {unit}{_mark(profile, f'modes.{name}.{key}')}"

    watts = "/".join(f"{watt:g}" for watt in mode.watts) + " W" + _mark(profile, f"modes.{name}.watts")
    facts = [
        value("fp16_tflops", "TFLOPS fp16"),
        value("fp32_tflops", "TFLOPS fp32"),
        value("bandwidth_gbs", "GB/s"),
        value("gpu_mhz", "MHz"),
        watts,
    ]
    return ", ".join(facts) + (f", from JetPack {mode.from_jetpack} on" if mode.from_jetpack else "")


def _estimate_lines(profile: DeviceProfile) -> list[str]:
    lines = [f"{YARDSTICK_NAME}, batch 1:"]
    for found in _yardsticks(profile):
        if found.latency_ms is None or found.low_ms is None or found.high_ms is None:
            lines.append(_row("", found.note))
            continue
        text = f"{found.latency_ms:.2g} ms ({found.low_ms:.2g} to {found.high_ms:.2g}), {found.precision}"
        fits = "fits" if found.fits else "does not fit"
        lines.append(_row(f"{found.mode} mode", f"{text}, {found.memory_bytes / 1e6:.0f} MB, {fits}; {found.note}"))
    return lines


def _yardsticks(profile: DeviceProfile) -> list[Estimate]:
    return [estimate(profile, YARDSTICK, mode=mode) for mode in profile.modes or ["normal"]]


def _mark(profile: DeviceProfile, path: str) -> str:
    if path in profile.unverified:
        return " [unverified]"
    return " [derived]" if path in profile.derived else ""


def _row(label: str, text: str) -> str:
    return textwrap.fill(text, 110, initial_indent=f"  {label:<13}", subsequent_indent=" " * 15)


def _alternatives(texts: Sequence[str]) -> str:
    """ "10.2 (16.7)": the normal value, and the Super one in parentheses."""
    return " ".join([*texts[:1], *(f"({text})" for text in texts[1:])]) or "-"


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
