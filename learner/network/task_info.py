"""The description of a learned task, as task.json stores it. Imports no torch, so that `status` starts fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from duallora_edge.device_profiles.reader import Section

RESIDUALS = ("isolated", "previous", "none")
CLASSIFIERS = ("lda", "lda_f", "mean_f", "ridge", "heads")
GATES = ("posterior", "open")
CALIBRATIONS = ("mixture", "temperature", "none")


@dataclass(frozen=True)
class TaskInfo:
    """Everything about a learned task that is not a tensor.

    Attributes:
        name: name of the task.
        classes: its classes, in the order of the rows of its tensors.
        method: the method that learned it, a key of `methods.METHODS`.
        residual: how its residual adapters are gated, one of `RESIDUALS`.
        seed: seed of the training.
        data_digest: identifies the images it was learned from.
        counts: number of training images by class.
        validation: what the validation images gave: ``images``, how many there were; ``gate_task_accuracy``, the
            share whose task the prefix posterior found; ``accuracy``, the share whose class the classifier found;
            ``left_out``, how many images the novelty was measured on. None where it could not be measured.
        classifier, gate, calibration: those of the configuration; they decide how a run that ends with this task
            answers. One of `CLASSIFIERS`, `GATES` and `CALIBRATIONS`.
    """

    name: str
    classes: tuple[str, ...]
    method: str
    residual: str
    seed: int
    data_digest: str
    counts: Mapping[str, int]
    validation: Mapping[str, float | None] = field(default_factory=dict)
    classifier: str = "lda"
    gate: str = "posterior"
    calibration: str = "mixture"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_json(cls, value: object) -> TaskInfo:
        """The inverse of `to_json`; unknown keys are ignored.

        Any name of a method is accepted here: only composing and learning need the method itself.

        Raises:
            ValueError: listing everything that is wrong.
        """
        problems: list[str] = []
        read = Section(value, "", problems)
        classes = read.texts("classes")
        if len(set(classes)) < max(len(classes), 1):
            read.problem("classes", "must be different names, at least one")
        counts, validation = read.section("counts"), read.section("validation")
        for name in counts.values:
            counts.integer(name, 0, 2**53)
        for key, number in validation.values.items():
            if number is not None:
                validation.number(key, 0, 2**53)
        digest = read.values.get("data_digest")
        if not isinstance(digest, str):
            read.problem("data_digest", "must be a text")
        info = cls(
            name=read.text("name"),
            classes=classes,
            method=read.text("method"),
            residual=read.choice("residual", RESIDUALS),
            seed=read.integer("seed", 0, 2**63 - 1),
            data_digest=str(digest),
            counts=counts.values,
            validation=validation.values,
            classifier=read.choice("classifier", CLASSIFIERS),
            gate=read.choice("gate", GATES),
            calibration=read.choice("calibration", CALIBRATIONS),
        )
        if problems:
            raise ValueError("; ".join(problems[:5]))
        return info
