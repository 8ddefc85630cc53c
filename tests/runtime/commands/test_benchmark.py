"""``benchmark`` as a user meets it: output, files, exit code, one sentence an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from duallora_edge.cli import main
from duallora_edge.runtime.benchmark import compare as benchmark_compare


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return int(end.value.code or 0), output.out, output.err


def benchmark(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run(capsys, "benchmark", *arguments, "--duration", 0, "--frame", "32x24", "--threads", 1)


@pytest.fixture(scope="module")
def report(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.json"
    with pytest.raises(SystemExit):
        main(["benchmark", str(shared_bundle), "--json", str(file), "--duration", "0", "--threads", "1"])
    return file


def test_benchmark_writes_table_and_reports(
    capsys: pytest.CaptureFixture[str], shared_bundle: Path, tmp_path: Path
) -> None:
    file, page = tmp_path / "report.json", tmp_path / "report.md"
    options = ("--json", file, "--markdown", page, "--budget-ms", 1e6, "--budget-mb", 1e6)
    code, out, _ = benchmark(capsys, shared_bundle, *options)
    assert code == 0 and out.splitlines()[-2:] == [f"Report: {file}", f"Markdown: {page}"]
    assert json.loads(file.read_text())["frame"] == [32, 24]
    assert page.read_text().startswith("# Benchmark of colours")
    assert out.startswith("One image takes ") and "within the budget of 1e+06 ms" in out.splitlines()[0]


def test_standard_output_for_a_program(capsys: pytest.CaptureFixture[str], shared_bundle: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.md"
    code, out, err = benchmark(capsys, shared_bundle, "--scenario", "single-stream", "--json", "-", "--markdown", page)
    assert code == 0 and json.loads(out)["single_stream"]["latency"]["n"] == 36 and json.loads(out)["offline"] is None
    assert f"Markdown: {page}" in err
    code, out, _ = benchmark(capsys, shared_bundle, "--scenario", "single-stream", "--markdown", "-")
    assert code == 0 and out.startswith("# Benchmark of colours")


def test_images_of_a_folder_at_a_pace_by_several_callers(
    capsys: pytest.CaptureFixture[str], shared_bundle: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "image.png")
    samples = tmp_path / "runs.csv"
    options = ("--scenario", "single-stream", "--images", tmp_path, "--fps", 500, "--parallel", 2, "--samples", samples)
    code, out, _ = benchmark(capsys, shared_bundle, *options)
    assert code == 0 and out.splitlines()[-1] == f"Samples: {samples}"
    assert "paced (500 frames/s)" in out and "parallel (2 callers)" in out
    assert samples.read_text().startswith("scenario,images,run,latency_ms,from_due_ms,")
    code, out, err = benchmark(capsys, shared_bundle, *options, "--json", "-")
    assert code == 0 and json.loads(out)["images"]["count"] == 1 and err == f"Samples: {samples}\n"


def test_a_budget_fails_after_the_report_is_out(
    capsys: pytest.CaptureFixture[str], shared_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    code, out, err = benchmark(capsys, shared_bundle, "--json", file, "--budget-ms", 0)
    assert code == 1 and file.exists() and "single stream" in out
    assert err.startswith("Error: Over budget: p90 is ") and err.count("\n") == 1


def test_two_bundles(
    capsys: pytest.CaptureFixture[str], shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_compare, "ROUNDS", 2)
    file = tmp_path / "comparison.json"
    options = ("--compare", shared_bundle, "--max-ratio", 0.001, "--json", file)
    code, out, err = benchmark(capsys, shared_bundle, *options)
    assert code == 1 and out.startswith("A takes ") and "over the limit of 0.001" in out.splitlines()[0]
    assert "in turns, 2 rounds" in out and json.loads(file.read_text())["rows"]
    assert err.startswith("Error: A takes ") and err.count("\n") == 1


def test_reports_and_a_bundle_with_a_report(
    capsys: pytest.CaptureFixture[str], shared_bundle: Path, report: Path
) -> None:
    code, out, _ = benchmark(capsys, report, "--compare", report, "--max-ratio", 1)
    assert code == 0 and "numbers of two reports" in out and "Different conditions" not in out
    code, out, _ = benchmark(capsys, shared_bundle, "--compare", report, "--scenario", "single-stream")
    assert code == 0 and "frame: 32 x 24 | 1280 x 720" in out and "offline, images/s" not in out


def test_what_cannot_be_compared(
    capsys: pytest.CaptureFixture[str], shared_bundle: Path, report: Path, tmp_path: Path
) -> None:
    (tmp_path / "nonsense.json").write_text("nonsense")
    for first, second in ((report, tmp_path / "absent"), (shared_bundle, tmp_path / "nonsense.json")):
        code, out, err = benchmark(capsys, first, "--compare", second)
        assert (code, out) == (1, "") and err.startswith(f"Error: {second} ") and err.count("\n") == 1
    (tmp_path / "empty").mkdir()
    code, out, err = benchmark(capsys, shared_bundle, "--compare", tmp_path / "empty")
    assert (code, out) == (1, "") and "has no manifest.json" in err
    code, out, err = benchmark(capsys, tmp_path / "absent")
    assert (code, out) == (1, "") and "is not a folder" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-ratio", 2), "--max-ratio needs --compare"),
        (("--compare", "x", "--budget-ms", 2), "use --max-ratio"),
        (("--compare", "x", "--max-ratio", 0), "0"),
        (("--json", "-", "--markdown", "-"), "Only one of"),
        (("--scenario", "offline", "--budget-ms", 2), "--budget-ms needs --scenario single-stream"),
        (("--scenario", "server"), "'server'"),
        (("--images", "absent"), "absent"),
        (("--fps", 0), "0"),
        (("--parallel", 1), "1"),
        *(
            (("--compare", "x", *option), "apply to one bundle")
            for option in (("--fps", 30), ("--samples", "runs.csv"))
        ),
        *((("--frame", size), "1280x720") for size in ("1280", "0x10", "10x", "99999x1", "axb")),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str], shared_bundle: Path, options: tuple[object, ...], words: str
) -> None:
    code, _, err = run(capsys, "benchmark", shared_bundle, *options)
    assert code == 2 and words in err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "benchmark", "--help")
    assert code == 0 and "Example:\n    duallora-edge benchmark bundle" in out
