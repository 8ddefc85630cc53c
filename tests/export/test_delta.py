"""Deltas between exports: what a device makes of them is the export, bit for bit."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from duallora_edge.errors import ExportError
from duallora_edge.export.delta import fold_by_ranks
from duallora_edge.export.export import export_delta, export_run
from duallora_edge.learner import Learner
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.runtime import Bundle, Classifier
from duallora_edge.runtime.bundle import MANIFEST
from duallora_edge.runtime.field.delta import apply_delta, delta_facts
from duallora_edge.runtime.graph_weights import WEIGHTS
from duallora_edge.runtime.preprocess import read_image
from duallora_edge.runtime.tensor_file import TensorFile

SETTINGS = {"size": 32, "rank_orthogonal": 2, "rank_residual": 2, "summaries": 1, "epochs": 1, "min_steps": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, image_stream: Path) -> tuple[Path, Path]:
    """A run with both tasks of the stream, and the same run with the first alone."""
    folder = tmp_path_factory.mktemp("runs")
    learner = Learner(folder / "both", data=str(image_stream), device="cpu", **SETTINGS)
    learner.learn()
    shutil.copytree(folder / "both", folder / "first")
    Learner(folder / "first").rollback()
    return folder / "both", folder / "first"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("target", "split"), [("rtx-sm86", True), ("orin-nano-8gb", False), ("x86-cpu", False)])
def test_a_task_as_a_delta(
    runs: tuple[Path, Path], image_stream: Path, tmp_path: Path, target: str, split: bool
) -> None:
    both, first = runs
    export_run(first, tmp_path / "old", target, split=split)
    delta = export_delta(both, tmp_path / "old", tmp_path / "1-2.delta")
    made = apply_delta(tmp_path / "old", delta.path, tmp_path / "made")
    assert json.dumps(made.manifest.to_json()) == json.dumps(delta.manifest.to_json())
    assert delta_facts(delta.path).from_version == 1
    assert delta.bytes == delta.path.stat().st_size and 0 < delta.share < 1
    assert (made.manifest.split, made.manifest.target["profile"]) == (split, target)
    with zipfile.ZipFile(delta.path) as archive:
        new = TensorFile(archive.read(f"{WEIGHTS}.tensors")).entries
        graphs = [name for name in archive.namelist() if name.startswith("prefix")]
    folded = [name for name in new if ".qkv.weight.1.q.up" in name]
    assert folded and not any(name.endswith((".qkv.weight", ".fc1.weight", ".proj.weight")) for name in new)
    assert not graphs  # the frozen part is the same file
    again = export_run(both, tmp_path / "whole", target, split=split)  # the same, but for the time in the manifest
    old, new_files = content(tmp_path / "made"), content(again.path)
    assert {name for name in old if old[name] != new_files[name]} == {MANIFEST}
    photo = next((image_stream / "02-round" / "test").glob("*/*"), None) or next(image_stream.glob("*/test/*/*"))
    frame = read_image(photo)
    answers = [Classifier.load(path, "cpu", 1)(frame) for path in (tmp_path / "made", again.path)]
    assert answers[0].probabilities.tobytes() == answers[1].probabilities.tobytes()


def test_back_and_beside(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A task that was taken back, and a bundle of another target: larger, and right all the same."""
    both, first = runs
    export_run(both, tmp_path / "old", "x86-cpu")
    back = export_delta(first, tmp_path / "old", tmp_path / "back.delta", bundle_version=9)
    made = apply_delta(tmp_path / "old", back.path, tmp_path / "made")
    assert made.manifest.bundle_version == 9 and len(Bundle.open(tmp_path / "made").manifest.tasks) == 1
    other = export_delta(both, tmp_path / "old", tmp_path / "other.delta", "rtx-sm86")
    assert apply_delta(tmp_path / "old", other.path, tmp_path / "rtx").manifest.target["profile"] == "rtx-sm86"


def test_what_is_at_the_output_stays(runs: tuple[Path, Path], tmp_path: Path) -> None:
    export_run(runs[1], tmp_path / "old", "x86-cpu")
    (tmp_path / "mine").write_text("my notes")
    with pytest.raises(ExportError, match="exists and is not a delta"):
        export_delta(runs[0], tmp_path / "old", tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "my notes"
    for _ in range(2):  # a delta is replaced
        export_delta(runs[0], tmp_path / "old", tmp_path / "1-2.delta")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-2.delta", "mine", "old"]


@pytest.mark.parametrize("method", ["dual_lora", "sequential", "task_arithmetic", "frozen"])
def test_folding_by_ranks_differs_by_rounding_alone(
    tiny_backbone: Backbone,
    make_task: Callable[..., PreparedTask],
    learn: Callable[..., list[TaskRecord]],
    method: str,
) -> None:
    tasks = [
        make_task(f"t{index}", list(names), [2 * index, 2 * index + 1]) for index, names in enumerate(("ab", "cd"))
    ]
    records = learn(tasks, method=method)
    model, folded = compose(tiny_backbone, records), compose(tiny_backbone, records)
    fold_by_ranks(folded, records)
    for before, after in zip(model.network.blocks, folded.network.blocks, strict=True):
        torch.testing.assert_close(after.weight, before.weight, rtol=1e-5, atol=1e-6)
        assert after.weight.dtype == before.weight.dtype
    assert np.isfinite(folded.network.blocks[0].weight.numpy()).all()
