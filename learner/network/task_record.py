"""What the learner keeps of a task: adapters, bases, head and statistics. Written once, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from duallora_edge.learner.data.fingerprint import FINGERPRINT_BYTES
from duallora_edge.learner.data.kept_split import SPLITS, KeptSplit
from duallora_edge.learner.network.adapters import Adapter
from duallora_edge.learner.network.task_info import TaskInfo
from duallora_edge.learner.statistics.calibration import QUANTILES, SHAPES, TEMPERATURES, CalibrationCurve
from duallora_edge.learner.statistics.gaussian import ClassStatistics, Discriminants
from duallora_edge.learner.statistics.ridge import RANDOM_FEATURES, STRENGTHS, RidgeSums


@dataclass(frozen=True)
class BlockRecord:
    """What a task adds to one adapted block: two adapters and the new rows [k, d] of the two bases."""

    orthogonal: Adapter
    residual: Adapter
    q_basis: Tensor
    v_basis: Tensor


@dataclass(frozen=True)
class KeptImages:
    """Training images that a method keeps: frames uint8 [n, S, S, 3] and labels int64 [n] in 0..K-1."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class TaskRecord:
    """Everything that is kept of one learned task of K classes.

    Attributes:
        info: its description.
        blocks: what it adds to each adapted block.
        split: which images it learned and which are for its test.
        head: the linear head [K, d + 1] that the adapters were trained with, bias last; where the method says so it
            has the classes of all tasks so far.
        statistics: of the features [f ; phi], classes in the order of ``info.classes``.
        curve: calibrates the classes.
        gate_nll: negative log-likelihood of the task under the prefix posterior, summed over its validation images,
            at each temperature [len(TEMPERATURES)]; zeros where there was nothing to measure.
        novelty: quantiles [QUANTILES] of the raw novelty of its images that were left out of the statistics.
        expected_novelty: what the statistics predicted for its mean (see `gaussian.expected_novelty`).
        overconfidence: how overconfident the statistics predicted the logits to be on which ``curve`` was measured;
            0 where that is not known.
        discriminants: of its classes alone, for the classifier ``lda``; None with other classifiers.
        ridge_sums: what the classifier ``ridge`` needs; None with other classifiers.
        kept_images: training images, of methods that keep any.
    """

    info: TaskInfo
    split: KeptSplit
    blocks: tuple[BlockRecord, ...]
    head: Tensor
    statistics: ClassStatistics
    curve: CalibrationCurve
    gate_nll: Tensor
    novelty: Tensor
    expected_novelty: float = 0.0
    overconfidence: float = 0.0
    discriminants: Discriminants | None = None
    ridge_sums: RidgeSums | None = None
    kept_images: KeptImages | None = None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by the name of their file (without suffix), for storage as safetensors.

        All are float32 except hashes, kept images and their labels. What a task does not have has no file.
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
            "factor": self.statistics.factor,
            "diagonal": self.statistics.diagonal,
            "curve.nll": self.curve.nll,
            "curve.confidence": self.curve.confidence,
            "curve.counts": self.curve.counts,
            "gate_nll": self.gate_nll,
            "novelty": self.novelty,
            "expected_novelty": torch.tensor([self.expected_novelty]),
            "overconfidence": torch.tensor([self.overconfidence]),
        }
        files = {"adapters": adapters, "bases": bases, "head": {"head": self.head}, "statistics": statistics}
        if self.discriminants:
            own = self.discriminants
            inflation = torch.tensor([own.inflation or 0.0])
            files["discriminants"] = {"weight": own.weight, "bias": own.bias, "inflation": inflation}
        if self.ridge_sums:
            ridge = self.ridge_sums
            files["ridge_sums"] = {"gram": ridge.gram, "sums": ridge.sums, "right": ridge.right}
        stored = {name: {k: v.float().contiguous() for k, v in part.items()} for name, part in files.items()}
        stored["split"] = {name: torch.from_numpy(getattr(self.split, name).copy()) for name in SPLITS}
        if self.kept_images:
            kept = self.kept_images
            stored["kept_images"] = {"images": kept.images.contiguous(), "labels": kept.labels.contiguous()}
        return stored

    @property
    def is_finite(self) -> bool:
        """Whether all tensors hold finite numbers."""
        return all(bool(torch.isfinite(value).all()) for part in self.tensors().values() for value in part.values())

    @classmethod
    def from_tensors(cls, info: TaskInfo, files: Mapping[str, Mapping[str, Tensor]]) -> TaskRecord:
        """The inverse of `tensors`.

        Raises:
            KeyError: when a tensor is missing.
            ValueError: when a tensor has another dtype or shape than the others require, or numbers that are not
                finite.
        """
        read = _Tensors({f"{name}/{key}": value for name, part in files.items() for key, value in part.items()})
        width = read("head/head", None, None).shape[1]
        classes, dim = len(info.classes), width - 1
        features = read("statistics/means", classes, None).shape[1]
        counts, curve_counts = read("statistics/counts", classes), read("statistics/curve.counts", 2)
        overconfidence = read("statistics/overconfidence", 1)
        if (
            bool((counts < 0).any() or (read("statistics/diagonal", None) < 0).any())
            or not 0 <= curve_counts[1] <= curve_counts[0]
            or overconfidence < 0
        ):
            raise ValueError("the statistics hold impossible counts")

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
        means, factor, diagonal = (
            read(f"statistics/{name}", *shape)
            for name, shape in (("means", (classes, features)), ("factor", (None, features)), ("diagonal", (features,)))
        )
        shape = (len(SHAPES), len(TEMPERATURES))
        nll, confidence = read("statistics/curve.nll", *shape), read("statistics/curve.confidence", *shape)
        return cls(
            info=info,
            split=read_split(files["split"]),
            blocks=blocks,
            head=read("head/head", None, width),
            statistics=ClassStatistics(counts.double(), means.double(), factor, diagonal),
            curve=CalibrationCurve(nll.double(), confidence.double(), curve_counts.double()),
            gate_nll=read("statistics/gate_nll", len(TEMPERATURES)),
            novelty=read("statistics/novelty", QUANTILES),
            expected_novelty=float(read("statistics/expected_novelty", 1)),
            overconfidence=float(overconfidence),
            discriminants=_discriminants(read, classes, features) if "discriminants" in files else None,
            ridge_sums=_ridge_sums(read, classes) if "ridge_sums" in files else None,
            kept_images=_kept_images(read, classes) if "kept_images" in files else None,
        )


