"""Two bundles, or two reports, side by side.

Two bundles are measured in turns in one process, so that a slow phase of the machine affects both.
For two reports, only the numbers can be compared, and everything that differed when they were measured is listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duallora_edge import __version__
from duallora_edge.errors import BudgetError, ReportError
from duallora_edge.files import read_json
from duallora_edge.runtime.benchmark.measure import describe_bundle
from duallora_edge.runtime.benchmark.report import LABEL, SCHEMA
from duallora_edge.runtime.benchmark.scenarios import run_batch, timed, warm_up
from duallora_edge.runtime.benchmark.statistics import Times, ratio_of_medians, summarize
from duallora_edge.runtime.benchmark.table import Block, printable
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.device.sampler import Watch, throttling
from duallora_edge.runtime.device.state import ROOT, read_state

ROUNDS = 20
LEAST = 3  # runs of a bundle in a round
SEED = 0
MAX_REPORT_BYTES = 4 * 2**20
MAX_PROBLEMS = 5
MAX_TEXT = 120
MEDIAN = "single stream p50, ms"
# The numbers that are compared: name -> keys that lead to the number, and its divisor.
NUMBERS: dict[str, tuple[tuple[str, ...], float]] = {
    MEDIAN: (("single_stream", "latency", "p50", "value"), 1),
    "single stream p90, ms": (("single_stream", "latency", "p90", "value"), 1),
    "single stream p99, ms": (("single_stream", "latency", "p99", "value"), 1),
    "multi-stream p50, ms": (("multi_stream", "latency", "p50", "value"), 1),
    "multi-stream p99, ms": (("multi_stream", "latency", "p99", "value"), 1),
    "offline, images/s": (("offline", "images_per_second"), 1),
    "parallel, images/s": (("parallel", "images_per_second"), 1),
    "paced from due p50, ms": (("paced", "from_due", "p50", "value"), 1),
    "paced from due p90, ms": (("paced", "from_due", "p90", "value"), 1),
    "end to end p50, ms": (("phases", "end_to_end", "p50", "value"), 1),
    "end to end p90, ms": (("phases", "end_to_end", "p90", "value"), 1),
    "load, ms": (("load_ms",), 1),
    "PSS after the runs, MB": (("memory", "after_runs", "pss", "bytes"), 1e6),
    "energy per image, mJ": (("single_stream", "energy", "millijoules"), 1),
}
# What both reports should have in common; a mapping is compared key by key.
CONDITIONS = {
    "device": ("machine", "profile"),
    "model of the device": ("machine", "model"),
    "CPU": ("machine", "cpu"),
    "GPU": ("machine", "gpu"),
    "usable cores": ("machine", "usable_cores"),
    "JetPack": ("machine", "jetpack"),
    "version": ("machine", "versions"),
    "duallora-edge": ("duallora_edge",),
    "power mode": ("device", "before", "power_mode", "value", "name"),
    "highest GPU clock": ("device", "before", "clocks", "value", "gpu", "high"),
    "highest CPU clock": ("device", "before", "clocks", "value", "cpu", "high"),
    "backend": ("backend", "name"),
    "precision": ("backend", "precision"),
    "threads": ("backend", "threads"),
    "input": ("bundle", "input"),
    "frame": ("frame",),
    "images": ("images", "count"),
    "megapixels of an image": ("images", "megapixels"),
    "frames per second": ("paced", "fps"),
    "callers": ("parallel", "callers"),
    "seconds": ("seconds",),
}


@dataclass(frozen=True)
class Row:
    """A number of A and of B, and A / B with its 5-95 % interval if both were measured in turns."""

    name: str
    first: float
    second: float
    ratio: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare_bundles` or `compare_reports` found.

    ``sides`` say what A and B are, ``method`` how they were measured, ``differences`` which conditions differed, and
    ``warnings`` why the numbers deserve less trust.
    """

    sides: tuple[str, str]
    method: str
    rows: tuple[Row, ...]
    differences: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"schema": SCHEMA, "label": LABEL, "duallora_edge": __version__, **asdict(self)}


