"""Configuration of a training run: one dataclass, read from flags over YAML over defaults."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from duallora_edge.errors import ConfigError

# What a setting of few values may be.
CHOICES = {
    "method": ("dual_lora", "inflora", "sequential", "task_arithmetic", "frozen", "joint"),
    "classifier": ("auto", "lda", "lda_f", "mean_f", "ridge", "heads"),
    "residual": ("auto", "isolated", "previous", "none"),
    "gate": ("posterior", "open"),
    "calibration": ("mixture", "temperature", "none"),
    "resize": ("crop", "squash"),
    "augment": ("none", "light"),
    "precision": ("auto", "fp32", "bf16"),
}

MAX_YAML_BYTES = 1 << 16
MAX_YAML_DEPTH = 20
MAX_PROBLEMS = 20
MAX_NAME = 60

# Settings that say where images come from; stored beside each task so that evaluations find its test images.
SOURCE = ("data", "classes_per_task", "class_order", "task_order", "task_name", "data_root", "test_fraction")
# Settings that later calls of the same run may change; all others define the run.
PER_CALL = (
    *SOURCE, "weights", "device", "augment", "flip", "memory_budget", "micro_batch", "forward_batch", "recompute",
    "cache_bytes",
)  # fmt: skip


class _Quoted(reprlib.Repr):
    """Values as messages quote them: short, whatever they are."""

    maxlevel, maxstring, maxother = 1, 60, 60

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out whole numbers of more than 4300 digits."""
        return super().repr_int(x, level) if abs(x) < 2**64 else "a huge number"


quoted = _Quoted().repr


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what `train` computes. Sizes in pixels, rates per step, fractions in 0..1."""

    # What to learn
    data: str = ""
    classes_per_task: int | None = None
    class_order: str = "alphabetical"
    task_order: tuple[str, ...] | None = None
    task_name: str | None = None
    data_root: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    develop: bool = False

    # The frozen network
    backbone: str = "embedded"
    weights: str | None = None
    size: int | None = None
    prefix_blocks: int | None = None
    summaries: int | None = None
    resize: str = "crop"

    # The method
    method: str = "dual_lora"
    rank_orthogonal: int = 8
    rank_residual: int = 8
    residual: str = "auto"
    energy: float = 0.95
    gate: str = "posterior"
    classifier: str = "auto"
    calibration: str = "mixture"
    task_scale: float = 0.25
    kl_weight: float = 0.0
    memory_per_class: int = 10

    # The optimisation
    learning_rate: float = 1e-3
    distillation: float = 1.0
    epochs: int = 4
    min_steps: int = 120
    batch_size: int = 32
    augment: str = "none"
    flip: bool = False
    seed: int = 0

    # The machine
    device: str = "auto"
    precision: str = "auto"
    checkpoint_steps: int = 100

    # Its memory: what a budget chooses, or what is given without one. Batches are in images.
    memory_budget: str | None = None
    micro_batch: int | None = None
    forward_batch: int = 64
    recompute: bool = False
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        problems = [text for ok, text in self._checks() if not ok]
        if problems:
            raise ConfigError("The configuration has problems: " + "; ".join(problems) + ".")

    def _checks(self) -> list[tuple[bool, str]]:
        def one_of(key: str, choices: tuple[str, ...]) -> tuple[bool, str]:
            value = getattr(self, key)
            return value in choices, f"{key} must be one of {', '.join(choices)}, not {quoted(value)}"

        def between(key: str, low: float, high: float) -> tuple[bool, str]:
            value = getattr(self, key)
            return value is None or low <= value <= high, f"{key} must be {low}..{high}, not {quoted(value)}"

        return [
            *(one_of(key, choices) for key, choices in CHOICES.items()),
            between("rank_orthogonal", 0, 256),
            between("rank_residual", 0, 256),
            between("energy", 0.0, 1.0),
            between("task_scale", 0.0, 10.0),
            between("kl_weight", 0.0, 1.0),
            between("memory_per_class", 0, 1_000_000),
            between("validation_fraction", 0.0, 0.5),
            between("test_fraction", 0.0, 0.9),
            between("learning_rate", 1e-7, 1.0),
            between("distillation", 0.0, 1000.0),
            between("epochs", 0, 10_000),
            between("min_steps", 0, 1_000_000),
            between("batch_size", 1, 65_536),
            between("seed", 0, 2**63 - 1),
            between("checkpoint_steps", 1, 1_000_000),
            between("micro_batch", 1, 65_536),
            between("forward_batch", 1, 65_536),
            between("cache_bytes", 0, 2**63 - 1),
            between("classes_per_task", 1, 1_000_000),
            between("size", 8, 4096),
            between("prefix_blocks", -1000, 1000),
            between("summaries", 1, 1000),
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_config(path: Path | None, overrides: Mapping[str, Any], base: TrainConfig | None = None) -> TrainConfig:
    """Resolve a configuration: ``overrides`` (flags; None means not given) over the YAML file over ``base``.

    Raises `ConfigError` naming every unknown key (with the nearest known one) and every value of a wrong type
    or range of the file at once.
    """
    values = {} if path is None else read_yaml(path)
    good, problems = sort_out(values)
    merged = {**good, **{key: value for key, value in overrides.items() if value is not None}}
    if isinstance(merged.get("task_order"), list):
        merged["task_order"] = tuple(merged["task_order"])
    try:
        config = replace(base or TrainConfig(), **merged)
    except ConfigError as error:
        problems.append(str(error).removeprefix("The configuration has problems: ").removesuffix("."))
    if problems:
        where = f" of {path}" if path else ""
        raise ConfigError(f"The configuration{where} has problems: {'; '.join(problems)}.")
    return config


def sort_out(values: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings among ``values`` that exist and have the right type, and what is wrong with the others."""
    known = {field.name: str(field.type) for field in fields(TrainConfig)}
    good: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in values.items():
        if len(problems) == MAX_PROBLEMS:
            problems.append("and maybe more")
            break
        if key not in known:
            near = difflib.get_close_matches(key[:MAX_NAME], known, n=1) if isinstance(key, str) else []
            problems.append(f"unknown key {quoted(key)}" + (f", did you mean {near[0]!r}?" if near else ""))
        elif (text := _type_problem(value, known[key])) is not None:
            problems.append(f"{key} must be {text}, not {quoted(value)}")
        else:
            good[key] = value
    return good, problems


