"""What the learner remembers of one task: adapters, bases, head, statistics. Written once, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from duallora_edge.learner.adapters import Adapter
from duallora_edge.learner.calibration import CalibrationCurve
from duallora_edge.learner.gaussian import ClassStatistics


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
    def from_json(cls, value: Mapping[str, Any]) -> TaskInfo:
        """The inverse of `to_json`; other keys are ignored. Raises KeyError when one is missing."""
        known = {f.name: value[f.name] for f in fields(cls)}
        return cls(**{**known, "classes": tuple(value["classes"])})


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
            statistics=ClassStatistics(
                statistics["counts"].double(), statistics["means"].double(), statistics["scatter"]
            ),
            curve=CalibrationCurve(*(statistics[f"curve.{key}"].double() for key in ("nll", "confidence", "counts"))),
            task_nll=statistics["task_nll"],
            novelty=statistics["novelty"],
            overconfidence=float(statistics["overconfidence"]),
            memory=dict(files.get("memory", {})),
        )


def empty_adapter(dim: int) -> Adapter:
    """The adapter of rank 0."""
    return Adapter(*(torch.zeros(0, dim) for _ in Adapter._fields))
