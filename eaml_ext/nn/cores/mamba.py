"""Mamba's whole block as a core: its expansion and its convolution, whose window is part of the state."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eaml_ext.nn.cores.base import Core
from eaml_ext.nn.mamba import Mamba
from eaml_ext.nn.precision import to_opmath
from eaml_ext.nn.submodule import has_hooks


class MambaCore(Core):
    """:class:`eaml_ext.nn.Mamba` under ``block``; a state holds the convolution's window and then the scan's states.

    Args:
        dim: width of input and output.
        state_size: states per channel.
        d_conv, expand, dt_min, dt_max: as of :class:`eaml_ext.nn.Mamba`.

    >>> y, state = MambaCore(8, 4).scan(torch.randn(2, 5, 8))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 16, 8]))
    """

    def __init__(
        self,
        dim: int,
        state_size: int = 16,
        *,
        d_conv: int = 4,
        expand: float = 2,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ):
        super().__init__(dim, state_size)
        self.block = Mamba(self.dim, self.state_size, d_conv, expand, dt_min=dt_min, dt_max=dt_max)
        self.state_shape = (self.block.d_inner, self.block.d_conv + self.state_size)

    def scan(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x`` (batch, time, dim), ``state`` (batch, *state_shape), ``reset`` (batch, time) bool -> (y, state)."""
        parts = None if state is None else self._parts(state)
        y, last = self._run(lambda x: self.block.scan(x, parts, reset, lengths), x)
        return y, self._whole(last)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (batch, dim), ``state`` (batch, *state_shape) -> (y, state): one step of :meth:`scan`."""
        y, *last = self._run(lambda x: self.block.step(x, *self._parts(state)), x)
        return y, self._whole(last)

    def _run(self, entry: Callable[[Tensor], Any], x: Tensor) -> Any:
        """``entry(x)`` inside a call of the block where hooks are attached to it."""
        return self.block(x, _entry=entry) if has_hooks(self.block) else entry(x)

    def _parts(self, state: Tensor) -> tuple[Tensor, Tensor]:
        width = self.block.d_conv
        return state[..., :width], state[..., width:]

    def _whole(self, parts: tuple[Tensor, Tensor] | list[Tensor]) -> Tensor:
        return torch.cat([to_opmath(part) for part in parts], dim=-1)
