"""State-space cores: sequence mixers of one width, interchangeable in :class:`eaml_ext.nn.SSM`.

A core is an ``nn.Module`` built as ``Core(dim, state_size)`` with

- ``state_shape``: the shape of one row's state;
- ``scan(x, state=None, reset=None, lengths=None, cu_seqlens=None, seq_idx=None) -> (y, state)``: a sequence, ``x``
  ``(batch, length, dim)``, ``reset`` ``(batch, length)`` bool and False on padding, ``lengths`` ``(batch,)``; the
  returned state is that after each row's last step. ``cu_seqlens`` has the boundaries of packed sequences, each with a
  state; ``seq_idx`` is another form of resets. :class:`eaml_ext.nn.SSM` passes ``lengths`` and ``cu_seqlens`` where
  they are given, and resets in place of ``seq_idx``;
- ``step(x, state) -> (y, state)``: one step, ``x`` ``(batch, dim)``.

``state_size`` is the number of states per channel; in S5 and LRU all channels share ``state_size`` states.
``docs/cores.md`` compares the cores.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from eaml_ext.nn.cores.base import Core
from eaml_ext.nn.cores.diagonal import LRU, S5
from eaml_ext.nn.cores.mamba import MambaCore
from eaml_ext.nn.cores.retention import Retention
from eaml_ext.nn.cores.rwkv import RWKV
from eaml_ext.nn.cores.s4d import S4D
from eaml_ext.nn.cores.s6 import S6
from eaml_ext.nn.cores.ssd import SSD

CORES: dict[str, Callable[..., nn.Module]] = {
    "s6": S6,
    "mamba": MambaCore,
    "s4d": S4D,
    "s5": S5,
    "lru": LRU,
    "ssd": SSD,
    "retention": Retention,
    "rwkv": RWKV,
}

CORES_WITH_STEP_SIZE = ("s6", "mamba", "s4d", "s5", "ssd")
"""The cores whose initial step sizes ``dt_min`` and ``dt_max`` set."""


def make_core(
    core: str | Callable[[int, int], nn.Module],
    dim: int,
    state_size: int,
    dt_min: float | None = None,
    dt_max: float | None = None,
) -> Any:
    """Build the core named ``core``, or ``core(dim, state_size)`` of a callable.

    Args:
        core: a key of ``CORES``, or a callable.
        dim: width of input and output.
        state_size: states per channel, or of the whole core for "s5" and "lru".
        dt_min, dt_max: range of the initial step sizes, for ``CORES_WITH_STEP_SIZE`` only; the core's own if absent.

    Raises:
        TypeError, ValueError: an argument is out of its range, or a step size is given to a core without one.

    >>> make_core("s6", 8, 4).state_shape
    (8, 4)
    """
    steps = {name: value for name, value in (("dt_min", dt_min), ("dt_max", dt_max)) if value is not None}
    if callable(core):
        if steps:
            name, value = steps.popitem()
            raise ValueError(f"make_core: {name} must be None for a callable core, got {value!r}")
        return core(dim, state_size)
    if core not in CORES:
        raise ValueError(f"make_core: core must be one of {sorted(CORES)} or a callable, got {core!r}")
    if steps and core not in CORES_WITH_STEP_SIZE:
        name, value = steps.popitem()
        raise ValueError(f"make_core: {name} must be None for core {core!r}, which has no step size, got {value!r}")
    return CORES[core](dim, state_size, **steps)


__all__ = [
    "CORES",
    "CORES_WITH_STEP_SIZE",
    "LRU",
    "RWKV",
    "S4D",
    "S5",
    "S6",
    "SSD",
    "Core",
    "MambaCore",
    "Retention",
    "make_core",
]
