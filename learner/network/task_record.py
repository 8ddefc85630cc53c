"""What the learner remembers of one task: adapters, bases, head, statistics. Written once, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duallora_edge.learner.network.adapters import Adapter
from duallora_edge.learner.network.task_info import TaskInfo
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
