"""The report of a benchmark as text in aligned columns, and as Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duallora_edge.runtime.backends.contract import nodes_on_cpu
from duallora_edge.runtime.benchmark.report import LABEL, Report
from duallora_edge.runtime.benchmark.scenarios import (
    MULTI_STREAM,
    OFFLINE,
    PHASES,
    QUERY_IMAGES,
    SINGLE_STREAM,
    Energy,
    Paced,
    Parallel,
    Stream,
)
from duallora_edge.runtime.benchmark.statistics import SHARES, Latency, Percentile, Times, runs_least, runs_needed
from duallora_edge.runtime.device.sampler import Series
from duallora_edge.runtime.device.state import Clock, DeviceState, PowerMode
from duallora_edge.runtime.process_memory import MemoryReadings, Reading, available_drop

_PERCENT = re.compile(r"[+-]?\d+%")
MLPERF_OFFLINE = 24_576  # samples, inference_rules.adoc

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Block:
    """A title; facts (name, value); a table whose first row names its columns; and lines. What is empty is left out."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    rows: Rows = ()
    lines: Sequence[str] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing but the title."""
        return not (self.facts or self.rows or self.lines)


def as_text(blocks: Iterable[Block]) -> str:
    """The blocks for a terminal."""
    return "\n\n".join("\n".join([block.title, *_body(block)]) for block in blocks if not block.empty)


def _body(block: Block) -> list[str]:
    width = max((len(name) for name, _ in block.facts), default=0)
    facts = [f"  {name:<{width}}  {value}" for name, value in block.facts]
    return [*facts, *_columns(block.rows), *(f"  {line}" for line in block.lines)]


def as_markdown(blocks: Iterable[Block], title: str, summary: str) -> str:
    """The blocks as a Markdown document with a title and a first paragraph."""
    parts = [f"# {_cell(title)}", _cell(summary)]
    for block in blocks:
        if block.empty:
            continue
        parts.append(f"## {_cell(block.title)}")
        if block.facts:
            parts.append("\n".join(f"- {_cell(name)}: {_cell(value)}" for name, value in block.facts))
        if block.rows:
            header, *rest = ["| " + " | ".join(map(_cell, row)) + " |" for row in block.rows]
            rule = "|---|" + "---:|" * (len(block.rows[0]) - 1)
            parts.append("\n".join([header, rule, *rest]))
        if block.lines:
            parts.append("\n".join(f"- {_cell(line)}" for line in block.lines))
    return "\n\n".join(parts) + "\n"


def printable(text: str) -> str:
    """Text from a file, without control characters and line breaks."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _columns(rows: Rows) -> list[str]:
    if not rows:
        return []
    name_width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [f"  {row[0]:<{name_width}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True))]
        )
        for row in rows
    ]


def table(report: Report, summary: str) -> str:
    """The line ``summary``, and everything in the report that a person compares, in blocks of aligned columns."""
    return f"{summary}\n\n{as_text(blocks(report))}"


def markdown(report: Report, summary: str) -> str:
    """The same as a Markdown document."""
    return as_markdown(blocks(report), f"Benchmark of {report.bundle['name']}: {LABEL}", summary)


def samples_csv(report: Report) -> str:
    """Every run of the report as a line of a CSV file; what a scenario does not measure is empty."""
    names = ("from_due_ms", *(f"{name}_ms" for name in PHASES[:-1]))
    text = io.StringIO()
    writer = csv.DictWriter(text, ("scenario", "images", "run", "latency_ms", *names), lineterminator="\n")
    writer.writeheader()
    for scenario, images, columns in _samples(report):
        for run, times in enumerate(zip(*columns.values(), strict=True), 1):
            rounded = {name: f"{value:.4f}" for name, value in zip(columns, times, strict=True)}
            writer.writerow({"scenario": scenario, "images": images, "run": run, **rounded})
    return text.getvalue()


def _samples(report: Report) -> Iterator[tuple[str, int, dict[str, Times]]]:
    """Name, images in a run, and times of each scenario that was measured."""
    single, multi, batches = report.single_stream, report.multi_stream, report.offline
    if single and single.latency:
        yield SINGLE_STREAM, single.images, {"latency_ms": single.latency.samples}
    parts = {f"{name}_ms": report.phases[name].samples for name in PHASES[:-1]}
    yield "end-to-end", 1, {"latency_ms": report.phases[PHASES[-1]].samples, **parts}
    if report.paced:
        times = {"latency_ms": report.paced.latency.samples, "from_due_ms": report.paced.from_due.samples}
        yield "paced", 1, times
    if multi and multi.latency:
        yield MULTI_STREAM, multi.images, {"latency_ms": multi.latency.samples}
    if batches:
        yield OFFLINE, batches.batch, {"latency_ms": batches.latency.samples}
    if report.parallel and report.parallel.latency:
        yield "parallel", 1, {"latency_ms": report.parallel.latency.samples}


