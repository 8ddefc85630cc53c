"""What the learner remembers of one task: adapters, bases, head, statistics. Written once, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from duallora_edge.learner.adapters import Adapter
from duallora_edge.learner.gaussian import ClassStatistics

# Temperatures at which the held-back negative log-likelihood is recorded (geometric, factor 2^(1/4)).
TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(-8, 33))


@dataclass(frozen=True)
class BlockRecord:
    """What a task adds to one adapted block: two adapters and the new rows [k, d] of the two bases."""

    orthogonal: Adapter
    residual: Adapter
    q_basis: Tensor
    v_basis: Tensor


@dataclass(frozen=True)
class TaskInfo:
    """The part of a task that is not tensors. ``residual`` is ``isolated``, ``previous`` or ``none``."""

    name: str
    classes: tuple[str, ...]
    method: str
    residual: str
    seed: int
    data_digest: str
    counts: Mapping[str, int]
    held_back: Mapping[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TaskInfo:
        """The inverse of `to_json`; other keys are ignored. Raises KeyError when one is missing."""
        known = {f.name: value[f.name] for f in fields(cls)}
        return cls(**{**known, "classes": tuple(value["classes"])})


@dataclass(frozen=True)
class TaskRecord:
    """One learned task.

    ``statistics`` are of the features [f ; phi] of the task's classes in the order of ``info.classes``; ``head``
    [K, d + 1] is the linear head (bias last) that the adapters were trained with; ``class_nll`` and ``task_nll``
    [len(TEMPERATURES)] are held-back negative log-likelihoods summed over images; ``novelty`` holds quantiles of
    the held-back novelty.
    """

    info: TaskInfo
    blocks: tuple[BlockRecord, ...]
    head: Tensor
    statistics: ClassStatistics
    class_nll: Tensor
    task_nll: Tensor
    novelty: Tensor

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by file name (without suffix), float32, for storage as safetensors."""
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
            "scatter": self.statistics.scatter,
            "class_nll": self.class_nll,
            "task_nll": self.task_nll,
            "novelty": self.novelty,
        }
        files = {"adapters": adapters, "bases": bases, "head": {"head": self.head}, "statistics": statistics}
        return {name: {k: v.float().contiguous() for k, v in part.items()} for name, part in files.items()}

    @classmethod
    def from_tensors(cls, info: TaskInfo, files: Mapping[str, Mapping[str, Tensor]]) -> TaskRecord:
        """The inverse of `tensors`. Raises KeyError when a tensor is missing."""
        adapters, bases, statistics = files["adapters"], files["bases"], files["statistics"]
        count = 1 + max((int(name.split(".")[1]) for name in bases), default=-1)

        def adapter(index: int, kind: str) -> Adapter:
            return Adapter(*(adapters[f"blocks.{index}.{kind}.{part}"] for part in Adapter._fields))

        blocks = tuple(
            BlockRecord(
                adapter(i, "orthogonal"), adapter(i, "residual"), bases[f"blocks.{i}.q"], bases[f"blocks.{i}.v"]
            )
            for i in range(count)
        )
        return cls(
            info=info,
            blocks=blocks,
            head=files["head"]["head"],
            statistics=ClassStatistics(*(statistics[key].double() for key in ("counts", "means", "scatter"))),
            class_nll=statistics["class_nll"],
            task_nll=statistics["task_nll"],
            novelty=statistics["novelty"],
        )


def empty_adapter(dim: int) -> Adapter:
    """The adapter of rank 0."""
    return Adapter(*(torch.zeros(0, dim) for _ in Adapter._fields))
