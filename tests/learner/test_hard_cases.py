"""Tasks as nobody would order them: tiny, lopsided, repeated, very many."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from duallora_edge.learner.data import PixelSet, PreparedTask
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.answers import Outputs
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.task_record import TaskRecord

MakeTask = Callable[..., PreparedTask]
Learn = Callable[..., list[TaskRecord]]
Accuracy = Callable[..., float]
METHODS = ["dual_lora", "inflora", "task_arithmetic", "sequential", "first_session", "frozen"]
CLOSED_FORM = ["dual_lora", "inflora", "first_session", "frozen"]  # those that are expected to remember


def pair(make_task: MakeTask, number: int, **sizes: int) -> PreparedTask:
    """A task of two classes with looks of their own."""
    kinds = [2 * number, 2 * number + 1]
    return make_task(f"t{number}", [f"k{kind}" for kind in kinds], kinds, **sizes)


def pairs(make_task: MakeTask, count: int, **sizes: int) -> list[PreparedTask]:
    return [pair(make_task, number, **sizes) for number in range(count)]


@torch.no_grad()
def answers(backbone: Backbone, records: list[TaskRecord], task: PreparedTask) -> Outputs:
    """The answers for the test images of a task, which must be finite and add up."""
    outputs: Outputs = compose(backbone, records)(torch.from_numpy(task.test.pixels.copy()))
    for value in (outputs.probabilities, outputs.task_probabilities, outputs.novelty, outputs.features):
        assert bool(torch.isfinite(value).all())
    for value in (outputs.probabilities, outputs.task_probabilities):
        torch.testing.assert_close(value.sum(dim=1), torch.ones(len(value)))
    assert bool(((outputs.novelty >= 0) & (outputs.novelty <= 1 + 1e-5)).all())
    return outputs


def assert_finite(records: list[TaskRecord]) -> None:
    """Every tensor of every record is a number."""
    for record in records:
        for name, tensors in record.tensors().items():
            for key, value in tensors.items():
                assert bool(torch.isfinite(value.double()).all()), f"{record.info.name} {name} {key}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_task_of_one_class(
    tiny_backbone: Backbone, make_task: MakeTask, learn: Learn, accuracy: Accuracy, method: str, position: int
) -> None:
    tasks = pairs(make_task, 2)
    tasks.insert(position, make_task("single", ["alone"], [5]))
    records = learn(tasks, method=method)
    single = records[position]
    assert_finite(records)
    assert all(len(block.orthogonal.q_down) == 0 for block in single.blocks)
    if method in ("dual_lora", "inflora"):
        assert all(len(block.q_basis) > 0 for block in single.blocks)  # later tasks leave its features alone
    for task in tasks:
        answers(tiny_backbone, records, task)
    if method in CLOSED_FORM:
        assert min(accuracy(records, task) for task in tasks) > 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("train", "held"), [(5, 0), (4, 1), (1, 0), (2, 1)])
def test_few_images_a_class(
    tiny_backbone: Backbone, make_task: MakeTask, learn: Learn, accuracy: Accuracy, method: str, train: int, held: int
) -> None:
    tasks = pairs(make_task, 2, train=train, validation=held)
    records = learn(tasks, method=method)
    assert_finite(records)
    for record in records:
        assert record.info.validation["images"] == 2 * held
        assert (record.info.validation["accuracy"] is None) == (held == 0)
        # Training images calibrate as well, but for the only one of a class.
        assert (record.curve.accuracy is None) == (held == 0 and train == 1)
        assert record.info.validation["left_out"] == 2 * held + (2 * train if train > 1 else 0)
        if not held:
            assert record.info.validation["gate_task_accuracy"] is None
            assert float(record.gate_nll.abs().sum()) == 0
    for task in tasks:
        answers(tiny_backbone, records, task)
    if method in CLOSED_FORM and train >= 4:
        assert min(accuracy(records, task) for task in tasks) > 0.5


@pytest.mark.parametrize("method", CLOSED_FORM)
def test_classes_of_300_images_and_of_one(
    tiny_backbone: Backbone, make_task: MakeTask, learn: Learn, accuracy: Accuracy, method: str
) -> None:
    """One class has 300 images and the other a single one, which is recognised again."""
    common, rare = (make_task(n, [n], [k], train=300, validation=0) for n, k in (("common", 0), ("rare", 2)))
    pixels = np.concatenate([common.train.pixels, rare.train.pixels[:1]])
    none = PixelSet(pixels[:0], ())
    first = PixelSet(rare.train.pixels[:1], ("rare",))
    lopsided = PreparedTask("lopsided", PixelSet(pixels, ("common",) * 300 + ("rare",)), none, first, digest="")
    records = learn([lopsided], method=method, min_steps=2, batch_size=64)
    assert_finite(records)
    assert records[0].info.counts == {"common": 300, "rare": 1}
    assert accuracy(records, lopsided) == 1
    assert accuracy(records, common) > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_known_class_in_a_new_domain(
    tiny_backbone: Backbone, make_task: MakeTask, learn: Learn, accuracy: Accuracy, method: str
) -> None:
    """The same names with other looks: one output a class, the sum of its two components."""
    tasks = [make_task("day", ["car", "bus"], [0, 1]), make_task("night", ["bus", "car"], [2, 3])]
    records = learn(tasks, method=method)
    model = compose(tiny_backbone, records)
    assert model.catalogue.classes == ("bus", "car")  # a task sorts its classes
    assert model.catalogue.class_of.tolist() == [0, 1, 0, 1]
    outputs = answers(tiny_backbone, records, tasks[1])
    components = model.classifier.mixture(model.classifier.evidence(outputs.features))
    torch.testing.assert_close(outputs.probabilities[:, 0], components[:, 0] + components[:, 2])
    torch.testing.assert_close(outputs.probabilities[:, 1], components[:, 1] + components[:, 3])
    torch.testing.assert_close(outputs.task_probabilities[:, 0], components[:, 0] + components[:, 1])
    if method in CLOSED_FORM:
        assert min(accuracy(records, task) for task in tasks) > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_the_same_images_under_other_names(
    tiny_backbone: Backbone, make_task: MakeTask, learn: Learn, method: str
) -> None:
    """Nothing tells the tasks apart: the names share the probability, and calibration says so."""
    tasks = [make_task("one", ["a", "b"], [0, 1]), make_task("two", ["c", "d"], [0, 1])]
    records = learn(tasks, method=method, views=0)
    assert_finite(records)
    outputs = answers(tiny_backbone, records, tasks[0])
    if method == "frozen":  # equal statistics, so equal answers
        torch.testing.assert_close(outputs.probabilities[:, :2], outputs.probabilities[:, 2:], rtol=1e-3, atol=1e-4)
    if method in CLOSED_FORM:
        right = torch.tensor([0] * 4 + [1] * 4)
        assert float((outputs.probabilities.argmax(dim=1) % 2 == right).double().mean()) > 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(2, 60), (60, 2)], ids=str)
def test_tasks_of_very_different_sizes(
    tiny_backbone: Backbone,
    make_task: MakeTask,
    learn: Learn,
    accuracy: Accuracy,
    method: str,
    sizes: tuple[int, int],
) -> None:
    tasks = [pair(make_task, number, train=size, validation=size // 10) for number, size in enumerate(sizes)]
    records = learn(tasks, method=method, min_steps=2)
    assert_finite(records)
    for task in tasks:
        answers(tiny_backbone, records, task)
    if method in CLOSED_FORM:
        assert min(accuracy(records, task) for task in tasks) > 0.25


def flat(name: str, shades: dict[str, tuple[int, int]], flicker: int = 0) -> PreparedTask:
    """A task of classes whose images are of one shade: ``shades`` holds shade and number of images."""
    rng = np.random.default_rng(0)
    pixels = np.concatenate([np.full((count, 32, 32, 3), shade, np.uint8) for shade, count in shades.values()])
    pixels[:, 0, 0] ^= rng.integers(0, flicker + 1, (len(pixels), 3), dtype=np.uint8)
    labels = tuple(label for label, (_, count) in shades.items() for _ in range(count))
    images = PixelSet(pixels, labels)
    return PreparedTask(name, images, PixelSet(pixels[::5], labels[::5]), images, digest=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("shades", "flicker"),
    [
        ({"black": (0, 8), "white": (255, 8)}, 0),
        ({"black": (0, 8), "also": (0, 8)}, 0),
        ({"black": (0, 8), "white": (254, 8)}, 1),
        ({"black": (0, 1), "white": (255, 1)}, 0),
        ({"black": (0, 1), "also": (0, 1)}, 0),
    ],
    ids=str,
)
def test_constant_features(
    tiny_backbone: Backbone,
    make_task: MakeTask,
    learn: Learn,
    accuracy: Accuracy,
    method: str,
    shades: dict[str, tuple[int, int]],
    flicker: int,
) -> None:
    """Images without any content, as a first task and before a usual one."""
    tasks = [flat("flat", shades, flicker), pair(make_task, 1)]
    learned = learn(tasks, method=method)
    assert_finite(learned)
    for records in (learned[:1], learned):
        for task in tasks[: len(records)]:
            answers(tiny_backbone, records, task)
        if "white" in shades and method in CLOSED_FORM:
            assert accuracy(records, tasks[0]) == 1


@pytest.mark.usefixtures("few_random_features")
@pytest.mark.parametrize("classifier", ["lda_f", "mean_f", "ridge", "heads"])
def test_constant_features_in_every_classifier(tiny_backbone: Backbone, learn: Learn, classifier: str) -> None:
    task = flat("flat", {"black": (0, 8), "white": (255, 8)})
    records = learn([task], classifier=classifier)
    assert_finite(records)
    answers(tiny_backbone, records, task)


MANY = [
    ("frozen", 20, {}),
    ("dual_lora", 50, {"energy": 0.99}),
    ("inflora", 20, {"energy": 0.99}),
    ("sequential", 20, {}),
    ("first_session", 20, {}),
    ("task_arithmetic", 20, {"kept_images_per_class": 1}),
]


@pytest.mark.parametrize(("method", "count", "settings"), MANY, ids=[method for method, *_ in MANY])
def test_many_tasks(
    tiny_backbone: Backbone,
    make_task: MakeTask,
    learn: Learn,
    accuracy: Accuracy,
    method: str,
    count: int,
    settings: dict[str, Any],
) -> None:
    """The space fills up: the rank of new orthogonal adapters falls to 0, and everything still answers."""
    tasks = pairs(make_task, count, train=4, validation=1)
    records = learn(tasks, method=method, min_steps=1, epochs=0, **settings)
    assert_finite(records)
    assert answers(tiny_backbone, records, tasks[0]).probabilities.shape == (8, 2 * count)
    mean = sum(accuracy(records, task) for task in tasks[::7]) / len(tasks[::7])
    assert mean > 5 / count or method not in CLOSED_FORM  # ten times chance
    for index in range(len(tiny_backbone.suffix)):
        blocks = [record.blocks[index] for record in records]
        for bases in ([block.q_basis for block in blocks], [block.v_basis for block in blocks]):
            together = torch.cat(bases).double()
            assert len(together) <= tiny_backbone.dim
            torch.testing.assert_close(together @ together.T, torch.eye(len(together)).double(), rtol=0, atol=1e-4)
        if method in ("dual_lora", "inflora"):
            ranks = [len(block.orthogonal.q_down) for block in blocks]
            assert ranks[0] >= 4 and all(later <= earlier for earlier, later in itertools.pairwise(ranks))


@pytest.mark.parametrize("method", ["dual_lora", "inflora"])
def test_a_full_space_leaves_no_orthogonal_adapter(
    tiny_backbone: Backbone, make_task: MakeTask, learn: Learn, accuracy: Accuracy, method: str
) -> None:
    """With all the energy kept, a few tasks span everything; what is left is the residual and the statistics."""
    tasks = pairs(make_task, 5, train=24, validation=2)
    records = learn(tasks, method=method, min_steps=1, epochs=0, energy=1.0)
    assert_finite(records)
    ranks = [[len(block.orthogonal.q_down) for block in record.blocks] for record in records]
    assert min(ranks[0]) >= 4 and ranks[-1] == [0] * len(ranks[-1])
    assert all(sum(len(r.blocks[i].q_basis) for r in records) <= tiny_backbone.dim for i in range(len(ranks[0])))
    assert min(accuracy(records, task) for task in tasks) > 0.25
