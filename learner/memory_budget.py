"""Training within a memory budget: the needs of a step and a pass are measured, the rest is counted, a plan is chosen.

On a CPU the budget limits the resident memory of the process, on CUDA what torch allocates on the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duallora_edge.errors import ConfigError
from duallora_edge.files import read_json, write_json
from duallora_edge.learner import adapt
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data import PreparedStream
from duallora_edge.learner.network.adapters import AdaptedBlock, Adapter
from duallora_edge.learner.network.backbone import Backbone, autocast
from duallora_edge.learner.network.network import run_suffix
from duallora_edge.learner.network.prefix_cache import BATCH, token_bytes
from duallora_edge.learner.statistics.gaussian import STORED_DIRECTIONS

UNITS = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
# Factor on what is predicted on top of the base, for buffers inside operators and holes in the heap.
MARGIN = 1.15
# Below this many images a step is slower than recomputing the blocks of a larger one.
SMALL_BATCH = 4
# Matrices float64 [D, D] in memory at once while the statistics of a task are fitted, composed, stored or read.
STATISTICS_MATRICES = 5
# Bytes of what is loaded later, such as the libraries of the report.
LATER = 96 << 20
PASSES = (BATCH, 32, 16, 8, 4, 2, 1)
FILE = "memory_budget.json"
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in malloc.h
CHOICES = ("micro_batch", "forward_batch", "recompute", "precision")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``2GB`` or ``2048MB`` (2 GB are 2048 MB, 1 MB is 1024 KB). Raises `ConfigError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"memory_budget must be a size such as 2GB or 2048MB, not {text!r}.")
    return int(float(match[1]) * UNITS[match[2].upper()])


@dataclass(frozen=True)
class Plan:
    """How to train within a budget.

    Attributes:
        memory_budget, micro_batch, forward_batch, recompute, precision: as in `TrainConfig`; batches in images.
        cache_bytes: bytes of the prefix cache in memory, the rest is in a file; None for no limit.
        expected: predicted peak in bytes.
    """

    memory_budget: str
    micro_batch: int
    forward_batch: int
    recompute: bool
    precision: str
    cache_bytes: int | None
    expected: int

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The configuration with what was chosen."""
        settings = asdict(self)
        del settings["expected"]
        return replace(config, **settings)

    def describe(self, batch_size: int) -> str:
        """One line for the user."""
        parts = [f"batches of {batch_size} images"]
        if self.micro_batch < batch_size:
            parts[0] += f" in parts of {self.micro_batch}"
        parts.append(f"{self.forward_batch} in a pass without training")
        if self.recompute:
            parts.append("blocks are computed again for the gradient")
        if self.cache_bytes is not None:
            parts.append(f"{_megabytes(self.cache_bytes)} of the prefix cache in memory, the rest in a file")
        parts.append(self.precision)
        return f"Memory budget {self.memory_budget}: {', '.join(parts)}; expected peak {_megabytes(self.expected)}"


@dataclass(frozen=True)
class Cost:
    """Bytes of tensors alive at once: ``fixed`` plus ``image`` for each image of a batch."""

    fixed: int
    image: int

    def of(self, batch: int) -> int:
        return self.fixed + batch * self.image

    def larger(self, other: Cost) -> Cost:
        """A bound of both."""
        return Cost(max(self.fixed, other.fixed), max(self.image, other.image))

    @classmethod
    def measure(cls, run: Callable[[int], object]) -> Cost:
        """The cost of ``run(batch)``, from batches of one image and of three."""
        one, three = (live_peak(lambda batch=batch: run(batch)) for batch in (1, 3))  # type: ignore[misc]
        image = (three - one) // 2
        return cls(max(one - image, 0), image)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, and their peak, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in known and storage not in self._seen:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def live_peak(run: Callable[[], object]) -> int:
    """The most bytes of tensors made by ``run`` that are alive at one moment."""
    with _LiveBytes() as count:
        run()
    return count.peak


def training_cost(backbone: Backbone, config: TrainConfig) -> Cost:
    """The cost of forward and backward passes through the adapted suffix."""
    rank, dim, device = max(config.rank_orthogonal + config.rank_residual, 1), backbone.dim, backbone.device
    blocks = [AdaptedBlock(block) for block in backbone.suffix]
    for block in blocks:
        down, up = torch.zeros(rank, dim, device=device), nn.Parameter(torch.zeros(rank, dim, device=device))
        block.adapter = Adapter(down, up, down, up)

    @torch.enable_grad()
    def step(batch: int) -> None:
        tokens = torch.zeros(batch, _length(backbone), dim, device=device)
        with autocast(config.precision, device):
            f = run_suffix(backbone, blocks, tokens, recompute=config.recompute)[0].float()
            loss = (1 - F.cosine_similarity(f, torch.ones_like(f))).mean()
        loss.backward()

    return Cost.measure(step)


