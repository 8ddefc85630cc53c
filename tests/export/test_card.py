"""The front matter of an export's README.md, read as the Hugging Face Hub reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import RepoCard, model_index_to_eval_results

from duallora_edge.device_profiles import resolve_target
from duallora_edge.export.bundle import write_bundle
from duallora_edge.export.card import README, front_matter, hub_id
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.measurements import write_rows
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.learner.report.metrics import Cell, Metrics, TaskClasses
from duallora_edge.learner.run_directory import RunDirectory

TASKS = (TaskClasses("first", ("a", "b")),)
BINS = [0] * 15


def cell(n: int, correct: int) -> Cell:
    """A task of whose ``n`` test images ``correct`` were right, at a confidence of 0.9."""
    counts, right = ((*BINS[:13], number, 0) for number in (n, correct))
    sums = tuple(0.9 * count for count in counts)
    return Cell(n, correct, correct, n, bin_count=counts, bin_correct=right, bin_confidence=sums)


def card(text: str) -> ModelCardData:
    data = RepoCard(text, ignore_metadata_errors=False).data
    return ModelCardData(**data.to_dict())


def with_backbone(run: RunDirectory, name: str, **settings: object) -> RunDirectory:
    return RunDirectory(run.path, replace(TrainConfig(), **settings), replace(run.info, name=name))  # type: ignore[arg-type]


def test_a_bundle_has_a_card(run: RunDirectory, model: ComposedModel, tmp_path: Path) -> None:
    write_bundle(run, model, resolve_target("x86-cpu"), tmp_path / "bundle", None)
    text = (tmp_path / "bundle" / README).read_text(encoding="utf-8")
    data = card(text).to_dict()
    tags = ["duallora-edge", "onnx", "continual-learning"]
    assert data == {"library_name": "duallora-edge", "pipeline_tag": "image-classification", "tags": tags}
    active = run.active_tasks()
    rows = {run.digest(active[:1]): (cell(10, 9),), run.digest(active): (cell(10, 8), cell(30, 30))}
    write_rows(run, rows)
    write_bundle(run, model, resolve_target("x86-cpu"), tmp_path / "bundle", None)
    data = card((tmp_path / "bundle" / README).read_text(encoding="utf-8")).to_dict()
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "site" and [each.task_type for each in results] == ["image-classification"] * 2
    assert {each.dataset_name for each in results} == {"40 test images of 2 tasks"}
    assert {each.metric_type: each.metric_value for each in results} == {"accuracy": 0.95, "calibration_error": 0.05}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("vit_tiny_patch16_224", {}, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("vit_tiny_patch16_224.augreg_in21k", {}, "timm/vit_tiny_patch16_224.augreg_in21k"),
        ("vit_tiny_patch16_224", {"weights": "mine.safetensors"}, None),
        ("embedded", {}, None),
    ],
)
def test_what_the_hub_has(run: RunDirectory, name: str, settings: dict[str, str], expected: str | None) -> None:
    named = with_backbone(run, name, **settings)
    assert hub_id(named) == expected
    assert card(front_matter(named, "peft", "image-feature-extraction", [])).base_model == expected


@pytest.mark.parametrize(("cells", "settings"), [((cell(10, 9),), {"develop": True}), ((Cell(),), {})])
def test_only_what_test_images_gave_is_told(
    run: RunDirectory, cells: Sequence[Cell], settings: dict[str, bool]
) -> None:
    metrics = Metrics(TASKS, (tuple(cells),))
    assert "model-index" not in front_matter(with_backbone(run, "embedded", **settings), "a", "b", [], metrics)
