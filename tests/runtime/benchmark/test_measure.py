"""Scenarios, warm-up, failures of a batch, the report, budgets, estimates, and the output as text and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duallora_edge.device_profiles.catalog import packaged
from duallora_edge.errors import BackendError, BudgetError, DataError, SourceError
from duallora_edge.runtime.backends.contract import GoldenCheck
from duallora_edge.runtime.backends.ladder import Backend
from duallora_edge.runtime.benchmark import measure as benchmark_measure
from duallora_edge.runtime.benchmark import scenarios as benchmark_scenarios
from duallora_edge.runtime.benchmark.measure import read_images, run_benchmark
from duallora_edge.runtime.benchmark.report import (
    Device,
    EstimateCheck,
    Report,
    answer,
    check_budgets,
    check_estimates,
)
from duallora_edge.runtime.benchmark.scenarios import (
    BATCHES,
    MIN_BATCHES,
    MIN_RUNS,
    WARMUP_RUNS,
    Stream,
    offline,
    paced,
    parallel,
    repeat,
    run_batch,
    stream,
    throughput,
)
from duallora_edge.runtime.benchmark.statistics import Latency, summarize
from duallora_edge.runtime.benchmark.table import as_text, blocks, markdown, samples_csv
from duallora_edge.runtime.bundle import Outputs
from duallora_edge.runtime.device.sampler import Series, Watch
from duallora_edge.runtime.device.state import Clock, DeviceState, Finding, read_state
from duallora_edge.runtime.preprocess import Pixels
from duallora_edge.runtime.process_memory import Reading

ESTIMATE = {
    "profile": "orin-nano-8gb",
    "mode": "super",
    "precision": "fp16",
    "latency_ms": 1.6,
    "note": "estimate, not measured",
}
IMAGES = np.zeros((1, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def report(shared_bundle: Path) -> Report:
    found = run_benchmark(shared_bundle, threads=1, seconds=0.02, frame=(64, 48))
    estimate = EstimateCheck((ESTIMATE,), None, None, "it is of another device")
    return dataclasses.replace(found, estimate=estimate)


def table(report: Report) -> str:
    return as_text(blocks(report))


def limited_to(images: int) -> Callable[[Pixels], Outputs]:
    """A model that runs out of memory with more than so many images."""

    def run(batch: Pixels) -> Outputs:
        if len(batch) > images:
            raise BackendError("out of memory")
        zeros = np.zeros((len(batch), 1), np.float32)
        return Outputs(zeros, zeros, zeros[:, 0], zeros)

    return run


def test_throughput_ends_at_the_first_batch_that_fails() -> None:
    found = throughput(limited_to(4), IMAGES, seconds=0.01)
    assert [row.batch for row in found] == [1, 2, 4, 8]
    assert found[-1].images_per_second is None and found[-1].reason == "out of memory"
    assert all(row.images_per_second and row.n >= MIN_BATCHES for row in found[:-1])


def test_offline_measures_the_best_batch_anew() -> None:
    found = offline(limited_to(16), IMAGES, 0.01, Watch())
    assert found.batch == max(found.sweep, key=lambda row: row.images_per_second or 0).batch
    assert found.images_per_second == pytest.approx(1000 * found.batch / found.latency.mean)
    with pytest.raises(BackendError, match="cannot run a single image \\(out of memory\\)"):
        offline(limited_to(0), IMAGES, 0.0, Watch())


def test_a_stream_that_the_device_cannot_run() -> None:
    assert stream(limited_to(4), IMAGES, 8, 0.0, Watch()) == Stream(8, None, None, "out of memory")


def test_energy_is_power_times_time() -> None:
    class Known(Watch):
        def power(self, start: float, end: float) -> Any:
            return benchmark_scenarios.Power(10.0, "VDD_IN", 3)

    found = stream(limited_to(8), IMAGES, 8, 0.01, Known())
    assert found.latency is not None and found.energy is not None and found.energy.millijoules is not None
    # 10 W for the mean time of a query of 8, and the little that passes between queries.
    assert found.energy.millijoules >= 10 * found.latency.mean / 8
    assert stream(limited_to(1), IMAGES, 1, 0.0, Watch()).energy == benchmark_scenarios.Energy(
        None, None, "no monitor of the total power can be read"
    )


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (1, 1, [[0], [0]]),
        (1, 3, [[0, 0, 0], [0, 0, 0]]),
        (3, 1, [[0], [1], [2], [0]]),
        (3, 2, [[0, 1], [2, 0], [0, 1]]),
    ],
)
def test_batches_go_through_all_images(count: int, size: int, expected: list[list[int]]) -> None:
    seen: list[list[int]] = []
    images = np.arange(count, dtype=np.uint8)[:, None, None, None]

    def infer(batch: Pixels) -> Outputs:
        seen.append(batch.ravel().tolist())
        return limited_to(99)(batch)

    call = run_batch(infer, images, size)
    for _ in expected:
        call()
    assert seen == expected


class FakeTime:
    """A clock that moves when somebody sleeps, or works."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("call_ms", "frames_per_answer", "missed", "waited_ms"),
    [
        (50, 1.0, 0.0, 0.0),  # in time: a frame is due every 125 ms
        (150, 1.2, 1.0, 125.0),
        (400, 3.2, 1.0, 125.0),  # only the newest frame waits, and no longer than until the next one
    ],
)
def test_frames_at_the_pace_of_a_camera(
    monkeypatch: pytest.MonkeyPatch, call_ms: float, frames_per_answer: float, missed: float, waited_ms: float
) -> None:
    clock = FakeTime()
    monkeypatch.setattr(benchmark_scenarios, "time", clock)
    found = paced(lambda _: clock.sleep(call_ms / 1000), list(IMAGES), 8.0, 60.0, Watch())
    assert found.latency.p50.value == pytest.approx(call_ms) and found.latency.std == pytest.approx(0, abs=1e-6)
    assert found.frames / found.latency.n == pytest.approx(frames_per_answer, rel=0.02)
    assert found.missed == pytest.approx(missed * found.frames, abs=1)
    waits = found.from_due.samples - found.latency.samples
    assert waits.min() >= -1e-6 and waits.max() <= waited_ms + 1e-6
    assert found.frames == pytest.approx(8 * 60, abs=4)


