"""The report of a benchmark as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from duallora_edge.runtime.benchmark import LABEL, Latency, Report
from duallora_edge.runtime.memory import Memory, Reading, available_drop

Rows = Sequence[Sequence[str]]


def table(report: Report) -> str:
    """Everything in the report that a person compares, in blocks of aligned columns."""
    width, height = report.frame
    blocks = [
        _header(report),
        _columns(
            [
                [f"ms ({LABEL})", "p50", "p90", "p99", "mean", "std", "CoV", "N"],
                _latency("single stream: model, one image", report.single_stream),
                *(
                    _latency(f"frame {width}x{height}: {name.replace('_', ' ')}", latency)
                    for name, latency in report.phases.items()
                ),
            ]
        ),
        _notes(report),
        _columns([["batch", "images/s", "batches"], *_throughput(report)]),
        _columns(_memory(report.memory)),
        *_reasons(report.memory["after_batches"]),
        "\n".join(_estimate(entry) for entry in report.estimates),
    ]
    return "\n\n".join(block for block in blocks if block)


def _header(report: Report) -> str:
    bundle, machine = report.bundle, report.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    not_used = "".join(f"\n         not {name}: {why}" for name, why in report.backend["not_used"].items())
    threads = report.backend["threads"] or "ONNX Runtime's default"
    device = machine["model"] or machine["cpu"] or "unknown CPU"
    loaded = f"loaded and checked in {report.load_ms:.0f} ms"
    return (
        f"bundle   {bundle['name']}, version {bundle['bundle_version']}: {bundle['classes']} classes, "
        f"{bundle['tasks']} tasks, {bundle['input'][1]} px, model {bundle['model_bytes'] / 1e6:.1f} MB\n"
        f"backend  {report.backend['name']}, threads: {threads}, {loaded}{not_used}\n"
        f"machine  {device}, {machine['usable_cores']} usable cores ({machine['profile'] or 'no profile'})\n"
        f"versions {versions}"
    )


def _latency(name: str, latency: Latency) -> list[str]:
    times = (latency.p50, latency.p90, latency.p99, latency.mean, latency.std)
    return [name, *(f"{value:.3f}" for value in times), f"{latency.cov:.0%}", str(latency.n)]


def _notes(report: Report) -> str:
    lines = [f"single stream: {note}" for note in report.single_stream.notes]
    lines += [f"end to end: {note}" for note in report.phases["end_to_end"].notes]
    return "\n".join(f"! {line}" for line in lines)


def _throughput(report: Report) -> list[list[str]]:
    return [
        [
            str(row.batch),
            f"{row.images_per_second:.1f}" if row.images_per_second else f"failed: {row.reason}",
            str(row.n),
        ]
        for row in report.throughput
    ]


def _memory(memory: Mapping[str, Memory]) -> list[list[str]]:
    moments = list(memory.values())
    rows = [["memory, MB", *(name.replace("_", " ") for name in memory)]]
    for label, key in (("PSS", "pss"), ("RSS (VmRSS)", "rss"), ("peak RSS (VmHWM)", "peak_rss"), ("GPU", "device")):
        rows.append([label, *(_megabytes(getattr(moment, key)) for moment in moments)])
    drops = [available_drop(moments[0], moment) for moment in moments]
    return [*rows, ["drop of MemAvailable", *(_megabytes(drop) for drop in drops)]]


def _megabytes(reading: Reading) -> str:
    return "-" if reading.bytes is None else f"{reading.bytes / 1e6:.1f}"


def _reasons(memory: Memory) -> list[str]:
    readings = (memory.pss, memory.rss, memory.peak_rss, memory.available, memory.device)
    lines = [f"- {reading.method}: {reading.reason}" for reading in readings if reading.reason]
    return ["\n".join(lines)] if lines else []


def _estimate(entry: Mapping[str, Any]) -> str:
    """A line for what the exporter expected. It comes from a file, so nothing in it is taken for granted."""
    latency = entry.get("latency_ms")
    value = f"{latency:.2g} ms" if isinstance(latency, float) else "no latency"
    where = f"{entry.get('profile')}, {entry.get('mode')} mode, {entry.get('precision')}"
    text = f"stored at export for {where}: {value}; {entry.get('note', 'estimate, not measured')}"
    return "".join(character if character.isprintable() else "?" for character in text)


def _columns(rows: Rows) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
