"""What every backend promises: a function from images to outputs that answers the golden images correctly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from duallora_edge.runtime.bundle import (
    MAX_DIFFERENCE,
    MAX_FEATURE_DIFFERENCE,
    MAX_NOVELTY_DIFFERENCE,
    OUTPUTS,
    Golden,
    Outputs,
)
from duallora_edge.runtime.preprocess import Pixels

MIN_COSINE = 0.999
# The largest batch of an engine that TensorRT builds from a graph that takes any number of images.
ENGINE_BATCH = 16

Infer = Callable[[Pixels], Outputs]


class UnavailableError(Exception):
    """A backend that this installation does not have; its message is the reason."""


@dataclass(frozen=True)
class GoldenCheck:
    """How the outputs of a backend compare with the golden outputs of ``images`` images.

    ``cosine`` is the smallest cosine between the two probability vectors of an image, ``max_difference`` the
    largest absolute difference of a class or task probability, ``max_novelty_difference`` that of a novelty, and
    ``max_feature_difference`` the largest distance of two feature vectors as a share of the golden one's length.
    ``top1_agreement`` is the share of images with the same best class; two classes whose golden probabilities
    differ by less than twice the tolerance count as the same. ``precision`` decides what is allowed.
    """

    images: int
    cosine: float
    max_difference: float
    max_novelty_difference: float
    max_feature_difference: float
    top1_agreement: float
    precision: str = "fp32"

    @property
    def passed(self) -> bool:
        """Everything within the limits of the precision, with the same best class everywhere. NaN fails."""
        return (
            self.max_difference <= MAX_DIFFERENCE[self.precision]
            and self.cosine >= MIN_COSINE
            and self.max_novelty_difference <= MAX_NOVELTY_DIFFERENCE
            and self.max_feature_difference <= MAX_FEATURE_DIFFERENCE[self.precision]
            and self.top1_agreement == 1.0
        )

    def __str__(self) -> str:
        return (
            f"largest difference of a probability {self.max_difference:.2g} (at most "
            f"{MAX_DIFFERENCE[self.precision]:g}), of novelty {self.max_novelty_difference:.2g} (at most "
            f"{MAX_NOVELTY_DIFFERENCE:g}), of features {self.max_feature_difference:.2g} (at most "
            f"{MAX_FEATURE_DIFFERENCE[self.precision]:g}), cosine {self.cosine:.6f}, same best class on "
            f"{self.top1_agreement:.0%} of {self.images} golden images"
        )


def check_golden(infer: Infer, golden: Golden, precision: str = "fp32") -> GoldenCheck:
    """Run the golden images one by one, as with a camera, and compare every output."""
    close = 2 * MAX_DIFFERENCE[precision]
    cosines, agreements, differences = [], [], []
    for index in range(len(golden.image)):
        outputs = infer(golden.image[index : index + 1])
        expected, actual = golden.probabilities[index].astype(np.float64), outputs.probabilities[0].astype(np.float64)
        cosines.append(expected @ actual / (np.linalg.norm(expected) * np.linalg.norm(actual)))
        agreements.append(expected[actual.argmax()] >= expected.max() - close)
        feature = golden.features[index].astype(np.float64)
        differences.append(
            (
                np.abs(expected - actual).max(),
                np.abs(golden.task_probabilities[index] - outputs.task_probabilities[0]).max(),
                np.abs(golden.novelty[index] - outputs.novelty[0]),
                np.linalg.norm(feature - outputs.features[0]) / max(float(np.linalg.norm(feature)), 1e-12),
            )
        )
    # np.min and np.max propagate NaN, so that it fails the check.
    classes, tasks, novelty, features = np.max(differences, axis=0)
    return GoldenCheck(
        images=len(cosines),
        cosine=float(np.min(cosines)),
        max_difference=float(np.max([classes, tasks])),
        max_novelty_difference=float(novelty),
        max_feature_difference=float(features),
        top1_agreement=float(np.mean(agreements)),
        precision=precision,
    )


def in_groups(infer: Infer, batch: int | None) -> Infer:
    """Let a graph that takes exactly ``batch`` images take any number: the last group is padded with black images.

    A graph that takes any number (None) is returned as it is.
    """
    if batch is None:
        return infer

    def grouped(images: Pixels) -> Outputs:
        count = len(images)
        if count == batch:
            return infer(images)
        rows = max(1, -(-count // batch)) * batch
        padded = np.zeros((rows, *images.shape[1:]), images.dtype)
        padded[:count] = images
        return _joined([infer(padded[start : start + batch]) for start in range(0, rows, batch)], count)

    return grouped


def at_most(infer: Infer, batch: int) -> Infer:
    """Let a model that takes at most ``batch`` images take any number, by splitting them."""

    def split(images: Pixels) -> Outputs:
        if len(images) <= batch:
            return infer(images)
        starts = range(0, len(images), batch)
        return _joined([infer(images[start : start + batch]) for start in starts], len(images))

    return split


def nodes_on_cpu(names: Sequence[str]) -> str:
    """One line for a person: how many nodes run on the CPU, and the first of their names."""
    more = ", ..." if len(names) > 5 else ""
    return f"{len(names)} of the graph's nodes run on the CPU ({', '.join(names[:5])}{more})"


def _joined(parts: Sequence[Outputs], count: int) -> Outputs:
    """The outputs of several runs as one, cut to the first ``count`` images."""
    return Outputs(*(np.concatenate([getattr(part, name) for part in parts])[:count] for name in OUTPUTS))
