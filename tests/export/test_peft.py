"""Runs as adapters of PEFT: on the timm model they give the features of the run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from duallora_edge.errors import ExportError
from duallora_edge.export import export_peft
from duallora_edge.export.peft import ADAPTER, BACKBONE, CONFIG, README, loras
from duallora_edge.learner import Learner, methods
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.base_adaptation import BaseAdaptation
from duallora_edge.learner.network.network import run_suffix
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.run_directory import RunDirectory

Call = Callable[..., tuple[int, str, str]]
FRAMES = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FILES = {CONFIG, ADAPTER, README, BACKBONE}


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft", reason="peft is not installed (extra bench)")


@pytest.fixture
def stored(
    tmp_path: Path,
    make_backbone: Callable[..., Backbone],
    make_task: Callable[..., PreparedTask],
    learn: Callable[..., list[TaskRecord]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[RunDirectory, Backbone]]:
    """``stored(residuals, variant={}, base=False, **settings)``: a run of as many tasks on a tiny ViT, and that ViT."""

    def make(
        residuals: Sequence[str], variant: dict[str, Any] | None = None, base: bool = False, **settings: Any
    ) -> tuple[RunDirectory, Backbone]:
        backbone = make_backbone(**(variant or {}))
        if base:
            updates = tuple((torch.randn(2, 48) * 0.1, torch.randn(2, 144) * 0.1) for _ in backbone.model.blocks)
            positions = backbone.model.pos_embed + 0.1
            directions = torch.zeros(0, 48)
            backbone.adapt(BaseAdaptation(updates, positions, directions, "0" * 64, 32, 2, {}), "1" * 64)
        records: list[TaskRecord] = []
        for index, residual in enumerate(residuals):
            task = make_task(f"t{index}", [f"a{index}", f"b{index}"], [2 * index, 2 * index + 1], train=6, validation=2)
            options = {"residual": residual, "learning_rate": 0.03, **settings}
            records = learn([task], past=records, backbone=backbone, **options)
        run = RunDirectory.create(tmp_path / "site", TrainConfig(), backbone.info)
        for record in records:
            run.commit(record)
        monkeypatch.setattr(RunDirectory, "backbone", lambda *_: backbone)
        return run, backbone

    return make


def features(run: RunDirectory, backbone: Backbone, task: int) -> Tensor:
    """What the network of the run gives for images that surely belong to a task."""
    network = methods.compose(backbone, run.records()).eval().network
    tokens, _ = backbone.prefix(FRAMES)
    posterior = torch.eye(len(run.active_tasks()))[task].expand(len(FRAMES), -1)
    return run_suffix(backbone, network.blocks, tokens, posterior)[0]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"reg_tokens": 4, "qk_norm": True, "init_values": 0.5},
    {"global_pool": "avg"},
    {"qkv_bias": False},
    {"depth": 13},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_the_timm_model_gives_the_features_of_the_run(
    peft: Any,
    stored: Callable[..., Any],
    make_backbone: Callable[..., Backbone],
    tmp_path: Path,
    variant: dict[str, Any],
) -> None:
    run, backbone = stored(["previous", "isolated", "previous"], variant)
    for task in range(3):
        adapter = export_peft(run.path, tmp_path / "adapter", task=f"t{task}")
        blocks = range(2, variant.get("depth", 4))
        assert {*adapter.ranks} == {f"blocks.{block}.attn.qkv" for block in blocks}
        vit = make_backbone(**variant).model
        loaded = peft.PeftModel.from_pretrained(vit, tmp_path / "adapter").eval()
        expected, images = features(run, backbone, task), backbone.normalised(FRAMES)
        assert (backbone.model(images) - expected).abs().max() > 1e-3  # the adapters matter
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-5)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "inflora"},
        {"method": "sequential"},
        {"method": "task_arithmetic"},
        {"gate": "open"},
        {"residual": "none"},
    ],
    ids=str,
)
@torch.no_grad()
def test_merged_weights_are_the_folded_ones_where_gates_do_not_matter(
    peft: Any,
    stored: Callable[..., Any],
    make_backbone: Callable[..., Backbone],
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    run, backbone = stored(["isolated", "isolated"], **settings)
    export_peft(run.path, tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(make_backbone().model, tmp_path / "adapter").merge_and_unload()
    model = methods.compose(backbone, run.records())
    if settings.get("gate") != "open":
        for block, folded in zip(merged.blocks[2:], model.network.blocks, strict=True):
            torch.testing.assert_close(block.attn.qkv.weight, folded.weight, rtol=1e-5, atol=1e-6)
    expected = features(run, backbone, 0)
    torch.testing.assert_close(merged.eval()(backbone.normalised(FRAMES)), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_model_holds_the_adapters_of_all_tasks(
    peft: Any, stored: Callable[..., Any], make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    run, backbone = stored(["isolated", "isolated"])
    for task in ("t0", "t1"):
        export_peft(run.path, tmp_path / task, task=task)
    model = peft.PeftModel.from_pretrained(make_backbone().model, tmp_path / "t0", adapter_name="t0")
    model.load_adapter(tmp_path / "t1", "t1")
    for task, name in enumerate(("t0", "t1")):
        model.set_adapter(name)
        found = model.eval()(backbone.normalised(FRAMES))
        torch.testing.assert_close(found, features(run, backbone, task), rtol=1e-4, atol=1e-5)


def test_one_task_needs_no_name(peft: Any, stored: Callable[..., Any], tmp_path: Path) -> None:
    run, _ = stored(["isolated"])
    assert export_peft(run.path, tmp_path / "adapter").ranks
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == FILES


def test_gates_are_not_guessed(stored: Callable[..., Any], tmp_path: Path) -> None:
    run, _ = stored(["isolated", "isolated"])
    with pytest.raises(ExportError, match=r"which PEFT cannot do; name the task .* with --task \(t0, t1\)"):
        export_peft(run.path, tmp_path / "adapter")
    with pytest.raises(ExportError, match="The run has no task 't7'; it has t0, t1"):
        export_peft(run.path, tmp_path / "adapter", task="t7")
    assert not (tmp_path / "adapter").exists()


def test_a_run_without_adapters(stored: Callable[..., Any], tmp_path: Path) -> None:
    run, _ = stored(["none"], method="frozen")
    with pytest.raises(ExportError, match="has no adapters"):
        export_peft(run.path, tmp_path / "adapter")


@torch.no_grad()
def test_an_adapted_backbone_is_in_the_folder(
    peft: Any, stored: Callable[..., Any], make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    run, backbone = stored(["isolated"], base=True)
    export_peft(run.path, tmp_path / "adapter")
    vit = make_backbone().model
    vit.load_state_dict(load_file(tmp_path / "adapter" / BACKBONE))
    loaded = peft.PeftModel.from_pretrained(vit, tmp_path / "adapter").eval()
    expected = features(run, backbone, 0)
    torch.testing.assert_close(loaded(backbone.normalised(FRAMES)), expected, rtol=1e-4, atol=1e-5)


def test_ranks_that_add_nothing_are_left_out_and_ranks_may_differ(
    peft: Any, stored: Callable[..., Any], make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    run, backbone = stored(["none"])
    record = run.records()[0]
    first, second = record.blocks
    up = first.orthogonal.q_up.clone()
    up[1:] = 0
    blocks = (replace(first, orthogonal=first.orthogonal._replace(q_up=up)), second)
    other = RunDirectory.create(tmp_path / "other", TrainConfig(), backbone.info)
    other.commit(replace(record, blocks=blocks))
    ranks = export_peft(other.path, tmp_path / "adapter").ranks
    assert ranks == {"blocks.2.attn.qkv": 5, "blocks.3.attn.qkv": 8}
    merged = peft.PeftModel.from_pretrained(make_backbone().model, tmp_path / "adapter").merge_and_unload()
    model = methods.compose(backbone, other.records())
    for block, folded in zip(merged.blocks[2:], model.network.blocks, strict=True):
        torch.testing.assert_close(block.attn.qkv.weight, folded.weight, rtol=1e-5, atol=1e-6)
    assert len(loras(model, other.records(), None)["blocks.2.attn.qkv"][0]) == 5


def test_an_adapter_is_replaced_and_nothing_else(stored: Callable[..., Any], tmp_path: Path) -> None:
    run, _ = stored(["isolated"])
    folder = tmp_path / "adapter"
    for _ in range(2):
        export_peft(run.path, folder)
    (folder / "notes.txt").write_text("mine")
    for change in (lambda: None, lambda: (folder / "notes.txt").rename(folder / "other"), (folder / ADAPTER).unlink):
        change()
        with pytest.raises(ExportError, match="is not an adapter that an export wrote; give another name with -o"):
            export_peft(run.path, folder)
    assert {path.name for path in folder.iterdir()} == FILES - {ADAPTER} | {"other"}


@pytest.mark.parametrize("arguments", [("--split",), ("--target", "x86-cpu"), ("--batch", 1), ("--json",)], ids=str)
def test_options_of_bundles_are_refused(call: Call, tmp_path: Path, arguments: tuple[object, ...]) -> None:
    code, out, err = call("export", tmp_path, "-o", tmp_path / "adapter", "--format", "peft", *arguments)
    assert (code, out) == (2, "") and "writes no bundle" in err
    code, _, err = call("export", tmp_path, "-o", tmp_path / "adapter", "--task", "t0")
    assert code == 2 and "--task is for --format peft" in err


def test_the_readme_loads_what_the_command_wrote(peft: Any, call: Call, image_stream: Path, tmp_path: Path) -> None:
    """The embedded backbone at another size than its own, with its base adaptation."""
    settings: dict[str, Any] = {"size": 32, "summaries": 1, "epochs": 1, "min_steps": 4, "device": "cpu"}
    learner = Learner(tmp_path / "run", rank_orthogonal=2, rank_residual=2, **settings)
    learner.learn(image_stream / "01-round")
    code, out, _ = call("export", tmp_path / "run", "--format", "peft", "-o", tmp_path / "adapter")
    assert code == 0 and out.startswith(f"Adapter: {tmp_path}/adapter  LoRA of rank ") and " on 2 blocks, " in out
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model_name_or_path"] is None
    text = (tmp_path / "adapter" / README).read_text(encoding="utf-8").replace("THIS_FOLDER", str(tmp_path / "adapter"))
    found = re.search(r"```python\n(.*?)```", text, re.S)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    model = learner.model()
    images = model.network.backbone.normalised(FRAMES)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](images), model(FRAMES).features[:, :192], rtol=1e-4, atol=1e-4)
