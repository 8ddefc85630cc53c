"""Measuring a run: the answers of its states on the test images of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from duallora_edge.errors import ConfigError, DataError, RunError
from duallora_edge.learner import distributed
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.data import PixelSet
from duallora_edge.learner.data.kept_split import measurable
from duallora_edge.learner.data.split import some
from duallora_edge.learner.device import pick_device
from duallora_edge.learner.doubts import doubts
from duallora_edge.learner.measurements import measured_rows, stored_answers, write_answers, write_rows
from duallora_edge.learner.methods import METHODS, compose
from duallora_edge.learner.network.answers import NOVELTY_THRESHOLD, ComposedModel, Outputs
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.features import collect_features
from duallora_edge.learner.network.prefix_cache import BATCH, Encoded, PrefixCache
from duallora_edge.learner.network.task_record import TaskRecord
from duallora_edge.learner.reading import read_images, source_groups
from duallora_edge.learner.report.answers import Answers
from duallora_edge.learner.report.metrics import Cell, Metrics, Predictions, Row, TaskClasses
from duallora_edge.learner.report.page import About, write_report
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.timing import timed


class Tests:
    """Test images of tasks, encoded once by the frozen prefix and answered by every state."""

    def __init__(
        self,
        backbone: Backbone,
        precision: str,
        cache: PrefixCache | None = None,
        *,
        batch_size: int = BATCH,
        cache_bytes: int | None = None,
    ) -> None:
        """``batch_size`` and ``cache_bytes`` (of each task) as for `Encoded`."""
        self.backbone, self.precision, self.cache = backbone, precision, cache
        self._encode = partial(Encoded, backbone, precision=precision, batch_size=batch_size, cache_bytes=cache_bytes)
        self._encoded: dict[str, Encoded] = {}
        self._scenes: dict[str, npt.NDArray[np.int64]] = {}

    def add(self, name: str, test: PixelSet, classes: Sequence[str]) -> None:
        """Encode the test images of a task. Images of classes that the task did not learn are left out."""
        keep = np.isin(test.labels, list(classes))
        test = test if keep.all() else test.where(keep)
        self._encoded[name], self._scenes[name] = self._encode(test, classes, cache=self.cache), test.scenes

    def encoded(self, task: str) -> Encoded:
        """The test images of a task that was added."""
        return self._encoded[task]

    @timed("evaluation")
    @torch.no_grad()
    def row(self, tasks: Sequence[TaskRecord], *, pictures: bool = False) -> tuple[Row, Answers]:
        """The cells of the state after the last of ``tasks``, and its answers with or without ``pictures``.

        Cells of tasks without test images are empty.
        """
        if not any(len(self._encoded.get(task.info.name, ())) for task in tasks):
            return tuple(Cell() for _ in tasks), Answers({})
        model = compose(self.backbone, tasks)
        cells, answers = zip(*(self._cell(model, tasks, index, pictures) for index in range(len(tasks))), strict=True)
        *earlier, newest = cells
        known = {name for task in tasks[:-1] for name in task.info.classes}
        if known and newest.n and not known.intersection(tasks[-1].info.classes):
            before = compose(self.backbone, tasks[:-1])
            novel = self._answers(before, tasks[-1].info.name).novelty > NOVELTY_THRESHOLD
            newest = replace(newest, novel_before=int(novel.sum()))
        return (*earlier, newest), Answers.joined(answers)

    def _answers(self, model: ComposedModel, task: str) -> Outputs:
        """The answers on the test images of a task, on the CPU."""
        features, _ = collect_features(model.network, self._encoded[task], self.precision)
        answers = [model.classifier(part.to(self.backbone.device)) for part in features.split(BATCH)]
        return Outputs(
            **{f.name: torch.cat([getattr(answer, f.name) for answer in answers]).cpu() for f in fields(Outputs)}
        )

    def _cell(
        self, model: ComposedModel, tasks: Sequence[TaskRecord], index: int, pictures: bool
    ) -> tuple[Cell, Answers]:
        info = tasks[index].info
        encoded = self._encoded.get(info.name)
        if encoded is None or not len(encoded):
            return Cell(), Answers({})
        answers = self._answers(model, info.name)
        if not bool(torch.isfinite(answers.probabilities).all()):
            raise RunError("The run is damaged (its answers are not numbers); restore it from a copy.")
        columns = [model.catalogue.classes.index(name) for name in info.classes]
        predictions = Predictions(
            labels=torch.tensor(columns)[encoded.labels].numpy(),
            probabilities=answers.probabilities.numpy(),
            task=index,
            task_probabilities=answers.task_probabilities.numpy(),
            novel=(answers.novelty > NOVELTY_THRESHOLD).numpy(),
            scenes=self._scenes[info.name],
        )
        frames = (lambda numbers: encoded.frames(torch.from_numpy(numbers))) if pictures else None
        return Cell.from_predictions(predictions, columns), Answers.of_task(predictions, frames)


def evaluate_run(
    run: RunDirectory, tests: Tests | None, *, reuse: bool, on_state: Callable[[Metrics], None]
) -> Metrics:
    """Measure every state of the run on every task it knows.

    With ``reuse`` rows measured earlier on the same state are taken over; ``on_state(metrics)`` is called for each
    state that is measured now. Without ``tests`` nothing is measured, and the cells of other states stay empty.
    """
    active = run.active_tasks()
    if not active:
        raise RunError(f"The run {run.path} has learned no task yet; 'duallora-edge train' teaches it one.")
    known = measured_rows(run) if reuse else {}
    records = run.records(active) if tests else []
    infos = map(run.read_info, active)
    tasks = tuple(TaskClasses(info.name, info.classes) for info in infos)
    rows: dict[str, Row] = {}
    for k in range(1, len(active) + 1):
        state = run.digest(active[:k])
        if state in known:
            rows[state] = known[state]
        elif tests is None:
            rows[state] = tuple(Cell() for _ in range(k))
        else:
            newest = k == len(active)
            rows[state], answers = tests.row(records[:k], pictures=newest and run.config.pictures)
            write_answers(run, state, run.digest(active[: k - 1]), answers)
            on_state(Metrics(tasks[:k], tuple(rows.values())))
    if tests is not None:
        write_rows(run, rows)
    return Metrics(tasks, tuple(rows.values()))


@distributed.main_only
@timed("evaluation")
def report(
    run: RunDirectory, metrics: Metrics, callback: Callback, comparisons: Sequence[tuple[str, Metrics]] = ()
) -> Path:
    """Write the report of a run into its folder ``reports``, and say what is to be doubted; returns its path."""
    found = doubts(metrics, [run.read_info(task) for task in run.active_tasks()])
    for line in found:
        callback.say(line)
    about = About(run.path.name, run.config.method, details(run), found)
    answers = stored_answers(run, run.digest())
    return write_report(run.path / "reports", metrics, about, comparisons, answers)


def details(run: RunDirectory) -> dict[str, str]:
    """The facts under which a run's numbers were measured, as label and text."""
    config, info = run.config, run.info
    facts: Mapping[str, Any] = {
        "Backbone": info.name,
        "Input": f"{info.size} × {info.size} px",
        "Frozen blocks": info.prefix_blocks,
        "Ranks": f"{config.rank_orthogonal} orthogonal + {config.rank_residual} residual",
        "Epochs": config.epochs,
        "Precision of training": config.precision,
        "Seed": config.seed,
    }
    return {label: str(value) for label, value in facts.items()}