def compare_bundles(
    first: Path,
    second: Path,
    backend: str = "auto",
    threads: int | None = None,
    strict: bool = False,
    seconds: float = 5.0,
    root: Path = ROOT,
) -> Comparison:
    """Measure the single stream of two bundles in turns, `ROUNDS` times, each for ``seconds`` in all.

    The rest as in `run_benchmark`. The second bundle has to run on the backend that the first one got: raises
    `BackendError` where it cannot, and `BundleError`.
    """
    opened = Classifier.load(first, backend, threads, strict, trial=False)
    classifiers = (opened, Classifier.load(second, opened.backend.name, threads, strict=True, trial=False))
    before = read_state(root)
    with Watch(root) as watch:
        turns = _in_turns(classifiers, seconds)
    after, during = read_state(root), watch.series()
    latencies = [summarize(np.concatenate(rounds)) for rounds in turns]
    medians = np.array([[np.median(times) for times in pair] for pair in zip(*turns, strict=True)])
    ratio = ratio_of_medians(medians, SEED)
    middle = np.median(medians, axis=0)
    rows = [Row(MEDIAN, float(middle[0]), float(middle[1]), ratio.value, ratio.low, ratio.high)]
    p90s = [latency.p90.value for latency in latencies]
    if p90s[0] is not None and p90s[1] is not None:
        rows.append(Row("single stream p90, ms", p90s[0], p90s[1], p90s[0] / p90s[1]))
    facts = [
        {"bundle": describe_bundle(classifier, path), "backend": classifier.backend.to_json()}
        for classifier, path in zip(classifiers, (first, second), strict=True)
    ]
    notes = [f"{name}: {note}" for name, found in zip("AB", latencies, strict=True) for note in found.notes]
    return Comparison(
        sides=(_side(facts[0]), _side(facts[1])),
        method=f"in turns, {ROUNDS} rounds of one process, on {opened.backend.name}",
        rows=tuple(rows),
        differences=tuple(_differences(*facts)),
        warnings=(*throttling(before, during, after), *notes),
    )


def _in_turns(classifiers: tuple[Classifier, Classifier], seconds: float) -> tuple[list[Times], list[Times]]:
    """For each classifier the times of every round, ``[n]`` in ms."""
    calls = []
    for classifier in classifiers:
        size = classifier.bundle.manifest.preprocessing.size
        image = np.random.default_rng(SEED).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
        calls.append(run_batch(classifier.backend.infer, image))
        warm_up(calls[-1])
    found: tuple[list[Times], list[Times]] = ([], [])
    for _ in range(ROUNDS):
        for call, rounds in zip(calls, found, strict=True):
            call()  # fills the caches again after the other bundle
            rounds.append(timed(call, seconds / ROUNDS, LEAST)[:, -1])
    return found


def read_report(path: Path) -> Mapping[str, Any]:
    """Read the JSON that ``duallora-edge benchmark --json`` wrote. Raises `ReportError`.

    Only the numbers that are compared are checked, by `compare_reports`.
    """
    remedy = "give a bundle, or a file that 'duallora-edge benchmark --json' wrote"
    try:
        document = read_json(path, MAX_REPORT_BYTES)
    except FileNotFoundError as error:
        raise ReportError(f"{path} does not exist; {remedy}.") from error
    except (OSError, ValueError) as error:
        reason = printable(str(error))[:MAX_TEXT]
        raise ReportError(f"{path} cannot be read as a report ({reason}); {remedy}.") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(document, dict) or "load_ms" not in document:
        raise ReportError(f"{path} is not a benchmark report; {remedy}.")
    if type(schema) is not int or schema != SCHEMA:
        raise ReportError(f"{path} has the report schema {_shown(schema)}, this version reads {SCHEMA}; measure again.")
    return document


