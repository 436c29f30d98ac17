"""Several processes that compute together: collectives of torch.distributed, whose errors are one sentence.

Every rank calls the same methods in the same order. Where a rank has died, or does not answer within the group's
timeout, the others raise :class:`RankError` instead of waiting for ever.
"""

from __future__ import annotations

import functools
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eaml_ext import _check

TIMEOUT = 300.0  # seconds


class RankError(ConnectionError):
    """Another rank has died, does not answer, or has failed where all had to succeed."""


class Group:
    """The ranks 0 ... ``size - 1`` that call its methods together.

    Args:
        group: a ``torch.distributed`` process group, of the gloo or nccl backend; None: the default one, which
            ``init_process_group`` (or :func:`torchrun_group`) has made.

    Attributes:
        rank, size: this process's number, and how many there are.

    Raises:
        TypeError: ``group`` is no process group.
        ValueError: there is no default group, or this process is not a member.

    A group of one process, for which nothing is sent:

    >>> with torchrun_group(alone=True) as group:
    ...     group.rank, group.size, group.all_gather(torch.tensor([3])).tolist(), list(group.shard(5))
    (0, 1, [[3]], [0, 1, 2, 3, 4])
    """

    def __init__(self, group: Any = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("Group: torch.distributed is not initialised: run under torchrun, inside torchrun_group()")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            if group is dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError("Group: this process is not a member of group")
            raise TypeError(f"Group: group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
        # Not owned: a process group that outlives destroy_process_group() has threads that can abort Python's exit.
        self._group_ref = weakref.ref(dist.group.WORLD if group is None else group)
        self.rank: int = dist.get_rank(self._group)
        self.size: int = dist.get_world_size(self._group)
        # What is sent lives where the backend takes it from.
        self._device = torch.device("cuda" if dist.get_backend(self._group) == "nccl" else "cpu")
        self._broken: str | None = None

    @property
    def _group(self) -> Any:
        group = self._group_ref()
        if group is None:
            raise RankError("Group: its process group has been destroyed")
        return group

    def __repr__(self) -> str:
        return f"Group(rank {self.rank} of {self.size})"

    def shard(self, count: int, rank: int | None = None) -> range:
        """Which of ``count`` items belong to a rank (None: this one): consecutive ones, as many as to others or one
        fewer; none for some ranks where there are fewer items than ranks."""
        count = _check.integer("Group.shard", "count", count, 0)
        rank = self.rank if rank is None else _check.integer("Group.shard", "rank", rank, 0, self.size)
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """``(size, *shape)``: the tensor of each rank, of the same shape and dtype on all."""
        mine = tensor.detach().to(self._device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._call("all_gather", lambda: dist.all_gather(parts, mine, group=self._group))
        return torch.stack(parts).to(tensor.device)

    def all_to_all(self, bytes_: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send ``send[r]`` of the bytes (uint8) to each rank r, one after the other; those received, likewise."""
        mine = bytes_.detach().to(self._device).contiguous()
        out = torch.empty(sum(receive), dtype=torch.uint8, device=self._device)
        sizes: Any = {"output_split_sizes": [int(n) for n in receive], "input_split_sizes": [int(n) for n in send]}
        self._call("all_to_all", lambda: dist.all_to_all_single(out, mine, **sizes, group=self._group))
        return out.to(bytes_.device)

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Put into each tensor, in place, its sum over the ranks, the same bits on all; one message for each dtype."""
        self._each_dtype("all_reduce", tensors, lambda flat: dist.all_reduce(flat, group=self._group))

    @torch.no_grad()
    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Put into each tensor, in place, what it is on rank 0; one message for each dtype."""
        self._each_dtype("broadcast", tensors, lambda flat: dist.broadcast(flat, group_src=0, group=self._group))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.all_gather(torch.tensor(flag)).any())

    def broadcast_from_rank_zero(self, function: Callable[[], Any]) -> Any:
        """What ``function()`` returns on rank 0, where alone it is called; what it raises is raised on all ranks."""
        message: list[Any] = [None]
        if self.rank == 0:
            try:
                message = [(function(), None)]
            except Exception as error:
                message = [(None, error)]
        value, failure = self.broadcast_object(0, message[0])
        if failure is not None:
            raise failure
        return value

    def broadcast_object(self, rank: int, value: Any) -> Any:
        """The value that ``rank`` has, any object that pickle knows; the other ranks' values are ignored."""
        rank = _check.integer("Group.broadcast_object", "rank", rank, 0, self.size)
        message = [value]
        args: Any = {"group_src": rank, "group": self._group, "device": self._device}
        self._call("broadcast_object_list", lambda: dist.broadcast_object_list(message, **args))
        return message[0]

    @contextmanager
    def errors_on_all_ranks(self, where: str) -> Iterator[None]:
        """A block without collectives that must succeed on all ranks: its error is raised where it happens, and
        RankError on the others, so that none goes on alone."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        flags = self.all_gather(torch.tensor(failed is not None))
        if failed is not None:
            raise failed
        self.raise_on_any_rank(where, flags)

    def raise_on_any_rank(self, where: str, failed: Tensor) -> None:
        """Raise RankError if a rank has failed: ``(size,)``, nonzero where."""
        ranks = failed.nonzero().flatten().tolist()
        if ranks:
            raise RankError(f"{where}: rank {ranks[0]} of {self.size} failed, its own error says why")

    def _each_dtype(self, name: str, tensors: Sequence[Tensor], function: Callable[[Tensor], Any]) -> None:
        """Call the function with all tensors of a dtype as one, and put its numbers back into them."""
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            some = [t for t in tensors if t.dtype is dtype]
            flat = torch.cat([t.reshape(-1).to(self._device) for t in some])
            self._call(name, functools.partial(function, flat))
            for tensor, part in zip(some, flat.split([t.numel() for t in some]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _call(self, name: str, function: Callable[[], Any]) -> None:
        if self._broken is not None:
            raise RankError(self._broken)
        try:
            function()
        except RuntimeError as error:  # all that the backends raise
            reason = str(error).split("] ", 1)[-1].partition(". ")[0].partition("\n")[0]
            late = "Timed out" in reason or "timeout" in reason.lower()
            what = "does not answer" if late else "has died or closed the connection"
            me = f"rank {self.rank} of {self.size}"
            self._broken = f"distributed.{name}: another rank {what}, {me} gives up ({reason})"
            raise RankError(self._broken) from None


def world_size() -> int:
    """How many processes ``torchrun`` has started, this one among them; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def torchrun_group(timeout: float = TIMEOUT, *, alone: bool = False) -> Iterator[Group | None]:
    """The group of the processes that ``torchrun`` has started, or None where there is but this one.

    Initialises torch.distributed (gloo) where nobody has, and then destroys it at the end of the block.

    Args:
        timeout: seconds after which a rank that waits for others gives up.
        alone: a group of one also where there is but this process.

    Raises:
        TypeError, ValueError: an argument of the wrong kind.
        RankError: not all ranks have come within the timeout.

    >>> with torchrun_group() as group:
    ...     print(group)
    None
    """
    timeout = _check.positive("torchrun_group", "timeout", timeout)
    if math.isinf(timeout):
        raise ValueError(f"torchrun_group: timeout must be finite, got {timeout!r}")
    _check.flag("torchrun_group", "alone", alone)
    if dist.is_available() and dist.is_initialized():
        yield Group()
        return
    count = world_size()
    if count == 1 and not alone:
        yield None
        return
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    if count == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch re-exports it without saying so
        options |= {"store": store, "rank": 0, "world_size": 1}
    try:
        dist.init_process_group("gloo", **options)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RankError(f"torchrun_group: not all of {count} ranks have come within {timeout} s ({reason})") from None
    try:
        yield Group()
    finally:
        dist.destroy_process_group()


def run_on_rank_zero(group: Group | None, function: Callable[[], Any]) -> Any:
    """What the function returns or raises on rank 0, on all ranks; without a group, here."""
    return function() if group is None else group.broadcast_from_rank_zero(function)


def any_rank(group: Group | None, flag: bool) -> bool:
    """Whether the flag is set on any rank; without a group, here."""
    return flag if group is None else group.any(flag)


def check_group(where: str, group: Any) -> None:
    """Raise TypeError unless ``group`` is a Group or None."""
    if group is not None and not isinstance(group, Group):
        raise TypeError(f"{where}: group must be an eaml_ext.distributed.Group or None, got {type(group).__name__}")
