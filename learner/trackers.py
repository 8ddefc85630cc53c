"""Trainings in TensorBoard, MLflow and Weights & Biases, as callbacks; each library is imported where it is chosen."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from duallora_edge.errors import ConfigError
from duallora_edge.extras import install_hint
from duallora_edge.learner.callbacks import Callback, Point

if TYPE_CHECKING:
    from duallora_edge.learner.config import TrainConfig
    from duallora_edge.learner.report.metrics import Metrics


class Tracker(Callback):
    """Logs each call of `learn` as one run of a tracker.

    Logged are the settings, ``<task>/loss``, ``/learning_rate``, ``/images_per_second`` and ``/validation_accuracy`` by
    the step of the task's training, and after each task, by the number of tasks, ``accuracy/<task>`` of each task,
    ``last_accuracy``, ``forgetting_since_learned`` and ``calibration_error``. Shares are 0..1.

    What fails once, such as a server that is away, is said once and not tried again; learning goes on.

    Attributes:
        name: the key in `TRACKERS`, the value of ``--track``, and the extra that has the library.
        module: what is imported.
    """

    name: ClassVar[str]
    module: ClassVar[str]

    def __init__(self, run: str | Path, warn: Callable[[str], object] = warnings.warn) -> None:
        """Import the library; nothing is logged yet.

        Args:
            run: The folder of the run, whose name the tracker shows.
            warn: Hears of a failure.

        Raises:
            ConfigError: The library is not installed.
        """
        try:
            self.library: Any = importlib.import_module(self.module)
        except ImportError as error:
            remedy = install_hint(self.name)
            raise ConfigError(f"Logging to {self.name} needs its library ({error}): {remedy}.") from error
        self.run, self.warn = Path(run), warn
        self._is_open = False

    def start(self, config: TrainConfig, tasks: tuple[str, ...]) -> None:
        self._is_open = True
        self._try(self._open, config.to_json())

    def trained(self, point: Point) -> None:
        values = {
            "loss": point.loss,
            "learning_rate": point.learning_rate,
            "images_per_second": point.images_per_second,
            "validation_accuracy": point.validation_accuracy,
        }
        task = _tag(point.task)
        named = {f"{task}/{key}": value for key, value in values.items()}
        self._try(self._log, _known(named), f"{task}/step", point.step)

    def measured(self, metrics: Metrics) -> None:
        summary = ("last_accuracy", "forgetting_since_learned", "calibration_error")
        values = {key: metrics.summary[key] for key in summary}
        values |= {f"accuracy/{_tag(task.name)}": task.now for task in metrics.per_task}
        self._try(self._log, _known(values), "tasks", len(metrics.tasks))

    def end(self, metrics: Metrics) -> None:
        self._try(self._close)
        self._is_open = False

    def _try(self, work: Callable[..., None], *arguments: object) -> None:
        """Do something while nothing has failed. What libraries print there does not mix with ``train --json``."""
        if not self._is_open:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):
                work(*arguments)
        except Exception as error:
            self._is_open = False
            self.warn(f"Nothing more is logged to {self.name} ({str(error).strip().partition(chr(10))[0]}).")

    def _open(self, settings: Mapping[str, Any]) -> None:
        """Begin a run with these settings."""
        raise NotImplementedError

    def _log(self, values: Mapping[str, float], axis: str, step: int) -> None:
        """Log values at a ``step`` of an ``axis``."""
        raise NotImplementedError

    def _close(self) -> None:
        """End the run."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """Event files in the folder ``reports/tensorboard`` of the run."""

    name = "tensorboard"
    module = "torch.utils.tensorboard"

    def _open(self, settings: Mapping[str, Any]) -> None:
        self.writer = self.library.SummaryWriter(str(self.run / "reports" / "tensorboard"))
        self.writer.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```")

    def _log(self, values: Mapping[str, float], axis: str, step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()  # a kill leaves what was logged

    def _close(self) -> None:
        self.writer.close()


class MLflow(Tracker):
    """A run of the experiment and server that MLFLOW_EXPERIMENT_NAME and MLFLOW_TRACKING_URI name."""

    name = "mlflow"
    module = "mlflow"

    def _open(self, settings: Mapping[str, Any]) -> None:
        # Learning waits for a server that is away; by default for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        self.library.start_run(run_name=self.run.name, nested=True)
        self.library.log_params(settings)

    def _log(self, values: Mapping[str, float], axis: str, step: int) -> None:
        self.library.log_metrics(values, step=step)

    def _close(self) -> None:
        self.library.end_run()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, of the project that WANDB_PROJECT names."""

    name = "wandb"
    module = "wandb"

    def _open(self, settings: Mapping[str, Any]) -> None:
        self.tracked = self.library.init(name=self.run.name, config=dict(settings))
        self.defined: set[str] = set()

    def _log(self, values: Mapping[str, float], axis: str, step: int) -> None:
        for key in values.keys() - self.defined:
            self.tracked.define_metric(key, step_metric=axis)
            self.defined.add(key)
        self.tracked.log({axis: step, **values})

    def _close(self) -> None:
        self.tracked.finish()


TRACKERS: Mapping[str, type[Tracker]] = {one.name: one for one in (TensorBoard, MLflow, WeightsAndBiases)}


def _tag(task: str) -> str:
    """The name of a task as a part of the name of a metric, for which MLflow allows fewest characters."""
    return re.sub(r"[^\w.-]+", "_", task)


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in values.items() if value is not None}
