"""MambaCore: Mamba's whole block as a core; its state holds ``conv_state`` and ``ssm_state``, one after the other."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eaml_ext._torch_compat import has_hooks
from eaml_ext.nn.cores.base import Core
from eaml_ext.nn.mamba import Mamba
from eaml_ext.nn.precision import to_opmath


class MambaCore(Core):
    """:class:`eaml_ext.nn.Mamba` as the submodule ``block``, with its expansion and its convolution.

    Args:
        dim: width of input and output.
        state_size: states per channel.
        d_conv, expand, dt_min, dt_max: as in :class:`eaml_ext.nn.Mamba`.

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

    def _run_scan(
        self,
        x: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Core.scan`; ``state`` is ``(batch, d_inner, d_conv + state_size)``, floating."""
        states = None if state is None else self._split(state)
        y, states = self._run(lambda x: self.block.scan(x, states, reset, lengths, cu_seqlens), x)
        return y, self._join(*states)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Core.step`; ``state`` is ``(batch, d_inner, d_conv + state_size)``, floating."""
        y, *states = self._run(lambda x: self.block.step(x, *self._split(state)), x)
        return y, self._join(*states)

    def _run(self, method: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Return ``method(x)``, run inside a call of the block where hooks are attached to it."""
        return self.block(x, _method=method) if has_hooks(self.block) else method(x)

    def _split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        d_conv = self.block.d_conv
        return state[..., :d_conv], state[..., d_conv:]

    def _join(self, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        return torch.cat([to_opmath(conv_state), to_opmath(ssm_state)], dim=-1)