def add_tests(
    run: RunDirectory, tests: Tests, callback: Callback, *, data: str | None = None, skip: Collection[str] = ()
) -> None:
    """Read and encode the test images of the active tasks from where they were learned (or from ``data``).

    No image that a task learned is among them, however the source has changed since (see `measurable`). A source that
    is gone is said, and its tasks stay unmeasured; a ``data`` that was asked for must be readable.
    """
    entries = {run.read_info(entry).name: entry for entry in run.active_tasks()}
    splits = {name: run.read_split(entry) for name, entry in entries.items()}
    infos = {name: run.read_info(entry) for name, entry in entries.items() if name not in skip}
    sources, there = run.sources(), set[str]()
    for settings in source_groups(run, infos):
        # A source may also hold tasks that were learned from another one, of which it has other images.
        own = {name for name in infos if sources.get(name, {}) == settings}
        if data is not None:
            settings["data"] = data
        try:
            stream = read_images(replace(run.config, **settings), run.info, callback)
        except (DataError, ConfigError) as error:
            if data is not None:
                raise
            callback.say(f"The test images from {settings.get('data')} cannot be read and are not measured: {error}")
            continue
        if METHODS[run.config.method].single_task:
            stream = stream.merged()
        there.update(task.name for task in stream.tasks)
        for task in stream.tasks:
            if task.name in own:
                others = [split for name, split in splits.items() if name != task.name]
                test = measurable(task, splits[task.name], others, every=data is not None)
                if data is None and (message := splits[task.name].changes(task, others, len(test))):
                    callback.say(message)
                tests.add(task.name, test, infos[task.name].classes)
    if data is not None and not there.intersection(infos):
        raise DataError(
            f"{data} holds images of {some(sorted(there))}, but the run learned {some(list(infos))}; call the folder "
            "as the task is called."
        )


def measure_run(
    run: RunDirectory,
    data: str | None,
    device: str,
    weights: str | None,
    callback: Callback,
    comparisons: Sequence[tuple[str, Metrics]] = (),
) -> Metrics:
    """Measure every state of a run again and write the report; ``data`` replaces the remembered source."""
    with run.locked():
        backbone = run.backbone(weights).to(pick_device(device))
        tests = Tests(backbone, run.config.precision)
        add_tests(run, tests, callback, data=data)
        metrics = evaluate_run(run, tests, reuse=False, on_state=callback.measured)
        report(run, metrics, callback, comparisons)
    callback.end(metrics)
    return metrics
