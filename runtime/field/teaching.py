"""Classes that are taught on the device, from a few frames, without PyTorch and without a change to the model.

A bundle classifies by Gaussians with one covariance Sigma, one for each class (`docs/method.md`), so a further class
needs its mean alone. It is the mean of the features of its frames. Everything else stays: the temperatures, the scale
of the novelty, and what the other classes answer among themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from duallora_edge.errors import BundleError
from duallora_edge.runtime.bundle import TEACH, Bundle, FloatArray, Outputs, Task
from duallora_edge.runtime.graph_weights import WEIGHTS
from duallora_edge.runtime.tensor_file import TensorFile

TASK = "taught"
"""The task of all taught classes."""
CAUTION = 0.15

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Taught:
    """Taught classes beside those of a bundle: what the bundle answers becomes an answer about all of them.

    Attributes:
        classes: the names of the taught classes.
        weight: their discriminants, float32 [K, D].
        bias: float32 [K].
    """

    teacher: Teacher
    classes: tuple[str, ...]
    weight: FloatArray
    bias: FloatArray

    def __call__(self, outputs: Outputs) -> Outputs:
        """The outputs for the same images, with a further class for each taught one and a further task for all."""
        return self.teacher.answers(outputs.features, self.weight, self.bias)


class Teacher:
    """The classifier of a bundle in NumPy, and how features vary within a class.

    About twice the classes times the features in memory, 2.2 MB for 100 classes of a ViT-Ti.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Read what the open ``bundle`` holds. Raises `BundleError` where nothing can be taught to it."""
        manifest = bundle.manifest
        if TEACH not in manifest.files or WEIGHTS not in manifest.files:
            raise BundleError(
                f"{bundle.path} cannot be taught: only runs with the classifier 'lda' can; export one of those."
            )
        self.size = manifest.feature_size
        weights, teach = bundle.tensors(WEIGHTS), bundle.tensors(TEACH)
        try:
            self._read(weights, teach, manifest.tasks, len(manifest.classes))
        except (KeyError, ValueError, IndexError, np.linalg.LinAlgError) as error:
            file = bundle.path / TEACH
            raise BundleError(f"{file} does not fit the bundle ({error}); export the run again.") from error

    def _read(self, weights: TensorFile, teach: TensorFile, tasks: tuple[Task, ...], classes: int) -> None:
        d = self.size
        components = [(task, index) for task, each in enumerate(tasks) for index in each.classes]
        k = len(components)
        self.task_of, self.class_of = (np.array(each) for each in zip(*components, strict=True))
        self.tasks, self.classes = len(tasks), classes
        self.weight, self.bias = _array(weights, "classifier.weight", k, d), _array(weights, "classifier.bias", k)
        self.within: tuple[FloatArray, FloatArray] | None = None
        if (within := "classifier.within") + ".weight" in weights.entries:
            self.within = _array(weights, f"{within}.weight", k, d), _array(weights, f"{within}.bias", k)
        self.centre = _array(weights, "classifier.centre", d)
        self.precision = _array(weights, "classifier.precision.weight", 1, d)[0]
        self.background = _array(weights, "novelty.background.weight", None, k)
        self.background_bias = _array(weights, "novelty.background.bias", len(self.background))
        self.start, self.slope = (_array(weights, f"novelty.{name}", None) for name in ("start", "slope"))
        self.height = _array(weights, "novelty.height.weight", 1, len(self.start))[0]
        self.temperature, self.spread, self.share = (float(x) for x in _array(teach, "mixture", 3))
        self.limits = _array(teach, "remoteness", 2)
        self.distance = float(_array(teach, "distance", 1)[0])
        diagonal = _array(teach, "diagonal", d).astype(np.float64)
        if not (diagonal.min() > 0 and self.temperature > 0 and self.spread > 0):
            raise ValueError("values that are not positive")
        self._root = np.sqrt(diagonal)
        self._rows = _array(teach, "factor", None, d, dtype=np.float16).astype(np.float64) / self._root
        self._inner = np.linalg.inv(np.eye(len(self._rows)) + self._rows @ self._rows.T)

    def teach(self, features: Mapping[str, FloatArray]) -> Taught:
        """Discriminants of classes from the features float32 [n, D] of their frames, at least one of each.

        The mean of n frames lies off the mean of the class by a squared distance of h / n, where h is that of one
        image. It makes frames of the class look further away than they are, so h / n is taken off their distance, but
        for `CAUTION` / sqrt(n) of it: too much of it draws frames of other classes. (Chosen on training images of
        CIFAR-100: benchmarks/RESULTS.md.)
        """
        centre = self.centre.astype(np.float64)
        weights, biases = [], []
        for frames in features.values():
            count, mean = len(frames), frames.mean(axis=0, dtype=np.float64)
            weight = self._solve(mean - centre)
            gained = self.distance / count * (1 - CAUTION / np.sqrt(count))
            weights.append(weight)
            biases.append((gained - weight @ (mean - centre)) / 2 - weight @ centre)
        return Taught(
            self,
            tuple(features),
            np.array(weights, np.float32).reshape(-1, self.size),
            np.array(biases, np.float32),
        )

    def _solve(self, x: Doubles) -> Doubles:
        """x [D] times Sigma^-1, by the identity of Woodbury."""
        scaled = x / self._root
        return np.asarray((scaled - self._inner @ (self._rows @ scaled) @ self._rows) / self._root)

    def answers(self, features: FloatArray, weight: FloatArray, bias: FloatArray) -> Outputs:
        """What the graph answers to features [n, D], with further classes of discriminants ``weight`` and ``bias``."""
        gaussian = features @ self.weight.T + self.bias
        logits = gaussian if self.within is None else self._within_tasks(gaussian, features)
        taught = features @ weight.T + bias
        remoteness = np.clip(np.square(features - self.centre) @ self.precision, *self.limits)[:, None]
        evidence = np.concatenate([logits, taught / self.temperature], axis=1) / remoteness
        components = (1 - self.share) * _softmax(evidence) + self.share * _softmax(evidence / self.spread)
        count, known = len(self.task_of), len(features)
        probabilities = np.zeros((known, self.classes + len(bias)), np.float32)
        np.add.at(probabilities.T, self.class_of, components[:, :count].T)
        probabilities[:, self.classes :] = components[:, count:]
        of_tasks = np.zeros((known, self.tasks + 1), np.float32)
        np.add.at(of_tasks.T, self.task_of, components[:, :count].T)
        of_tasks[:, -1] = components[:, count:].sum(axis=1)
        return Outputs(probabilities, of_tasks, self._novelty(gaussian * self.temperature, taught), features)

    def _within_tasks(self, logits: FloatArray, features: FloatArray) -> FloatArray:
        """The best logit of each task, and the other classes behind it in the order of the task's own discriminants."""
        assert self.within is not None
        weight, bias = self.within
        within = features @ weight.T + bias
        best = np.full((2, len(features), self.tasks), -np.inf, np.float32)
        for each, found in zip((logits, within), best, strict=True):
            np.maximum.at(found.T, self.task_of, each.T)
        return np.asarray(within + (best[0] - best[1])[:, self.task_of])

    def _novelty(self, gaussian: FloatArray, taught: FloatArray) -> FloatArray:
        white = gaussian @ self.background.T + self.background_bias
        nearest = np.concatenate([gaussian, taught], axis=1).max(axis=1)
        raw = np.square(white).sum(axis=1) - 2 * nearest
        steps = np.clip((raw[:, None] - self.start) * self.slope, 0, 1)
        return np.asarray(steps @ self.height, np.float32)


def _softmax(logits: FloatArray) -> FloatArray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def _array(file: TensorFile, name: str, *shape: int | None, dtype: type = np.float32) -> npt.NDArray[np.float32]:
    """A copy of an array of finite numbers, of this shape, where None stands for any size from 1."""
    array = file[name]
    fits = array.dtype == dtype and array.ndim == len(shape) and array.size
    if not fits or any(want not in (None, size) for want, size in zip(shape, array.shape, strict=True)):
        raise ValueError(f"'{name}' is {array.dtype} {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"'{name}' holds numbers that are not finite")
    return array.copy()
