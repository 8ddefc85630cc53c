"""One training by several processes (ranks) that ``torchrun`` starts, on one machine or many.

Every rank runs the same program. What is expensive is split (images behind the frozen prefix, the images of a step),
what is small is done by all, and the run folder is written by rank 0 alone. Without ``torchrun`` there is one rank,
and each function here is no more than the work that it is given.

Gradients are summed by an explicit all-reduce of one flat buffer a step. The wrapper of torch for data-parallel modules
would hide nothing behind the backward pass (the trained tensors are some hundred kilobytes), wants them in a module,
and averages over ranks as if all had equally many images, which the last batch of an epoch breaks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from duallora_edge.errors import ConfigError, DualLoraEdgeError, RunError

T = TypeVar("T")
Items = TypeVar("Items", bound=Sequence[object])

TIMEOUT_VARIABLE = "DUALLORA_EDGE_TIMEOUT"
TIMEOUT_S = 600


class LostRankError(RunError):
    """Another process of the training is gone or silent."""

    def __init__(self) -> None:
        super().__init__(
            "Another process of this training ended or did not answer in time; "
            "run the same command again, it continues from the last checkpoint."
        )


class _Terminated(BaseException):
    """SIGTERM: `torchrun` ends its processes with it when one of them died. No handler of errors may hold it up."""


# Of these the first rank that has one tells the user. It is the cause: the others notice when that rank ends.
_TOLD_ONCE = (DualLoraEdgeError, OSError, _Terminated)


class _Group:
    """The ranks of this training: where they meet, and a channel for waits in which one rank works alone.

    Such a wait takes as long as the work (decoding a data set); that a process ended is noticed on it at once.
    """

    def __init__(self) -> None:
        timeout = timedelta(seconds=_timeout())
        self.store, rank, size = next(rendezvous("env://", timeout=timeout))
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        dist.init_process_group(backend, store=self.store, rank=rank, world_size=size, timeout=timeout)
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        assert isinstance(patient, dist.ProcessGroup)  # something else only for a rank that is no member
        self.patient = patient
        self.heard: Exception | None = None  # the last error that another rank had

    def is_told(self) -> bool:
        """Whether another rank has told the user why this training ended; else this one is about to."""
        try:
            return int(self.store.add("told", 1)) > 1
        except RuntimeError:  # the store went down with the process that kept it
            return False


_group: _Group | None = None


def number() -> int:
    """The number of this rank."""
    return dist.get_rank() if _group else 0


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if _group else 1


def is_first() -> bool:
    """Whether this rank writes and tells: rank 0, and whoever is alone."""
    return number() == 0


def local_rank() -> int:
    """The number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def on_this_machine() -> int:
    """How many ranks share the memory of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _group else 1


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other ranks where `torchrun` started several, and leave them at the end.

    Raises `LostRankError` when another rank is lost, `SystemExit` where another rank tells the user what is wrong.
    """
    global _group
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with _together():
            _group = _Group()
        yield
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, before)
    except BaseException as error:
        # This process ends now, which the others notice; it shall still be able to say why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if _group and (error is _group.heard or (isinstance(error, _TOLD_ONCE) and _group.is_told())):
            raise SystemExit(1) from error
        if isinstance(error, _Terminated):
            raise LostRankError from error
        raise
    finally:
        _group = None


def first(work: Callable[[], T]) -> T:
    """What ``work`` gives on rank 0, which alone does it; its error is raised on all ranks."""
    if _group is None:
        return work()
    return _result(_from_rank(_attempt(work) if is_first() else (None, None), 0), 0)


def in_turn(work: Callable[[], T]) -> T:
    """Each rank does ``work``, those after rank 0 when it is done: they find in a cache what it left there.

    An error of any rank is raised on all.
    """
    if _group is None:
        return work()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if is_first():
        outcome = _attempt(work)
    _result((None, _from_rank(outcome[1], 0)), 0)
    if not is_first():
        outcome = _attempt(work)
    errors: list[Exception | None] = [None] * count()
    with _together():
        dist.all_gather_object(errors, outcome[1], group=_group.patient)
    for rank, error in enumerate(errors):
        _result((None, error), rank)
    return _result(outcome, number())


@contextmanager
def held_by_first(context: AbstractContextManager[None]) -> Iterator[None]:
    """Rank 0 enters ``context`` for all ranks; that it cannot is raised on all."""
    with ExitStack() as stack:
        first(lambda: stack.enter_context(context))
        yield


def same(value: T) -> T:
    """The value of rank 0: what processors of different kinds compute differs in the last digits."""
    return value if _group is None else _from_rank(value, 0)


def parts(items: Items) -> list[Items]:
    """Neighbouring items for each rank, the first ranks one more where it does not come out even."""
    size, more = divmod(len(items), count())
    ends = [size * rank + min(rank, more) for rank in range(count() + 1)]
    return [items[begin:end] for begin, end in itertools.pairwise(ends)]  # type: ignore[misc]


def own_rows(total: int) -> slice:
    """The rows of a batch of ``total`` that are this rank's; none where there are more ranks than rows."""
    own = parts(range(total))[number()]
    return slice(own.start, own.stop)


def gather(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """All rows [sum of counts, ...], on the CPU, of which rank r gives its [counts[r], ...]."""
    if _group is None:
        return rows
    whole = torch.empty(sum(counts), *same(rows.shape[1:]), dtype=rows.dtype)
    with _together():
        for rank, part in enumerate(whole.split(list(counts))):
            if not len(part):
                continue
            if rank == number():
                part.copy_(rows)
            dist.broadcast(part, rank)
    return whole


def add(tensor: Tensor) -> None:
    """Replace a tensor by its sum over the ranks, the same bits on all."""
    if _group is not None:
        with _together():
            dist.all_reduce(tensor)


def add_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace the gradients by their sums over the ranks, in one all-reduce; none counts as zero."""
    if _group is None:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    add(flat)
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = total.view_as(parameter)


def agreed(value: bool) -> bool:
    """Whether ``value`` holds on all ranks."""
    votes = torch.tensor([int(not value)])
    add(votes)
    return not int(votes)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of ``work`` or the error that the user shall read. Others end this process, which all notice."""
    try:
        return work(), None
    except (DualLoraEdgeError, OSError) as error:
        return None, error


def _result(outcome: tuple[T | None, Exception | None], rank: int) -> T:
    """The result of an outcome on ``rank``, or its error raised here: of the same type, so that all ranks agree."""
    value, error = outcome
    if error is not None:
        if _group is not None and rank != number():
            _group.heard = error
        raise error
    return value  # type: ignore[return-value]


def _from_rank(value: T, rank: int) -> T:
    """The ``value`` of one rank on all of them."""
    box = [value]
    assert _group is not None
    with _together():
        dist.broadcast_object_list(box, rank, group=_group.patient)
    return box[0]


@contextmanager
def _together() -> Iterator[None]:
    """Something that needs the other ranks. Raises `LostRankError` when one of them is lost."""
    try:
        yield
    except RuntimeError as error:  # of gloo ("Connection closed by peer", "Timed out"), NCCL and the store alike
        raise LostRankError from error


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


def _timeout() -> float:
    """Seconds that a step may wait for the others. Raises `ConfigError` when the environment holds nonsense."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_S))
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise ConfigError(f"{TIMEOUT_VARIABLE} must be a number of seconds such as {TIMEOUT_S}, not {text!r}.")