def blocks(report: Report) -> list[Block]:
    """The report in the order in which a person reads it; blocks may be empty."""
    return [
        Block("Bundle and machine", facts=list(_facts(report))),
        Block(f"Scenarios ({LABEL})", rows=list(_scenarios(report)), lines=list(_scenario_notes(report))),
        Block("Latency, ms (95 % interval)", rows=list(_latencies(report)), lines=_marks()),
        Block("Offline: batch sizes", rows=list(_sweep(report))),
        Block("Memory, MB", rows=list(_memory(report.memory)), lines=list(_methods(report))),
        Block("Device", rows=list(_device(report)), lines=list(_device_notes(report))),
        Block("Estimate of the exporter", lines=list(_estimates(report))),
        Block("Warnings", lines=list(_warnings(report))),
    ]


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    bundle, backend, machine = report.bundle, report.backend, report.machine
    threads = backend["threads"] or "ONNX Runtime's default"
    yield (
        "bundle",
        f"{bundle['name']}, version {bundle['bundle_version']}: {bundle['classes']} classes, {bundle['tasks']} tasks, "
        f"{bundle['input'][1]} px, model {bundle['model_bytes'] / 1e6:.1f} MB",
    )
    yield "backend", f"{backend['name']} in {backend['precision']}, threads: {threads}"
    if backend["on_cpu"]:
        yield "on the CPU", nodes_on_cpu(backend["on_cpu"])
    yield from ((f"not {name}", why) for name, why in backend["not_used"].items())
    if report.images is not None:
        size = f"{report.images.megapixels:g} megapixels on average"
        yield "images", f"{report.images.count} of {printable(report.images.folder)}, {size}"
    yield "load", f"{report.load_ms:.0f} ms, including the check of the golden images"
    device = machine["model"] or machine["cpu"] or "unknown CPU"
    yield "machine", f"{device}, {machine['usable_cores']} usable cores ({machine['profile'] or 'no profile'})"
    yield "versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())


def _warnings(report: Report) -> Iterator[str]:
    yield from report.device.warnings
    named = {
        "single stream": report.single_stream and report.single_stream.latency,
        "end to end": report.phases["end_to_end"],
        "multi-stream": report.multi_stream and report.multi_stream.latency,
        "offline": report.offline and report.offline.latency,
        "paced": report.paced and report.paced.latency,
        "parallel": report.parallel and report.parallel.latency,
    }
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)  # note without its numbers -> (name, number)
    for name, latency in named.items():
        for note in latency.notes if latency else ():
            number = _PERCENT.search(note)
            found[_PERCENT.sub("%", note, count=1)].append((name, number[0] if number else ""))
    for note, places in found.items():
        names, numbers = (", ".join(texts) for texts in zip(*places, strict=True))
        yield f"{names}: {note.replace('%', numbers, 1)}"


def _scenarios(report: Report) -> Iterator[list[str]]:
    yield ["scenario", "measure", "result", "95 % interval", "N", "MLPerf N", "mJ/image"]
    for name, stream, share in (
        ("single stream (one image)", report.single_stream, 0.9),
        (f"multi-stream (queries of {QUERY_IMAGES})", report.multi_stream, 0.99),
    ):
        if stream is not None:
            yield [name, *_stream(stream, share)]
    if report.offline is not None:
        found = report.offline
        images = found.batch * found.latency.n
        rate = f"{found.images_per_second:.1f}"
        name = f"offline (batches of {found.batch})"
        yield [name, "images/s", rate, "", f"{images:,}", f"{MLPERF_OFFLINE:,}", _energy(found.energy)]
    if report.parallel is not None:
        yield [f"parallel ({report.parallel.callers} callers)", "images/s", *_parallel(report.parallel)]
    if report.paced is not None:
        yield [f"paced ({report.paced.fps:g} frames/s)", "missed", *_paced(report.paced)]


def _parallel(found: Parallel) -> list[str]:
    if found.latency is None:
        return ["failed", "", "0", "", "-"]
    return [f"{found.images_per_second:.1f}", "", f"{found.latency.n:,}", "", _energy(found.energy)]


def _paced(found: Paced) -> list[str]:
    return [f"{found.missed / found.frames:.1%}", "", f"{found.frames:,}", "", _energy(found.energy)]


