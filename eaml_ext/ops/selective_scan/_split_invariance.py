"""The context manager that keeps CUDA kernels from dividing time into segments."""

import threading
from types import TracebackType

import torch

_lock = threading.Lock()
_depth = 0  # contexts that are open, in all threads


def is_split_invariant() -> bool:
    """Return whether a :class:`split_invariant` context is open."""
    return _depth > 0


class split_invariant:
    """Context manager: a scan on CUDA, its splits and its single steps have the same bits.

    The CUDA kernels divide the time of long sequences with few channels (below 512 at 16 states) into segments, which
    run at the same time. The states between segments are then sums in another order. While this context is open there
    are no segments: ``y`` and the last state of a scan equal those of scans of its parts, with the state handed over,
    and those of :func:`selective_scan_step`, bit for bit. The derivatives of these calls have no segments either. Long
    sequences with few channels then use a small part of a large GPU. On a CPU nothing changes.

    The context holds for all threads of the process, because autograd runs backward passes in threads of its own.
    Activation checkpoints compute a scan again in the backward pass, so that belongs into the context, too. A compiled
    function keeps the setting of the call that compiled it.

    Raises:
        RuntimeError: if the context is opened inside a compiled function.

    Example:
        >>> import torch
        >>> from eaml_ext.ops import selective_scan, split_invariant
        >>> u, delta = torch.randn(1, 4, 100), torch.rand(1, 4, 100)
        >>> A, B, C = -torch.rand(4, 16), torch.randn(1, 16, 100), torch.randn(1, 16, 100)
        >>> with split_invariant():
        ...     y = selective_scan(u, delta, A, B, C)
        >>> y.shape
        torch.Size([1, 4, 100])
    """

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("split_invariant: open the context outside of the compiled function")
        self._add(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.compiler.is_dynamo_compiling():  # in Python 3.10, Dynamo traces this after the error of __enter__
            raise RuntimeError("split_invariant: open the context outside of the compiled function")
        self._add(-1)

    @staticmethod
    def _add(change: int) -> None:
        global _depth
        with _lock:
            _depth += change
