"""Statistics against slow definitions, failures of a batch, budgets, and the table."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duallora_edge.errors import BackendError, BudgetError
from duallora_edge.runtime.benchmark import (
    BATCHES,
    MIN_RUNS,
    Report,
    check_budgets,
    run_benchmark,
    summarize,
    throughput,
)
from duallora_edge.runtime.benchmark_table import table
from duallora_edge.runtime.bundle import Outputs
from duallora_edge.runtime.memory import Reading
from duallora_edge.runtime.preprocess import Pixels

ESTIMATE = {
    "profile": "orin-nano-8gb",
    "mode": "super",
    "precision": "fp16",
    "latency_ms": 1.6,
    "note": "estimate, not measured",
}


@pytest.fixture(scope="module")
def report(shared_bundle: Path) -> Report:
    found = run_benchmark(shared_bundle, threads=1, seconds=0.02, frame=(64, 48))
    return dataclasses.replace(found, estimates=(ESTIMATE,))


def percentile(samples: list[float], share: float) -> float:
    """Linear interpolation between the two nearest ranks, by hand."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@given(st.lists(st.floats(0.01, 1e4), min_size=2, max_size=50))
def test_statistics_equal_their_definitions(samples: list[float]) -> None:
    found = summarize(samples, warmup=3)
    assert found.mean == pytest.approx(statistics.fmean(samples))
    assert found.std == pytest.approx(statistics.stdev(samples), rel=1e-6, abs=1e-9)
    assert found.cov == pytest.approx(found.std / found.mean)
    for value, share in ((found.p50, 0.5), (found.p90, 0.9), (found.p99, 0.99)):
        assert value == pytest.approx(percentile(samples, share))
    half = len(samples) // 2
    assert found.drift == pytest.approx(statistics.median(samples[half:]) / statistics.median(samples[:half]) - 1)
    assert (found.n, found.warmup) == (len(samples), 3)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([1.0, 1.01] * 500, []),
        ([1.0, 1.01] * 499, ["p99 of 998 runs"]),
        ([1.0, 2.0] * 500, ["vary by"]),
        ([1.0] * 500 + [1.08] * 500, ["second half"]),
    ],
)
def test_notes_say_why_a_number_deserves_less_trust(samples: list[float], words: list[str]) -> None:
    notes = summarize(samples).notes
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True))


@pytest.mark.parametrize("samples", [[], [1.0], [[1.0, 2.0]]])
def test_too_few_samples(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        summarize(samples)


def test_throughput_ends_at_the_first_batch_that_fails() -> None:
    def run(images: Pixels) -> Outputs:
        if len(images) > 4:
            raise BackendError("out of memory")
        zeros = np.zeros((len(images), 1), np.float32)
        return Outputs(zeros, zeros, zeros[:, 0], zeros)

    found = throughput(run, np.zeros((8, 8, 3), np.uint8), seconds=0.01)
    assert [row.batch for row in found] == [1, 2, 4, 8]
    assert found[-1].images_per_second is None and found[-1].reason == "out of memory"
    assert all(row.images_per_second and row.n >= MIN_RUNS for row in found[:-1])


def test_a_report_is_complete(report: Report) -> None:
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert "not MLPerf" in document["label"]
    assert document["bundle"]["name"] == "colours" and document["bundle"]["input"] == ["N", 16, 16, 3]
    assert document["backend"]["golden_check"]["images"] == 4 and document["backend"]["threads"] == 1
    assert {"python", "numpy", "onnxruntime"} <= set(document["machine"]["versions"])
    assert document["machine"]["usable_cores"] >= 1
    assert set(document["phases"]) == {"preprocess", "infer", "postprocess", "end_to_end"}
    assert [row["batch"] for row in document["throughput"]] == list(BATCHES)
    assert list(document["memory"]) == ["before_load", "after_load", "after_runs", "after_batches"]
    assert document["single_stream"]["n"] >= MIN_RUNS and document["load_ms"] > 0


def test_the_phases_add_up(report: Report) -> None:
    parts = [report.phases[name].mean for name in ("preprocess", "infer", "postprocess")]
    assert sum(parts) <= report.phases["end_to_end"].mean


def test_the_table(report: Report) -> None:
    text = table(report)
    assert "colours, version 3: 4 classes, 2 tasks, 16 px" in text
    assert "frame 64x48: end to end" in text and "not MLPerf" in text and "p99 of" in text
    assert "stored at export for orin-nano-8gb, super mode, fp16: 1.6 ms; estimate, not measured" in text
    assert max(map(len, text.splitlines())) < 160


@pytest.mark.parametrize(
    "estimate", [{"latency_ms": "\x1b[31m", "note": "\x1b[2J"}, {"latency_ms": 10**400}, {"x": []}]
)
def test_a_strange_estimate_does_no_harm(report: Report, estimate: dict[str, object]) -> None:
    text = table(dataclasses.replace(report, estimates=(estimate,)))
    assert "no latency" in text and "\x1b" not in text


@pytest.mark.parametrize(
    ("stored", "expected"), [([ESTIMATE, 3, "x"], (ESTIMATE,)), ({"no": "list"}, ()), (None, ()), (7, ())]
)
def test_estimates_come_from_the_manifest(
    make_bundle: Callable[..., Path], stored: object, expected: tuple[object, ...]
) -> None:
    found = run_benchmark(make_bundle(target={"estimates": stored}), seconds=0.0, frame=(8, 8))
    assert found.estimates == expected
    assert ("stored at export" in table(found)) is bool(expected)


def test_budgets(report: Report) -> None:
    check_budgets(report, None, None)
    check_budgets(report, 1e6, 1e6)
    with pytest.raises(BudgetError, match=r"p90 is .* the budget 0 ms; PSS is .* MB, the budget 1 MB"):
        check_budgets(report, 0, 1)
    memory = {"after_runs": dataclasses.replace(report.memory["after_runs"], pss=Reading("pss", None, "no file"))}
    with pytest.raises(BudgetError, match="cannot be checked, because no file"):
        check_budgets(dataclasses.replace(report, memory=memory), None, 1e6)