def test_several_callers_at_once() -> None:
    together = threading.Barrier(3)

    def infer(batch: Pixels) -> Outputs:
        together.wait(timeout=30)  # breaks unless three threads are here
        return limited_to(1)(batch)

    found = parallel(infer, IMAGES, 3, 0.0, Watch())
    assert found.latency is not None and found.latency.n == MIN_RUNS and found.latency.warmup == 15
    assert found.images_per_second is not None and found.images_per_second > 0
    failed = parallel(limited_to(0), IMAGES, 2, 0.0, Watch())
    assert (failed.images_per_second, failed.latency, failed.reason) == (None, None, "out of memory")


@pytest.mark.parametrize(
    ("times", "warmup", "settled"),
    [
        ([[9.0, 8, 7, 6, 5]] + [[1.0]] * 60, 14, True),  # settles once ten runs in a row agree by their medians
        ([[2.0**run] for run in range(300)], WARMUP_RUNS, False),
        ([[1.0]] * 60, 10, True),
    ],
)
def test_warm_up_lasts_until_the_times_settle(times: list[list[float]], warmup: int, settled: bool) -> None:
    values: Iterator[float] = iter([time for part in times for time in part])
    runs = repeat(lambda: (next(values),), 0.0)
    assert (runs.warmup <= warmup, runs.settled) == (True, settled)
    assert runs.times.shape == (MIN_RUNS, 1) and runs.start <= runs.end


def test_warm_up_of_a_slow_model_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_scenarios, "WARMUP_S", 0.0)
    assert repeat(lambda: (1.0,), 0.0, 5).warmup == 2


def test_a_report_is_complete(report: Report) -> None:
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["schema"] == 1 and "not MLPerf" in document["label"]
    assert document["bundle"]["name"] == "colours" and document["bundle"]["input"] == ["N", 16, 16, 3]
    assert document["backend"]["golden_check"]["images"] == 4 and document["backend"]["threads"] == 1
    assert {"kernel", "python", "numpy", "onnxruntime"} <= set(document["machine"]["versions"])
    assert document["machine"]["usable_cores"] >= 1
    assert set(document["phases"]) == {"preprocess", "infer", "postprocess", "end_to_end"}
    assert [row["batch"] for row in document["offline"]["sweep"]] == list(BATCHES)
    assert list(document["memory"]) == ["before_load", "after_load", "after_runs", "after_batches"]
    assert document["single_stream"]["latency"]["n"] >= MIN_RUNS and document["load_ms"] > 0
    assert document["multi_stream"]["images"] == 8 and document["multi_stream"]["latency"]["n"] >= MIN_BATCHES
    assert set(document["device"]) == {"before", "after", "during", "warnings"}


