"""Answers: the same for any batch, probabilities, and right by slow references."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.answers import LEAST_REMOTENESS, MOST_REMOTENESS, Catalogue, Classifier, Scores
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.statistics.calibration import LEVELS, Mixture, NoveltyScale
from duallora_edge.learner.statistics.gaussian import ClassStatistics, Discriminants, GaussianClassifier


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


def test_novelty_is_the_relative_distance_on_the_scale_of_validation_images() -> None:
    rng = np.random.default_rng(0)
    labels = torch.arange(60) % 3
    features = torch.from_numpy(rng.normal(size=(60, 5)).astype(np.float32)) + 4 * labels[:, None]
    gaussian = GaussianClassifier.fit([ClassStatistics.of(features, labels, 3)])
    knots = tuple(float(k) for k in np.linspace(-20, 10, len(LEVELS) + 1))
    classifier = Classifier(
        Catalogue.of([info("t", ["a", "b", "c"])]),
        gaussian,
        Scores(gaussian.weight, gaussian.bias, None),
        Mixture(1.0),
        NoveltyScale(knots),
        torch.device("cpu"),
    )
    raw = classifier.raw_novelty(features)
    expected = np.interp(raw.numpy(), knots, (*LEVELS, 1.0))
    np.testing.assert_allclose(classifier.novelty(features), expected, atol=1e-5)
    far = features[:1] + 100 * torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])  # away from the line of the classes
    assert float(classifier.raw_novelty(far)) > float(raw.max())


def test_the_remoteness_is_the_distance_in_units_of_the_variances() -> None:
    rng = np.random.default_rng(1)
    features = torch.from_numpy(rng.normal(size=(400, 5)) * [1, 5, 0.2, 1, 1])
    gaussian = GaussianClassifier.fit([ClassStatistics.of(features, torch.arange(400) % 2, 2)])
    scores = Scores(gaussian.weight, gaussian.bias, None)
    catalogue = Catalogue.of([info("t", ["a", "b"])])
    classifier = Classifier(catalogue, gaussian, scores, Mixture(2.0), NoveltyScale.unknown(), torch.device("cpu"))
    x = features.float()
    remoteness = classifier.remoteness(x)
    assert float(remoteness.mean()) == pytest.approx(1, abs=0.02)
    expected = (((x - x.mean(dim=0)) / x.std(dim=0)) ** 2).mean(dim=1).clamp(min=LEAST_REMOTENESS)
    torch.testing.assert_close(remoteness, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(
        classifier(x).probabilities, (classifier.logits(x) / remoteness[:, None] / 2).softmax(dim=1)
    )
    extremes = torch.cat([1e3 * x[:1], x.mean(dim=0)[None]])
    torch.testing.assert_close(classifier.remoteness(extremes), torch.tensor([MOST_REMOTENESS, LEAST_REMOTENESS]))


@given(classes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_the_order_within_a_task_is_that_of_its_own_discriminants(classes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    catalogue = Catalogue.of([info(f"t{t}", [f"{t}.{k}" for k in range(n)]) for t, n in enumerate(classes)])
    x = 3 * torch.randn(6, 5, generator=generator)
    total = sum(classes)
    gaussian = GaussianClassifier.fit([ClassStatistics.of(torch.randn(40, 5), torch.arange(40) % total, total)])
    weight, bias = torch.randn(total, 5, generator=generator), torch.randn(total, generator=generator)
    own = [
        Discriminants(torch.randn(n, 5, generator=generator), torch.randn(n, generator=generator), 1.0) for n in classes
    ]
    scores = Scores(weight, bias, None, within=own)
    classifier = Classifier(catalogue, gaussian, scores, Mixture(1.0), NoveltyScale.unknown(), torch.device("cpu"))
    found = classifier.logits(x)
    first = 0
    for task in own:
        part = slice(first, first + len(task.bias))
        among_all, alone = x @ weight[part].T + bias[part], x @ task.weight.T + task.bias
        for row in range(len(x)):
            expected = [float(u - alone[row].max() + among_all[row].max()) for u in alone[row]]
            torch.testing.assert_close(found[row, part], torch.tensor(expected), rtol=1e-4, atol=1e-4)
        first = part.stop


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