def forward_cost(backbone: Backbone, config: TrainConfig) -> Cost:
    """The cost of a pass without gradients through prefix and suffix."""
    size, device = backbone.info.size, backbone.device
    blocks = [AdaptedBlock(block) for block in backbone.suffix]

    @torch.no_grad()
    def run(batch: int) -> None:
        images = torch.zeros(batch, size, size, 3, dtype=torch.uint8, device=device)
        tokens, _ = backbone.prefix(images, config.precision)
        with autocast(config.precision, device):
            run_suffix(backbone, blocks, tokens, collect="class")

    return Cost.measure(run)


def adaptation_cost(backbone: Backbone, config: TrainConfig) -> Cost:
    """The cost of forward and backward passes through all blocks when the backbone is fitted to its input size."""
    size, dim, device = backbone.info.size, backbone.dim, backbone.device
    patches, blocks = (size // backbone.patch_size) ** 2, [AdaptedBlock(block) for block in backbone.model.blocks]
    kept = torch.arange(max(round(adapt.KEPT_PATCHES * patches), 1), device=device)

    @torch.enable_grad()
    def step(batch: int) -> None:
        for block in blocks:
            block.weight = block.weight.detach().requires_grad_()
        images = torch.zeros(batch, size, size, 3, dtype=torch.uint8, device=device)
        wanted = torch.ones(batch, 2 * (backbone.special_tokens + patches) + 1, dim, device=device)
        adapt.step_loss(backbone, blocks, images, kept, wanted, config).backward()

    return Cost.measure(step)


def summary_width(backbone: Backbone, config: TrainConfig) -> int:
    """Length of the prefix summary once the run has the directions of its second-order part."""
    if len(backbone.directions):
        return backbone.summary_dim
    return backbone.summary_dim + config.second_order * (config.second_order + 1) // 2


def held_bytes(backbone: Backbone, config: TrainConfig, stream: PreparedStream, learned: int) -> int:
    """Bytes that stay occupied while the last task of the stream is learned: records, summaries phi, features."""
    dim, summary = backbone.dim, summary_width(backbone, config)
    images = max((1 + config.views) * len(task.train) + len(task.validation) for task in stream.tasks)
    tests = sum(len(task.test) for task in stream.tasks)
    factors = (learned + len(stream.tasks)) * STORED_DIRECTIONS * (dim + summary) * 4
    return factors + images * 4 * (2 * summary + dim) + tests * 4 * summary


def statistics_bytes(backbone: Backbone, config: TrainConfig, stream: PreparedStream) -> int:
    """Bytes that are needed to sum up the features of a task: three times float64, and some matrices."""
    width = backbone.dim + summary_width(backbone, config)
    images = max((1 + config.views) * len(task.train) + len(task.validation) for task in stream.tasks)
    return STATISTICS_MATRICES * width**2 * 8 + images * 3 * 8 * width


def make_plan(
    backbone: Backbone,
    config: TrainConfig,
    stream: PreparedStream,
    learned: int,
    *,
    free_precision: bool = False,
    before: Mapping[str, Any] | None = None,
) -> Plan:
    """The fastest plan for ``config.memory_budget`` with which the tasks of ``stream`` can follow ``learned`` others.

    First the prefix cache moves to a file, which changes no result. Then parts of a batch become smaller (the same up
    to rounding), blocks are computed twice, and with ``free_precision`` matrix multiplications are in bf16.
    ``before``, the plan of an earlier call as JSON, is kept while it fits, so that an interrupted training ends in the
    same bytes.

    Raises:
        ConfigError: when no plan meets the budget, with the smallest budget that one would.
    """
    budget, device = parse_bytes(config.memory_budget or ""), backbone.device
    on_cpu = device.type == "cpu"
    held = held_bytes(backbone, config, stream, learned) if on_cpu else 0
    statistics = statistics_bytes(backbone, config, stream) if on_cpu else 0
    batch = 3 * config.batch_size * token_bytes(backbone)  # in float16 and float32
    tokens = (1 + config.views) * max(len(task.train) for task in stream.tasks) * token_bytes(backbone)
    adapts = not learned and adapt.is_needed(backbone, config)
    teacher = sum(parameter.nbytes for parameter in backbone.parameters()) if adapts else 0
    costs: dict[tuple[str, bool], tuple[Cost, Cost]] = {}
    least = sys.maxsize
    for option in [*([before] if before else []), *_options(config, free_precision)]:
        chosen = replace(config, **{key: option[key] for key in ("precision", "recompute", "micro_batch")})
        key = (chosen.precision, chosen.recompute)
        if key not in costs:
            training = training_cost(backbone, chosen)
            if adapts:
                training = training.larger(adaptation_cost(backbone, chosen))
            costs[key] = training, forward_cost(backbone, chosen)
        training, forward = costs[key]
        # Only now, since measuring has loaded kernels and started threads, which stay.
        base = LATER + resident_bytes() if on_cpu else torch.cuda.memory_allocated(device)
        for passes in [option["forward_batch"]] if option is before else PASSES:
            most = held + teacher + max(batch + training.of(option["micro_batch"]), forward.of(passes), statistics)
            free = int((budget - base) / MARGIN) - most
            least = min(least, int(base + MARGIN * most))
            if free >= 0:
                kept = min(tokens, free) if on_cpu else None
                expected = int(base + MARGIN * (most + (kept or 0)))
                return Plan(
                    str(config.memory_budget),
                    **{**option, "forward_batch": passes},
                    cache_bytes=kept,
                    expected=expected,
                )
    raise ConfigError(
        f"A memory budget of {config.memory_budget} cannot be met: learning these tasks with this backbone needs at "
        f"least {_megabytes(least)}; give that, or take a smaller --backbone, --size or --second-order."
    )


def _options(config: TrainConfig, free_precision: bool) -> Iterator[dict[str, Any]]:
    """The plans to try, the fastest first; the batch of a pass and the cache are chosen later."""
    for precision in dict.fromkeys([config.precision, *(["bf16"] if free_precision else [])]):
        for recompute in (False, True):
            batch = config.batch_size
            while batch >= (1 if recompute else min(SMALL_BATCH, config.batch_size)):
                yield {"precision": precision, "recompute": recompute, "micro_batch": batch}
                batch = math.ceil(batch / 2) if batch > 1 else 0


def fit_budget(
    config: TrainConfig, backbone: Backbone, stream: PreparedStream, run: Path, learned: int, *, free_precision: bool
) -> Plan | None:
    """The plan of a call of `train` for its budget, None without a budget; `remember` keeps it for the next call.

    ``free_precision``: whether the precision was not chosen and no run depends on it yet.
    """
    if config.memory_budget is None:
        return None
    if backbone.device.type == "cuda":
        total = torch.cuda.get_device_properties(backbone.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, parse_bytes(config.memory_budget) / total), backbone.device)
    else:
        give_back_early()
    path = run / FILE
    before = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # an unreadable plan is made again
        known = read_json(path)
        if (known["memory_budget"], known["batch_size"]) == (config.memory_budget, config.batch_size):
            before = {key: known[key] for key in CHOICES}
    return make_plan(backbone, config, stream, learned, free_precision=free_precision, before=before)


def give_back_early() -> None:
    """Let glibc return every larger block to the system as soon as it is freed, instead of keeping it for later.

    Otherwise the heap grows far beyond what tensors ever occupy at once. The price is a few page faults in each step.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 18)


def remember(plan: Plan, batch_size: int, run: Path) -> None:
    """Write the plan into the run."""
    write_json(run / FILE, {**asdict(plan), "batch_size": batch_size})


def resident_bytes(line: str = "VmRSS") -> int:
    """Resident memory of this process in bytes, or its peak (``VmHWM``). Raises `ConfigError` without Linux."""
    try:
        with Path("/proc/self/status").open(encoding="ascii") as file:
            return next(int(entry.split()[1]) * 1024 for entry in file if entry.startswith(line + ":"))
    except (OSError, StopIteration) as error:
        raise ConfigError("A memory budget needs Linux, whose /proc tells how much is used; leave it out.") from error


def _megabytes(size: int) -> str:
    return f"{math.ceil(size / UNITS['MB'])} MB"


def _length(backbone: Backbone) -> int:
    """Number of tokens of an image."""
    return token_bytes(backbone) // (2 * backbone.dim)
