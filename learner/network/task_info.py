"""The description of a learned task, as task.json stores it. Imports no torch, so that `status` starts fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from duallora_edge.device_profiles.reader import Section
from duallora_edge.learner.config import CHOICES


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
            method=read.text("method"),
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