def _stream(stream: Stream, share: float) -> list[str]:
    measure = f"p{100 * share:.0f}, ms"
    if stream.latency is None:
        return [measure, "failed", "", "0", f"{runs_needed(share):,}", "-"]
    found = {0.9: stream.latency.p90, 0.99: stream.latency.p99}[share]
    interval = "" if found.low is None else f"{found.low:.3f} to {found.high:.3f}"
    value = "n/a" if found.value is None else f"{found.value:.3f}"
    return [measure, value, interval, f"{stream.latency.n:,}", f"{found.needed:,}", _energy(stream.energy)]


def _energy(energy: Energy | None) -> str:
    return "-" if energy is None or energy.millijoules is None else f"{energy.millijoules:.1f}"


def _scenario_notes(report: Report) -> Iterator[str]:
    if report.multi_stream and report.multi_stream.latency and report.multi_stream.latency.p99.value is None:
        least = runs_least(0.99)
        seconds = 1.1 * report.multi_stream.latency.mean * least / 1000
        yield f"n/a: a p99 needs {least} queries; --duration {seconds:.0f} is long enough here"
    if report.multi_stream and report.multi_stream.reason:
        yield f"multi-stream failed: {report.multi_stream.reason}"
    if report.parallel and report.parallel.reason:
        yield f"parallel failed: {report.parallel.reason}"
    if report.paced:
        frames, answered = report.paced.frames, report.paced.latency.n
        yield (
            f"missed: {report.paced.missed:,} of {frames:,} frames had no answer when the next one was due; "
            f"{frames - answered:,} of them were dropped for a newer one"
        )
    found = [report.single_stream, report.multi_stream, report.offline, report.parallel, report.paced]
    energies = [scenario.energy for scenario in found if scenario is not None and scenario.energy is not None]
    for energy in energies[:1]:  # the same monitor for all
        if energy.power is not None:
            yield f"energy: from the mean power of {energy.power.of}, including everything else the device did"
        else:
            yield f"no energy: {energy.reason}"


def _latencies(report: Report) -> Iterator[list[str]]:
    yield ["", "p50", "p90", "p99", "mean", "std", "CoV", "N"]
    for name, stream in (("model, one image", report.single_stream), ("model, query", report.multi_stream)):
        if stream is not None and stream.latency is not None:
            yield [f"{name} of {stream.images}" if stream.images > 1 else name, *_latency(stream.latency)]
    if report.parallel is not None and report.parallel.latency is not None:
        yield [f"model, {report.parallel.callers} callers", *_latency(report.parallel.latency)]
    frame = f"frame {report.frame[0]}x{report.frame[1]}" if report.frame else "image of the folder"
    for name, latency in report.phases.items():
        yield [f"{frame}: {name.replace('_', ' ')}", *_latency(latency)]
    if report.paced is not None:
        yield ["paced: from the start of the call", *_latency(report.paced.latency)]
        yield ["paced: from when the frame was due", *_latency(report.paced.from_due)]


def _latency(latency: Latency) -> list[str]:
    shares = [_percentile(found, latency.n) for found in (latency.p50, latency.p90, latency.p99)]
    return [*shares, f"{latency.mean:.3f}", f"{latency.std:.3f}", f"{latency.cov:.0%}", f"{latency.n:,}"]


def _percentile(found: Percentile, n: int) -> str:
    if found.value is None:
        return "n/a"
    return f"{found.value:.3f} ({found.low:.3f}-{found.high:.3f})" + ("*" if n < found.needed else " ")


def _marks() -> list[str]:
    needed = ", ".join(f"{runs_needed(share):,} for p{100 * share:.0f}" for share in SHARES)
    least = ", ".join(f"{runs_least(share):,} for p{100 * share:.0f}" for share in SHARES)
    return [
        f"* fewer runs than MLPerf requires ({needed})",
        f"n/a: too few runs for an upper end of the interval ({least})",
    ]


def _sweep(report: Report) -> Iterator[list[str]]:
    if report.offline is not None:
        yield ["batch", "images/s", "batches"]
        for row in report.offline.sweep:
            rate = f"failed: {row.reason}" if row.images_per_second is None else f"{row.images_per_second:.1f}"
            yield [str(row.batch), rate, str(row.n)]


def _memory(memory: Mapping[str, MemoryReadings]) -> Iterator[list[str]]:
    moments = list(memory.values())
    yield ["", *(name.replace("_", " ") for name in memory)]
    for label, key in (("PSS", "pss"), ("RSS", "rss"), ("peak RSS", "peak_rss"), ("GPU", "device")):
        yield [label, *(_megabytes(getattr(moment, key)) for moment in moments)]
    yield ["drop of MemAvailable", *(_megabytes(available_drop(moments[0], moment)) for moment in moments)]


