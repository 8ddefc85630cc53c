"""Learning tasks: the orthogonality promise, odd tasks, and the same bits however training is interrupted."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from duallora_edge.learner.backbone import Backbone
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.model import ComposedModel
from duallora_edge.learner.record import TaskRecord

MakeTask = Callable[..., PreparedTask]
Learn = Callable[..., list[TaskRecord]]


def digit_of(classes: int, start: int = 0) -> tuple[list[str], list[int]]:
    kinds = list(range(start, start + classes))
    return [f"k{kind}" for kind in kinds], kinds


def assert_identical(a: TaskRecord, b: TaskRecord) -> None:
    assert a.info == b.info
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for file, tensors in left.items():
        assert tensors.keys() == right[file].keys()
        for name, value in tensors.items():
            assert torch.equal(value, right[file][name]), f"{file} {name}"


@torch.no_grad()
def accuracy(backbone: Backbone, records: list[TaskRecord], task: PreparedTask) -> float:
    model = ComposedModel(backbone, records)
    answers = model(torch.from_numpy(task.test.pixels.copy())).probabilities.argmax(dim=1)
    names = [model.catalogue.classes[i] for i in answers]
    return sum(a == b for a, b in zip(names, task.test.labels, strict=True)) / len(names)


@pytest.mark.parametrize("residual", ["isolated", "previous", "none"])
def test_new_updates_do_not_touch_what_old_tasks_read(make_task: MakeTask, learn: Learn, residual: str) -> None:
    tasks = [make_task(str(i), *digit_of(2, 2 * i)) for i in range(3)]
    records = learn(tasks, residual=residual, min_steps=10)
    for index in range(len(records[0].blocks)):
        bases: dict[str, list[Tensor]] = {"q": [], "v": []}
        for record in records:
            block = record.blocks[index]
            updates = dict(zip("qv", block.orthogonal.product(), strict=True))
            for target, earlier in bases.items():
                if earlier:
                    old = torch.cat(earlier)
                    leak = (old @ updates[target].T).norm() / (old.norm() * updates[target].norm())
                    assert updates[target].norm() > 0
                    assert leak < 1e-4
            bases["q"].append(block.q_basis)
            bases["v"].append(block.v_basis)
        for earlier in bases.values():  # the bases of all tasks together are orthonormal
            together = torch.cat(earlier).double()
            torch.testing.assert_close(together @ together.T, torch.eye(len(together)).double(), rtol=0, atol=1e-5)


def test_the_residual_of_mode_previous_lies_in_the_newest_bases(make_task: MakeTask, learn: Learn) -> None:
    records = learn([make_task(str(i), *digit_of(2, 2 * i)) for i in range(3)], residual="previous")
    assert all(len(block.residual.q_down) == 0 for block in records[0].blocks)  # the first task has nothing before it
    for earlier, record in itertools.pairwise(records):
        for before, block in zip(earlier.blocks, record.blocks, strict=True):
            newest = torch.cat([before.q_basis, before.v_basis])
            down = block.residual.q_down
            assert len(down) and torch.equal(down, block.residual.v_down)
            solution = torch.linalg.lstsq(newest.T.double(), down.T.double()).solution
            torch.testing.assert_close(newest.T.double() @ solution, down.T.double(), rtol=0, atol=1e-5)


def test_previous_without_new_bases_has_no_residual(make_task: MakeTask, learn: Learn) -> None:
    """With an energy of 0 nothing is kept: every Psi is empty, and nothing may be divided by it."""
    tasks = [make_task(str(i), *digit_of(2, 2 * i)) for i in range(3)]
    for record in learn(tasks, residual="previous", energy=0.0):
        for block in record.blocks:
            assert len(block.q_basis) == len(block.v_basis) == len(block.residual.q_down) == 0
            assert len(block.orthogonal.q_down) == 4
            assert all(bool(torch.isfinite(part).all()) for part in block.orthogonal)


def test_rank_zero_learns_statistics_and_head(tiny_backbone: Backbone, make_task: MakeTask, learn: Learn) -> None:
    tasks = [make_task("a", *digit_of(2)), make_task("b", *digit_of(2, 2))]
    records = learn(tasks, rank_orthogonal=0, rank_residual=0)
    assert [record.info.residual for record in records] == ["none", "none"]
    for record in records:
        assert all(part.shape == (0, 48) for block in record.blocks for part in block.orthogonal)
        assert float(record.head.abs().sum()) > 0
    assert accuracy(tiny_backbone, records, tasks[1]) > 0.5


@pytest.mark.parametrize("position", [0, 1])
def test_a_task_of_one_class(tiny_backbone: Backbone, make_task: MakeTask, learn: Learn, position: int) -> None:
    tasks = [make_task("pair", *digit_of(2)), make_task("pair too", *digit_of(2, 2))]
    tasks.insert(position, make_task("single", ["alone"], [5]))
    records = learn(tasks)
    single = records[position]
    assert all(len(block.orthogonal.q_down) == len(block.residual.q_down) == 0 for block in single.blocks)
    assert all(len(block.q_basis) > 0 for block in single.blocks)  # later tasks leave its features alone
    assert min(accuracy(tiny_backbone, records, task) for task in tasks) > 0.5


def test_five_images_a_class_and_none_held_back(tiny_backbone: Backbone, make_task: MakeTask, learn: Learn) -> None:
    tasks = [make_task(str(i), *digit_of(2, 2 * i), train=5, held=0) for i in range(2)]
    records = learn(tasks)
    for record in records:
        assert record.info.held_back["images"] == 0
        assert record.info.held_back["task_accuracy"] is None
        assert record.info.residual == "isolated"
        assert float(record.class_nll.abs().sum()) == float(record.task_nll.abs().sum()) == 0
    model = ComposedModel(tiny_backbone, records)
    assert model.novelty_threshold is None
    assert min(accuracy(tiny_backbone, records, task) for task in tasks) > 0.5


def test_one_image_a_class(tiny_backbone: Backbone, make_task: MakeTask, learn: Learn) -> None:
    records = learn([make_task(str(i), *digit_of(2, 2 * i), train=1, held=0) for i in range(2)])
    with torch.no_grad():
        outputs = ComposedModel(tiny_backbone, records)(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert bool(torch.isfinite(outputs.probabilities).all())


def test_a_known_class_in_a_new_domain(tiny_backbone: Backbone, make_task: MakeTask, learn: Learn) -> None:
    """The same names with other looks: one class each, whose probability is the sum of its two components."""
    tasks = [make_task("day", ["car", "bus"], [0, 1]), make_task("night", ["bus", "car"], [2, 3])]
    records = learn(tasks)
    model = ComposedModel(tiny_backbone, records)
    assert model.catalogue.classes == ("bus", "car")  # a task sorts its classes
    with torch.no_grad():
        features = model.network(torch.from_numpy(tasks[1].test.pixels.copy()))
        components = (model.classifier.logits(features) / model.classifier.temperature).softmax(dim=1)
        outputs = model.classifier(features)
    torch.testing.assert_close(outputs.probabilities[:, 0], components[:, 0] + components[:, 2])
    torch.testing.assert_close(outputs.probabilities[:, 1], components[:, 1] + components[:, 3])
    assert min(accuracy(tiny_backbone, records, task) for task in tasks) > 0.5


def test_twelve_tasks(tiny_backbone: Backbone, make_task: MakeTask, learn: Learn) -> None:
    """Many tasks, the later ones with the looks of the first: the subspaces fill up, and nothing breaks."""
    tasks = [make_task(f"t{i}", [f"a{i}", f"b{i}"], [i % 5, 5 + i % 5], train=6, held=1, seed=i) for i in range(12)]
    records = learn(tasks, min_steps=2, energy=0.999)
    for index in range(len(records[0].blocks)):
        assert sum(len(record.blocks[index].q_basis) for record in records) <= tiny_backbone.dim
    with torch.no_grad():
        outputs = ComposedModel(tiny_backbone, records)(torch.from_numpy(tasks[0].test.pixels.copy()))
    assert outputs.probabilities.shape == (8, 24) and outputs.task_probabilities.shape == (8, 12)
    torch.testing.assert_close(outputs.probabilities.sum(dim=1), torch.ones(8))


def test_training_lowers_the_loss_of_its_head(tiny_backbone: Backbone, make_task: MakeTask, learn: Learn) -> None:
    task = make_task("a", *digit_of(4), train=16)

    def loss(steps: int) -> float:
        record = learn([task], min_steps=steps, epochs=0)[0]
        with torch.no_grad():
            f = ComposedModel(tiny_backbone, [record]).network(torch.from_numpy(task.train.pixels.copy()))[:, :48]
            labels = torch.tensor([task.classes.index(name) for name in task.train.labels])
            logits = f @ record.head[:, :-1].T + record.head[:, -1]
            return float(torch.nn.functional.cross_entropy(logits, labels))

    assert loss(40) < 0.7 * loss(0)


@pytest.mark.parametrize("held", [0, 4])
def test_the_mode_of_the_residual_follows_the_task_identity(make_task: MakeTask, learn: Learn, held: int) -> None:
    """Tasks that look the same cannot be told apart, so ``auto`` chooses ``previous`` as soon as that is measured."""
    alike = [make_task(f"t{i}", ["a", "b"], [0, 1], held=held, seed=i) for i in range(4)]
    modes = [record.info.residual for record in learn(alike)]
    assert modes[0] == "isolated"
    assert modes[-1] == ("previous" if held else "isolated")


def test_the_record_of_the_task_is_complete(make_task: MakeTask, learn: Learn) -> None:
    records = learn([make_task("a", *digit_of(3), train=7, held=2), make_task("b", *digit_of(2, 3))])
    info = records[0].info
    assert dict(info.counts) == {"k0": 7, "k1": 7, "k2": 7}  # held-back images are no training images
    assert float(records[0].statistics.counts.sum()) == 27  # but count in the statistics
    assert info.held_back["images"] == 6 and 0 <= (info.held_back["accuracy"] or 0) <= 1
    assert info.held_back["task_accuracy"] is None  # nothing to be told from
    assert 0 <= (records[1].info.held_back["task_accuracy"] or 0) <= 1
    assert bool((records[0].novelty.diff() >= 0).all())


@pytest.mark.parametrize("method", ["dual_lora", "sequential", "frozen"])
def test_learning_twice_gives_the_same_bits(make_task: MakeTask, learn: Learn, method: str) -> None:
    tasks = [make_task("a", *digit_of(2)), make_task("b", *digit_of(3, 2))]
    settings = {"method": method, "augment": "light", "flip": True}
    for one, two in zip(learn(tasks, **settings), learn(tasks, **settings), strict=True):
        assert_identical(one, two)


def test_the_seed_matters(make_task: MakeTask, learn: Learn) -> None:
    task = make_task("a", *digit_of(2), train=20)
    one, two = (learn([task], seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(one.head, two.head)


class InterruptedTrainingError(Exception):
    pass


class BreakingCheckpoint:
    """Keeps the last state, and stops training right after saving step ``stop_at``."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at = stop_at
        self.saved: tuple[int, dict[str, Tensor]] | None = None

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        return self.saved

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        self.saved = (step, {name: value.clone() for name, value in tensors.items()})
        if step == self.stop_at:
            raise InterruptedTrainingError


