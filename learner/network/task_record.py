"""What the learner remembers of one task: adapters, bases, head, statistics. Written once, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from duallora_edge.device_profiles.reader import Section
from duallora_edge.learner.config import CHOICES
from duallora_edge.learner.network.adapters import Adapter
from duallora_edge.learner.statistics.calibration import QUANTILES, SHAPES, TEMPERATURES, CalibrationCurve
from duallora_edge.learner.statistics.gaussian import ClassStatistics


@dataclass(frozen=True)
class BlockRecord:
    """What a task adds to one adapted block: two adapters and the new rows [k, d] of the two bases."""

    orthogonal: Adapter
    residual: Adapter
    q_basis: Tensor
    v_basis: Tensor


@dataclass(frozen=True)
class TaskInfo:
    """The part of a task that is not tensors.

    ``residual`` is ``isolated``, ``previous`` or ``none``; ``classifier``, ``gate`` and ``calibration`` are those of
    the configuration, and decide how a state that ends with this task answers.
    """

    name: str
    classes: tuple[str, ...]
    method: str
    residual: str
    seed: int
    data_digest: str
    counts: Mapping[str, int]
    held_back: Mapping[str, float | None] = field(default_factory=dict)
    classifier: str = "lda"
    gate: str = "posterior"
    calibration: str = "mixture"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_json(cls, value: object) -> TaskInfo:
        """The inverse of `to_json`; other keys are ignored. Raises ValueError with all that is wrong."""
        problems: list[str] = []
        read = Section(value, "", problems)
        classes = read.texts("classes")
        if len(set(classes)) < max(len(classes), 1):
            read.problem("classes", "must be different names, at least one")
        counts, held_back = read.section("counts"), read.section("held_back")
        for name in counts.values:
            counts.integer(name, 0, 2**53)
        for key, number in held_back.values.items():
            if number is not None:
                held_back.number(key, 0, 2**53)
        digest = read.values.get("data_digest")
        if not isinstance(digest, str):
            read.problem("data_digest", "must be a text")
        info = cls(
            name=read.text("name"),
            classes=classes,
            method=read.choice("method", CHOICES["method"]),
            residual=read.choice("residual", ("isolated", "previous", "none")),
            seed=read.integer("seed", 0, 2**63 - 1),
            data_digest=str(digest),
            counts=counts.values,
            held_back=held_back.values,
            classifier=read.choice("classifier", (name for name in CHOICES["classifier"] if name != "auto")),
            gate=read.choice("gate", CHOICES["gate"]),
            calibration=read.choice("calibration", CHOICES["calibration"]),
        )
        if problems:
            raise ValueError("; ".join(problems[:5]))
        return info


@dataclass(frozen=True)
class TaskRecord:
    """One learned task.

    ``statistics`` are of the features [f ; phi] of the task's classes in the order of ``info.classes``; ``head``
    [K, d + 1] is the linear head (bias last) that the adapters were trained with, of the task's classes or, where
    the method says so, of all classes so far; ``curve`` calibrates the classes; ``task_nll`` [len(TEMPERATURES)] is
    the held-back negative log-likelihood of the task; ``novelty`` [QUANTILES] holds quantiles of the raw held-back
    novelty; ``memory`` is what only some methods keep, such as images; ``overconfidence`` is what the statistics
    predicted of the logits that ``curve`` was measured on, 0 where they cannot.
    """

    info: TaskInfo
    blocks: tuple[BlockRecord, ...]
    head: Tensor
    statistics: ClassStatistics
    curve: CalibrationCurve
    task_nll: Tensor
    novelty: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    overconfidence: float = 0.0

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by file name (without suffix), for storage as safetensors: float32, ``memory`` as it is.

        Of the symmetric scatter only the upper triangle is kept. A task without memory has no such file.
        """
        adapters, bases = {}, {}
        for index, block in enumerate(self.blocks):
            for kind, adapter in (("orthogonal", block.orthogonal), ("residual", block.residual)):
                for part, value in adapter._asdict().items():
                    adapters[f"blocks.{index}.{kind}.{part}"] = value
            bases[f"blocks.{index}.q"] = block.q_basis
            bases[f"blocks.{index}.v"] = block.v_basis
        statistics = {
            "counts": self.statistics.counts,
            "means": self.statistics.means,
            "scatter": self.statistics.triangle,
            "curve.nll": self.curve.nll,
            "curve.confidence": self.curve.confidence,
            "curve.counts": self.curve.counts,
            "task_nll": self.task_nll,
            "novelty": self.novelty,
            "overconfidence": torch.tensor([self.overconfidence]),
        }
        files = {"adapters": adapters, "bases": bases, "head": {"head": self.head}, "statistics": statistics}
        stored = {name: {k: v.float().contiguous() for k, v in part.items()} for name, part in files.items()}
        return stored | ({"memory": {k: v.contiguous() for k, v in self.memory.items()}} if self.memory else {})

    @property
    def is_finite(self) -> bool:
        """Whether all tensors hold finite numbers."""
        return all(bool(torch.isfinite(value).all()) for part in self.tensors().values() for value in part.values())

    @classmethod
    def from_tensors(cls, info: TaskInfo, files: Mapping[str, Mapping[str, Tensor]]) -> TaskRecord:
        """The inverse of `tensors`.

        Raises KeyError when a tensor is missing, and ValueError when one is of another type or shape than the others
        ask for, or holds anything but finite numbers. What is in ``memory`` only its method knows.
        """
        read = _Tensors({f"{name}/{key}": value for name, part in files.items() for key, value in part.items()})
        width = read("head/head", None, None).shape[1]
        classes, dim = len(info.classes), width - 1
        features = read("statistics/means", classes, None).shape[1]
        counts, curve_counts = read("statistics/counts", classes), read("statistics/curve.counts", 2)
        overconfidence = read("statistics/overconfidence", 1)
        if bool((counts < 0).any()) or not 0 <= curve_counts[1] <= curve_counts[0] or overconfidence < 0:
            raise ValueError("the statistics hold counts that cannot be")

        def adapter(index: int, kind: str) -> Adapter:
            name = f"adapters/blocks.{index}.{kind}"
            q_down, v_down = read(f"{name}.q_down", None, dim), read(f"{name}.v_down", None, dim)
            return Adapter(
                q_down, read(f"{name}.q_up", len(q_down), dim), v_down, read(f"{name}.v_up", len(v_down), dim)
            )

        blocks = tuple(
            BlockRecord(
                adapter(i, "orthogonal"),
                adapter(i, "residual"),
                read(f"bases/blocks.{i}.q", None, dim),
                read(f"bases/blocks.{i}.v", None, dim),
            )
            for i in range((len(files["bases"]) + 1) // 2)
        )
        triangle = read("statistics/scatter", features * (features + 1) // 2)
        shape = (len(SHAPES), len(TEMPERATURES))
        nll, confidence = read("statistics/curve.nll", *shape), read("statistics/curve.confidence", *shape)
        return cls(
            info=info,
            blocks=blocks,
            head=read("head/head", None, width),
            statistics=ClassStatistics(counts.double(), read("statistics/means", classes, None).double(), triangle),
            curve=CalibrationCurve(nll.double(), confidence.double(), curve_counts.double()),
            task_nll=read("statistics/task_nll", len(TEMPERATURES)),
            novelty=read("statistics/novelty", QUANTILES),
            overconfidence=float(overconfidence),
            memory={
                key: read.finite(f"memory/{key}", torch.float32, torch.uint8, torch.int64)
                for key in files.get("memory", {})
            },
        )


class _Tensors:
    """Tensors by name, each checked when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __call__(self, name: str, *shape: int | None) -> Tensor:
        """The tensor of a name: float32 of this shape, where None is any number."""
        value = self.finite(name, torch.float32)
        if value.dim() != len(shape) or any(
            want is not None and size != want for size, want in zip(value.shape, shape, strict=True)
        ):
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"the tensor {name} must be of shape [{expected}], not {list(value.shape)}")
        return value

    def finite(self, name: str, *types: torch.dtype) -> Tensor:
        """The tensor of a name, which is of one of some types."""
        value = self.tensors[name]
        if value.dtype not in types:
            raise ValueError(f"the tensor {name} must hold {types[0]}, not {value.dtype}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"the tensor {name} holds numbers that are not finite")
        return value


def empty_adapter(dim: int) -> Adapter:
    """The adapter of rank 0."""
    return Adapter(*(torch.zeros(0, dim) for _ in Adapter._fields))
