"""One training by several processes (ranks) that ``torchrun`` starts, on one machine or many.

Every rank runs the same program. What is expensive is split (images behind the frozen prefix, the images of a step),
what is small is done by all, and the run directory is read and written by rank 0 alone (`main_only`). Without
``torchrun`` there is one rank, and each function here only does the work that it is given, without importing torch.

Gradients are summed by an explicit all-reduce of one flat buffer a step. The wrapper of torch for data-parallel modules
would hide nothing behind the backward pass (the trained tensors are some hundred kilobytes), wants them in a module,
and averages over ranks as if all had equally many images, which the last batch of an epoch breaks.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from duallora_edge.errors import ConfigError, DualLoraEdgeError, RunError

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
Items = TypeVar("Items", bound=Sequence[object])

TIMEOUT_VARIABLE = "DUALLORA_EDGE_TIMEOUT"
TIMEOUT_S = 600


class LostProcessError(RunError):
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
        import torch
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        timeout = timedelta(seconds=_timeout())
        self.store, self.rank, self.world_size = next(rendezvous("env://", timeout=timeout))
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        assert isinstance(patient, dist.ProcessGroup)  # something else only for a rank that is no member
        self.patient = patient
        self.heard: Exception | None = None  # the last error that another rank had
        self.alone = False  # whether rank 0 does something that the others wait for

    def is_told(self) -> bool:
        """Whether another rank has told the user why this training ended; else this one is about to."""
        try:
            return int(self.store.add("told", 1)) > 1
        except RuntimeError:  # the store went down with the process that kept it
            return False


_group: _Group | None = None


def rank() -> int:
    """The rank of this process, as in torch.distributed; 0 without `torchrun`."""
    return _group.rank if _group else 0


def world_size() -> int:
    """The number of ranks; 1 without `torchrun`."""
    return _group.world_size if _group else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes files and talks to the user."""
    return rank() == 0


def local_rank() -> int:
    """The rank of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """The number of ranks on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _group else 1


@contextmanager
def process_group() -> Iterator[None]:
    """Meet the other ranks where `torchrun` started several, and leave them at the end.

    Raises `LostProcessError` when another rank is lost, `SystemExit` where another rank tells the user what is wrong.
    """
    global _group
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:  # which torchrun sets
        yield
        return
    import torch.distributed as dist

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
            raise LostProcessError from error
        raise
    finally:
        _group = None


def on_main(work: Callable[[], T]) -> T:
    """Do ``work`` on rank 0 alone; its result is returned, and its error raised, on all ranks.

    What rank 0 calls in there is its own business: the others wait for the whole.
    """
    if _group is None or _group.alone:
        return work()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if is_main():
        _group.alone = True
        try:
            outcome = _attempt(work)
        finally:
            _group.alone = False
    return _result(_from_rank(outcome, 0), 0)


def main_only(function: Callable[P, T]) -> Callable[P, T]:
    """A function that rank 0 alone carries out, see `on_main`."""

    @functools.wraps(function)
    def on_rank_0(*args: P.args, **kwargs: P.kwargs) -> T:
        return on_main(lambda: function(*args, **kwargs))

    return on_rank_0


def main_first(work: Callable[[], T]) -> T:
    """Do ``work`` on every rank, on rank 0 first: the others find in a cache what it left there.

    An error of any rank is raised on all.
    """
    if _group is None:
        return work()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if is_main():
        outcome = _attempt(work)
    _result((None, _from_rank(outcome[1], 0)), 0)
    if not is_main():
        outcome = _attempt(work)
    import torch.distributed as dist

    errors: list[Exception | None] = [None] * world_size()
    with _together():
        dist.all_gather_object(errors, outcome[1], group=_group.patient)
    for source, error in enumerate(errors):
        _result((None, error), source)
    return _result(outcome, rank())


@contextmanager
def held_by_main(context: AbstractContextManager[None]) -> Iterator[None]:
    """Rank 0 enters ``context`` for all ranks; that it cannot is raised on all."""
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(context))
        yield


def broadcast(value: T) -> T:
    """The value of rank 0, since processors of different kinds differ in the last digits."""
    return value if _group is None else _from_rank(value, 0)


def shards(items: Items) -> list[Items]:
    """Neighbouring items for each rank, the first ranks one more where it does not come out even."""
    size, more = divmod(len(items), world_size())
    ends = [size * index + min(index, more) for index in range(world_size() + 1)]
    return [items[begin:end] for begin, end in itertools.pairwise(ends)]  # type: ignore[misc]


def own_rows(total: int) -> slice:
    """The rows of a batch of ``total`` that are this rank's; none where there are more ranks than rows."""
    own = shards(range(total))[rank()]
    return slice(own.start, own.stop)


def all_gather(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """All rows [sum of counts, ...], on the CPU, of which rank r gives its [counts[r], ...]."""
    if _group is None:
        return rows
    import torch
    import torch.distributed as dist

    whole = torch.empty(sum(counts), *broadcast(rows.shape[1:]), dtype=rows.dtype)
    with _together():
        for source, part in enumerate(whole.split(list(counts))):
            if not len(part):
                continue
            if source == rank():
                part.copy_(rows)
            dist.broadcast(part, source)
    return whole


def all_reduce(tensor: Tensor) -> None:
    """Replace a tensor by its sum over the ranks, the same bits on all."""
    if _group is None:
        return
    import torch.distributed as dist

    with _together():
        dist.all_reduce(tensor)


def all_reduce_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace the gradients by their sums over the ranks, in one all-reduce; none counts as zero."""
    if _group is None:
        return
    import torch

    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    all_reduce(flat)
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = total.view_as(parameter)


def all_agree(value: bool) -> bool:
    """Whether ``value`` holds on all ranks."""
    if _group is None:
        return value
    import torch

    votes = torch.tensor([int(not value)])
    all_reduce(votes)
    return not int(votes)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of ``work`` or the error that the user shall read. Others end this process, which all notice."""
    try:
        return work(), None
    except (DualLoraEdgeError, OSError) as error:
        return None, error


def _result(outcome: tuple[T | None, Exception | None], source: int) -> T:
    """The result of an outcome on rank ``source``, or its error raised here, of the same type on all ranks."""
    value, error = outcome
    if error is not None:
        if _group is not None and source != rank():
            _group.heard = error
        raise error
    return value  # type: ignore[return-value]


def _from_rank(value: T, source: int) -> T:
    """The ``value`` of rank ``source`` on all ranks."""
    import torch.distributed as dist

    box = [value]
    assert _group is not None
    with _together():
        dist.broadcast_object_list(box, source, group=_group.patient)
    return box[0]


@contextmanager
def _together() -> Iterator[None]:
    """Something that needs the other ranks. Raises `LostProcessError` when one of them is lost."""
    try:
        yield
    except RuntimeError as error:  # of gloo ("Connection closed by peer", "Timed out"), NCCL and the store alike
        raise LostProcessError from error


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
