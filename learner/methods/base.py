"""The interface of a method, and what most of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from duallora_edge.errors import RunError
from duallora_edge.learner.methods.scoring import CLASSIFIERS, overconfidence, ridge_fits, ridge_memory, ridge_right
from duallora_edge.learner.methods.training import (
    Downs,
    Lesson,
    Moments,
    collect_features,
    look,
    past_bases,
    summaries,
    train_adapters,
    untrained,
)
from duallora_edge.learner.network.adapters import AdaptedBlock, Collect
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.network import (
    Catalogue,
    Classifier,
    ComposedModel,
    DynamicMemory,
    Network,
    Scores,
    fold_all,
)
from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.network.task_record import BlockRecord, TaskRecord
from duallora_edge.learner.statistics.calibration import (
    CalibrationCurve,
    Mixture,
    NoveltyScale,
    best_mixture,
    best_temperature,
    quantiles,
)
from duallora_edge.learner.statistics.gaussian import ClassStatistics, GaussianClassifier
from duallora_edge.learner.statistics.subspace import new_directions
from duallora_edge.learner.timing import phase, timed


class Method(ABC):
    """How a task is learned, and how the tasks of a run answer together. Methods hold no state.

    Attributes:
        name: as in ``--method``.
        summary: one line for users.
        classifier: how classes are scored unless the configuration says otherwise (`classifiers`).
        keeps_images: whether it stores training images, which ``status --privacy`` then lists.
        single_task: whether it learns everything at once and refuses a second task.
        removable: whether a task may be taken out from under later ones.
        trains: whether a task of one class, which has no gradient, is a special case.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    classifier: ClassVar[str] = "lda"
    keeps_images: ClassVar[bool] = False
    single_task: ClassVar[bool] = False
    removable: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    @abstractmethod
    def learn(self, lesson: Lesson) -> TaskRecord:
        """Learn one task. Nothing of the past is changed; the same lesson gives the same record."""

    def updates(self, blocks: Sequence[Sequence[BlockRecord]]) -> Sequence[Sequence[BlockRecord]]:
        """What the network applies of the blocks of some tasks: all of it, unless a method says otherwise."""
        return blocks

    def scores(self, tasks: Sequence[TaskRecord], gaussian: GaussianClassifier) -> Scores:
        """How the components of the tasks are scored."""
        return CLASSIFIERS[tasks[-1].info.classifier](tasks, gaussian)

    def memory_fits(self, task: TaskRecord, backbone: Backbone) -> bool:
        """Whether a task that was read has what this method keeps beside the statistics."""
        return task.info.classifier != "ridge" or ridge_fits(task.memory, len(task.info.classes))

    def compose(self, backbone: Backbone, tasks: Sequence[TaskRecord]) -> ComposedModel:
        """The model of some tasks (at least one): evaluated, exported and served."""
        infos = [task.info for task in tasks]
        memory = DynamicMemory(
            GaussianClassifier.fit(summaries(tasks, backbone), inflation=False),
            [len(info.classes) for info in infos],
            best_temperature([task.task_nll for task in tasks]),
            backbone.device,
        )
        network = Network(backbone, infos, self.updates([task.blocks for task in tasks]), memory)
        images = [float(sum(info.counts.values())) for info in infos]
        scale = NoveltyScale.pooled([task.novelty for task in tasks], images)
        catalogue = Catalogue.of(infos)
        gaussian = GaussianClassifier.fit([task.statistics for task in tasks])
        scores = self.scores(tasks, gaussian)
        if len(scores.weight) != len(catalogue.class_of):
            raise RunError("The run is damaged (its heads are not of its classes); restore it from a copy.")
        mixture = best_mixture(_curves(tasks, catalogue, scores), infos[-1].calibration)
        classifier = Classifier(catalogue, gaussian, scores, mixture, scale, backbone.device)
        return ComposedModel(catalogue, network, classifier)

    def training_blocks(self, lesson: Lesson) -> list[AdaptedBlock]:
        """The suffix in which a new task is trained: every folded update, and the residuals that will be open.

        Residuals of mode ``previous`` have gate P(task >= s) = 1 for images of a newer task; isolated ones have 0.
        """
        blocks = [AdaptedBlock(block) for block in lesson.backbone.suffix]
        for index, block in enumerate(blocks):
            records = [task.blocks[index] for task in lesson.past]
            on = [task.blocks[index].residual for task in lesson.past if task.info.residual == "previous"]
            block.weight = fold_all(block.weight, [*(record.orthogonal for record in records), *on])
        return blocks

    def adapt(
        self,
        lesson: Lesson,
        collect: Collect,
        downs: Callable[[int, Tensor, Tensor], Downs],
        *,
        distillation: float = 0.0,
    ) -> tuple[tuple[BlockRecord, ...], Tensor]:
        """Train adapters and a head on top of everything before.

        ``downs(index, q, v)`` chooses the down-projections of a block from its second moments (``collect``). A task of
        one class has no gradient: it gets neither, and its statistics alone are learned.
        """
        if len(lesson.task.classes) == 1:
            return untrained(lesson.backbone), torch.zeros(1, lesson.backbone.dim + 1)
        suffix = self.training_blocks(lesson)
        before = look(lesson, suffix, collect)
        with phase("bases"):
            chosen = [downs(index, q, v) for index, (q, v) in enumerate(before.moments)]
        return train_adapters(lesson, suffix, chosen, before.features, distillation=distillation)

    @timed("statistics")
    @torch.no_grad()
    def finish(
        self,
        lesson: Lesson,
        info: TaskInfo,
        blocks: tuple[BlockRecord, ...],
        head: Tensor,
        *,
        collect: Collect = "none",
        memory: Mapping[str, Tensor] | None = None,
    ) -> TaskRecord:
        """Statistics and calibration, collected in the finished network under the gates of inference.

        With ``collect`` the bases are extended by what the projections read. Held-back images calibrate first and
        join the statistics afterwards.
        """
        config, train, held, classes = lesson.config, lesson.train, lesson.held, len(info.classes)
        chosen = self.classifier if config.classifier == "auto" else config.classifier
        info = replace(info, classifier=chosen, gate=config.gate, calibration=config.calibration)
        task_nll = lesson.identity.nll if lesson.identity else torch.zeros(len(CalibrationCurve.empty().nll[0]))
        nll = [*(task.task_nll for task in lesson.past), task_nll]
        network = Network(
            lesson.backbone,
            [*(task.info for task in lesson.past), info],
            self.updates([*(task.blocks for task in lesson.past), blocks]),
            lesson.memory(best_temperature(nll), lesson.backbone.device),
        )
        features, moments = collect_features(network, train, config.precision, collect)
        held_features, _ = collect_features(network, held, config.precision)
        record = TaskRecord(
            info=info,
            blocks=_with_bases(blocks, lesson.past, moments, config.energy),
            head=head,
            statistics=ClassStatistics.of(features, train.labels, classes),
            curve=CalibrationCurve.empty(),
            task_nll=task_nll,
            novelty=quantiles(torch.zeros(0)),
            memory={**(memory or {})},
        )
        if info.classifier == "ridge":
            record = replace(record, memory={**record.memory, **ridge_memory(features, train.labels, classes)})
        scored = held_features if len(held) else features
        offset = sum(len(task.info.classes) for task in lesson.past)
        if info.classifier == "ridge" and len(held):
            right = ridge_right([*lesson.past, record], held_features, held.labels + offset)
            record = replace(record, memory={**record.memory, "ridge.right": right})
        tasks = [*lesson.past, record]
        catalogue = Catalogue.of([task.info for task in tasks])
        gaussian = GaussianClassifier.fit([task.statistics for task in tasks])
        scores = self.scores(tasks, gaussian)
        scale = NoveltyScale.pooled([record.novelty], [1.0])
        classifier = Classifier(catalogue, gaussian, scores, Mixture(1.0), scale, torch.device("cpu"))
        record = replace(record, novelty=quantiles(classifier.raw_novelty(scored)))
        if not len(held):
            return record
        truth = torch.tensor([catalogue.classes.index(name) for name in info.classes])[held.labels]
        curve = CalibrationCurve.of(classifier.logits(held_features), classifier.class_sums, truth)
        if info.classifier == "ridge":
            more = ridge_memory(held_features, held.labels, classes)
            sums = {key: record.memory[key] + more[key] for key in ("ridge.gram", "ridge.sums")}
            record = replace(record, memory={**record.memory, **sums})
        return replace(
            record,
            info=replace(info, held_back={**info.held_back, "accuracy": curve.accuracy}),
            curve=curve,
            overconfidence=overconfidence(scores, catalogue, record.statistics, lesson.number) or 0.0,
            statistics=record.statistics + ClassStatistics.of(held_features, held.labels, classes),
        )


def _curves(tasks: Sequence[TaskRecord], catalogue: Catalogue, scores: Scores) -> list[CalibrationCurve]:
    """The curves of the tasks for the classifier of today.

    Each was measured with the classifier of its day, fitted to fewer images: its logits were more too large.
    """
    curves = []
    for index, task in enumerate(tasks):
        now = overconfidence(scores, catalogue, task.statistics, index) if task.overconfidence else None
        curves.append(task.curve.warmer(now / task.overconfidence) if now else task.curve)
    return curves


@timed("bases")
def _with_bases(
    blocks: tuple[BlockRecord, ...], past: Sequence[TaskRecord], moments: Moments, energy: float
) -> tuple[BlockRecord, ...]:
    """The blocks with the directions that their moments add to the bases of the past; as they are without moments."""

    if not moments:
        return blocks
    extended = []
    for index, (block, (q, v)) in enumerate(zip(blocks, moments, strict=True)):
        q_basis, v_basis = past_bases(past, index, len(q))
        extended.append(
            replace(block, q_basis=new_directions(q, q_basis, energy), v_basis=new_directions(v, v_basis, energy))
        )
    return tuple(extended)
