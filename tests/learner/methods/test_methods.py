"""What every method promises, and what each of them promises alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from duallora_edge.errors import ConfigError, RunError
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import PixelSet, PreparedTask
from duallora_edge.learner.methods import METHODS, base, compose, learn_task
from duallora_edge.learner.methods.dual_lora import DualLora
from duallora_edge.learner.methods.lesson import Lesson
from duallora_edge.learner.methods.losses import Loss, distilled_cross_entropy
from duallora_edge.learner.methods.scoring import ClassifierData, lda, overconfidence
from duallora_edge.learner.network.adapters import AdaptedBlock, Adapter
from duallora_edge.learner.network.answers import Catalogue
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.dynamic_memory import gate_matrix
from duallora_edge.learner.network.network import run_suffix
from duallora_edge.learner.network.task_record import BlockRecord, KeptImages, TaskRecord
from duallora_edge.learner.statistics import calibration
from duallora_edge.learner.statistics.calibration import CalibrationCurve, best_mixture
from duallora_edge.learner.statistics.gaussian import ClassStatistics

MakeTask = Callable[..., PreparedTask]
Learn = Callable[..., list[TaskRecord]]
QUICK = {"learning_rate": 0.01, "min_steps": 6}
ORTHOGONAL = [("dual_lora", "isolated"), ("dual_lora", "previous"), ("dual_lora", "none"), ("inflora", "auto")]


@pytest.fixture(scope="module")
def tasks(make_task: MakeTask) -> list[PreparedTask]:
    return [make_task("one", ["a", "b"], [0, 1]), make_task("two", ["c", "d", "e"], [2, 3, 4])]


@pytest.fixture(scope="module")
def learned(tasks: list[PreparedTask], learn: Learn) -> Callable[[str], list[TaskRecord]]:
    """``learned("inflora")``: the records of the two tasks, or of the first one where a method learns one alone."""
    known: dict[str, list[TaskRecord]] = {}

    def get(method: str) -> list[TaskRecord]:
        if method not in known:
            chosen = tasks[: 1 if METHODS[method].single_task else None]
            known[method] = learn(chosen, method=method, **QUICK)
        return known[method]

    return get


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_probabilities(
    tiny_backbone: Backbone,
    tasks: list[PreparedTask],
    learned: Callable[[str], list[TaskRecord]],
    accuracy: Callable[..., float],
    method: str,
) -> None:
    records = learned(method)
    assert METHODS[method].name == method and METHODS[method].summary and TrainConfig(method=method).method == method
    with torch.no_grad():
        outputs = compose(tiny_backbone, records)(torch.from_numpy(tasks[0].test.pixels.copy()))
    classes = len({name for record in records for name in record.info.classes})
    for part, width in ((outputs.probabilities, classes), (outputs.task_probabilities, len(records))):
        assert part.shape == (8, width) and bool((part >= 0).all())
        torch.testing.assert_close(part.sum(dim=1), torch.ones(8))
    assert bool(torch.isfinite(outputs.novelty).all())
    assert {record.info.method for record in records} == {method}
    if METHODS[method].classifier == "lda":
        assert min(accuracy(records, task) for task in tasks[: len(records)]) > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_records_survive_their_tensors(
    tiny_backbone: Backbone, learned: Callable[[str], list[TaskRecord]], method: str
) -> None:
    for record in learned(method):
        files = record.tensors()
        again = TaskRecord.from_tensors(record.info, files)
        assert again.info == record.info and again.tensors().keys() == files.keys()
        for file, tensors in files.items():
            assert all(torch.equal(value, again.tensors()[file][name]) for name, value in tensors.items()), file
            assert file in ("kept_images", "split") or all(value.dtype == torch.float32 for value in tensors.values())
    frames = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with torch.no_grad():
        one, two = (
            compose(tiny_backbone, records)(frames).probabilities
            for records in (learned(method), [TaskRecord.from_tensors(r.info, r.tensors()) for r in learned(method)])
        )
    assert torch.equal(one, two)


@pytest.mark.parametrize(("classifier", "held"), [("lda", 30), ("lda", 8), ("ridge", 30)])
def test_a_whole_domain_held_back_is_calibrated_by_those_learned(
    make_task: MakeTask, learn: Learn, monkeypatch: pytest.MonkeyPatch, classifier: str, held: int
) -> None:
    """Each fold is measured as if the others had been learned, of the domain and, without training, of the rest.

    The novelty knows nothing of them.
    """
    monkeypatch.setattr(base, "ENOUGH", 0)
    monkeypatch.setattr(calibration, "FOLDS", 2)
    settings = {"method": "frozen", "classifier": classifier, "views": 0}
    given = make_task("one", ["a", "b"], [0, 1], train=40, validation=held)
    (plain,), (found,) = (learn([task], **settings) for task in (given, replace(given, validation_given=False)))
    assert torch.equal(found.novelty, plain.novelty) and found.info == plain.info
    expected = plain.curve
    if held > 2 * 0.1 * (40 + held):
        expected = CalibrationCurve.empty()
        for images, others in ((given.validation, given.train), (given.train, given.train.where(np.zeros(80, bool)))):
            folds = np.arange(len(images)) % (len(images) // 2) * 4 // len(images)
            for number in range(2):
                out = folds == number
                learned = PixelSet.joined([others, images.where(~out)])
                (record,) = learn([replace(given, train=learned, validation=images.where(out))], **settings)
                expected = expected + record.curve
        assert not torch.allclose(expected.nll, plain.curve.nll, rtol=0.01)
    for name in ("nll", "confidence", "counts"):
        torch.testing.assert_close(getattr(found.curve, name), getattr(expected, name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("method", "images"), [("frozen", 140), ("sequential", 60)])
def test_images_that_were_trained_on_do_not_calibrate_beside_a_domain(
    make_task: MakeTask, learn: Learn, monkeypatch: pytest.MonkeyPatch, method: str, images: int
) -> None:
    monkeypatch.setattr(base, "ENOUGH", 60)
    task = replace(make_task("one", ["a", "b"], [0, 1], train=40, validation=30), validation_given=False)
    (record,) = learn([task], method=method, **QUICK)
    assert record.curve.counts[0] == images


def test_training_needs_no_gradients_switched_on(tasks: list[PreparedTask], learn: Learn) -> None:
    plain = learn(tasks[:1], method="sequential", **QUICK)
    with torch.no_grad():
        inside = learn(tasks[:1], method="sequential", **QUICK)
    assert torch.equal(inside[0].blocks[0].orthogonal.q_up, plain[0].blocks[0].orthogonal.q_up)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.single_task])
def test_a_second_task_is_refused_where_all_is_learned_at_once(
    tiny_backbone: Backbone, tasks: list[PreparedTask], learned: Callable[[str], list[TaskRecord]], method: str
) -> None:
    config = TrainConfig(method=method, device="cpu", precision="fp32")
    with pytest.raises(ConfigError, match=rf"The method {method} learns all tasks at once; it cannot learn two"):
        learn_task(tiny_backbone, learned(method), tasks[1], config, None, Callback())  # type: ignore[arg-type]


def leak(rows: Tensor, update: Tensor) -> float:
    """How much of what an update [d, d] could make of rows [n, d] it does make of them."""
    return float((rows @ update.T).norm() / (rows.norm() * update.norm()))


@pytest.mark.parametrize(("method", "residual"), ORTHOGONAL)
def test_new_updates_do_not_touch_what_old_tasks_read(
    make_task: MakeTask, learn: Learn, method: str, residual: str
) -> None:
    tasks = [make_task(str(i), [f"a{i}", f"b{i}"], [2 * i, 2 * i + 1]) for i in range(3)]
    records = learn(tasks, method=method, residual=residual, energy=0.8, **QUICK)
    for index in range(len(records[0].blocks)):
        bases: dict[str, list[Tensor]] = {"q": [], "v": []}
        for record in records:
            block = record.blocks[index]
            updates = dict(zip("qv", block.orthogonal.product(), strict=True))
            for target, earlier in bases.items():
                assert updates[target].norm() > 0
                assert not earlier or leak(torch.cat(earlier), updates[target]) < 1e-4
            bases["q"].append(block.q_basis)
            bases["v"].append(block.v_basis)
        for earlier in bases.values():  # the bases of all tasks together are orthonormal
            together = torch.cat(earlier).double()
            torch.testing.assert_close(together @ together.T, torch.eye(len(together)).double(), rtol=0, atol=1e-5)


def test_with_all_the_energy_the_rows_themselves_are_kept(
    tiny_backbone: Backbone, make_task: MakeTask, learn: Learn
) -> None:
    """The rows that the projections read for training images of the first task, in the network of that task."""
    tasks = [make_task(str(i), [f"a{i}", f"b{i}"], [2 * i, 2 * i + 1], train=6, validation=0) for i in range(2)]
    records = learn(tasks, residual="none", energy=1.0, **QUICK)
    network = compose(tiny_backbone, records[:1]).network
    with torch.no_grad():
        prefix = tiny_backbone.prefix(torch.from_numpy(tasks[0].train.pixels.copy()))
        _, rows = network.from_prefix(*prefix, collect="class")
    for block, read in zip(records[1].blocks, rows, strict=True):
        query, value = block.orthogonal.product()
        assert query.norm() > 0 and value.norm() > 0
        assert max(leak(read.q, query), leak(read.v, value)) < 1e-3  # tokens are kept in half precision


@pytest.mark.parametrize("method", ["dual_lora", "inflora", "sequential", "task_arithmetic"])
@torch.no_grad()
def test_merged_equals_side_branch(
    tiny_backbone: Backbone, learned: Callable[[str], list[TaskRecord]], method: str
) -> None:
    """The network with all updates beside the frozen weights: the gates open what the method folds."""
    records, infos = learned(method), [record.info for record in learned(method)]
    model = compose(tiny_backbone, records)
    tokens, phi = tiny_backbone.prefix(torch.randint(0, 256, (5, 32, 32, 3), generator=torch.manual_seed(0)).byte())
    blocks = [AdaptedBlock(block) for block in tiny_backbone.suffix]
    for index, block in enumerate(blocks):
        folded = [record.blocks[index].orthogonal for record in records]
        beside = [record.blocks[index].residual for record in records]
        if method == "task_arithmetic":  # only the newest fine-tuning counts, for every image
            folded, beside = [*folded, beside[-1]], []
        block.adapter = Adapter(*(torch.cat(parts) for parts in zip(*folded, *beside, strict=True)))
        always = torch.ones(len(records), sum(len(adapter.q_down) for adapter in folded))
        gated = [gate_matrix(infos, [len(adapter.q_down) for adapter in beside])] if beside else []
        block.gate_map = torch.cat([always, *gated], dim=1)
        assert float(torch.cat([block.adapter.q_up, block.adapter.v_up]).abs().max()) > 1e-3
    expected, _ = run_suffix(tiny_backbone, blocks, tokens, model.network.dynamic_memory(phi))
    found = model.network.from_prefix(tokens, phi)[0][:, : tiny_backbone.dim]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_task_arithmetic_adds_scaled_updates_of_tasks_learned_alone(
    tiny_backbone: Backbone, make_task: MakeTask, learn: Learn, tasks: list[PreparedTask], scale: float
) -> None:
    settings = {"method": "task_arithmetic", "kept_images_per_class": 0, **QUICK}
    records = learn(tasks, task_scale=scale, **settings)
    plain = learn(tasks, task_scale=1.0, **settings)
    after_another = learn([make_task("other", ["x", "y"], [7, 8]), tasks[1]], task_scale=1.0, **settings)
    model = compose(tiny_backbone, records)
    for index, block in enumerate(model.network.blocks):
        updates = [record.blocks[index].orthogonal.product() for record in plain]
        alone = after_another[1].blocks[index].orthogonal.product()
        assert all(torch.equal(a, b) for a, b in zip(alone, updates[1], strict=True))
        base = tiny_backbone.suffix[index].attn.qkv.weight
        for part, of in ((slice(0, 48), 0), (slice(96, 144), 1)):
            expected = base[part] + scale * sum(update[of] for update in updates)
            torch.testing.assert_close(block.weight[part], expected, rtol=0, atol=1e-6)
        assert torch.equal(block.weight[48:96], base[48:96])
    assert not any(record.kept_images for record in records)
    assert [len(record.head) for record in records] == [2, 5]


@pytest.mark.parametrize(("per_class", "stored"), [(3, 3), (12, 12), (99, 12)])
def test_task_arithmetic_stores_some_images_of_each_class(
    learn: Learn, tasks: list[PreparedTask], per_class: int, stored: int
) -> None:
    for task, record in zip(
        tasks, learn(tasks, method="task_arithmetic", kept_images_per_class=per_class), strict=True
    ):
        assert record.kept_images
        images, labels = record.kept_images.images, record.kept_images.labels
        assert images.dtype == torch.uint8 and images.shape == (stored * len(task.classes), 32, 32, 3)
        assert torch.bincount(labels).tolist() == [stored] * len(task.classes)
        for pixels, label in zip(images, labels.tolist(), strict=True):
            known = [k for k, name in enumerate(task.train.labels) if name == task.classes[label]]
            assert any((task.train.pixels[k] == pixels.numpy()).all() for k in known)
        assert len({pixels.numpy().tobytes() for pixels in images}) == len(images)


@pytest.mark.parametrize(
    ("method", "setting", "values"),
    [
        ("task_arithmetic", "kl_weight", (0.0, 0.5)),
        ("task_arithmetic", "kept_images_per_class", (0, 5)),
        ("task_arithmetic", "task_scale", (0.25, 1.0)),
        ("dual_lora", "distillation", (0.0, 5.0)),
    ],
)
def test_a_setting_changes_the_result(
    tiny_backbone: Backbone,
    learn: Learn,
    tasks: list[PreparedTask],
    method: str,
    setting: str,
    values: tuple[float, float],
) -> None:
    models = [compose(tiny_backbone, learn(tasks, method=method, **{setting: v, **QUICK})) for v in values]
    weights = [torch.stack([block.weight for block in model.network.blocks]) for model in models]
    assert float((weights[0] - weights[1]).abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("method", "setting"), [("task_arithmetic", "kl_weight"), ("dual_lora", "distillation")], ids=str
)
def test_pulling_towards_the_pretrained_features_keeps_them(
    tiny_backbone: Backbone, learn: Learn, tasks: list[PreparedTask], method: str, setting: str
) -> None:
    """The features of the training images move less with the pull than without."""
    settings = {"method": method, "kept_images_per_class": 0, "task_scale": 1.0, "learning_rate": 0.02, "min_steps": 20}
    frames = torch.from_numpy(tasks[0].train.pixels.copy())
    learned = [learn(tasks[:1], **{setting: weight, **settings}) for weight in (0.0, 0.9)]
    with torch.no_grad():
        before, *after = (
            compose(tiny_backbone, records).network(frames) for records in (learn(tasks[:1], method="frozen"), *learned)
        )
    moved = [float((features - before).norm()) for features in after]
    assert moved[1] < 0.8 * moved[0]


@pytest.mark.parametrize(
    ("factor", "halved"), [(1, False), (2, True), (0, False)], ids=["as it was", "more", "unknown"]
)
def test_a_curve_follows_what_the_statistics_predict_of_the_logits(
    tiny_backbone: Backbone, learned: Callable[[str], list[TaskRecord]], factor: float, halved: bool
) -> None:
    """A task measured on logits that were twice as overconfident asks for half its temperature today."""
    logits = torch.randn(200, 2, generator=torch.manual_seed(0)) * 9
    truth = (logits / 4).softmax(dim=1).multinomial(1, generator=torch.manual_seed(1))[:, 0]
    record = replace(learned("dual_lora")[0], curve=CalibrationCurve.of(logits, torch.eye(2), truth))
    data = ClassifierData.of([record], tiny_backbone.dim)
    today = overconfidence(lda(data), Catalogue.of([record.info]), record.statistics, 0)
    assert today
    asked = compose(tiny_backbone, [replace(record, overconfidence=factor * today)]).classifier.mixture
    expected = best_mixture([record.curve]).temperature * (0.5 if halved else 1)
    assert asked.temperature == pytest.approx(expected, rel=0.05)


@torch.no_grad()
def test_only_the_first_session_trains(
    tiny_backbone: Backbone,
    make_task: MakeTask,
    learn: Learn,
    learned: Callable[[str], list[TaskRecord]],
    tasks: list[PreparedTask],
) -> None:
    """The first task is that of `Sequential`; later ones answer in its network, and leave it as it is."""
    first, second = learned("first_session")
    plain = learned("sequential")[0]
    assert torch.equal(first.head, plain.head) and float(first.head.abs().max()) > 0
    for block, other in zip(first.blocks, plain.blocks, strict=True):
        assert torch.equal(block.orthogonal.q_up, other.orthogonal.q_up) and float(block.orthogonal.q_up.norm()) > 0
    assert not any(len(a.q_down) for block in second.blocks for a in (block.orthogonal, block.residual))
    assert not second.head.any()
    frames = torch.from_numpy(tasks[0].test.pixels.copy())
    before, after = (compose(tiny_backbone, records).network(frames) for records in ([first], [first, second]))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)
    alone = learn([make_task("single", ["alone"], [5]), tasks[1]], method="first_session", **QUICK)
    assert compose(tiny_backbone, alone).network.is_untouched


@pytest.mark.usefixtures("few_random_features")
@pytest.mark.parametrize(
    ("method", "classifier"),
    [
        *(("dual_lora", classifier) for classifier in ("lda", "lda_f", "mean_f", "ridge", "heads")),
        ("first_session", "ridge"),
        ("task_arithmetic", "lda"),
    ],
)
def test_the_classifier_of_the_configuration_wins(
    tiny_backbone: Backbone,
    learn: Learn,
    accuracy: Callable[..., float],
    tasks: list[PreparedTask],
    method: str,
    classifier: str,
) -> None:
    records = learn(tasks, method=method, classifier=classifier, **QUICK)
    assert [record.info.classifier for record in records] == [classifier] * 2
    assert (records[0].ridge_sums is not None) == (classifier == "ridge")
    with torch.no_grad():
        outputs = compose(tiny_backbone, records)(torch.from_numpy(tasks[0].test.pixels.copy()))
    torch.testing.assert_close(outputs.probabilities.sum(dim=1), torch.ones(8))
    if classifier in ("lda", "ridge"):
        assert min(accuracy(records, task) for task in tasks) >= 0.5  # by chance one in five


def lopsided(block: BlockRecord) -> BlockRecord:
    """The block with a rank less in the value projection of its residual."""
    r = block.residual
    return replace(block, residual=r._replace(v_down=r.v_down[1:], v_up=r.v_up[1:]))


def kept(size: int) -> KeptImages:
    return KeptImages(torch.zeros(2, size, size, 3, dtype=torch.uint8), torch.tensor([0, 1]))


def changed(record: TaskRecord, **info: object) -> TaskRecord:
    return replace(record, info=replace(record.info, **info))  # type: ignore[arg-type]


def negative(statistics: ClassStatistics) -> ClassStatistics:
    """Statistics whose scatter is not positive."""
    return replace(statistics, diagonal=-1e6 * (1 + statistics.diagonal))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda a, b: [a, replace(b, blocks=b.blocks[:1])], "'second': it was learned on another backbone"),
        (lambda a, b: [replace(a, head=a.head[:, 1:]), b], "'first': it was learned on another backbone"),
        (lambda a, b: [replace(a, statistics=a.statistics.part(slice(0, 48))), b], "on another backbone"),
        (lambda a, b: [changed(a, method="frozen"), b], "with another method"),
        (lambda a, b: [changed(a, classifier="ridge"), b], "with another method"),
        (lambda a, b: [a, replace(b, blocks=tuple(map(lopsided, b.blocks)))], "adapters of different ranks"),
        (lambda a, b: [a, a], "'first': another task has the same name"),
        (lambda a, b: [changed(a, classifier="ridge"), changed(b, classifier="ridge")], "it lacks something"),
        (lambda a, b: [replace(a, kept_images=kept(32)), b], "it lacks something"),
        (lambda a, b: [a, replace(b, discriminants=None)], "it lacks something"),
        (
            lambda a, b: [
                changed(replace(t, head=t.head[:1], discriminants=None), classifier="heads", method="sequential")
                for t in (a, b)
            ],
            "heads are not those of its classes",
        ),
        (
            lambda a, b: [replace(a, statistics=replace(a.statistics, diagonal=-1e6 * (1 + a.statistics.diagonal))), b],
            "statistics",
        ),
        (lambda a, b: [a, replace(b, statistics=replace(b.statistics, means=b.statistics.means * 1e38))], ""),
    ],
)
def test_tasks_that_do_not_fit_each_other(
    tiny_backbone: Backbone,
    two_tasks: list[TaskRecord],
    damage: Callable[[TaskRecord, TaskRecord], list[TaskRecord]],
    reason: str,
) -> None:
    with pytest.raises(RunError, match=f"The run is damaged .*{reason}.*restore it from a copy"):
        compose(tiny_backbone, damage(*two_tasks))


def test_kept_images_of_another_size_do_not_fit(tiny_backbone: Backbone, two_tasks: list[TaskRecord]) -> None:
    record = changed(replace(two_tasks[0], kept_images=kept(16)), method="task_arithmetic", classifier="heads")
    with pytest.raises(RunError, match="it lacks something that its method needs, or has something else"):
        compose(tiny_backbone, [record])


def test_a_training_that_diverges_is_not_kept(make_task: MakeTask, learn: Learn, two_tasks: list[TaskRecord]) -> None:
    blocks = tuple(
        replace(block, orthogonal=Adapter(*(1e30 * (part + 1) for part in block.orthogonal)))
        for block in two_tasks[0].blocks
    )
    with pytest.raises(RunError, match="Task 'third' cannot be learned: its training diverged"):
        learn([make_task("third", ["x", "y"], [0, 1])], [replace(two_tasks[0], blocks=blocks)])


class Cautious(DualLora):
    """The example of the documentation of `Method`."""

    name = "cautious"
    summary = "DualLoRA with a growing pull towards the old features"

    def loss(self, lesson: Lesson) -> Loss:
        return partial(distilled_cross_entropy, weight=lesson.config.distillation * (1 + lesson.number))


def test_the_loss_of_a_method_of_ones_own_is_used(
    learned: Callable[[str], list[TaskRecord]],
    tasks: list[PreparedTask],
    learn: Learn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the first task its weight is that of DualLoRA, for the second one it is twice as large."""
    monkeypatch.setattr(DualLora, "loss", Cautious.loss)
    expected, found = learned("dual_lora"), learn(tasks, **QUICK)
    assert torch.equal(found[0].head, expected[0].head) and not torch.equal(found[1].head, expected[1].head)


def test_a_method_of_ones_own_answers_for_its_records(
    tiny_backbone: Backbone, two_tasks: list[TaskRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "cautious", Cautious())
    records = [changed(record, method="cautious") for record in two_tasks]
    assert compose(tiny_backbone, records).catalogue.tasks == ("first", "second")


def test_residual_adapters_stay_within_their_rank(make_task: MakeTask, learn: Learn) -> None:
    tasks = [make_task(name, [f"{name}x", f"{name}y"], [2 * i, 2 * i + 1]) for i, name in enumerate("abc")]
    records = learn(tasks, rank_residual=2, max_residual_rank=3, residual="isolated", **QUICK)
    assert [len(record.blocks[0].residual.q_down) for record in records] == [2, 1, 0]
    assert [record.info.residual for record in records] == ["isolated", "isolated", "none"]