def _megabytes(reading: Reading) -> str:
    return "-" if reading.bytes is None else f"{reading.bytes / 1e6:.1f}"


def _methods(report: Report) -> Iterator[str]:
    memory = report.memory["after_runs"]
    named = {"PSS": memory.pss, "RSS": memory.rss, "peak RSS": memory.peak_rss, "GPU": memory.device}
    yield "methods: " + ", ".join(f"{name}: {found.method}" for name, found in named.items() if found.bytes is not None)
    for name, found in named.items():
        if found.reason:
            yield f"no {name}: {found.reason}"
    if report.machine["is_jetson"]:
        yield "the GPU shares the system memory; only the drop of MemAvailable counts all of it"


def _device(report: Report) -> Iterator[list[str]]:
    """The state before and after the runs, and lowest / mean / highest during them; only what could be read."""
    before, after, during = report.device.before, report.device.after, report.device.during
    rows = []
    if before.power_mode.value is not None:
        rows.append(["power mode", _mode(before.power_mode.value), "", _mode(after.power_mode.value)])
    for name in _clocks(before):
        seen = during.get("clock_mhz", {}).get(name)
        ends = [_clock(state, name) for state in (before, after)]
        rows.append([f"{name} clock, MHz (limits)", ends[0], _series(seen, 0), ends[1]])
    if after.temperatures.value:
        name = max(after.temperatures.value, key=after.temperatures.value.__getitem__)
        seen = during.get("temperature_c", {}).get(name)
        ends = [f"{(state.temperatures.value or {}).get(name, float('nan')):.1f}" for state in (before, after)]
        rows.append([f"hottest sensor, C ({name})", ends[0], _series(seen, 1), ends[1]])
    for name, series in during.get("power_w", {}).items():
        ends = [f"{value:.2f}" if (value := (state.power.value or {}).get(name)) else "" for state in (before, after)]
        rows.append([f"power, W ({name})", ends[0], _series(series, 2), ends[1]])
    counts = [state.throttle_counts.value or {} for state in (before, after)]
    rows += [
        [f"throttle events ({name})", f"{counts[0][name]:.0f}", "", f"{counts[1][name]:.0f}"]
        for name in counts[0].keys() & counts[1].keys()
    ]
    if rows:
        yield ["", "before", "during: low / mean / high", "after"]
        yield from rows


def _mode(mode: PowerMode | None) -> str:
    return "unknown" if mode is None else mode.name + ("" if mode.id is None else f" ({mode.id})")


def _clocks(state: DeviceState) -> Mapping[str, Clock]:
    """The clocks of both sources; that of the memory is only known to jetson_clocks."""
    return {**(state.jetson_clocks.value or {}), **(state.clocks.value or {})}


def _clock(state: DeviceState, name: str) -> str:
    clock = _clocks(state).get(name)
    return "" if clock is None else f"{clock.current:.0f} ({clock.low:.0f}-{clock.high:.0f})"


def _series(series: Series | None, digits: int) -> str:
    if series is None:
        return ""
    return " / ".join(f"{value:.{digits}f}" for value in (series.low, series.mean, series.high))


def _device_notes(report: Report) -> Iterator[str]:
    """Why the numbers may be hard to repeat, and what could not be read, grouped by reason."""
    gpu = _clocks(report.device.before).get("gpu")
    if report.machine["is_jetson"] and gpu is not None and gpu.low < gpu.high:
        yield "the clocks follow the load; 'sudo jetson_clocks' fixes them and makes the numbers repeatable"
    missing: dict[str, list[str]] = defaultdict(list)
    for method, reason in report.device.before.reasons:
        missing[reason].append(method)
    for reason, methods in missing.items():
        yield f"{reason}: {', '.join(methods)}"


def _estimates(report: Report) -> Iterator[str]:
    check = report.estimate
    yield from (_estimate(entry) for entry in check.estimates)
    if check.ratio is not None:
        yield f"measured p50 / estimate: {check.ratio:.2f} ({check.mode} mode)"
    elif check.estimates:
        yield f"no comparison with the measurement: {check.reason}"


def _estimate(entry: Mapping[str, Any]) -> str:
    """What the exporter expected, in one line; it comes from a file that may hold anything."""
    latency = entry.get("latency_ms")
    value = f"{latency:.2g} ms" if isinstance(latency, float) else "no latency"
    where = f"{entry.get('profile')}, {entry.get('mode')} mode, {entry.get('precision')}"
    return printable(f"stored at export for {where}: {value}; {entry.get('note', 'estimate, not measured')}")
