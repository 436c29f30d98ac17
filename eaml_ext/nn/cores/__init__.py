"""State-space cores: sequence mixers of one width, interchangeable in :class:`eaml_ext.nn.SSM`.

A core is an ``nn.Module`` built as ``Core(dim, state_size)`` with

- ``state_shape``: the shape of one row's state;
- ``scan(x, state=None, reset=None, lengths=None) -> (y, state)``, ``x`` ``(batch, time, dim)``, ``reset`` ``(batch,
  time)`` bool, ``lengths`` ``(batch,)``: the state is that after each row's last step, after which no ``reset`` is;
- ``step(x, state) -> (y, state)``, ``x`` ``(batch, dim)``.

``docs/cores.md`` says which to choose. ``state_size`` is the number of states per channel; of S5 and LRU, whose
channels share one state, that of the whole.
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


TIMED = ("s6", "mamba", "s4d", "s5", "ssd")
"""The cores that have a step size, whose initial range ``dt_min`` and ``dt_max`` set."""


def make_core(
    core: str | Callable[[int, int], nn.Module],
    dim: int,
    state_size: int,
    dt_min: float | None = None,
    dt_max: float | None = None,
) -> Any:
    """The core named ``core``, or built by it if it is a callable ``(dim, state_size) -> nn.Module``.

    ``dt_min`` and ``dt_max`` go to the cores of ``TIMED``, which have defaults of their own; other cores refuse them.
    """
    steps = {name: value for name, value in (("dt_min", dt_min), ("dt_max", dt_max)) if value is not None}
    if callable(core):
        if steps:
            name, value = steps.popitem()
            raise ValueError(f"make_core: {name} must be None for a callable core, got {value!r}")
        return core(dim, state_size)
    if core not in CORES:
        raise ValueError(f"make_core: core must be one of {sorted(CORES)} or a callable, got {core!r}")
    if steps and core not in TIMED:
        name, value = steps.popitem()
        raise ValueError(f"make_core: {name} must be None for core {core!r}, which has no step size, got {value!r}")
    return CORES[core](dim, state_size, **steps)


__all__ = ["CORES", "LRU", "RWKV", "S4D", "S5", "S6", "SSD", "TIMED", "Core", "MambaCore", "Retention", "make_core"]