def read_split(tensors: Mapping[str, Tensor]) -> KeptSplit:
    """The split from the tensors of its file. Raises `KeyError` and `ValueError` as `TaskRecord.from_tensors`."""
    read = _Tensors(tensors)
    return KeptSplit(*(read(name, None, FINGERPRINT_BYTES, dtype=torch.uint8).numpy() for name in SPLITS))


def _discriminants(read: _Tensors, classes: int, features: int) -> Discriminants:
    inflation = float(read("discriminants/inflation", 1))
    if inflation < 0:
        raise ValueError("the discriminants hold an impossible inflation")
    return Discriminants(
        read("discriminants/weight", classes, features), read("discriminants/bias", classes), inflation or None
    )


def _ridge_sums(read: _Tensors, classes: int) -> RidgeSums:
    return RidgeSums(
        gram=read("ridge_sums/gram", RANDOM_FEATURES, RANDOM_FEATURES),
        sums=read("ridge_sums/sums", classes, RANDOM_FEATURES),
        right=read("ridge_sums/right", len(STRENGTHS)),
    )


def _kept_images(read: _Tensors, classes: int) -> KeptImages:
    """Images of every class; that they have the size of the backbone's input is checked with the backbone."""
    images = read("kept_images/images", None, None, None, 3, dtype=torch.uint8)
    labels = read("kept_images/labels", len(images), dtype=torch.int64)
    if labels.unique().tolist() != list(range(classes)):
        raise ValueError("the labels of the kept images are not those of the classes")
    return KeptImages(images, labels)


class _Tensors:
    """Tensors by name, each checked when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __call__(self, name: str, *shape: int | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor called ``name``: finite numbers of this dtype and shape, where None stands for any number."""
        value = self.tensors[name]
        if value.dtype != dtype:
            raise ValueError(f"the tensor {name} must hold {dtype}, not {value.dtype}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"the tensor {name} holds numbers that are not finite")
        if value.dim() != len(shape) or any(
            want is not None and size != want for size, want in zip(value.shape, shape, strict=True)
        ):
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"the tensor {name} must be of shape [{expected}], not {list(value.shape)}")
        return value


def empty_adapter(dim: int) -> Adapter:
    """The adapter of rank 0."""
    return Adapter(*(torch.zeros(0, dim) for _ in Adapter._fields))
