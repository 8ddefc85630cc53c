"""Comparing methods: settings of variants, one table, one picture, results that are kept."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from PIL import Image

from duallora_edge.cli import main
from duallora_edge.compare import GROUPS, Variant
from duallora_edge.errors import ConfigError, RunError
from duallora_edge.learner.report.comparison import Result, comparison_png, markdown

ENDS = {"last_accuracy": (0.8, 0.9)}
RESULT = Result(0.9, 0.95, 0.02, 0.01, 0.0, 0.03, 0.99, 0.05, 0.9, 36_864, 2e6, 90, ENDS)
JOINT = Result(0.92, None, None, None, None, 0.02, None, 0.05, None, 36_864, 2e6, 60, ENDS)
QUICK = ["--latency-rounds", "3", "--config"]


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """A configuration that learns in a moment."""
    path = tmp_path / "quick.yaml"
    path.write_text("epochs: 1\nmin_steps: 2\nrank_orthogonal: 2\nrank_residual: 2\nsummaries: 1\ndevice: cpu\n")
    return path


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("frozen", {"method": "frozen"}),
        (" dual_lora:rank_residual=4 ", {"method": "dual_lora", "rank_residual": 4}),
        ("frozen:classifier=mean_f:energy=0.5", {"method": "frozen", "classifier": "mean_f", "energy": 0.5}),
    ],
)
def test_variants(text: str, settings: dict[str, object]) -> None:
    variant = Variant.parse(text)
    assert variant.settings == settings
    assert variant.label == text.strip()
    assert not set(variant.file_name) & set(":=/ ")


@pytest.mark.parametrize(
    "text", ["magic", "frozen:classifier", "frozen:seed=3", "frozen:colour=red", "frozen:energy=hot"]
)
def test_bad_variants(text: str) -> None:
    with pytest.raises(ConfigError):
        Variant.parse(text)


@pytest.mark.parametrize("group", GROUPS)
def test_groups_are_variants_with_different_files(group: str) -> None:
    assert len({Variant.parse(text).file_name for text in GROUPS[group]}) == len(GROUPS[group])


def test_table() -> None:
    other = Result(0.8, 0.95, 0.02, 0.01, 0.0, 0.03, 0.99, 0.05, 0.9, 36_864, 2e6, 90, ENDS)
    table = markdown("site", {"dual_lora": [RESULT, other], "joint": [JOINT]}, {"dual_lora": 6.25}, {"joint"})
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert rows[1].endswith("| 1.0 | – |")
    assert rows[0].startswith("| `dual_lora` | 85.0 ± 7.1 | 80.0 to 90.0 | 95.0 ± 0.0 | 2.0 ± 0.0 |")
    assert rows[0].endswith("| 1.5 ± 0.0 | 6.2 |")
    assert rows[1].startswith("| `joint`¹ | 92.0 | 80.0 to 90.0 | – | – | – | – | 2.0 | – |")
    assert table.startswith("**site**, 2 seeds")


def test_picture() -> None:
    png = comparison_png("site", {"dual_lora": [RESULT, RESULT], "$x_1$ joint": [JOINT]})
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        assert image.width > 1000


def test_results_are_stored() -> None:
    assert Result.from_json(json.loads(json.dumps(RESULT.to_json()))) == RESULT
    with pytest.raises(RunError, match="unreadable"):
        Result.from_json({"last": 1})


def test_command(call: Callable[..., tuple[int, str, str]], image_stream: Path, tmp_path: Path, quick: Path) -> None:
    arguments = ["compare", "--stream", image_stream, "--methods", "dual_lora,frozen:classifier=mean_f,joint"]
    out = tmp_path / "out"
    code, printed, errors = call(*arguments, "--out", out, *QUICK, quick)
    assert code == 0, errors
    assert "| `dual_lora` |" in printed
    assert (out / "comparison.md").read_text() in printed
    assert (out / "comparison.png").is_file()
    stored = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert len(stored) == 3
    (out / "package.json").write_text("{}")  # no run lies beside it: no result
    stored[out / "package.json"] = (out / "package.json").stat().st_mtime_ns
    assert call(*arguments, "--out", out, *QUICK, quick)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.json")} == stored
    # Results made with other settings are not mixed in.
    code, _, errors = call(*arguments, "--out", out, "--size", "32", *QUICK, quick)
    assert code == 1
    assert "size" in errors


@pytest.mark.parametrize("name", ["comparison.md", "comparison.png"])
def test_files_of_others_are_left_alone(
    call: Callable[..., tuple[int, str, str]], image_stream: Path, tmp_path: Path, quick: Path, name: str
) -> None:
    (tmp_path / name).write_text("years of work")
    code, _, errors = call("compare", "--stream", image_stream, "--out", tmp_path, *QUICK, quick)
    assert code == 1 and errors.count("\n") == 1
    assert f"{name} was not written by a comparison; give another folder with --out" in errors
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path != quick} == {name: "years of work"}


def test_calls_at_once_fill_one_table(
    processes: ForkServerContext, image_stream: Path, tmp_path: Path, quick: Path
) -> None:
    """Each with a seed or method of its own; whichever ends last, the table has all."""
    out = tmp_path / "out"
    jobs = [("frozen", "0"), ("frozen", "1"), ("frozen:classifier=mean_f", "0")]
    words = ["compare", "--stream", str(image_stream), "--out", str(out), "--config", str(quick)]
    started = [
        processes.Process(
            target=main, args=([*words, "--latency-rounds", "0", "--methods", methods, "--seeds", seeds],)
        )
        for methods, seeds in jobs
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0]
    table = (out / "comparison.md").read_text()
    assert "2 seeds" in table and "| `frozen` |" in table and "| `frozen:classifier=mean_f` |" in table
    assert " ± " in next(line for line in table.splitlines() if line.startswith("| `frozen` |"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seeds", "one"], "--seeds must be whole numbers"),
        (["--methods", "magic"], "method must be one of"),
        (["--shuffle", "--seeds", "1"], "--shuffle needs"),
        (["--stream", "nowhere"], "nowhere"),
    ],
)
def test_wrong_usage_is_said(
    call: Callable[..., tuple[int, str, str]], image_stream: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    code, _, errors = call("compare", "--stream", image_stream, "--out", tmp_path / "out", *options)
    assert code == 1
    assert said in errors


def test_development_leaves_the_test_images_alone(
    call: Callable[..., tuple[int, str, str]], image_stream: Path, tmp_path: Path, quick: Path
) -> None:
    out = tmp_path / "out"
    options = ["--methods", "frozen", "--develop", "--out", out, "--latency-rounds", "0", "--config", quick]
    code, _, errors = call("compare", "--stream", image_stream, *options)
    assert code == 0, errors
    assert "the test images are left alone" in errors
