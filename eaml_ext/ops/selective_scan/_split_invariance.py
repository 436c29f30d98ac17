"""The context manager that keeps CUDA kernels from dividing time into segments."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_active = ContextVar("eaml_ext_split_invariant", default=False)


def is_split_invariant() -> bool:
    """Return whether the calling context is inside :func:`split_invariant`."""
    return _active.get()


@contextmanager
def split_invariant() -> Iterator[None]:
    """Make a scan on CUDA, its splits and its single steps have the same bits.

    The CUDA kernels divide the time of long sequences with few channels (below 512 at 16 states) into segments, which
    run at the same time. The states between segments are then sums in another order. Inside this context there are no
    segments: ``y`` and the last state of a scan equal those of scans of its parts, with the state handed over, and
    those of :func:`selective_scan_step`, bit for bit. The derivatives of these calls have no segments either, wherever
    they are computed. Long sequences with few channels then use a small part of a large GPU. On a CPU nothing changes.

    A compiled function keeps the setting it was traced with.

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
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)
