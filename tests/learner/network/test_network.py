"""The network of some tasks: that of timm without adapters, and that of its own task under a certain posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.adapters import AdaptedBlock
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.network import fold_all, run_suffix
from duallora_edge.learner.network.task_record import TaskRecord


def random_frames(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"reg_tokens": 4},
    {"reg_tokens": 2, "no_embed_class": True},
    {"class_token": False, "global_pool": "avg"},
    {"global_pool": "avg"},
    {"global_pool": "avg", "reg_tokens": 3},
    {"global_pool": "avg", "fc_norm": False},
    {"qk_norm": True},
    {"init_values": 0.5},
    {"pre_norm": True},
    {"qkv_bias": False},
    {"dynamic_img_size": True},
    {"fc_norm": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_without_adapters_the_feature_is_that_of_timm(
    make_backbone: Callable[..., Backbone],
    make_task: Callable[..., PreparedTask],
    learn: Callable[..., list[TaskRecord]],
    variant: dict[str, Any],
) -> None:
    backbone = make_backbone(**variant)
    tasks = [make_task("one", ["a", "b"], [0, 1]), make_task("two", ["c"], [2])]
    model = compose(backbone, learn(tasks, backbone=backbone, method="frozen"))
    frames = random_frames(5)
    with torch.no_grad():
        found = model(frames).features[:, : backbone.dim]
        pixels = (frames.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        timm_feature = backbone.model.forward_head(backbone.model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(found, timm_feature, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["isolated", "previous"])
def test_a_certain_posterior_recreates_the_network_of_its_task(
    tiny_backbone: Backbone,
    make_task: Callable[..., PreparedTask],
    learn: Callable[..., list[TaskRecord]],
    mode: str,
) -> None:
    """isolated: every orthogonal update and the task's own residual; previous: those of the tasks up to it."""
    tasks = [make_task(str(i), [f"a{i}", f"b{i}"], [2 * i, 2 * i + 1]) for i in range(3)]
    records = learn(tasks, residual=mode)
    model = compose(tiny_backbone, records)
    tokens, _ = tiny_backbone.prefix(random_frames(4))
    for task in range(3):
        blocks = [AdaptedBlock(block) for block in tiny_backbone.suffix]
        for index, block in enumerate(blocks):
            on = records[: task + 1] if mode == "previous" else records[task : task + 1]
            updates = [r.blocks[index].orthogonal for r in records] + [r.blocks[index].residual for r in on]
            block.weight = fold_all(block.weight, updates)
        certain = torch.zeros(4, 3)
        certain[:, task] = 1
        found, _ = run_suffix(tiny_backbone, model.network.blocks, tokens, certain)
        expected, _ = run_suffix(tiny_backbone, blocks, tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_weights_are_summed_from_a_base_that_never_changes(
    tiny_backbone: Backbone, two_tasks: list[TaskRecord]
) -> None:
    before = [block.attn.qkv.weight.clone() for block in tiny_backbone.suffix]
    once, twice = (compose(tiny_backbone, two_tasks).network.blocks for _ in range(2))
    for block, same, base, original in zip(once, twice, tiny_backbone.suffix, before, strict=True):
        assert torch.equal(base.attn.qkv.weight, original)
        assert torch.equal(block.weight, same.weight)
        assert not torch.equal(block.weight, original)
