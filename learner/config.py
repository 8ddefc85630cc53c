"""Configuration of a training run: one dataclass, read from flags over YAML over defaults."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from duallora_edge.errors import ConfigError
from duallora_edge.learner.methods import METHODS
from duallora_edge.learner.settings import quoted, setting, settings_of
from duallora_edge.learner.yaml_files import read_yaml

MAX_PROBLEMS = 20
MAX_NAME = 60
_LARGE = 2**63 - 1


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what `train` computes. Sizes in pixels, rates per step, fractions in 0..1.

    Each field declares its setting: the command line, the checks, docs/settings.md and examples/train.yaml are made
    from it (`settings`).
    """

    data: str = setting(
        "", "Images to learn from: a folder, a manifest, .tar, .parquet or torchvision:NAME.",
        "Essentials", unset="those of the last call", metavar="SOURCE", scope="source",
    )  # fmt: skip
    method: str = setting("dual_lora", "How tasks are learned.", "Essentials", choices=METHODS, metavar="NAME")
    backbone: str = setting(
        "embedded",
        "The frozen network: 'embedded' (small, part of the package) or a timm name NAME[.tag]; a larger one is "
        "usually more accurate and always slower.",
        "Essentials", metavar="NAME",
    )  # fmt: skip
    weights: str | None = setting(
        None, "safetensors file with the weights of the backbone.",
        "Essentials", unset="the backbone's own", metavar="FILE", scope="call",
    )  # fmt: skip
    base: str = setting(
        "auto",
        "How the backbone is fitted to another input size than its own before the first task: 'auto' on the images of "
        "that task, 'all' on those of all tasks at hand, neither of which needs labels, 'none' not at all, or a FILE "
        "made by 'adapt'.",
        "Essentials", metavar="auto|all|none|FILE",
    )  # fmt: skip
    epochs: int = setting(
        4, "Passes over the training images of each task; training takes longer in proportion.",
        "Essentials", low=0, high=10_000,
    )  # fmt: skip
    seed: int = setting(
        0, "Seed for everything random; on one CPU in fp32 the same seed gives the same run, bit for bit.",
        "Essentials", low=0, high=_LARGE,
    )  # fmt: skip

    task_name: str | None = setting(
        None, "Name of the task.", "Data", unset="the name of the folder", metavar="NAME", scope="source"
    )
    task_order: tuple[str, ...] | None = setting(
        None, "Names of the tasks of a stream, in the order in which to learn them.",
        "Data", unset="sorted by name", metavar="NAME,NAME", scope="source",
    )  # fmt: skip
    classes_per_task: int | None = setting(
        None, "Split the classes of one data set into tasks of this many classes.",
        "Data", low=1, high=1_000_000, unset="one task", scope="source",
    )  # fmt: skip
    class_order: str = setting(
        "alphabetical", "Order of the classes before they are split into tasks: 'alphabetical' or 'seed:N'.",
        "Data", metavar="ORDER", scope="source",
    )  # fmt: skip
    data_root: str | None = setting(
        None, "Folder where torchvision data sets are kept or downloaded to.",
        "Data", unset="the cache folder", metavar="DIR", scope="source",
    )  # fmt: skip
    crop_boxes: bool = setting(
        False, "Learn each box of a detection set (COCO or YOLO) as an image of its class.", "Data", scope="source"
    )
    test_fraction: float = setting(
        0.2, "Share of the images to set aside for testing where the data have no test images.",
        "Data", low=0.0, high=0.9, scope="source",
    )  # fmt: skip
    validation_fraction: float = setting(
        0.1,
        "Share of the training images to set aside for calibration; without them confidences are not calibrated.",
        "Data", low=0.0, high=0.5,
    )  # fmt: skip
    size: int | None = setting(
        None, "Side of the input in pixels; a larger one shows more detail, and time grows with its square.",
        "Data", low=8, high=4096, unset="the backbone's own",
    )  # fmt: skip
    resize: str = setting(
        "crop", "How an image becomes square: 'crop' takes the centre, 'squash' distorts the whole frame.",
        "Data", choices=("crop", "squash"),
    )  # fmt: skip
    develop: bool = setting(
        False, "Measure on a fifth of the training images and leave the test images alone, to choose settings.",
        "Data", flag=False,
    )  # fmt: skip
    pictures: bool = setting(
        True, "Show small pictures of training images, and of test images with wrong answers, in the run's reports.",
        "Data",
    )  # fmt: skip

    rank_orthogonal: int = setting(
        8, "Rank of the adapters that leave earlier tasks untouched; a higher rank learns more and stores more.",
        "Method", low=0, high=256,
    )  # fmt: skip
    rank_residual: int = setting(
        8,
        "Rank of the adapters that open for images of their own task; a higher rank learns more, and inference "
        "slows down with every task until 'max_residual_rank' is reached.",
        "Method", low=0, high=256,
    )  # fmt: skip
    max_residual_rank: int = setting(
        64,
        "Rank of these adapters of all tasks together, so that neither latency nor memory grows for ever; tasks beyond "
        "it have none.",
        "Method", low=0, high=100_000,
    )  # fmt: skip
    energy: float = setting(
        0.95,
        "Share of the energy of a task's features that later tasks must not touch; a higher share forgets less and "
        "leaves later tasks less room.",
        "Method", low=0.0, high=1.0,
    )  # fmt: skip
    distillation: float = setting(
        1.0, "How strongly features are held where they were before the task; more forgets less and learns less.",
        "Method", low=0.0, high=1000.0,
    )  # fmt: skip
    classifier: str = setting(
        "auto",
        "How classes are scored: 'auto' as the method does, 'lda' from all features, 'lda_f' or 'mean_f' from the "
        "last layer, 'ridge' from random features, 'heads' by the trained linear heads.",
        "Method", choices=("auto", "lda", "lda_f", "mean_f", "ridge", "heads"),
    )  # fmt: skip
    prefix_blocks: int | None = setting(
        None,
        "Blocks of the backbone that stay frozen, or -1 for all but one; fewer frozen blocks learn more and take "
        "more time and memory.",
        "Method", low=-1000, high=1000, unset="half of them",
    )  # fmt: skip
    summaries: int = setting(
        1,
        "Frozen blocks whose class token and patch statistics the dynamic memory and the classifier read, evenly "
        "spaced and ending with the last; all where there are fewer.",
        "Method", low=1, high=1000,
    )  # fmt: skip

    second_order: int = setting(
        48,
        "Directions in which the classifier and the dynamic memory also read how the patches of an image vary "
        "together; 0 for none (a FILE for 'base' brings its own).",
        "Method", low=0, high=128,
    )  # fmt: skip

    task_scale: float = setting(
        0.25, "Weight of the update of each task in their sum.", "Only task_arithmetic", low=0.0, high=10.0
    )
    kl_weight: float = setting(0.0, "Share of distillation in the loss.", "Only task_arithmetic", low=0.0, high=1.0)
    kept_images_per_class: int = setting(
        10, "Training images of each class that the run stores and fine-tunes on; 0 stores no images.",
        "Only task_arithmetic", low=0, high=1_000_000,
    )  # fmt: skip

    learning_rate: float = setting(
        1e-3, "Step size of the optimiser; too high diverges, too low leaves a task half learned.",
        "Optimisation", low=1e-7, high=1.0,
    )  # fmt: skip
    batch_size: int = setting(
        32, "Images in each training step; a larger batch needs more memory.",
        "Optimisation", low=1, high=65_536,
    )  # fmt: skip
    min_steps: int = setting(
        120, "Train each task for at least this many steps, so that a small task gets more epochs.",
        "Optimisation", low=0, high=1_000_000,
    )  # fmt: skip
    views: int = setting(
        1,
        "Random views of each training image (part of it, other colours) that are learned beside it; they help most "
        "where images are few.",
        "Optimisation", low=0, high=16, scope="call",
    )  # fmt: skip
    flip: bool = setting(
        False, "Mirror half of these views; wrong for digits, letters and signs.",
        "Optimisation", scope="call",
    )  # fmt: skip

    device: str = setting(
        "auto", "Where to compute: auto, cpu, cuda or cuda:N.", "Resources", metavar="NAME", scope="call"
    )
    precision: str = setting(
        "auto",
        "Precision of matrix multiplications during training: fp32, the faster bf16, or 'auto' for bf16 where the "
        "hardware has it.",
        "Resources", choices=("auto", "fp32", "bf16"),
    )  # fmt: skip
    memory_budget: str | None = setting(
        None,
        "Stay within this much memory, such as 2GB, of the process or on CUDA; a tight budget trains more slowly.",
        "Resources", unset="no limit", metavar="SIZE", scope="call",
    )  # fmt: skip
    checkpoint_steps: int = setting(
        100, "Steps between two checkpoints; training that was stopped repeats at most this many.",
        "Resources", low=1, high=1_000_000, flag=False,
    )  # fmt: skip
    micro_batch: int | None = setting(
        None, "Split each training step into parts of this many images, for less memory and more time.",
        "Resources", low=1, high=65_536, unset="the whole batch", flag=False, scope="call",
    )  # fmt: skip
    forward_batch: int = setting(
        64, "Images in each pass without training; fewer need less memory.",
        "Resources", low=1, high=65_536, flag=False, scope="call",
    )  # fmt: skip
    recompute: bool = setting(
        False, "Compute the blocks again for the gradient instead of storing them, for less memory and more time.",
        "Resources", flag=False, scope="call",
    )  # fmt: skip
    cache_bytes: int | None = setting(
        None, "Bytes of encoded images to keep in memory; the rest goes to a temporary file.",
        "Resources", low=0, high=_LARGE, unset="by free memory", flag=False, scope="call",
    )  # fmt: skip

    residual: str = setting(
        "auto",
        "Where residual adapters learn: 'isolated' in directions of the task's own, 'previous' in those that the task "
        "before added, 'none' nowhere; 'auto' is 'isolated' while tasks are recognised reliably, else 'previous'.",
        "Ablations", choices=("auto", "isolated", "previous", "none"),
    )  # fmt: skip
    gate: str = setting(
        "posterior",
        "When residual adapters open: 'posterior' as far as an image is likely to be of their task, 'open' always.",
        "Ablations", choices=("posterior", "open"),
    )  # fmt: skip
    calibration: str = setting(
        "mixture", "How confidences are calibrated: by a 'mixture' of two temperatures, one 'temperature', or 'none'.",
        "Ablations", choices=("mixture", "temperature", "none"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        order: object = self.task_order
        if isinstance(order, list):  # as YAML has it
            object.__setattr__(self, "task_order", tuple(order))
        problems = [text for key, one in SETTINGS.items() if (text := one.problem(getattr(self, key)))]
        if problems:
            raise ConfigError(f"The configuration has problems: {'; '.join(problems)}.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


SETTINGS = settings_of(TrainConfig)
# Settings that say where images come from; stored beside each task so that evaluations find its test images.
SOURCE = tuple(key for key, one in SETTINGS.items() if one.scope == "source")
# Settings that later calls of the same run may change; all others define the run.
PER_CALL = tuple(key for key, one in SETTINGS.items() if one.scope != "run")


def load_config(path: Path | None, overrides: Mapping[str, Any], base: TrainConfig | None = None) -> TrainConfig:
    """Resolve a configuration: ``overrides`` (flags; None means not given) over the YAML file over ``base``.

    Raises `ConfigError` naming every unknown key (with the nearest known one) and every value of a wrong type
    or range at once.
    """
    values, problems = ({}, []) if path is None else sort_out(read_yaml(path))
    given, more = sort_out({key: value for key, value in overrides.items() if value is not None})
    if problems or more:
        where = f" of {path}" if path else ""
        raise ConfigError(f"The configuration{where} has problems: {'; '.join([*problems, *more])}.")
    return replace(base or TrainConfig(), **{**values, **given})


def sort_out(values: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings among ``values`` that exist and have a good value, and what is wrong with the others."""
    good: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in values.items():
        if len(problems) == MAX_PROBLEMS:
            problems.append("and maybe more")
            break
        if key not in SETTINGS:
            near = difflib.get_close_matches(key[:MAX_NAME], SETTINGS, n=1) if isinstance(key, str) else []
            problems.append(f"unknown key {quoted(key)}" + (f", did you mean {near[0]!r}?" if near else ""))
        elif (text := SETTINGS[key].problem(value)) is not None:
            problems.append(text)
        else:
            good[key] = value
    return good, problems