@pytest.mark.parametrize("stop_at", [1, 4, 6, 10])
@pytest.mark.parametrize("settings", [{}, {"augment": "light", "rank_residual": 0}], ids=["plain", "augmented"])
def test_interrupted_training_gives_the_same_bits(
    make_task: MakeTask, learn: Learn, two_tasks: list[TaskRecord], stop_at: int, settings: dict[str, object]
) -> None:
    """24 images in batches of 10: steps 1, 4, 10 are within an epoch, 6 is at its end, 10 is the last one."""
    task = make_task("third", *digit_of(2, 4))
    settings = {"min_steps": 10, "batch_size": 10, "checkpoint_steps": 1, **settings}
    whole = learn([task], two_tasks, **settings)[-1]
    checkpoint = BreakingCheckpoint(stop_at)
    with pytest.raises(InterruptedTrainingError):
        learn([task], two_tasks, checkpoint=checkpoint, **settings)
    checkpoint.stop_at = 0
    assert_identical(learn([task], two_tasks, checkpoint=checkpoint, **settings)[-1], whole)


def test_rank_zero_can_be_interrupted(make_task: MakeTask, learn: Learn) -> None:
    task, settings = make_task("a", *digit_of(2)), {"rank_orthogonal": 0, "rank_residual": 0, "checkpoint_steps": 1}
    checkpoint = BreakingCheckpoint(2)
    with pytest.raises(InterruptedTrainingError):
        learn([task], checkpoint=checkpoint, **settings)
    assert_identical(learn([task], checkpoint=checkpoint, **settings)[0], learn([task], **settings)[0])


def test_learning_changes_nothing_of_the_past(
    tiny_backbone: Backbone, make_task: MakeTask, learn: Learn, two_tasks: list[TaskRecord]
) -> None:
    before = {name: value.clone() for name, value in tiny_backbone.state_dict().items()}
    kept = [TaskRecord.from_tensors(record.info, record.tensors()) for record in two_tasks]
    learn([make_task("third", *digit_of(2, 4))], two_tasks)
    for record, copy in zip(two_tasks, kept, strict=True):
        assert_identical(record, copy)
    assert all(torch.equal(value, before[name]) for name, value in tiny_backbone.state_dict().items())


def test_records_survive_their_tensors(two_tasks: list[TaskRecord]) -> None:
    for record in two_tasks:
        assert_identical(TaskRecord.from_tensors(record.info, record.tensors()), record)
        assert all(value.dtype == torch.float32 for part in record.tensors().values() for value in part.values())


def test_a_missing_tensor_is_named(two_tasks: list[TaskRecord]) -> None:
    files = two_tasks[0].tensors()
    del files["adapters"]["blocks.1.residual.v_up"]
    with pytest.raises(KeyError, match=r"blocks\.1\.residual\.v_up"):
        TaskRecord.from_tensors(two_tasks[0].info, files)
