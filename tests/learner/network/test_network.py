"""The composed model: equal to timm without adapters, the same for any batch, and right by slow references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.adapters import AdaptedBlock
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.network import (
    Catalogue,
    Classifier,
    Scores,
    fold_all,
    gate_matrix,
    run_suffix,
)
from duallora_edge.learner.network.task_record import TaskInfo, TaskRecord
from duallora_edge.learner.statistics.calibration import LEVELS, Mixture, NoveltyScale
from duallora_edge.learner.statistics.gaussian import ClassStatistics, GaussianClassifier


def info(name: str, classes: list[str], residual: str = "isolated") -> TaskInfo:
    return TaskInfo(name, tuple(classes), "dual_lora", residual, 0, "", {})


def random_frames(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_catalogue_maps_components_to_classes_and_tasks() -> None:
    catalogue = Catalogue.of([info("day", ["car", "van"]), info("night", ["van", "bus", "car"])])
    assert catalogue.classes == ("car", "van", "bus")
    assert catalogue.class_of.tolist() == [0, 1, 1, 2, 0]
    assert catalogue.task_of.tolist() == [0, 0, 1, 1, 1]
    components = torch.tensor([[0.1, 0.2, 0.3, 0.05, 0.35]])
    torch.testing.assert_close(components @ catalogue.class_sums(), torch.tensor([[0.45, 0.5, 0.05]]))
    torch.testing.assert_close(components @ catalogue.task_sums(), torch.tensor([[0.3, 0.7]]))


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        (["isolated", "isolated", "isolated"], [0.2, 0.3, 0.5]),
        (["previous", "previous", "previous"], [1.0, 0.8, 0.5]),
        (["isolated", "previous", "isolated"], [0.2, 0.8, 0.5]),
        (["none", "none", "previous"], [0.2, 0.3, 0.5]),
    ],
)
def test_gates_of_a_posterior(modes: list[str], expected: list[float]) -> None:
    infos = [info(str(i), ["x"], mode) for i, mode in enumerate(modes)]
    ranks = [2, 0, 3]
    gates = torch.tensor([[0.2, 0.3, 0.5]]) @ gate_matrix(infos, ranks)
    torch.testing.assert_close(gates, torch.tensor([expected]).repeat_interleave(torch.tensor(ranks), dim=1))


def test_open_gates_are_open_for_every_posterior() -> None:
    infos = [replace(info(str(i), ["x"], mode), gate="open") for i, mode in enumerate(("isolated", "previous", "none"))]
    posterior = torch.eye(3)
    torch.testing.assert_close(posterior @ gate_matrix(infos, [2, 0, 3]), torch.ones(3, 5))


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


@settings(max_examples=10)
@given(order=st.permutations(range(12)), size=st.integers(1, 12))
def test_an_answer_does_not_depend_on_the_batch(
    tiny_backbone: Backbone, two_tasks: list[TaskRecord], order: list[int], size: int
) -> None:
    model, frames = compose(tiny_backbone, two_tasks), random_frames(12)
    with torch.no_grad():
        whole = model(frames)
        parts = [model(frames[list(order[first : first + size])]) for first in range(0, 12, size)]
    for name in ("probabilities", "task_probabilities", "novelty", "features"):
        found = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(found, getattr(whole, name)[list(order)], rtol=1e-4, atol=1e-5, msg=name)


def test_one_frame_alone_equals_itself_among_64(tiny_backbone: Backbone, two_tasks: list[TaskRecord]) -> None:
    model, frames = compose(tiny_backbone, two_tasks), random_frames(64)
    with torch.no_grad():
        whole = model(frames).probabilities
        for index in (0, 31, 63):
            torch.testing.assert_close(
                model(frames[index : index + 1]).probabilities[0], whole[index], atol=1e-5, rtol=0
            )


def test_outputs_are_probabilities(tiny_backbone: Backbone, two_tasks: list[TaskRecord]) -> None:
    model = compose(tiny_backbone, two_tasks)
    with torch.no_grad():
        outputs = model(random_frames(6))
    assert outputs.probabilities.shape == (6, 4) and outputs.task_probabilities.shape == (6, 2)
    assert outputs.features.shape == (6, tiny_backbone.dim + tiny_backbone.summary_dim)
    for part in (outputs.probabilities, outputs.task_probabilities):
        torch.testing.assert_close(part.sum(dim=1), torch.ones(6))
    assert bool(((outputs.novelty >= 0) & (outputs.novelty <= 1)).all())


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


def test_novelty_is_the_relative_distance_on_the_scale_of_held_back_images() -> None:
    rng = np.random.default_rng(0)
    labels = torch.arange(60) % 3
    features = torch.from_numpy(rng.normal(size=(60, 5)).astype(np.float32)) + 4 * labels[:, None]
    gaussian = GaussianClassifier.fit([ClassStatistics.of(features, labels, 3)])
    knots = tuple(float(k) for k in np.linspace(-20, 10, len(LEVELS) + 1))
    classifier = Classifier(
        Catalogue.of([info("t", ["a", "b", "c"])]),
        gaussian,
        Scores(gaussian.weight, gaussian.bias),
        Mixture(1.0),
        NoveltyScale(knots),
        torch.device("cpu"),
    )
    raw = classifier.raw_novelty(features)
    expected = np.interp(raw.numpy(), knots, (*LEVELS, 1.0))
    np.testing.assert_allclose(classifier.novelty(features), expected, atol=1e-5)
    far = features[:1] + 100 * torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])  # away from the line of the classes
    assert float(classifier.raw_novelty(far)) > float(raw.max())


def test_sequential_answers_with_the_trained_heads(
    tiny_backbone: Backbone, make_task: Callable[..., PreparedTask], learn: Callable[..., list[TaskRecord]]
) -> None:
    tasks = [make_task("one", ["a", "b"], [0, 1]), make_task("two", ["c", "d"], [2, 3])]
    records = learn(tasks, method="sequential")
    model = compose(tiny_backbone, records)
    with torch.no_grad():
        features = model.network(random_frames(3))
        f, heads = features[:, : tiny_backbone.dim], torch.cat([r.head for r in records])
        torch.testing.assert_close(
            model.classifier.logits(features), f @ heads[:, :-1].T + heads[:, -1], rtol=1e-4, atol=1e-5
        )
