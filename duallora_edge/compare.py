"""``duallora-edge compare``: several methods and seeds on one stream, in one table and one picture."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt
import yaml

from duallora_edge.cli_groups import option_group
from duallora_edge.errors import ConfigError, RunError
from duallora_edge.files import open_lock, read_json, write_atomic, write_json
from duallora_edge.learner.commands import echo, folder_bytes
from duallora_edge.learner.config import PER_CALL, SETTINGS, TrainConfig, load_config, sort_out
from duallora_edge.learner.learner import Learner
from duallora_edge.learner.methods import METHODS
from duallora_edge.learner.options import MethodsCommand, setting_options
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.terminal import TerminalCallback
from duallora_edge.runtime.bundle import INPUT

# The libraries of learning and export are imported by what needs them, so that the help starts at once.
if TYPE_CHECKING:
    from duallora_edge.learner.network.prefix_cache import PrefixCache
    from duallora_edge.learner.report.comparison import Result

TABLE, PICTURE = "comparison.md", "comparison.png"

PEERS = (
    "dual_lora", "inflora", "sequential", "sequential:classifier=lda", "first_session",
    "first_session:classifier=ridge", "frozen:classifier=mean_f", "frozen:classifier=lda_f", "frozen:classifier=ridge",
    "frozen", "frozen:prefix_blocks=-1:summaries=6", "task_arithmetic", "task_arithmetic:classifier=lda", "joint",
)  # fmt: skip
ABLATIONS = (
    "dual_lora", "dual_lora:base=all", "dual_lora:base=none", "dual_lora:views=0", "dual_lora:residual=isolated",
    "dual_lora:residual=previous", "dual_lora:residual=previous:gate=open", "dual_lora:distillation=0",
    "dual_lora:learning_rate=0.005",
    "dual_lora:second_order=0", "dual_lora:second_order=0:summaries=3", "dual_lora:classifier=lda_f",
    "dual_lora:classifier=heads",
    "dual_lora:calibration=temperature", "dual_lora:calibration=none",
)  # fmt: skip
ADAPTERS = (  # as many trained numbers in each
    "frozen", "first_session", "dual_lora:rank_orthogonal=16:rank_residual=0",
    "dual_lora:rank_orthogonal=0:rank_residual=16:residual=isolated:max_residual_rank=1000",
    "dual_lora:rank_orthogonal=0:rank_residual=16:residual=previous:max_residual_rank=1000",
    "dual_lora", "inflora",
)  # fmt: skip
ARITHMETIC = (
    "task_arithmetic:kept_images_per_class=0:task_scale=0.1", "task_arithmetic:kept_images_per_class=0",
    "task_arithmetic:kept_images_per_class=0:task_scale=0.5", "task_arithmetic:kept_images_per_class=0:task_scale=1",
    "task_arithmetic:kept_images_per_class=0:kl_weight=0.4", "task_arithmetic:kept_images_per_class=2",
    "task_arithmetic", "task_arithmetic:task_scale=0.5", "task_arithmetic:kl_weight=0.4",
    "task_arithmetic:kept_images_per_class=20",
)  # fmt: skip
# Settings that change what the prefix makes of an image; the base adaptation itself is in the keys of the cache.
PREFIX = ("size", "resize", "prefix_blocks", "summaries", "second_order", "precision")
SIZES = (
    "frozen:size=96:base=none", "frozen:size=96", "frozen:size=128:base=none", "frozen:size=128",
    "frozen:size=160:base=none", "frozen:size=160", "frozen:size=192:base=none", "frozen:size=192",
    "frozen:size=224",
)  # fmt: skip
GROUPS = {"peers": PEERS, "ablations": ABLATIONS, "adapters": ADAPTERS, "arithmetic": ARITHMETIC, "sizes": SIZES}


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own: ``dual_lora:residual=previous:rank_residual=4``."""

    label: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Raises `ConfigError` for an unknown method or setting, or a value that does not fit."""
        method, *rest = text.strip().split(":")
        settings: dict[str, Any] = {"method": method}
        for part in rest:
            key, equals, value = part.partition("=")
            if not equals or key in ("method", "seed", "data"):
                raise ConfigError(
                    f"{part!r} in {text!r} must be SETTING=VALUE, a setting of 'train' such as rank_residual=4."
                )
            settings[key] = yaml.safe_load(value)
        _, problems = sort_out(settings)
        if problems:
            raise ConfigError(f"{text!r} has problems: {'; '.join(problems)}.")
        load_config(None, settings)
        return cls(text.strip(), settings)

    @property
    def file_name(self) -> str:
        """The label as a file name."""
        return self.label.replace(":", "-").replace("=", "_")


class Stopwatch(TerminalCallback):
    """Shows progress, and adds up how long learning took."""

    seconds = 0.0

    def learned(self, task: str, seconds: float) -> None:
        self.seconds += seconds


essential, data, output = option_group("Essentials"), option_group("Data"), option_group("Output")


@click.command(cls=MethodsCommand)
@essential(
    "--stream", required=True, metavar="SOURCE",
    help="Images to learn from, as --data of 'train': a folder, a manifest, .tar, .parquet or torchvision:NAME.",
)  # fmt: skip
@essential(
    "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder for runs, table and picture."
)
@essential(
    "--methods", default="peers", metavar="NAME,NAME",
    help="Methods to compare, each with settings of its own if wanted (dual_lora:rank_residual=4), or a group: "
    f"{', '.join(GROUPS)}. [default: peers]",
)  # fmt: skip
@essential(
    "--seeds", default="0", metavar="N,N",
    help="Seeds; each decides the training and which images are for validation. [default: 0]",
)  # fmt: skip
@essential("--config", "config_path", type=click.Path(path_type=Path), metavar="FILE",
           help="YAML file with settings of 'train'; options win over it.")  # fmt: skip
@setting_options("backbone", "weights", "task_order", "classes_per_task", "class_order")
@data("--shuffle", is_flag=True, help="Learn the tasks (or classes) in another order for each seed above 0.")
@setting_options("size")
@data(
    "--develop/--test", default=None, help=f"{SETTINGS['develop'].help.rstrip('.')}; or measure on the test images. "
    "[default: test]",
)  # fmt: skip
@output(
    "--latency-rounds", default=100, type=click.IntRange(0), metavar="N",
    help="Rounds of the measurement of latencies; 0 leaves it out. [default: 100]",
)  # fmt: skip
def compare(
    stream: str,
    methods: str,
    seeds: str,
    shuffle: bool,
    out: Path,
    config_path: Path | None,
    latency_rounds: int,
    **flags: Any,
) -> None:
    """Learn one stream with several methods and seeds, and write one table and one picture.

    Images, backbone, ranks, optimiser and classifier are the same for all unless a method says otherwise. Results
    that are already in --out are not computed again, so the same command continues where it was stopped. The table
    has all results that are there, so several calls with different --methods or --seeds can fill it, one after the
    other or at once. Latencies are measured for the methods of this call alone.

    \b
    Example:
      duallora-edge compare --stream photos/ --methods dual_lora,sequential,joint --seeds 0,1,2 --out out/compare
      duallora-edge compare --stream photos/ --methods dual_lora:residual=previous,dual_lora --out out/compare
    """
    base = load_config(config_path, {**flags, "data": stream})
    variants = [Variant.parse(text) for text in GROUPS.get(methods, methods.split(","))]
    numbers = _seeds(seeds)
    _check_free(out)
    from duallora_edge.learner.network.prefix_cache import PrefixCache
    from duallora_edge.learner.report.comparison import comparison_png, markdown

    caches: dict[tuple[object, ...], PrefixCache] = {}
    found: dict[str, dict[int, Result]] = {variant.label: {} for variant in variants}
    for seed in numbers:
        for variant in variants:
            config = _config(variant, seed, base, shuffle)
            cache = caches.setdefault(tuple(getattr(config, key) for key in PREFIX), PrefixCache())
            found[variant.label][seed] = _result(variant, config, out, cache)
    runs = {variant.label: out / f"{variant.file_name}-{numbers[0]}" for variant in variants}
    times = single_image_times(runs, latency_rounds) if latency_rounds else {}
    latencies = {label: float(np.median(values)) for label, values in times.items()}
    name = Path(stream).name
    with _one_at_a_time(out):  # else a call that read fewer results might write last
        _add_others(found, out, base, shuffle)
        results = {label: [by_seed[seed] for seed in sorted(by_seed)] for label, by_seed in found.items()}
        keeps = {label for label in results if METHODS[Variant.parse(label).settings["method"]].keeps_images}
        table = markdown(name, results, latencies, keeps)
        write_atomic(out / TABLE, table)
        write_atomic(out / PICTURE, comparison_png(name, results))
    echo(table)
    echo(f"Table: {out / 'comparison.md'}  picture: {out / 'comparison.png'}")


def _check_free(out: Path) -> None:
    """Raises `ConfigError` when the table or the picture would replace a file that no comparison wrote."""
    for name in (TABLE, PICTURE):
        if os.path.lexists(out / name) and not any(_results(out)):
            raise ConfigError(f"{out / name} was not written by a comparison; give another folder with --out.")


def _results(out: Path) -> Iterator[Path]:
    """The stored results in ``out``: JSON files, each beside its run."""
    return (path for path in sorted(out.glob("*.json")) if RunDirectory.exists(path.with_suffix("")))


@contextmanager
def _one_at_a_time(out: Path) -> Iterator[None]:
    """Wait until no other call writes the table in ``out``; the lock ends with its process (flock)."""
    with open_lock(out / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _add_others(found: dict[str, dict[int, Result]], out: Path, base: TrainConfig, shuffle: bool) -> None:
    """Add the results that other calls left in ``out``. Raises `ConfigError` when one was made with other settings."""
    for path in _results(out):
        label, seed, result = _read(path)
        if label is not None and seed not in found.get(label, {}):
            _check_settings(path.with_suffix(""), _config(Variant.parse(label), seed, base, shuffle))
            found.setdefault(label, {})[seed] = result


def _read(path: Path) -> tuple[str | None, int, Result]:
    """The variant, seed and content of a stored result. Raises `RunError` when it is something else."""
    from duallora_edge.learner.report.comparison import Result

    try:
        value = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} is unreadable ({error}); delete it and compare again.") from error
    return value.pop("variant", None), value.pop("seed", 0), Result.from_json(value)


def _config(variant: Variant, seed: int, base: TrainConfig, shuffle: bool) -> TrainConfig:
    """The configuration of a variant and seed."""
    config = load_config(None, {**variant.settings, "seed": seed}, base)
    return _shuffled(config, seed) if shuffle and seed else config


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds must be whole numbers separated by commas, not {text!r}.") from error


def _shuffled(config: TrainConfig, seed: int) -> TrainConfig:
    """The stream in the order of a seed: the classes where they are split into tasks, else the given tasks."""
    if config.classes_per_task:
        return replace(config, class_order=f"seed:{seed}")
    if not config.task_order:
        raise ConfigError("--shuffle needs --task-order or --classes-per-task, so that there is an order to change.")
    order = np.random.default_rng(seed).permutation(len(config.task_order))
    return replace(config, task_order=tuple(config.task_order[i] for i in order))


def _result(variant: Variant, config: TrainConfig, out: Path, cache: PrefixCache) -> Result:
    """Learn the stream, or read the result of an earlier call."""
    from duallora_edge.learner.report.comparison import Result

    path = out / f"{variant.file_name}-{config.seed}"
    stored = out / f"{path.name}.json"
    if stored.is_file():
        _check_settings(path, config)
        return _read(stored)[2]
    watch = Stopwatch()
    watch.say(f"\n== {variant.label}, seed {config.seed}")
    settings = {key: value for key, value in config.to_json().items() if value != getattr(TrainConfig(), key)}
    metrics = Learner(path, callbacks=[watch], cache=cache, **settings).learn()
    run = RunDirectory.open(path)
    infos = [run.read_info(task) for task in run.active_tasks()]
    images = sum(sum(info.counts.values()) for info in infos)
    seconds = watch.seconds + images * cache.seconds / max(cache.images, 1)
    result = Result.of(
        metrics,
        single_task=METHODS[config.method].single_task,
        trained=_trained(run),
        stored_bytes=folder_bytes(path / "tasks") / len(infos),
        seconds=seconds,
    )
    write_json(stored, {"variant": variant.label, "seed": config.seed, **result.to_json()})
    return result


def _check_settings(path: Path, config: TrainConfig) -> None:
    """Raise `ConfigError` when the result of an earlier call was made with other settings or images."""
    from duallora_edge.learner.train import open_run

    values = config.to_json()
    run = open_run(path, config, [key for key in values if key not in PER_CALL])
    for source in run.sources().values():
        for key in ("classes_per_task", "class_order", "task_order"):
            if source[key] != values[key]:
                raise ConfigError(
                    f"The result in {path} was made with {key} {source[key]!r}, not {values[key]!r}; use a new --out."
                )


def _trained(run: RunDirectory) -> float:
    """Mean number of trained parameters of a task without its head: up-projections of both adapters."""
    records = run.records()
    total = sum(
        adapter.q_up.numel() + adapter.v_up.numel()
        for record in records
        for block in record.blocks
        for adapter in (block.orthogonal, block.residual)
    )
    return total / len(records)


def single_image_times(runs: Mapping[str, Path], rounds: int) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds [rounds] of one image in the exported last state of each run, on this CPU in interleaved rounds."""
    import onnx
    import onnxruntime

    from duallora_edge.export.graph import build_model
    from duallora_edge.learner.methods import compose

    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (label, run_path) in enumerate(runs.items()):
            run = RunDirectory.open(run_path)
            model = compose(run.backbone(), run.records()).eval()
            path = Path(folder) / f"{number}.onnx"
            onnx.save(build_model(model, 17, 8), path)
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 2
            sessions[label] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    sizes = {label: session.get_inputs()[0].shape[1] for label, session in sessions.items()}
    frames = {size: rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8) for size in set(sizes.values())}
    times: dict[str, list[float]] = {label: [] for label in sessions}
    for number in range(rounds + 10):
        for label in rng.permutation(list(sessions)):
            started = time.perf_counter()
            sessions[label].run(None, {INPUT: frames[sizes[label]]})
            if number >= 10:
                times[label].append(1000 * (time.perf_counter() - started))
    return {label: np.array(values) for label, values in times.items()}