def compare_reports(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> Comparison:
    """Compare the numbers that two reports have in common; ``names`` are their paths, for messages.

    Raises `ReportError` that lists what is not valid.
    """
    problems: list[str] = []
    numbers = [_numbers(report, name, problems) for report, name in zip((first, second), names, strict=True)]
    if problems:
        more = f" and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise ReportError(f"Not valid: {'; '.join(problems[:MAX_PROBLEMS])}{more}; measure again.")
    common = [name for name in NUMBERS if name in numbers[0] and name in numbers[1]]
    if not common:
        raise ReportError(f"{names[0]} and {names[1]} have no numbers in common; measure the same scenarios.")
    rows = tuple(Row(key, numbers[0][key], numbers[1][key], numbers[0][key] / numbers[1][key]) for key in common)
    sides = tuple(_side(report) for report in (first, second))
    return Comparison((sides[0], sides[1]), "numbers of two reports", rows, tuple(_differences(first, second)), ())


def _numbers(report: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, float]:
    found = {}
    for what, (keys, unit) in NUMBERS.items():
        value = _dig(report, keys)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e18:
            problems.append(f"{'.'.join(keys)} of {name} must be a number above 0, not {_shown(value)}")
            continue
        found[what] = value / unit
    return found


def _dig(report: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The value to which ``keys`` lead; None where one is missing or leads nowhere."""
    value: Any = report
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    for name, keys in CONDITIONS.items():
        values = [_dig(report, keys) for report in (first, second)]
        if all(isinstance(value, Mapping) for value in values):
            for key in sorted({str(key) for value in values for key in value}):
                yield from _difference(f"{name} of {key}", *(value.get(key) for value in values))
        else:
            yield from _difference(name, *values)


def _difference(name: str, first: Any, second: Any) -> Iterator[str]:
    if _shown(first) != _shown(second):
        yield f"{printable(name)[:MAX_TEXT]}: {_shown(first)} | {_shown(second)}"


def _side(report: Mapping[str, Any]) -> str:
    """What was measured, in a few words."""
    bundle = [_dig(report, ("bundle", key)) for key in ("name", "bundle_version", "path")]
    return f"{_shown(bundle[0])}, version {_shown(bundle[1])} ({_shown(bundle[2])})"


def _shown(value: Any) -> str:
    """A value from a file in a message: short and printable."""
    if isinstance(value, (list, tuple)):
        return " x ".join(_scalar(item) for item in value[:8])
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:g}"
    return printable(str(value))[:MAX_TEXT] if isinstance(value, (str, int)) else "something else"


def comparison_blocks(found: Comparison) -> list[Block]:
    """The comparison for `as_text` and `as_markdown`."""
    rows = [["", "A", "B", "A / B"]]
    for row in found.rows:
        interval = "" if row.low is None else f" ({row.low:.3f} to {row.high:.3f})"
        rows.append([row.name, f"{row.first:,.3f}", f"{row.second:,.3f}", f"{row.ratio:.3f}{interval}"])
    notes = ["below 1: A takes less; for images/s, above 1: A is faster"]
    if any(row.low is not None for row in found.rows):
        notes.append("in parentheses: 5-95 % interval of the ratio, by bootstrap over the rounds")
    if any(row.low is not None and row.high is not None and row.low <= 1 <= row.high for row in found.rows):
        notes.append("the interval contains 1, so no difference is shown; a longer --duration narrows it")
    return [
        Block("Compared", facts=[("A", found.sides[0]), ("B", found.sides[1]), ("how", found.method)]),
        Block(f"Ratios ({LABEL})", rows=rows, lines=notes),
        Block("Different conditions (A | B)", lines=found.differences),
        Block("Warnings", lines=found.warnings),
    ]


def comparison_answer(found: Comparison, limit: float | None) -> str:
    """The line that most people want: how many times as long A takes as B, and whether ``limit`` allows it."""
    medians = [row for row in found.rows if row.name == MEDIAN]
    if not medians:
        return "The single stream was not measured for both."
    row = medians[0]
    interval = "" if row.low is None else f" ({row.low:.3f} to {row.high:.3f})"
    verdict = "" if limit is None else f", {'within' if row.ratio <= limit else 'over'} the limit of {limit:g}"
    return (
        f"A takes {row.ratio:.3f}{interval} times as long as B for one image{verdict}: "
        f"{row.first:,.3f} and {row.second:,.3f} ms (p50)."
    )


def check_ratio(found: Comparison, limit: float | None) -> None:
    """Raise `BudgetError` when A takes more than ``limit`` times as long as B, by the p50 of the single stream."""
    if limit is None:
        return
    ratios = [row.ratio for row in found.rows if row.name == MEDIAN]
    if not ratios:
        raise BudgetError(
            "The ratio cannot be checked, because one report lacks the single stream; measure that scenario."
        )
    if ratios[0] > limit:
        raise BudgetError(f"A takes {ratios[0]:.3f} times as long as B, the limit is {limit:g}; find what is slower.")
