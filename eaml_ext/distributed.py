"""Collectives of torch.distributed for several processes, with errors of one sentence.

Every rank calls the same methods in the same order. If a rank has died or does not answer within the group's timeout,
the other ranks raise :class:`RankError`.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from eaml_ext import _check

T = TypeVar("T")
TIMEOUT = 300.0  # seconds


class RankError(ConnectionError):
    """Another rank has died, does not answer, or has failed in a step that all ranks must complete."""


class Group:
    """The ranks 0 ... ``size - 1``, which call its methods together.

    Args:
        group: a ``torch.distributed`` process group of the gloo or nccl backend; None: the default group, made by
            ``init_process_group`` or :func:`torchrun_group`.

    Attributes:
        rank: this process's number.
        size: number of processes.

    Raises:
        TypeError: ``group`` is not a process group.
        ValueError: there is no default group, or this process is not a member.

    A group of one process, which sends nothing:

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
        # Weak, because the threads of a process group that outlives destroy_process_group() can abort Python's exit.
        self._group_ref = weakref.ref(dist.group.WORLD if group is None else group)
        self.rank: int = dist.get_rank(self._group)
        self.size: int = dist.get_world_size(self._group)
        # The backend sends tensors from this device.
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
        """Return the consecutive indices of the items of one rank; the ranks' numbers of items differ by at most one.

        Args:
            count: number of items, 0 or more.
            rank: the rank; None: this one.

        Raises:
            TypeError, ValueError: ``count`` is no integer >= 0, or ``rank`` no integer in [0, size).
        """
        count = _check.integer("Group.shard", "count", count, 0)
        rank = self.rank if rank is None else _check.integer("Group.shard", "rank", rank, 0, self.size)
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Gather a tensor from each rank.

        Args:
            tensor: ``(*shape)``, of the same shape and dtype on all ranks.

        Returns:
            ``(size, *shape)``, on the device of ``tensor``.
        """
        sent = tensor.detach().to(self._device).contiguous()
        received = [torch.empty_like(sent) for _ in range(self.size)]
        self._call("all_gather", lambda: dist.all_gather(received, sent, group=self._group))
        return torch.stack(received).to(tensor.device)

    def all_to_all(self, bytes_: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send consecutive bytes to each rank.

        Args:
            bytes_: ``(sum(send),)``, uint8; in the order of the receiving ranks.
            send: number of bytes for each rank.
            receive: number of bytes from each rank.

        Returns:
            ``(sum(receive),)``, uint8; in the order of the sending ranks.
        """
        sent = bytes_.detach().to(self._device).contiguous()
        out = torch.empty(sum(receive), dtype=torch.uint8, device=self._device)
        sizes: Any = {"output_split_sizes": [int(n) for n in receive], "input_split_sizes": [int(n) for n in send]}
        self._call("all_to_all", lambda: dist.all_to_all_single(out, sent, **sizes, group=self._group))
        return out.to(bytes_.device)

    @torch.no_grad()
    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the ranks; all ranks get the same bits.

        Args:
            tensors: of any shapes and dtypes, the same on all ranks; each dtype is one message.
        """
        self._per_dtype("all_reduce", tensors, lambda flat: dist.all_reduce(flat, group=self._group))

    @torch.no_grad()
    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its value on rank 0.

        Args:
            tensors: of any shapes and dtypes, the same on all ranks; each dtype is one message.
        """
        self._per_dtype("broadcast", tensors, lambda flat: dist.broadcast(flat, group_src=0, group=self._group))

    def any(self, flag: bool) -> bool:
        """Return whether the flag is True on any rank."""
        return bool(self.all_gather(torch.tensor(flag)).any())

    def broadcast_from_rank_zero(self, function: Callable[[], T]) -> T:
        """Call ``function()`` on rank 0 alone; return its result, or raise its error, on all ranks.

        Args:
            function: returns an object that pickle supports.
        """
        message: list[Any] = [None]
        if self.rank == 0:
            try:
                message = [(function(), None)]
            except Exception as error:
                message = [(None, error)]
        value, failure = self.broadcast_object(0, message[0])
        if failure is not None:
            raise failure
        result: T = value
        return result

    def broadcast_object(self, rank: int, value: Any) -> Any:
        """Return the value of one rank on all ranks.

        Args:
            rank: the sending rank.
            value: any object that pickle supports; ignored on the other ranks.

        Raises:
            TypeError, ValueError: ``rank`` is no integer in [0, size).
        """
        rank = _check.integer("Group.broadcast_object", "rank", rank, 0, self.size)
        message = [value]
        args: Any = {"group_src": rank, "group": self._group, "device": self._device}
        self._call("broadcast_object_list", lambda: dist.broadcast_object_list(message, **args))
        return message[0]

    @contextmanager
    def errors_on_all_ranks(self, where: str) -> Iterator[None]:
        """Raise on all ranks if the block raises on one: its own error there, RankError on the others.

        The block must contain no collectives.

        Args:
            where: the function that RankError names.
        """
        own_error: Exception | None = None
        try:
            yield
        except Exception as error:
            own_error = error
        failed = self.all_gather(torch.tensor(own_error is not None))
        if own_error is not None:
            raise own_error
        self.raise_on_any_rank(where, failed)

    def raise_on_any_rank(self, where: str, failed: Tensor) -> None:
        """Raise RankError if a rank has failed.

        Args:
            where: the function that the error names.
            failed: ``(size,)``, any dtype; nonzero for the ranks that failed.
        """
        ranks = failed.nonzero().flatten().tolist()
        if ranks:
            raise RankError(f"{where}: rank {ranks[0]} of {self.size} failed, its own error says why")

    def _per_dtype(self, name: str, tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> None:
        """Run the in-place collective on the concatenated tensors of each dtype, and copy its results back to them."""
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            same_dtype = [t for t in tensors if t.dtype is dtype]
            flat = torch.cat([t.reshape(-1).to(self._device) for t in same_dtype])
            self._call(name, functools.partial(collective, flat))
            for tensor, result in zip(same_dtype, flat.split([t.numel() for t in same_dtype]), strict=True):
                tensor.copy_(result.view(tensor.shape))

    def _call(self, name: str, collective: Callable[[], Any]) -> None:
        """Run a collective; its error, and every later call, raise RankError."""
        if self._broken is not None:
            raise RankError(self._broken)
        try:
            collective()
            return
        except RuntimeError as error:  # the base class of all errors of the backends
            reason = str(error).split("] ", 1)[-1].partition(". ")[0].partition("\n")[0]
        timed_out = "Timed out" in reason or "timeout" in reason.lower()
        what = "does not answer" if timed_out else "has died or closed the connection"
        this = f"rank {self.rank} of {self.size}"
        self._broken = f"distributed.{name}: another rank {what}, {this} gives up ({reason})"
        raise RankError(self._broken)  # outside the handler: the other error's frames refer to the process group


def world_size() -> int:
    """Return the number of processes that ``torchrun`` has started; 1 without it.

    >>> world_size()
    1
    """
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def torchrun_group(timeout: float = TIMEOUT, *, alone: bool = False) -> Iterator[Group | None]:
    """Yield the group of the processes that ``torchrun`` has started, or None for one process.

    If torch.distributed is not initialised, it is (with gloo), and destroyed at the end of the block.

    Args:
        timeout: seconds after which a rank that waits for others raises RankError.
        alone: True: one process gets a group of size 1 in place of None.

    Raises:
        TypeError, ValueError: an argument is of another type or out of its range.
        RankError: not all ranks have connected within the timeout.

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
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch re-exports it without a declaration
        options |= {"store": store, "rank": 0, "world_size": 1}
    try:
        init_process_group(**options)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RankError(f"torchrun_group: not all of {count} ranks have come within {timeout} s ({reason})") from None
    try:
        yield Group()
    finally:
        if dist.is_initialized():  # not destroyed inside the block
            destroy_process_group()


def init_process_group(**options: Any) -> None:
    """Initialise the default process group of gloo; ``options`` goes to ``torch.distributed.init_process_group``."""
    # Imported now, because default arguments in it keep the process group that exists when it is imported.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group("gloo", **options)


def destroy_process_group() -> None:
    """Destroy the default process group, and end its threads, which can abort Python's exit.

    ``torch.distributed.destroy_process_group`` leaves the threads to the destructor. Frames of caught exceptions may
    refer to the process group in reference cycles; those are collected.
    """
    alive = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    if alive() is not None:
        gc.collect()


def run_on_rank_zero(group: Group | None, function: Callable[[], T]) -> T:
    """:meth:`Group.broadcast_from_rank_zero`; without a group, call ``function()`` in this process.

    >>> run_on_rank_zero(None, lambda: 3)
    3
    """
    return function() if group is None else group.broadcast_from_rank_zero(function)


def any_rank(group: Group | None, flag: bool) -> bool:
    """:meth:`Group.any`; without a group, return ``flag``.

    >>> any_rank(None, True)
    True
    """
    return flag if group is None else group.any(flag)


def check_group(where: str, group: Any) -> None:
    """Raise TypeError unless ``group`` is a Group or None."""
    if group is not None and not isinstance(group, Group):
        raise TypeError(f"{where}: group must be an eaml_ext.distributed.Group or None, got {type(group).__name__}")
