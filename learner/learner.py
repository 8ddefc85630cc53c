"""The Python interface of learning: one object for one run.

PyTorch is imported by the methods that need it, so that undoing a task does not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora_edge.errors import RunError
from duallora_edge.learner.callbacks import Callback, Callbacks
from duallora_edge.learner.config import TrainConfig, load_config
from duallora_edge.learner.distributed import main_only
from duallora_edge.learner.measurements import stored_metrics
from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.report.metrics import Metrics
from duallora_edge.learner.run_directory import RunDirectory, StoredTask
from duallora_edge.learner.yaml_files import read_yaml

if TYPE_CHECKING:
    from duallora_edge.learner.network.answers import ComposedModel
    from duallora_edge.learner.network.prefix_cache import PrefixCache
    from duallora_edge.learner.transform import Transform
    from duallora_edge.runtime.bundle import Bundle


class Learner:
    """A run: the tasks that a vision transformer has learned, in a directory that may be moved and copied.

    Everything is kept in the run directory and nothing in this object, so a `Learner` may be thrown away at any time,
    and another one, or the command line, goes on with the same run.

        learner = Learner("runs/site-a", backbone="vit_small_patch14_reg4_dinov2", size=224)
        learner.learn("photos/")
        bundle = learner.export("bundle", target="jetson")
    """

    def __init__(
        self,
        run: str | Path,
        *,
        config: str | Path | None = None,
        callbacks: Iterable[Callback] = (),
        cache: PrefixCache | None = None,
        **settings: Any,
    ) -> None:
        """Name a run and the settings it is to be learned with; nothing is read or written yet.

        Args:
            run: The run directory, new or existing.
            config: A YAML file with settings.
            callbacks: What hears of the progress.
            cache: What the frozen prefix made of the images, to share between several runs on the same images.
            **settings: Any setting of docs/settings.md; they win over those of ``config``. An existing run keeps the
                settings it was made with, so there they may only repeat them or be settings of one call, such as
                ``device``.

        Raises:
            ConfigError: A setting is unknown, or its value is of a wrong type or range. All problems are named.
        """
        self.path = Path(run)
        path = None if config is None else Path(config)
        self._config, self._given = _resolve(path, settings)
        self._callback = Callbacks(callbacks)
        self._cache = cache

    def learn(
        self,
        data: str | Path | None = None,
        *,
        task_name: str | None = None,
        again: str | None = None,
        evaluate: bool = True,
    ) -> Metrics:
        """Learn the tasks in ``data`` that the run does not know yet, one after the other.

        Interrupted at any moment, the same call continues where it was, and ends in the same bytes (CPU, fp32).

        Args:
            data: A folder of images (one task, or a stream of tasks in folders), a CSV manifest, or
                ``torchvision:NAME``. None: the images of the last call, or those of the task ``again``.
            task_name: The name of the task, by default that of the folder.
            again: A known task whose images have changed. It is learned anew from all images that are there now and
                takes the place of its old version, as the newest task. The others stay as they are.
            evaluate: Whether to measure each new state on the test images, and to write the report.

        Returns:
            The metrics of the run; cells that were not measured are empty.

        Raises:
            ConfigError: A setting contradicts those the run was made with, or the device is not there.
            DataError: The images cannot be used, or a known task has other images and ``again`` does not name one, or
                the data hold no task of that name.
            RunError: The run is damaged, another process writes to it, it has no task ``again``, or later tasks of
                this method build on it.
        """
        from duallora_edge.learner.train import train_run

        given = {"data": None if data is None else str(data), "task_name": task_name}
        named = [key for key, value in given.items() if value is not None]
        config = load_config(None, given, self._config)
        given_names = [*self._given, *named]
        return train_run(self.path, config, given_names, self._callback, self._cache, again=again, evaluate=evaluate)

    def evaluate(self, data: str | Path | None = None, *, comparisons: Sequence[Learner] = ()) -> Metrics:
        """Measure every state of the run again on every task it knows, and write the report.

        Args:
            data: Where the test images are now; by default, where they were when the tasks were learned.
            comparisons: Runs on the same stream that stand beside this one in the report.

        Returns:
            The metrics of the run.

        Raises:
            RunError: The run is missing, empty or damaged, another process writes to it, or a run to compare with was
                not measured.
            DataError: ``data`` was given and cannot be read.
        """
        from duallora_edge.learner.evaluate import measure_run

        others = [(other.path.name, other.metrics) for other in comparisons]
        run, source = RunDirectory.open(self.path), None if data is None else str(data)
        return measure_run(run, source, self._config.device, self._config.weights, self._callback, others)

    @property
    def config(self) -> TrainConfig:
        """The settings of the run, or those it will be made with."""
        return RunDirectory.open(self.path).config if RunDirectory.exists(self.path) else self._config

    @property
    def tasks(self) -> tuple[TaskInfo, ...]:
        """The tasks in the order in which they were learned; none for a run that does not exist yet."""
        if not RunDirectory.exists(self.path):
            return ()
        run = RunDirectory.open(self.path)
        return tuple(map(run.read_info, run.active_tasks()))

    @property
    def metrics(self) -> Metrics:
        """The metrics as they were measured last. Raises `RunError` when a state was not measured."""
        return stored_metrics(RunDirectory.open(self.path))

    def rollback(self) -> str:
        """Undo the last task: the state is then, bit for bit, the one before that task was learned.

        Returns:
            The name of the task.

        Raises:
            RunError: There is no task, the run is damaged, or another process writes to it.
        """
        run = RunDirectory.open(self.path)
        with run.locked():
            active = run.active_tasks()
            if not active:
                raise RunError(f"The run {self.path} has no task to undo.")
            name = run.read_info(active[-1]).name
            self._activate(run, active[:-1])
        return name

    def remove(self, task: str) -> None:
        """Take one task out of the run: its adapters, bases, statistics and classes.

        Later tasks were learned on top of it and may answer a little worse; `evaluate` measures it. Removing the
        newest task is the same as `rollback`.

        Args:
            task: The name of the task.

        Raises:
            RunError: There is no such task, later tasks of this method build on it, the run is damaged, or another
                process writes to it.
        """
        run = RunDirectory.open(self.path)
        with run.locked():
            entry = run.find_removable(task)
            self._activate(run, [other for other in run.active_tasks() if other != entry])

    def _activate(self, run: RunDirectory, active: Sequence[StoredTask]) -> None:
        for folder in run.set_active_tasks(active):
            self._callback.say(f"{folder} stays: it holds files that the task did not write.")

    def model(self) -> ComposedModel:
        """The trained model: RGB frames uint8 [B, S, S, 3] in, calibrated outputs out.

        Returns:
            A `torch.nn.Module` in evaluation mode, on the CPU. Its outputs are named as those of the exported graph:
            ``probabilities`` [B, classes], ``task_probabilities`` [B, tasks], ``novelty`` [B], ``features`` [B, d].

        Raises:
            RunError: The run is missing, empty or damaged, or the backbone's weights are not those it was made with.
        """
        from duallora_edge.learner.methods import compose

        run = RunDirectory.open(self.path)
        records = run.records()
        if not records:
            raise RunError(f"The run {self.path} has learned no task yet; learn one first.")
        return compose(run.backbone(self._config.weights), records).eval()

    def transform(self) -> Transform:
        """What makes of an image the input of the run's backbone, for ``transform=`` of data sets outside.

            ImageFolder("photos/test", transform=learner.transform(), loader=duallora_edge.runtime.read_image)

        Returns:
            A function of an RGB image ``uint8 [H, W, 3]`` of any size. It returns ``float32 [3, S, S]``, which a timm
            model with the adapters of `duallora_edge.export.export_peft` takes.

        Raises:
            RunError: The run is missing or damaged.
        """
        from duallora_edge.learner.transform import Transform
        from duallora_edge.runtime.preprocess import Preprocessing

        run = RunDirectory.open(self.path)
        info = run.info
        return Transform(Preprocessing(info.size, run.config.resize, info.interpolation), info.mean, info.std)

    def export(self, output: str | Path, target: str = "jetson", **options: Any) -> Bundle:
        """Write a verified bundle for a device; see `duallora_edge.export.export_run` for options and errors.

        Args:
            output: The folder of the bundle; a bundle that is there is replaced as a whole or not at all.
            target: A device of ``duallora-edge devices``, or the YAML file of a profile.
            **options: ``jetpack``, ``precision``, ``batch``, ``split``, ``bundle_version``.

        Returns:
            The bundle, verified and opened.
        """
        # The one arrow from learning up to export: people expect the method here, and nothing else needs it.
        from duallora_edge.export import export_run

        weights, say = self._config.weights, self._callback.say
        return export_run(self.path, output, target, weights=weights, say=say, **options).bundle


@main_only
def _resolve(path: Path | None, settings: Mapping[str, Any]) -> tuple[TrainConfig, list[str]]:
    """The configuration, and the names of the settings that were given; None means not given."""
    named = [key for key, value in settings.items() if value is not None]
    return load_config(path, settings), [*named, *([] if path is None else read_yaml(path))]