def read_yaml(path: Path) -> dict[Any, Any]:
    """The keys and values of a YAML file. Raises `ConfigError` when it cannot be read as such.

    Aliases are refused: settings do not need them, and a few lines of nested ones unfold to gigabytes. So is deep
    nesting, on which libyaml crashes.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
        if len(raw) > MAX_YAML_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_YAML_BYTES} bytes; it is not a configuration.")
        content = raw.decode()
        depth = 0
        for event in yaml.parse(content, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{path} uses a YAML alias (*{quoted(event.anchor)[1:-1]}); write the value out.")
            if depth > MAX_YAML_DEPTH:
                raise ConfigError(f"{path} is nested too deeply; it is not a configuration.")
        value = yaml.load(content, Loader=loader)
    except (OSError, ValueError, ArithmeticError, yaml.YAMLError) as error:  # 2024-99-99, no UTF-8, 1:1:...:1.0
        reason = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"{path} cannot be read as YAML ({reason[0][:200]}); mend or leave it out.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(value).__name__}.")
    return value


def _type_problem(value: Any, annotation: str) -> str | None:
    """The expected type in words when ``value`` does not fit the annotation, else None."""
    if value is None:
        return None if "None" in annotation else "given"
    if annotation.startswith("tuple"):
        good = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
        return None if good else "a list of names"
    if annotation.startswith("bool"):
        return None if isinstance(value, bool) else "true or false"
    if annotation.startswith("int"):
        return None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    if annotation.startswith("float"):
        return None if isinstance(value, (int, float)) and not isinstance(value, bool) else "a number"
    return None if isinstance(value, str) else "a text"
