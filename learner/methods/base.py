"""The interface of a method, and what most methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from duallora_edge.errors import RunError
from duallora_edge.learner.data.kept_split import KeptSplit
from duallora_edge.learner.methods.lesson import Lesson, summary_statistics
from duallora_edge.learner.methods.losses import Loss, cross_entropy
from duallora_edge.learner.methods.scoring import (
    CLASSIFIERS,
    ClassifierData,
    fit_ridge_sums,
    overconfidence,
)
from duallora_edge.learner.methods.training import DownProjections, past_bases, train_adapters, untrained
from duallora_edge.learner.network.adapters import AdaptedBlock, Collect
from duallora_edge.learner.network.answers import Catalogue, Classifier, ComposedModel, Scores
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.dynamic_memory import DynamicMemory
from duallora_edge.learner.network.features import Moments, collect_features, suffix_features
from duallora_edge.learner.network.network import Network, fold_all
from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.network.task_record import BlockRecord, KeptImages, TaskRecord
from duallora_edge.learner.statistics.calibration import (
    QUANTILES,
    CalibrationCurve,
    Mixture,
    NoveltyScale,
    best_mixture,
    best_temperature,
    neighbour_folds,
    quantiles,
)
from duallora_edge.learner.statistics.gaussian import (
    STORED_DIRECTIONS,
    ClassStatistics,
    GaussianClassifier,
    expected_novelty,
)
from duallora_edge.learner.statistics.ridge import RidgeSums
from duallora_edge.learner.statistics.subspace import new_directions
from duallora_edge.learner.timing import phase, timed

# So many validation images are enough to calibrate a task by, and all images that adapters were trained on together
# count as so many of them (benchmarks/RESULTS.md).
ENOUGH = 100
LEARNED_COUNT_AS = 20


class Method(ABC):
    """How a task is learned, and how the tasks of a run answer together.

    A method holds no state: what it knows of earlier tasks is in their records. To make one of your own, derive from
    `Method` and write `learn`, or derive from one of the methods and change a part of it, then register it. This one
    is DualLoRA with a pull towards the old features that grows with every task::

        from functools import partial
        from duallora_edge.learner.methods import METHODS
        from duallora_edge.learner.methods.dual_lora import DualLora
        from duallora_edge.learner.methods.losses import distilled_cross_entropy

        class Cautious(DualLora):
            name = "cautious"
            summary = "DualLoRA with a growing pull towards the old features"

            def loss(self, lesson):
                return partial(distilled_cross_entropy, weight=lesson.config.distillation * (1 + lesson.number))

        METHODS["cautious"] = Cautious

    Attributes:
        name: the key in ``METHODS`` and the value of ``--method``; records name their method by it, so a run can be
            used only where a method of this name is registered.
        summary: one line for users.
        classifier: how classes are scored unless the configuration says otherwise, a key of `scoring.CLASSIFIERS`.
        keeps_images: whether it stores training images; ``status --privacy`` then says so.
        single_task: whether it learns all tasks at once and refuses a second one.
        removable: whether a task may be removed while later ones stay.
        trains: whether it trains by gradient, so that a task of one class, which has none, is a special case.
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
        """Learn one task.

        Most methods call `adapt`, which trains, and return the result of `finish`, which collects the statistics.
        Nothing in ``lesson`` may be changed, and the same lesson must give the same record.
        """

    def updates(self, blocks: Sequence[Sequence[BlockRecord]]) -> Sequence[Sequence[BlockRecord]]:
        """What the network applies of the blocks of each task: everything, unless a method decides otherwise."""
        return blocks

    def scores(self, classifier: str, data: ClassifierData) -> Scores:
        """The logits of all components, by a key of `scoring.CLASSIFIERS`."""
        return CLASSIFIERS[classifier](data)

    def is_complete(self, task: TaskRecord, backbone: Backbone) -> bool:
        """Whether a task that was read has what this method and its classifier need, and nothing else."""
        classifier = task.info.classifier
        return (
            (task.ridge_sums is not None) == (classifier == "ridge")
            and (task.discriminants is not None) == (classifier == "lda")
            and task.kept_images is None
        )

    def compose(self, backbone: Backbone, tasks: Sequence[TaskRecord]) -> ComposedModel:
        """The model of some tasks (at least one), to be evaluated, exported and served."""
        infos = [task.info for task in tasks]
        memory = DynamicMemory(
            GaussianClassifier.fit(summary_statistics(tasks, backbone), inflation=False),
            [len(info.classes) for info in infos],
            best_temperature([task.gate_nll for task in tasks]),
            backbone.device,
        )
        network = Network(backbone, infos, self.updates([task.blocks for task in tasks]), memory)
        images = [float(sum(info.counts.values())) for info in infos]
        scale = NoveltyScale.pooled(_novelties(tasks), images)
        catalogue = Catalogue.of(infos)
        data = ClassifierData.of(tasks, backbone.dim)
        scores = self.scores(infos[-1].classifier, data)
        if len(scores.weight) != len(catalogue.class_of):
            raise RunError("The run is damaged (its heads are not those of its classes); restore it from a copy.")
        mixture = best_mixture(_curves(tasks, catalogue, scores), infos[-1].calibration)
        classifier = Classifier(catalogue, data.gaussian, scores, mixture, scale, backbone.device)
        return ComposedModel(catalogue, network, classifier)

    def training_blocks(self, lesson: Lesson) -> list[AdaptedBlock]:
        """The suffix in which a new task is trained: all folded updates, and the residuals that will be open.

        For images of a newer task, residuals of mode ``previous`` have the gate P(task >= s) = 1 and isolated ones
        have the gate 0.
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
        downs: Callable[[int, Tensor, Tensor], DownProjections],
        loss: Loss = cross_entropy,
    ) -> tuple[tuple[BlockRecord, ...], Tensor]:
        """Train adapters and a head on top of everything before.

        Args:
            lesson: the task.
            collect: which tokens count in the second moments (see `run_suffix`).
            downs: called with the index of a block and the second moments, float64 [d, d], of what its query and value
                projections read; returns its down-projections.
            loss: what is minimised (see `losses`).

        Returns:
            What the task adds to each block, without bases, and the head [K, d + 1]. A task of one class has no
            gradient: it gets no adapters and a head of zeros, so that only its statistics are learned.
        """
        if len(lesson.task.classes) == 1:
            return untrained(lesson)
        suffix = self.training_blocks(lesson)
        features, moments = suffix_features(lesson.backbone, suffix, lesson.train, lesson.config.precision, collect)
        with phase("bases"):
            chosen = [downs(index, q, v) for index, (q, v) in enumerate(moments)]
        return train_adapters(lesson, suffix, chosen, features, loss)

    @timed("statistics")
    @torch.no_grad()
    def finish(
        self,
        lesson: Lesson,
        blocks: tuple[BlockRecord, ...],
        head: Tensor,
        *,
        residual: str = "none",
        collect: Collect = "none",
        kept_images: KeptImages | None = None,
    ) -> TaskRecord:
        """The record of a trained task: statistics and calibration in the finished network, under its gates.

        Validation images are used for calibration first and join the statistics afterwards. Where whole domains were
        held back, the confidence is that of images of learned domains, since it falls by itself with the distance
        (`Classifier.evidence`), and the novelty is that of the domains held back. Where validation images are few, or
        are of domains held back and no adapter was trained, training images calibrate as well, each by statistics of
        those that are not its neighbours. Adapters that were trained on them make them look easier than new images are,
        so together they count as no more than `LEARNED_COUNT_AS` validation images.

        Args:
            lesson: the task.
            blocks: what it adds to each block, without bases.
            head: the trained head.
            residual: how its residual adapters are gated.
            collect: whether, and with which tokens, what the projections read extends the bases (see `run_suffix`).
            kept_images: training images to keep.
        """
        config, train, validation, past = lesson.config, lesson.train, lesson.validation, lesson.past
        classes, gate = len(lesson.task.classes), lesson.gate_validation
        info = self._describe(lesson, residual)
        infos = [*(task.info for task in past), info]
        network = Network(
            lesson.backbone,
            infos,
            self.updates([*(task.blocks for task in past), blocks]),
            lesson.dynamic_memory(
                best_temperature([*(task.gate_nll for task in past), gate.nll]), lesson.backbone.device
            ),
        )
        features, moments = collect_features(network, train, config.precision, collect)
        validation_features, _ = collect_features(network, validation, config.precision)
        known = ClassifierData.of(past, lesson.backbone.dim)
        seen = lesson.statistics(features)
        statistics = seen.compressed(STORED_DIRECTIONS)
        ridge_sums = None
        if info.classifier == "ridge":
            ridge_sums = fit_ridge_sums(
                known.ridge_sums,
                (features, train.labels),
                (validation_features, validation.labels),
                classes,
            )
        classifier, scores = self._uncalibrated(known, infos, head, statistics, ridge_sums)
        catalogue = Catalogue.of(infos)
        truth = torch.tensor([catalogue.classes.index(name) for name in info.classes])
        evidence = classifier.evidence(validation_features)
        accuracy = CalibrationCurve.of(evidence, classifier.class_sums, truth[validation.labels]).accuracy
        novelty = [classifier.raw_novelty(validation_features)]
        fold = lesson.domain_folds
        for number in range(int(fold.amax()) + 1 if len(fold) else 0):
            out = fold == number
            rest = (validation_features[~out], validation.labels[~out], classes)
            joined = (seen + ClassStatistics.of(*rest)).compressed(STORED_DIRECTIONS)
            joined_sums = ridge_sums + RidgeSums.of(*rest) if ridge_sums else None
            fitted, _ = self._uncalibrated(known, infos, head, joined, joined_sums)
            evidence[out] = fitted.evidence(validation_features[out])
        curve = CalibrationCurve.of(evidence, classifier.class_sums, truth[validation.labels])
        trained = any(len(block.orthogonal.q_down) + len(block.residual.q_down) for block in blocks)
        is_few, is_new_domain = len(validation) < ENOUGH, bool((fold >= 0).any())
        if is_few or (is_new_domain and not trained):
            weight = min(1.0, LEARNED_COUNT_AS / max(train.images, 1)) if trained else 1.0
            for part, scores_left_out in self._left_out(lesson, infos, head, features, ridge_sums):
                curve = curve + part.scaled(weight)
                if is_few:
                    novelty.append(scores_left_out)
        factor = overconfidence(scores, catalogue, statistics, lesson.number)
        if len(validation):
            seen = seen + ClassStatistics.of(validation_features, validation.labels, classes)
            statistics = seen.compressed(STORED_DIRECTIONS)
            if ridge_sums:
                ridge_sums = ridge_sums + RidgeSums.of(validation_features, validation.labels, classes)
        found = {"accuracy": accuracy, "left_out": sum(map(len, novelty))}
        return TaskRecord(
            info=replace(info, validation={**info.validation, **found}),
            split=KeptSplit.of(lesson.task),
            blocks=_with_bases(blocks, past, moments, config.energy),
            head=head,
            statistics=statistics,
            curve=curve,
            gate_nll=gate.nll,
            novelty=quantiles(torch.cat(novelty)),
            expected_novelty=expected_novelty([*known.statistics, statistics])[-1],
            overconfidence=factor or 0.0,
            discriminants=GaussianClassifier.fit([statistics]) if info.classifier == "lda" else None,
            ridge_sums=ridge_sums,
            kept_images=kept_images,
        )

    def _left_out(
        self, lesson: Lesson, infos: Sequence[TaskInfo], head: Tensor, features: Tensor, ridge_sums: RidgeSums | None
    ) -> Iterator[tuple[CalibrationCurve, Tensor]]:
        """Curve and raw novelty [n] of each fold of the training images, by statistics of the others.

        ``features`` [n, D] are those of the images and their views; ``ridge_sums`` those of all of them.
        """
        train, classes = lesson.train, len(lesson.task.classes)
        known = replace(ClassifierData.of(lesson.past, lesson.backbone.dim), inflation=False)
        catalogue = Catalogue.of(infos)
        truth = torch.tensor([catalogue.classes.index(name) for name in infos[-1].classes])
        fold = neighbour_folds(train.labels[: train.images])
        for number in range(int(fold.max()) + 1):
            out, rest = fold == number, (fold != number).repeat(1 + train.views)
            others = ClassStatistics.of(features[rest], train.labels[rest], classes).scaled(1 / (1 + train.views))
            sums = ridge_sums
            if sums:
                sums = replace(RidgeSums.of(features[rest], train.labels[rest], classes), right=sums.right)
            classifier, _ = self._uncalibrated(known, infos, head, others.compressed(STORED_DIRECTIONS), sums)
            images, labels = features[: train.images][out], train.labels[: train.images][out]
            curve = CalibrationCurve.of(classifier.evidence(images), classifier.class_sums, truth[labels])
            yield curve, classifier.raw_novelty(images)

    def _uncalibrated(
        self,
        known: ClassifierData,
        infos: Sequence[TaskInfo],
        head: Tensor,
        statistics: ClassStatistics,
        ridge_sums: RidgeSums | None,
    ) -> tuple[Classifier, Scores]:
        """The classifier of the tasks ``infos``, of which the last has these statistics, before it is calibrated."""
        kind = infos[-1].classifier
        discriminants = GaussianClassifier.fit([statistics], inflation=known.inflation) if kind == "lda" else None
        data = known.followed_by(head, statistics, discriminants, ridge_sums)
        scores = self.scores(kind, data)
        catalogue, unknown = Catalogue.of(infos), NoveltyScale.unknown()
        return Classifier(catalogue, data.gaussian, scores, Mixture(1.0), unknown, torch.device("cpu")), scores

    def _describe(self, lesson: Lesson, residual: str) -> TaskInfo:
        """The description of a task; the accuracy of the classifier is not known yet."""
        config, labels = lesson.config, lesson.train.labels[: lesson.train.images]
        return TaskInfo(
            name=lesson.task.name,
            classes=lesson.task.classes,
            method=self.name,
            residual=residual,
            seed=config.seed,
            data_digest=lesson.task.digest,
            counts={name: int((labels == k).sum()) for k, name in enumerate(lesson.task.classes)},
            validation={
                "images": len(lesson.validation),
                "gate_task_accuracy": lesson.gate_validation.task_accuracy,
            },
            classifier=self.classifier if config.classifier == "auto" else config.classifier,
            gate=config.gate,
            calibration=config.calibration,
        )


def _curves(tasks: Sequence[TaskRecord], catalogue: Catalogue, scores: Scores) -> list[CalibrationCurve]:
    """The curves of the tasks for the classifier of today.

    Each curve was measured with the classifier of its day. That one was fitted to fewer images, so its logits were
    overconfident by a larger factor.
    """
    curves = []
    for index, task in enumerate(tasks):
        now = overconfidence(scores, catalogue, task.statistics, index) if task.overconfidence else None
        curves.append(task.curve.warmer(now / task.overconfidence) if now else task.curve)
    return curves


def _novelties(tasks: Sequence[TaskRecord]) -> list[Tensor]:
    """The quantiles of the novelty of each task for the Gaussians of today.

    They are moved by what the statistics predict, but by no more than from the median to the quantile of 95 %: from
    few images the prediction can be anything.
    """
    moved = []
    for task, now in zip(tasks, expected_novelty([task.statistics for task in tasks]), strict=True):
        reach = float(task.novelty[round(0.95 * (QUANTILES - 1))] - task.novelty[QUANTILES // 2])
        moved.append(task.novelty + min(max(now - task.expected_novelty, -reach), reach))
    return moved


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
