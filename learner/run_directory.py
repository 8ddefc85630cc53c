"""The run directory: tasks written once, one HEAD that names the active ones, a lock, a checkpoint.

Every state is committed by rename, so a kill at any moment leaves the last committed state or a checkpoint that can
be continued. Nothing is pickled, and no pixel is stored but for the thumbnails in the reports.

Only an empty folder becomes a run. An empty file, `MARKER`, then says that it is ours, so that a creation that was
killed can be done again; a run.yaml with backbone.json and HEAD.json says the same of runs made before there was one.
What is deleted has a name that is fixed here, or stands in a task.json whose id HEAD.json holds.

Where several processes train together, rank 0 alone reads and writes here, and the others get what it found (tensors of
tasks aside, which each rank reads itself). Callers need not know how many there are.
Importing this module does not import torch, so that commands that only describe a run start fast.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError, safe_open

from duallora_edge.errors import ConfigError, RunError
from duallora_edge.files import (
    atomic_directory,
    keep_spare,
    lock_holder,
    note_holder,
    open_lock,
    read_json,
    read_limited,
    sweep,
    write_atomic,
    write_json,
)
from duallora_edge.folder_kind import folder_kind
from duallora_edge.learner.config import PER_CALL, SOURCE, TrainConfig, sort_out
from duallora_edge.learner.distributed import held_by_main, main_first, main_only
from duallora_edge.learner.history import HISTORY, keep_lines
from duallora_edge.learner.methods import METHODS, VARIABLE
from duallora_edge.learner.network.backbone_info import BackboneInfo
from duallora_edge.learner.network.base_adaptation import MAX_BYTES, BaseAdaptation, read_made_from
from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.settings import quoted
from duallora_edge.learner.yaml_files import read_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from duallora_edge.learner.data.kept_split import KeptSplit
    from duallora_edge.learner.network.backbone import Backbone
    from duallora_edge.learner.network.task_record import TaskRecord

SCHEMA = 7
MARKER = ".duallora-edge-run"
SPARE = ".duallora-edge-spare"
BASE = "base.safetensors"
PICTURES = "reports/data.png"
ANSWERS = "reports/answers.json"
REPORT = "reports/report.html"
_LOCK = ".lock"
# What is written under a temporary name first, which a kill leaves.
_WRITTEN = (
    "HEAD.json", "run.yaml", "backbone.json", BASE, "sources.json", "memory_budget.json", SPARE,
    "checkpoint/state.safetensors",
    "reports/rows.json", "reports/metrics.json", "reports/profile.json", HISTORY, REPORT, ANSWERS, PICTURES,
)  # fmt: skip
FILES = tuple(
    f"{name}.safetensors"
    for name in ("adapters", "bases", "head", "statistics", "discriminants", "split", "ridge_sums", "kept_images")
)


@dataclass(frozen=True)
class StoredTask:
    """One entry of HEAD: the folder of a task and the id that its content must have."""

    folder: str
    id: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9]{4,9}-[A-Za-z0-9._-]{1,200}", self.folder):
            raise ValueError(f"{quoted(self.folder)} is not the folder of a task")
        if not re.fullmatch(r"[0-9a-f]{64}", self.id):
            raise ValueError(f"{quoted(self.id)} is not the id of a task")

    @property
    def number(self) -> int:
        return int(self.folder.split("-", 1)[0])

    def to_json(self) -> dict[str, str]:
        return {"folder": self.folder, "id": self.id}


class RunDirectory:
    """A run directory, opened for reading; `locked` guards every change."""

    def __init__(self, path: Path, config: TrainConfig, info: BackboneInfo) -> None:
        self.path = path
        self.config = config
        self.info = info

    @classmethod
    @main_only
    def exists(cls, path: Path) -> bool:
        """Whether there is a run at ``path``."""
        return (path / "run.yaml").is_file()

    @classmethod
    @main_only
    def create(cls, path: Path, config: TrainConfig, info: BackboneInfo, base: bytes | None = None) -> RunDirectory:
        """Make a new run directory. Raises `RunError` when something else is there.

        ``base`` is the content of the file whose sha256 is ``info.base``.
        """
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is not a folder; give another name with --run.")
        path.mkdir(parents=True, exist_ok=True)
        marker, names = path / MARKER, sorted(entry.name for entry in path.iterdir())
        if names and (marker.is_symlink() or not marker.is_file()):
            raise RunError(f"{path} holds other files ({names[0]}, ...); give an empty or new folder with --run.")
        marker.touch()
        with _locked(path):
            # A creation that was killed is done again: it left no run.yaml, which comes last, and no task.
            if cls.exists(path):
                raise RunError(f"Another process has just made the run {path}; run the same command again.")
            (path / "tasks").mkdir(exist_ok=True)
            if any((path / "tasks").iterdir()):
                raise RunError(f"The run {path} has tasks but no run.yaml; restore it from a copy.")
            if base is not None:
                write_atomic(path / BASE, base)
            write_json(path / "backbone.json", info.to_json())
            write_json(path / "HEAD.json", {"schema": SCHEMA, "tasks": []})
            keep_spare(path / SPARE)
            settings = {key: value for key, value in config.to_json().items() if key not in PER_CALL}
            settings["weights"] = str(Path(config.weights).resolve()) if config.weights else None
            write_atomic(path / "run.yaml", yaml.safe_dump({"schema": SCHEMA, **settings}, sort_keys=False))
        return cls(path, config, info)

    @classmethod
    @main_only
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run. Raises `RunError` when it is missing, damaged or of another schema."""
        if not path.is_dir():
            raise RunError(f"{path} is not a folder; 'duallora-edge train --data DIR --run {path}' makes a run.")
        if not cls.exists(path):
            if folder_kind(path) == "bundle":
                raise RunError(
                    f"{path} is a bundle, not a run; 'duallora-edge predict', 'run' and 'benchmark' take it."
                )
            raise RunError(f"{path} is not a run (no run.yaml); 'duallora-edge train' makes one.")
        try:
            settings = read_yaml(path / "run.yaml")
        except (OSError, ConfigError) as error:
            raise _damaged(path, error) from error
        if settings.pop("schema", None) != SCHEMA:
            raise RunError(f"{path}/run.yaml is not of schema {SCHEMA}; train again, or use the version that wrote it.")
        if isinstance(method := settings.get("method"), str) and method not in METHODS:
            raise RunError(
                f"The run {path} was trained with the method {quoted(method)}, which is not known here; "
                f"set {VARIABLE} to the file that registers it."
            )
        try:
            good, problems = sort_out(settings)
            if problems:
                raise ConfigError("; ".join(problems))
            config = TrainConfig(**good)
            info = BackboneInfo.from_json(read_json(path / "backbone.json"))
        except (OSError, ValueError, ConfigError) as error:
            raise _damaged(path, error) from error
        return cls(path, config, info)

    def backbone(self, weights: str | None = None) -> Backbone:
        """Load the backbone of the run and check that it is the same one. Raises `RunError` otherwise."""
        return main_first(lambda: self._load_backbone(weights))

    def _load_backbone(self, weights: str | None) -> Backbone:
        from duallora_edge.learner.network.backbone import load_backbone

        source = weights or self.config.weights
        base = None if self.info.base is None else self._base()
        backbone = load_backbone(
            self.info.name,
            weights=Path(source) if source else None,
            size=self.info.size,
            prefix_blocks=self.info.prefix_blocks,
            summaries=len(self.info.summary_blocks),
        )
        if replace(backbone.info, base=self.info.base) != self.info:
            raise RunError(
                f"The weights of {self.info.name} are not those the run was trained with (sha256 "
                f"{backbone.info.sha256[:12]}, expected {self.info.sha256[:12]}); give the right file with --weights."
            )
        if base is not None:
            backbone.adapt(base, str(self.info.base))
        return backbone

    def _base(self) -> BaseAdaptation:
        """The base adaptation of the run, which its backbone.json names by its sha256."""
        path = self.path / BASE
        try:
            content = read_limited(path, MAX_BYTES)
            if hashlib.sha256(content).hexdigest() != self.info.base:
                raise RunError(f"{path} was altered since it was written; restore it from a copy of the run.")
            return BaseAdaptation.from_bytes(content)
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); restore it from a copy of the run.") from error

    def base_made_from(self) -> Mapping[str, Any] | None:
        """What the base adaptation was made from, read without its tensors; None where the run has none."""
        path = self.path / BASE
        try:
            return None if self.info.base is None else read_made_from(path)
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); restore it from a copy of the run.") from error

    # -- reading ----------------------------------------------------------------------------------------------

    @main_only
    def active_tasks(self) -> list[StoredTask]:
        """The active tasks in order."""
        try:
            value = read_json(self.path / "HEAD.json")
            tasks = [StoredTask(entry["folder"], entry["id"]) for entry in value["tasks"]]
            if len({task.folder for task in tasks}) < len(tasks):
                raise ValueError("it names a task twice")
            return tasks
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"{self.path}/HEAD.json is damaged ({error}); restore it from a copy of the run.") from error

    def find(self, name: str) -> StoredTask:
        """The active task of this name. Raises `RunError` naming the tasks there are."""
        names = {self.read_info(entry).name: entry for entry in self.active_tasks()}
        if name not in names:
            raise RunError(f"The run {self.path} has no task {name!r}; it has {', '.join(names) or 'none'}.")
        return names[name]

    def find_removable(self, name: str) -> StoredTask:
        """The active task of this name, if the others can do without it. Raises `RunError` otherwise."""
        entry = self.find(name)
        if entry != self.active_tasks()[-1] and not METHODS[self.config.method].removable:
            raise RunError(
                f"Later tasks of {self.config.method} build on {name}; only the newest can be removed or learned again."
            )
        return entry

    @main_only
    def training_steps(self) -> int | None:
        """Steps done of a task whose training was interrupted, or None."""
        return FileCheckpoint(self.path / "checkpoint", "").steps()

    @main_only
    def read_info(self, task: StoredTask) -> TaskInfo:
        """The names, counts and settings of one task, without its tensors."""
        return self._description(task)[0]

    def read(self, task: StoredTask) -> TaskRecord:
        """Read one task and check every file against its sha256. Raises `RunError` when anything was altered."""
        from duallora_edge.learner.network.task_record import TaskRecord

        info, digests = self._description(task)
        files = {name: self._tensors(task, name, digest) for name, digest in digests.items()}
        with _damage_named(task):
            return TaskRecord.from_tensors(info, files)

    def read_split(self, task: StoredTask) -> KeptSplit:
        """Which images one task learned and which are for its test; checked like `read`."""
        from duallora_edge.learner.network.task_record import read_split

        digests = self._description(task)[1]
        with _damage_named(task):
            return read_split(self._tensors(task, "split", digests["split"]))

    def _tensors(self, task: StoredTask, name: str, digest: str) -> dict[str, Tensor]:
        """The tensors of a file of a task whose content has this sha256."""
        from safetensors.torch import load

        path = self.path / "tasks" / task.folder / f"{name}.safetensors"
        try:
            if not path.is_file():  # a pipe would be waited for
                raise FileNotFoundError("there is no such file")
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                raise RunError(f"{path} was altered since it was written; restore it from a copy of the run.")
            return load(content)
        except (OSError, KeyError, ValueError, MemoryError, SafetensorError) as error:
            raise RunError(f"{path} cannot be read ({error}); restore it from a copy of the run.") from error

    def records(self, tasks: Sequence[StoredTask] | None = None) -> list[TaskRecord]:
        """The records of the given tasks, or of all active ones."""
        return [self.read(task) for task in (self.active_tasks() if tasks is None else tasks)]

    def _description(self, task: StoredTask) -> tuple[TaskInfo, dict[str, str]]:
        """The part of a task that is not tensors, and the sha256 of its files by their names without suffix."""
        path = self.path / "tasks" / task.folder / "task.json"
        try:
            value = read_json(path)
            if _content_id(value) != task.id:
                raise RunError(f"{path} was altered since it was written; restore it from a copy of the run.")
            info, files = TaskInfo.from_json(value), value.get("files")
            if not isinstance(files, dict) or any(name not in FILES for name in files):
                raise ValueError("files: must be a mapping of the task's files to their sha256")
            return info, {name.removesuffix(".safetensors"): digest for name, digest in files.items()}
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path} cannot be read ({error}); restore it from a copy of the run.") from error

    # -- changing ---------------------------------------------------------------------------------------------

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Hold the only writer's lock. Raises `RunError` naming the process that holds it.

        The lock belongs to the process (flock), so it is gone when the process dies, however it dies.
        """
        return held_by_main(self._prepared())

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        with _locked(self.path):
            for name in _WRITTEN:
                sweep(self.path / name)
            self.delete_dropped()
            keep_spare(self.path / SPARE)
            yield

    @main_only
    def commit(self, record: TaskRecord, replaced: StoredTask | None = None) -> StoredTask:
        """Write a task as a whole, then make it the newest active one.

        In the same step ``replaced``, an active task, is dropped; `delete_dropped` deletes its files.
        """
        from safetensors.torch import save

        active = self.active_tasks()
        others = [task for task in active if task != replaced]
        number = 1 + max((task.number for task in others), default=0)
        while (self.path / "tasks" / (folder := f"{number:04d}-{_slug(record.info.name)}")).exists():
            number += 1  # somebody else's folder has this name, or that of the replaced task
        description = {
            "schema": SCHEMA,
            **record.info.to_json(),
            "parent": others[-1].id if others else None,
        }
        contents = {f"{name}.safetensors": save(tensors) for name, tensors in record.tensors().items()}
        description["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        task = StoredTask(folder, _content_id(description))
        self._write_active_tasks(
            active, dropped=[task]
        )  # a kill before it is active leaves a folder that is known as ours
        with atomic_directory(self.path / "tasks" / folder) as staging:
            for name, data in contents.items():
                (staging / name).write_bytes(data)
            (staging / "task.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", "utf-8")
        self._write_active_tasks([*others, task], dropped=[replaced] if replaced else [])
        self._delete_checkpoint()
        return task

    @main_only
    def set_active_tasks(self, tasks: Sequence[StoredTask]) -> list[Path]:
        """Make exactly these tasks the active ones, then delete the files of tasks that no longer are.

        The checkpoint goes too: training that began on another state cannot continue on this one. Works on a full
        disk. Returns the folders of deleted tasks that stay, as they hold something that the task did not write.
        The picture sheet, the answers and the report go as well: they may show their images. So do their lines of the
        history.
        """
        self._write_active_tasks(tasks, dropped=[task for task in self.active_tasks() if task not in tasks])
        self._delete_checkpoint()
        for name in (PICTURES, ANSWERS, REPORT):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (self.path / name).unlink()
        kept = self.delete_dropped()
        with contextlib.suppress(OSError, RunError):  # a full disk, or something damaged: the rest is done
            names = {self.read_info(task).name for task in tasks}
            keep_lines(self.path, lambda line: line["task"] in names)
        keep_spare(self.path / SPARE)
        return kept

    def _write_active_tasks(self, tasks: Sequence[StoredTask], dropped: Sequence[StoredTask] = ()) -> None:
        """Replace HEAD.json. Tasks that are ``dropped`` belong to no state; their folders are deleted."""
        value: dict[str, Any] = {"schema": SCHEMA, "tasks": [task.to_json() for task in tasks]}
        if dropped:
            value["dropped"] = [task.to_json() for task in dropped]
        write_atomic(self.path / "HEAD.json", json.dumps(value, indent=2) + "\n", spare=self.path / SPARE)

    @main_only
    def delete_dropped(self) -> list[Path]:
        """Delete what HEAD says is dropped, and say so in HEAD.

        Returns the folders that stay, as they hold something that the task did not write.
        """
        tasks = self.active_tasks()
        try:
            entries = read_json(self.path / "HEAD.json").get("dropped", [])
            dropped = [StoredTask(str(entry["folder"]), str(entry["id"])) for entry in entries]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{self.path}/HEAD.json is damaged ({error}); restore it from a copy of the run.") from error
        kept = [self.path / "tasks" / task.folder for task in dropped if not self._delete_task(task)]
        if dropped:
            with contextlib.suppress(OSError):  # on a full disk: the next one who changes the run says it
                self._write_active_tasks(tasks)
        return kept

    def _delete_task(self, task: StoredTask) -> bool:
        """Delete the files that a task.json of this id lists, and the folder if nothing else is in it."""
        folder = self.path / "tasks" / task.folder
        sweep(folder)
        if folder in {self.path / "tasks" / active.folder for active in self.active_tasks()} or folder.is_symlink():
            return False
        with contextlib.suppress(RunError):  # of another id, or gone: deleted but for the folder
            names = [f"{stem}.safetensors" for stem in self._description(task)[1]]
            for name in (*names, "task.json"):  # the list comes last
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()
        return not folder.exists()

    def _delete_checkpoint(self) -> None:
        FileCheckpoint(self.path / "checkpoint", "").delete()

    def checkpoint(self, key: str) -> FileCheckpoint:
        """The checkpoint of the task in training; one left by a task of another key is ignored and replaced."""
        return FileCheckpoint(self.path / "checkpoint", key)

    def digest(self, tasks: Sequence[StoredTask] | None = None) -> str:
        """SHA-256 over the ids of tasks (the active ones): equal digests mean equal states, bit for bit."""
        ids = [task.id for task in (self.active_tasks() if tasks is None else tasks)]
        return hashlib.sha256("\n".join(ids).encode()).hexdigest()

    @main_only
    def sources(self) -> dict[str, dict[str, Any]]:
        """The settings of `TrainConfig` that led to the images of each task, by task name."""
        path = self.path / "sources.json"
        try:
            value = read_json(path) if path.is_file() else {}
            if not isinstance(value, dict):
                raise ValueError("it must hold the settings of each task")
            return {name: _source(settings) for name, settings in value.items()}
        except (OSError, ValueError, ConfigError) as error:
            raise RunError(f"{path} is damaged ({error}); delete it and name the images with --data.") from error

    @main_only
    def remember_source(self, names: Sequence[str], config: TrainConfig) -> None:
        """Note where the images of some tasks come from, so that later evaluations find their test images."""
        values = config.to_json()
        settings = {key: values[key] for key in SOURCE}
        settings["data"] = config.data if config.data.startswith("torchvision:") else str(Path(config.data).resolve())
        write_json(self.path / "sources.json", {**self.sources(), **dict.fromkeys(names, settings)})


class FileCheckpoint:
    """Training in progress, in one safetensors file that is replaced atomically."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.path = folder / "state.safetensors"

    def steps(self) -> int | None:
        """Steps done, whatever the key; None without a readable checkpoint."""
        found = self._read(tensors=False)
        return None if found is None else found[1]

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """The saved step and tensors, or None without a checkpoint of this key."""
        found = self._read(tensors=True)
        return None if found is None or found[0] != self.key else found[1:]

    def _read(self, *, tensors: bool) -> tuple[str | None, int, dict[str, Tensor]] | None:
        """Key, step and the ``tensors`` where they are asked for; None when there is nothing that can be read.

        A checkpoint that cannot be read costs repeated work, never a wrong result.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt" if tensors else "np") as file:
                metadata = file.metadata() or {}
                step = int(metadata["step"])
                names = file.keys() if tensors and metadata.get("key") == self.key else ()
                return metadata.get("key"), step, {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, KeyError, ValueError, MemoryError):
            return None

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        self.folder.mkdir(exist_ok=True)
        metadata = {"key": self.key, "step": str(step)}
        write_atomic(self.path, save({k: v.contiguous() for k, v in tensors.items()}, metadata))

    def delete(self) -> None:
        """Delete what was saved, whatever the key."""
        sweep(self.path)
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # missing, or with a file of somebody else
            self.folder.rmdir()


@contextlib.contextmanager
def _damage_named(task: StoredTask) -> Iterator[None]:
    """Turn what wrong tensors raise into a `RunError` that names the task."""
    try:
        yield
    except KeyError as error:
        raise RunError(f"The task {task.folder} lacks the tensor {error}; restore it from a copy.") from error
    except ValueError as error:
        raise RunError(f"The task {task.folder} is damaged ({error}); restore it from a copy.") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a run directory. Raises `RunError` naming the process that holds it."""
    with open_lock(path / _LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"Process {lock_holder(file)} is writing to {path}; wait for it or stop it first."
            ) from error
        note_holder(file)
        yield


def _damaged(path: Path, error: Exception) -> RunError:
    return RunError(f"The run {path} is damaged ({str(error).splitlines()[0]}); restore it from a copy.")


def _source(settings: object) -> dict[str, Any]:
    """The settings of `SOURCE` as they were stored; those that an earlier version did not know have their default."""
    if not isinstance(settings, dict) or not settings.get("data"):
        raise ValueError("it must hold where the images of each task lie")
    good, problems = sort_out(settings)
    problems += [f"{key} does not say where images lie" for key in good if key not in SOURCE]
    if problems:
        raise ValueError("; ".join(problems))
    config = TrainConfig(**good)
    return {key: getattr(config, key) for key in SOURCE}


def _content_id(description: object) -> str:
    """SHA-256 of a task's description, which holds the sha256 of its files and the id of its parent."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "task"
