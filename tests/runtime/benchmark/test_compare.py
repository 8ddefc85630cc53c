"""Comparing two bundles in turns, two reports by their numbers, and reports that are none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from duallora_edge.errors import BackendError, BudgetError, ReportError
from duallora_edge.runtime.benchmark import compare as benchmark_compare
from duallora_edge.runtime.benchmark.compare import (
    MEDIAN,
    NUMBERS,
    Comparison,
    Row,
    check_ratio,
    compare_bundles,
    compare_reports,
    comparison_blocks,
    read_report,
)
from duallora_edge.runtime.benchmark.measure import run_benchmark
from duallora_edge.runtime.benchmark.table import as_text

NAMES = ("a.json", "b.json")


@pytest.fixture(scope="module")
def document(shared_bundle: Path) -> dict[str, Any]:
    report = run_benchmark(shared_bundle, threads=1, seconds=0.0, frame=(8, 8))
    found: dict[str, Any] = json.loads(json.dumps(report.to_json(), allow_nan=False))
    return found


def changed(document: dict[str, Any], keys: str, value: object) -> dict[str, Any]:
    """A copy in which the value that dotted keys lead to is another one."""
    result = copy.deepcopy(document)
    *path, last = keys.split(".")
    part = result
    for key in path:
        part = part[key]
    part[last] = value
    return result


def test_a_bundle_and_itself(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_compare, "ROUNDS", 4)
    found = compare_bundles(shared_bundle, shared_bundle, threads=1, seconds=0.02)
    median = found.rows[0]
    assert median.name == MEDIAN and median.low is not None and median.high is not None
    assert median.ratio == pytest.approx(median.first / median.second) and median.low <= median.ratio <= median.high
    assert found.differences == () and "in turns, 4 rounds" in found.method and "on cpu" in found.method
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["rows"][0]["name"] == MEDIAN
    text = as_text(comparison_blocks(found))
    assert "colours, version 3" in text and " to " in text and "not MLPerf" in text


def test_the_second_bundle_runs_where_the_first_does(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []
    load = benchmark_compare.Classifier.load

    def watched(path: Path, backend: str, threads: int | None, strict: bool, trial: bool) -> Any:
        asked.append((backend, strict))
        if len(asked) == 2:
            raise BackendError("not here")
        return load(path, backend, threads, strict, trial=trial)

    monkeypatch.setattr(benchmark_compare.Classifier, "load", watched)
    with pytest.raises(BackendError, match="not here"):
        compare_bundles(shared_bundle, shared_bundle)
    assert asked == [("auto", False), ("cpu", True)]


def test_two_reports(document: dict[str, Any]) -> None:
    same = compare_reports(document, document, NAMES)
    assert same.differences == () and all(row.ratio == 1.0 for row in same.rows)
    p50 = document["single_stream"]["latency"]["p50"]["value"]
    slower = changed(document, "single_stream.latency.p50.value", 2 * p50)
    slower = changed(slower, "backend.threads", 4)
    slower = changed(slower, "frame", [640, 480])
    slower = changed(slower, "machine.versions.numpy", "1.2.3")
    slower = changed(slower, "device.before.power_mode.value", {"name": "15W", "id": 0})
    found = compare_reports(slower, document, NAMES)
    assert found.rows[0] == Row(MEDIAN, 2 * p50, p50, 2.0)
    words = ("version of numpy: 1.2.3 | ", "power mode: 15W | unknown", "threads: 4 | 1", "frame: 640 x 480 | 8 x 8")
    assert len(found.differences) == 4 and all(any(word in line for line in found.differences) for word in words)
    assert "version of numpy: 1.2.3 | " in as_text(comparison_blocks(found))


def test_only_what_both_reports_have_is_compared(document: dict[str, Any]) -> None:
    less = changed(document, "single_stream", None)
    assert MEDIAN not in [row.name for row in compare_reports(less, document, NAMES).rows]
    with pytest.raises(BudgetError, match="one report lacks the single stream"):
        check_ratio(compare_reports(less, document, NAMES), 1.0)
    with pytest.raises(ReportError, match=r"a\.json and b\.json have no numbers in common"):
        compare_reports({"load_ms": None}, document, NAMES)


@pytest.mark.parametrize("value", [0, -1.5, "fast", True, [1], {}, float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("keys", ["load_ms", "phases.end_to_end.p50.value"])
def test_numbers_that_are_none(document: dict[str, Any], keys: str, value: object) -> None:
    with pytest.raises(ReportError, match=rf"Not valid: {keys} of b\.json must be a number above 0") as caught:
        compare_reports(document, changed(document, keys, value), NAMES)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [None, 3, "x", [], {"a": {"b": 1}}, "\x1b[2J" * 200, [[]] * 50])
@pytest.mark.parametrize("keys", ["machine", "bundle", "backend", "device", "frame", "single_stream", "seconds"])
def test_strange_parts_of_a_report_do_no_harm(document: dict[str, Any], keys: str, value: object) -> None:
    text = as_text(comparison_blocks(compare_reports(changed(document, keys, value), document, NAMES)))
    assert "\x1b" not in text and max(map(len, text.splitlines())) < 400


def test_all_wrong_numbers_are_told_at_once(document: dict[str, Any]) -> None:
    wrong: dict[str, Any] = {}
    for keys, _ in NUMBERS.values():
        part = wrong
        for key in keys[:-1]:
            part = part.setdefault(key, {})
        part[keys[-1]] = "x"
    with pytest.raises(ReportError, match="and 9 more; measure again"):
        compare_reports(wrong, document, NAMES)


def test_a_report_is_read_as_it_was_written(document: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(document))
    assert read_report(file) == document


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist; give a bundle, or a file"),
        ("", "cannot be read as a report"),
        ("\xff\xfe", "cannot be read as a report"),
        ("[" * 100_000, "cannot be read as a report"),
        ('{"load_ms": ' + "9" * 5000 + "}", "cannot be read as a report"),
        (" " * (4 * 2**20 + 1), "is larger than"),
        ("[]", "is not a benchmark report"),
        ("{}", "is not a benchmark report"),
        ('{"schema": 1}', "is not a benchmark report"),
        ('{"load_ms": 1}', "has the report schema unknown, this version reads 1"),
        ('{"load_ms": 1, "schema": 2}', "has the report schema 2, this version reads 1; measure again"),
        ('{"load_ms": 1, "schema": true}', "has the report schema True"),
        ('{"load_ms": 1, "schema": {"a": 1}}', "has the report schema something else"),
    ],
    ids=range(13),
)
def test_what_is_no_report(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "report.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ReportError, match=r"report\.json ") as caught:
        read_report(file)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("low", "high", "told"), [(0.9, 1.1, True), (1.01, 1.2, False), (0.8, 0.99, False)])
def test_an_interval_around_one_shows_no_difference(low: float, high: float, told: bool) -> None:
    found = Comparison(("a", "b"), "", (Row(MEDIAN, 5.0, 5.0, 1.0, low, high),), (), ())
    assert ("no difference is shown" in as_text(comparison_blocks(found))) is told


@pytest.mark.parametrize(("limit", "fails"), [(None, False), (1.3, False), (1.25, False), (1.2, True)])
def test_the_limit_of_a_ratio(limit: float | None, fails: bool) -> None:
    found = Comparison(("a", "b"), "", (Row(MEDIAN, 5.0, 4.0, 1.25),), (), ())
    if fails:
        with pytest.raises(BudgetError, match=r"A takes 1\.250 times as long as B, the limit is 1\.2"):
            check_ratio(found, limit)
    else:
        check_ratio(found, limit)


def test_a_difference_of_inputs_is_told(document: dict[str, Any]) -> None:
    other = changed(document, "bundle.input", [1, 224, 224, 3])
    assert compare_reports(other, document, NAMES).differences == ("input: 1 x 224 x 224 x 3 | N x 16 x 16 x 3",)