def test_only_the_scenarios_that_were_asked_for(shared_bundle: Path) -> None:
    found = run_benchmark(shared_bundle, threads=1, seconds=0.0, frame=(8, 8), scenarios=["offline"])
    assert found.single_stream is None and found.multi_stream is None and found.offline is not None
    found = run_benchmark(shared_bundle, threads=1, seconds=0.0, frame=(8, 8), scenarios=["single-stream"])
    assert found.single_stream is not None and found.offline is None and "after_batches" not in found.memory
    assert "offline" not in table(found).lower() and "single stream" in table(found)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images of different sizes."""
    for side in range(10, 60, 10):
        Image.new("RGB", (side, side), (side, 0, 0)).save(tmp_path / f"{side}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("limits", "sides"),
    [({}, [10, 20, 30, 40, 50]), ({"MAX_IMAGES": 2}, None), ({"MAX_IMAGES_BYTES": 1}, None)],
)
def test_images_of_a_folder_within_limits(
    monkeypatch: pytest.MonkeyPatch, photos: Path, limits: Mapping[str, int], sides: list[int] | None
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(benchmark_measure, name, value)
    found = [len(image) for image in read_images(photos)]
    assert found == [len(image) for image in read_images(photos)]
    assert sorted(found) == sides if sides else len(found) == limits.get("MAX_IMAGES", 1)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="contains no images"):
        read_images(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"broken\.png"):
        read_images(tmp_path)


@pytest.fixture(scope="module")
def wide_report(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """With images of a folder, a pace, and several callers."""
    folder = tmp_path_factory.mktemp("photos")
    Image.new("RGB", (200, 100)).save(folder / "black.png")
    return run_benchmark(shared_bundle, threads=1, seconds=0.02, images=folder, fps=200, callers=2)


def test_a_report_of_every_load(wide_report: Report) -> None:
    document = json.loads(json.dumps(wide_report.to_json(), allow_nan=False))
    assert document["frame"] is None and document["images"]["count"] == 1 and document["images"]["megapixels"] == 0.02
    assert document["paced"]["fps"] == 200 and document["paced"]["frames"] >= document["paced"]["latency"]["n"]
    assert document["parallel"]["callers"] == 2 and document["parallel"]["images_per_second"] > 0
    assert "samples" not in json.dumps(document)
    text = table(wide_report)
    for words in (
        r"images +1 of .*photos\d+, 0\.02 megapixels on average",
        r"parallel \(2 callers\) +images/s +[\d.]+",
        r"paced \(200 frames/s\) +missed +[\d.]+%",
        r"missed: \d+ of \d+ frames had no answer when the next one was due; \d+ of them were dropped",
        r"paced: from when the frame was due +[\d.n]",
        r"image of the folder: end to end",
    ):
        assert re.search(words, text), words
    failed = dataclasses.replace(wide_report, parallel=parallel(limited_to(0), IMAGES, 2, 0.0, Watch()))
    assert "parallel failed: out of memory" in table(failed)


def test_every_run_is_a_line_of_the_samples(wide_report: Report) -> None:
    rows = list(csv.DictReader(samples_csv(wide_report).splitlines()))
    columns = {
        "single-stream": {"latency_ms"},
        "end-to-end": {"latency_ms", "preprocess_ms", "infer_ms", "postprocess_ms"},
        "paced": {"latency_ms", "from_due_ms"},
        "multi-stream": {"latency_ms"},
        "offline": {"latency_ms"},
        "parallel": {"latency_ms"},
    }
    assert list(dict.fromkeys(row["scenario"] for row in rows)) == list(columns)
    for row in rows:
        assert {name for name, value in row.items() if name.endswith("_ms") and value} == columns[row["scenario"]]
    single = [float(row["latency_ms"]) for row in rows if row["scenario"] == "single-stream"]
    assert wide_report.single_stream is not None and wide_report.single_stream.latency is not None
    np.testing.assert_allclose(single, wide_report.single_stream.latency.samples, atol=1e-4)
    alone = dataclasses.replace(
        wide_report, single_stream=None, paced=None, parallel=None, offline=None, multi_stream=Stream(8, None, None, "")
    )
    assert {row["scenario"] for row in csv.DictReader(samples_csv(alone).splitlines())} == {"end-to-end"}


def test_the_phases_add_up(report: Report) -> None:
    parts = [report.phases[name].mean for name in ("preprocess", "infer", "postprocess")]
    assert sum(parts) <= report.phases["end_to_end"].mean


def test_the_table(report: Report) -> None:
    text = table(report)
    assert "colours, version 3: 4 classes, 2 tasks, 16 px" in text
    assert "frame 64x48: end to end" in text and "not MLPerf" in text
    assert re.search(r"single stream \(one image\) +p90, ms +[\d.]+ +[\d.]+ to [\d.]+ +[\d,]+ +24,576 ", text)
    assert "stored at export for orin-nano-8gb, super mode, fp16: 1.6 ms; estimate, not measured" in text
    assert max(map(len, text.splitlines())) < 220


def test_a_percentile_of_too_few_runs_is_not_shown(report: Report) -> None:
    few, many = summarize(np.arange(1, 41.0)), summarize(np.arange(1, 30_001.0))

    def line(latency: Latency) -> str:
        changed = dataclasses.replace(report, single_stream=Stream(1, latency, None))
        return next(text for text in table(changed).splitlines() if text.startswith("  model, one image"))

    assert re.search(r"20.500 \(14.000-27.000\)\* +36.100 \(32.000-40.000\)\* +n/a", line(few))
    assert line(many).count("*") == 1 and "n/a" not in line(many)  # only the p99 lacks what MLPerf asks for
    multi = Stream(8, few, None)
    assert "a p99 needs 368 queries; --duration" in as_text(blocks(dataclasses.replace(report, multi_stream=multi)))
    failed = Stream(8, None, None, "out of memory")
    assert "multi-stream failed: out of memory" in table(dataclasses.replace(report, multi_stream=failed))


def test_markdown_has_the_same_blocks(report: Report) -> None:
    page = markdown(report, "Quick.")
    assert page.startswith("# Benchmark of colours: quick local measurement, not MLPerf\n\nQuick.\n")
    for title in ("Bundle and machine", "Scenarios", "Latency, ms", "Memory, MB", "Device", "Estimate"):
        assert f"\n## {title}" in page
    for table_rows in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table_rows.splitlines()}) == 1


def test_the_device_is_shown(report: Report) -> None:
    during = {
        "power_w": {"VDD_IN": Series(5.0, 6.5, 8.0, 12)},
        "clock_mhz": {"gpu": Series(306.0, 900.0, 1020.0, 12)},
        "temperature_c": {"tj": Series(45.0, 48.0, 51.5, 12)},
    }
    state = dataclasses.replace(
        report.device.before,
        clocks=Finding("devfreq", {"gpu": Clock(306, 306, 1020)}),
        temperatures=Finding("zones", {"tj": 45.5, "cpu": 44.0}),
        throttle_counts=Finding("counters", {"heat, core": 2.0}),
    )
    text = table(dataclasses.replace(report, device=Device(state, state, during, ("throttled: heat",))))
    for words in (
        r"throttled: heat",
        r"gpu clock, MHz \(limits\) +306 \(306-1020\) +306 / 900 / 1020 +306 \(306-1020\)",
        r"hottest sensor, C \(tj\) +45.5 +45.0 / 48.0 / 51.5 +45.5",
        r"power, W \(VDD_IN\) +5.00 / 6.50 / 8.00",
        r"throttle events \(heat, core\) +2 +2",
    ):
        assert re.search(words, text), words


@pytest.mark.parametrize(
    "estimate", [{"latency_ms": "\x1b[31m", "note": "\x1b[2J"}, {"latency_ms": 10**400}, {"x": []}]
)
def test_a_strange_estimate_does_no_harm(report: Report, estimate: dict[str, object]) -> None:
    text = table(dataclasses.replace(report, estimate=EstimateCheck((estimate,), None, None, "no")))
    assert "no latency" in text and "\x1b" not in text


@pytest.mark.parametrize(
    ("stored", "expected"), [([ESTIMATE, 3, "x"], (ESTIMATE,)), ({"no": "list"}, ()), (None, ()), (7, ())]
)
def test_estimates_come_from_the_manifest(
    make_bundle: Callable[..., Path], stored: object, expected: tuple[object, ...]
) -> None:
    found = run_benchmark(make_bundle(target={"estimates": stored}), seconds=0.0, frame=(8, 8))
    assert found.estimate.estimates == expected
    assert ("stored at export" in table(found)) is bool(expected)


def state_with(tmp_path: Path, gpu_mhz: float | None) -> DeviceState:
    clocks = None if gpu_mhz is None else {"gpu": Clock(306, 306, gpu_mhz)}
    return dataclasses.replace(read_state(tmp_path), clocks=Finding("devfreq", clocks))


@pytest.mark.parametrize(
    ("target", "gpu_mhz", "backend", "change", "ratio", "words"),
    [
        ({}, 1020, "tensorrt", {}, 2.0, None),
        ({}, 1019.9, "cuda", {}, 2.0, None),
        ({}, 624.75, "tensorrt", {}, None, "no estimate for tensorrt in fp16, normal mode"),
        ({}, 408, "tensorrt", {}, None, "no estimate is for the current GPU clock"),
        ({}, None, "tensorrt", {}, None, "no estimate is for the current GPU clock"),
        ({}, 1020, "cpu", {}, None, "no estimate for cpu in fp16"),
        ({"profile": "agx-orin-64gb"}, 1020, "tensorrt", {}, None, "for another device: this machine is orin-nano-8gb"),
        ({"estimates": 3}, 1020, "tensorrt", {}, None, "holds no estimate"),
        ({}, 1020, "tensorrt", {"latency_ms": float("inf")}, None, "no estimate for tensorrt"),
        ({}, 1020, "tensorrt", {"latency_ms": "1"}, None, "no estimate for tensorrt"),
        ({}, 1020, "tensorrt", {"precision": "fp32"}, None, "no estimate for tensorrt in fp16"),
    ],
)
def test_a_measurement_is_compared_with_an_estimate_of_the_same_device_only(
    tmp_path: Path,
    target: Mapping[str, Any],
    gpu_mhz: float | None,
    backend: str,
    change: Mapping[str, Any],
    ratio: float | None,
    words: str | None,
) -> None:
    stored = {"profile": "orin-nano-8gb", "estimates": [{**ESTIMATE, **change}], **target}
    single = Stream(1, summarize([3.2] * 40), None)
    ran = Backend(backend, limited_to(1), GoldenCheck(1, 1.0, 0.0, 0.0, 0.0, 1.0), {}, "fp16")
    found = check_estimates(stored, "orin-nano-8gb", state_with(tmp_path, gpu_mhz), ran, single)
    assert found.ratio == (None if ratio is None else pytest.approx(ratio))
    assert (found.reason is None) == (words is None) and (words or "") in (found.reason or "")
    if ratio is not None:
        missing = check_estimates(stored, "orin-nano-8gb", state_with(tmp_path, gpu_mhz), ran, None)
        assert missing.reason == "the single stream was not measured"


def test_a_graphics_card_has_one_mode(tmp_path: Path) -> None:
    assert list(packaged("rtx-sm86").modes) == ["normal"]
    stored = {"profile": "rtx-sm86", "estimates": [{**ESTIMATE, "mode": "normal"}]}
    ran = Backend("tensorrt", limited_to(1), GoldenCheck(1, 1.0, 0.0, 0.0, 0.0, 1.0), {}, "fp16")
    single = Stream(1, summarize([0.8] * 40), None)
    assert check_estimates(stored, "rtx-sm86", read_state(tmp_path), ran, single).ratio == pytest.approx(0.5)


def test_budgets(report: Report) -> None:
    check_budgets(report, None, None)
    check_budgets(report, 1e6, 1e6)
    with pytest.raises(BudgetError, match=r"p90 is .* the budget 0 ms; PSS is .* MB, the budget 1 MB"):
        check_budgets(report, 0, 1)
    memory = {"after_runs": dataclasses.replace(report.memory["after_runs"], pss=Reading("pss", None, "no file"))}
    with pytest.raises(BudgetError, match="cannot be checked, because no file"):
        check_budgets(dataclasses.replace(report, memory=memory), None, 1e6)
    with pytest.raises(BudgetError, match="the single stream was not measured"):
        check_budgets(dataclasses.replace(report, single_stream=None), 1.0, None)


def test_the_answer_comes_with_its_verdict(report: Report) -> None:
    words = r"One image takes [\d.]+ ms \(p90\){} on cpu in fp32; memory \(PSS\) [\d.]+ MB{}\."
    assert re.fullmatch(words.format("", "; no budget given"), answer(report, None, None))
    within, over = ", within the budget of 1e+06 {}", ", over the budget of 0 {}"
    found = answer(report, 1e6, 0)
    assert within.format("ms") in found and over.format("MB") in found
    assert answer(dataclasses.replace(report, single_stream=None), None, None).startswith("The single stream was not")


def test_warnings_come_last_and_each_once(report: Report) -> None:
    noisy, calm = summarize([1.0, 2.0] * 20, warmup=7, settled=False), summarize([1.0] * 40)
    changed = dataclasses.replace(
        report,
        single_stream=Stream(1, noisy, None),
        multi_stream=Stream(8, calm, None),
        offline=None,
        phases={**report.phases, "end_to_end": summarize([1.0, 1.0, 2.0, 2.0] * 10)},
    )
    last = blocks(changed)[-1]
    assert last.title == "Warnings"
    assert list(last.lines)[-2:] == [
        "single stream: unstable: after 7 runs of warm-up the times had not settled",
        "single stream, end to end: unstable: the runs vary by 34%, 34% of their mean; close other programs, "
        "fix the clocks",
    ]
