"""``duallora-edge benchmark``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from duallora_edge.cli_groups import GroupedCommand, option_group
from duallora_edge.files import write_atomic, write_json
from duallora_edge.runtime.benchmark.compare import (
    Comparison,
    check_ratio,
    compare_bundles,
    compare_reports,
    comparison_answer,
    comparison_blocks,
    read_report,
)
from duallora_edge.runtime.benchmark.measure import run_benchmark
from duallora_edge.runtime.benchmark.report import answer, check_budgets
from duallora_edge.runtime.benchmark.scenarios import SCENARIOS, SINGLE_STREAM
from duallora_edge.runtime.benchmark.table import as_markdown, as_text, markdown, samples_csv, table
from duallora_edge.runtime.commands.options import backend_options, frame_size
from duallora_edge.text import escaped

_measurement = option_group("Measurement")
_output = option_group("Output")
_limits = option_group("Budgets")
_comparison = option_group("Comparison")


@click.command(cls=GroupedCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@_measurement(
    "--scenario",
    "scenarios",
    type=click.Choice(SCENARIOS),
    multiple=True,
    help="Measure only this one; may be repeated. Default: all three.",
)
@_measurement(
    "--duration",
    type=click.FloatRange(0.0, 3600.0),
    default=5.0,
    show_default=True,
    help="Seconds for each scenario and for the phases; with --compare, for each bundle.",
)
@_measurement(
    "--frame",
    callback=frame_size,
    metavar="WxH",
    default="1280x720",
    show_default=True,
    help="Size of the camera frame, which is generated.",
)
@_measurement(
    "--images",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Classify images of a folder instead: as many as fit into 64 MiB, at most 100. They count as memory.",
)
@_measurement(
    "--fps",
    type=click.FloatRange(0.1, 1000.0),
    help="Also classify frames at this rate, as from a camera; the device may lower its clocks between them.",
)
@_measurement(
    "--parallel", type=click.IntRange(2, 256), metavar="N", help="Also let N threads run the model at the same time."
)
@_output("--json", "json_file", metavar="FILE", help="Write the report as JSON; '-' prints it instead of text.")
@_output("--markdown", "markdown_file", metavar="FILE", help="Write Markdown; '-' prints it instead of text.")
@_output(
    "--samples",
    "samples_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write every run as a line of CSV.",
)
@_limits("--budget-ms", type=click.FloatRange(min=0), help="Exit code 1 when one image takes longer than this (p90).")
@_limits("--budget-mb", type=click.FloatRange(min=0), help="Exit code 1 when the process takes more memory (PSS).")
@_comparison(
    "--compare", "other", metavar="OTHER", type=click.Path(path_type=Path), help="Another bundle or report (see above)."
)
@_comparison(
    "--max-ratio",
    type=click.FloatRange(min=0, min_open=True),
    help="Exit code 1 when BUNDLE takes more than this many times as long as OTHER.",
)
@backend_options
def benchmark(
    bundle: Path,
    scenarios: tuple[str, ...],
    duration: float,
    frame: tuple[int, int],
    images: Path | None,
    fps: float | None,
    parallel: int | None,
    json_file: str | None,
    markdown_file: str | None,
    samples_file: Path | None,
    budget_ms: float | None,
    budget_mb: float | None,
    other: Path | None,
    max_ratio: float | None,
    backend: str,
    threads: int | None,
    strict: bool,
) -> None:
    """Measure latency, throughput, energy and memory of the bundle BUNDLE on this machine.

    The scenarios are those of MLPerf Inference, but a run of a few seconds is not an MLPerf result: the report says
    how many runs there were and how many MLPerf asks for. It also holds the power mode, clocks, temperature,
    throttling and power, as far as the device reports them. Nothing on the device is changed.

    All of it runs back to back, except --fps: there each frame has its time, as with a camera. Its latency counts from
    that time as well, and a frame is missed when it has no answer before the next one is due.

    The latency budget applies to the p90 of the single stream (the model on one prepared image), the memory budget
    (1 MB = 10^6 bytes) to the PSS of the whole process after single images.

    With --compare, BUNDLE and OTHER may each be a bundle or a report (--json). Two bundles run single images in turns
    on the same backend, and the result is the ratio of their medians with its 5-95 % interval. Otherwise the numbers
    of two reports are compared, together with every condition that differed; a bundle is measured first. To compare
    with --images, --fps or --parallel, measure each bundle with --json, then compare the reports.

    \b
    Example:
      duallora-edge benchmark bundle --budget-ms 20 --json report.json --markdown report.md
      duallora-edge benchmark bundle --images photos --fps 30 --samples runs.csv
      duallora-edge benchmark bundle --scenario single-stream --parallel 4
      duallora-edge benchmark new-bundle --compare bundle --max-ratio 1.1
      duallora-edge benchmark today.json --compare report.json
    """
    scenarios = scenarios or SCENARIOS
    if json_file == "-" and markdown_file == "-":
        raise click.UsageError("Only one of --json and --markdown can be '-'.")
    _check_limits(other is not None, budget_ms, budget_mb, max_ratio, scenarios)
    if other is not None and (images is not None or fps or parallel or samples_file is not None):
        raise click.UsageError(
            "--images, --fps, --parallel and --samples apply to one bundle; measure each with --json, then compare the "
            "reports."
        )
    if other is None:
        report = run_benchmark(bundle, backend, threads, strict, duration, frame, scenarios, images, fps, parallel)
        summary = answer(report, budget_ms, budget_mb)
        _show(table(report, summary), report.to_json(), markdown(report, summary), json_file, markdown_file)
        if samples_file is not None:
            write_atomic(samples_file, samples_csv(report))
            click.echo(escaped(f"Samples: {samples_file}"), err="-" in (json_file, markdown_file))
        check_budgets(report, budget_ms, budget_mb)
        return
    if bundle.is_dir() and other.is_dir():
        found = compare_bundles(bundle, other, backend, threads, strict, duration)
    else:
        found = _compare(bundle, other, (backend, threads, strict, duration, frame, scenarios))
    blocks, summary = comparison_blocks(found), comparison_answer(found, max_ratio)
    page = as_markdown(blocks, "Comparison of two benchmarks", summary)
    _show(f"{summary}\n\n{as_text(blocks)}", found.to_json(), page, json_file, markdown_file)
    check_ratio(found, max_ratio)


def _check_limits(
    comparing: bool, budget_ms: float | None, budget_mb: float | None, max_ratio: float | None, scenarios: Sequence[str]
) -> None:
    """A limit for which nothing is measured is wrong usage, not a check that passes."""
    if not comparing and max_ratio is not None:
        raise click.UsageError("--max-ratio needs --compare.")
    if comparing and (budget_ms is not None or budget_mb is not None):
        raise click.UsageError("--budget-ms and --budget-mb apply to one bundle; with --compare use --max-ratio.")
    if budget_ms is not None and SINGLE_STREAM not in scenarios:
        raise click.UsageError(f"--budget-ms needs --scenario {SINGLE_STREAM}.")


def _compare(first: Path, second: Path, options: tuple[Any, ...]) -> Comparison:
    """Compare two reports; either may be a bundle, which is measured now."""
    # Files are read first: a wrong path should not cost a measurement.
    read = {path: read_report(path) for path in (first, second) if not path.is_dir()}
    reports = [read[path] if path in read else run_benchmark(path, *options).to_json() for path in (first, second)]
    return compare_reports(reports[0], reports[1], (str(first), str(second)))


def _show(text: str, document: Mapping[str, Any], page: str, json_file: str | None, markdown_file: str | None) -> None:
    """Print one form, and write the others to their files."""
    if json_file == "-":
        click.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        click.echo(escaped(page if markdown_file == "-" else text))
    written = []
    if json_file not in (None, "-"):
        write_json(Path(json_file), document)
        written.append(f"Report: {json_file}")
    if markdown_file not in (None, "-"):
        write_atomic(Path(markdown_file), page)
        written.append(f"Markdown: {markdown_file}")
    # With '-' standard output is for a program.
    for line in written:
        click.echo(escaped(line), err="-" in (json_file, markdown_file))
