"""Learning tasks: the orthogonality promise, odd tasks, and the same bits however training is interrupted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.methods import METHODS, compose, training
from duallora_edge.learner.methods.dual_lora import DualLora
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.network import run_suffix
from duallora_edge.learner.network.task_record import TaskRecord

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


def test_rank_zero_learns_statistics_and_head(
    make_task: MakeTask, learn: Learn, accuracy: Callable[..., float]
) -> None:
    tasks = [make_task("a", *digit_of(2)), make_task("b", *digit_of(2, 2))]
    records = learn(tasks, rank_orthogonal=0, rank_residual=0)
    assert [record.info.residual for record in records] == ["none", "none"]
    for record in records:
        assert all(part.shape == (0, 48) for block in record.blocks for part in block.orthogonal)
        assert float(record.head.abs().sum()) > 0
    assert accuracy(records, tasks[1]) > 0.5


def test_training_lowers_the_loss_of_its_head(tiny_backbone: Backbone, make_task: MakeTask, learn: Learn) -> None:
    task = make_task("a", *digit_of(4), train=16)

    def loss(steps: int) -> float:
        record = learn([task], min_steps=steps, epochs=0, learning_rate=1e-2)[0]
        with torch.no_grad():
            f = compose(tiny_backbone, [record]).network(torch.from_numpy(task.train.pixels.copy()))[:, :48]
            labels = torch.tensor([task.classes.index(name) for name in task.train.labels])
            logits = f @ record.head[:, :-1].T + record.head[:, -1]
            return float(torch.nn.functional.cross_entropy(logits, labels))

    assert loss(40) < 0.7 * loss(0)


@pytest.mark.parametrize("held", [0, 4])
def test_the_mode_of_the_residual_follows_the_task_identity(make_task: MakeTask, learn: Learn, held: int) -> None:
    """Tasks that look the same cannot be told apart, and without validation images nobody knows: ``previous``."""
    alike = [make_task(f"t{i}", ["a", "b"], [0, 1], validation=held, seed=i) for i in range(4)]
    modes = [record.info.residual for record in learn(alike)]
    assert modes[0] == "isolated"
    assert modes[-1] == "previous"


@pytest.mark.parametrize(
    ("images", "share", "expected"),
    [(10, 1.0, "previous"), (40, 1.0, "isolated"), (400, 0.91, "previous"), (400, 0.95, "isolated")],
)
def test_few_images_do_not_decide(images: int, share: float, expected: str) -> None:
    """The end of the interval decides, so ten images that are all right do not."""
    past = SimpleNamespace(info=SimpleNamespace(validation={"images": images, "gate_task_accuracy": share}), blocks=())
    lesson = SimpleNamespace(
        config=TrainConfig(),
        past=[past],
        task=SimpleNamespace(classes=("a", "b")),
        validation=(),
        gate_validation=SimpleNamespace(task_accuracy=None),
    )
    assert DualLora().residual_mode(lesson) == expected  # type: ignore[arg-type]


def test_the_record_of_the_task_is_complete(make_task: MakeTask, learn: Learn) -> None:
    records = learn([make_task("a", *digit_of(3), train=7, validation=2), make_task("b", *digit_of(2, 3))])
    info = records[0].info
    assert dict(info.counts) == {"k0": 7, "k1": 7, "k2": 7}  # held-back images are no training images
    assert float(records[0].statistics.counts.sum()) == 27  # but count in the statistics
    assert info.validation["images"] == 6 and 0 <= (info.validation["accuracy"] or 0) <= 1
    assert info.validation["gate_task_accuracy"] is None  # nothing to be told from
    assert 0 <= (records[1].info.validation["gate_task_accuracy"] or 0) <= 1
    assert bool((records[0].novelty.diff() >= 0).all())


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.single_task])
def test_learning_twice_gives_the_same_bits(make_task: MakeTask, learn: Learn, method: str) -> None:
    tasks = [make_task("a", *digit_of(2)), make_task("b", *digit_of(3, 2))]
    settings = {"method": method, "views": 2, "flip": True}
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
@pytest.mark.parametrize("settings", [{}, {"views": 0, "rank_residual": 0}], ids=["views", "images"])
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


@pytest.mark.parametrize("method", ["inflora", "sequential", "task_arithmetic"])
def test_interrupted_training_of_every_method_gives_the_same_bits(
    make_task: MakeTask, learn: Learn, method: str
) -> None:
    settings = {"method": method, "min_steps": 5, "checkpoint_steps": 1}
    past = learn([make_task("a", *digit_of(2))], **settings)
    task, checkpoint = make_task("b", *digit_of(2, 2)), BreakingCheckpoint(3)
    whole = learn([task], past, **settings)[-1]
    with pytest.raises(InterruptedTrainingError):
        learn([task], past, checkpoint=checkpoint, **settings)
    assert_identical(learn([task], past, checkpoint=checkpoint, **settings)[-1], whole)


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


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({"distillation": 0.0}, 1e-5), ({"views": 2, "flip": True}, 5e-3), ({}, 5e-3)],
    ids=["cross-entropy", "views", "defaults"],
)
def test_parts_of_a_batch_give_the_same_record_up_to_rounding(
    make_task: MakeTask, learn: Learn, two_tasks: list[TaskRecord], settings: dict[str, object], tolerance: float
) -> None:
    """Parts of 4 of batches of 10, the last ones smaller: sums in another order, in fp32, over 12 steps of Adam.

    By default the first gradient of the adapters is nothing but rounding: the head is zero and the features are still
    those they are pulled towards. Adam makes a step of it nevertheless, hence the larger tolerance.
    """
    task, settings = make_task("third", *digit_of(2, 4)), {"min_steps": 12, "batch_size": 10, **settings}
    whole = learn([task], two_tasks, **settings)[-1].tensors()
    parts = learn([task], two_tasks, micro_batch=4, **settings)[-1].tensors()
    torch.testing.assert_close(parts["head"]["head"], whole["head"]["head"], rtol=0, atol=tolerance)
    torch.testing.assert_close(parts["statistics"]["means"], whole["statistics"]["means"], rtol=0, atol=tolerance)


def test_computing_blocks_again_gives_the_same_bits(
    make_task: MakeTask, learn: Learn, two_tasks: list[TaskRecord]
) -> None:
    task = make_task("third", *digit_of(2, 4))
    assert_identical(learn([task], two_tasks, recompute=True)[-1], learn([task], two_tasks)[-1])


def test_a_part_that_does_not_fit_is_halved(
    tiny_backbone: Backbone, make_task: MakeTask, learn: Learn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA would refuse more than 5 images at once."""
    task, refused = make_task("a", *digit_of(2)), []

    def limited(backbone: Backbone, blocks: Any, tokens: Tensor, **options: Any) -> Any:
        if torch.is_grad_enabled() and len(tokens) > 5:
            refused.append(len(tokens))
            raise torch.cuda.OutOfMemoryError
        return run_suffix(backbone, blocks, tokens, **options)

    expected = learn([task], micro_batch=4)[0]
    monkeypatch.setattr(training, "run_suffix", limited)
    assert_identical(learn([task])[0], expected)
    assert refused == [16, 8]


def test_a_checkpoint_that_does_not_fit_is_not_continued(make_task: MakeTask, learn: Learn) -> None:
    task, settings = make_task("a", *digit_of(2)), {"min_steps": 2, "epochs": 0, "checkpoint_steps": 1}
    whole = learn([task], **settings)[0]
    checkpoint = BreakingCheckpoint(1)
    with pytest.raises(InterruptedTrainingError):
        learn([task], checkpoint=checkpoint, **settings)
    assert checkpoint.saved
    _, tensors = checkpoint.saved
    checkpoint.stop_at = 0
    for step, changes in (
        (-3, {}),
        (1, {"0.value": tensors["0.value"][:-1] + 1}),
        (1, {"1.exp_avg": tensors["1.exp_avg"].half()}),
        (1, {"0.exp_avg_sq": tensors["0.exp_avg_sq"] * float("nan")}),
        (1, {"one more": tensors["0.value"]}),
    ):
        checkpoint.saved = (step, {**tensors, **changes})
        assert_identical(learn([task], checkpoint=checkpoint, **settings)[0], whole)
