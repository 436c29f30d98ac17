"""h_t = exp(dt_t A) h_{t-1} + dt_t B(x_t) u_t;  y_t = (C(x_t) . h_t + D u_t) * silu(z(x_t)): Mamba's selective core."""

import math

import torch
from torch import Tensor, nn

from eaml_ext.nn._row_invariant import linear
from eaml_ext.nn._step_size import inverse_softplus
from eaml_ext.nn.cores.base import Core
from eaml_ext.nn.padding import zero_delta_after_length
from eaml_ext.ops import selective_scan, selective_scan_step


class S6(Core):
    """Selective state-space core: step size, B and C depend on the input (Gu & Dao 2023, "Mamba", section 3).

    As in the paper, A starts as S4D-Real, ``-(1..state_size)``, and step sizes start log-uniform in [0.001, 0.1].

    Args:
        dim: width of input and output.
        state_size: states per channel.
        dt_min, dt_max: step sizes start log-uniform between them; state n decays by exp(-n dt) a step.

    >>> core = S6(8, 4)
    >>> y, state = core.scan(torch.randn(2, 5, 8))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8, 4]))
    """

    def __init__(self, dim: int, state_size: int = 16, *, dt_min: float = 1e-3, dt_max: float = 0.1):
        super().__init__(dim, state_size)
        dim, state_size = self.dim, self.state_size
        self.state_shape = (dim, state_size)
        rank = math.ceil(dim / 16)
        self.split = (rank, state_size, state_size)
        self.x_proj = nn.Linear(dim, sum(self.split), bias=False)  # dt, B, C
        self.dt_proj = nn.Linear(rank, dim, bias=False)
        self.gate = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        self.delta_bias = nn.Parameter(inverse_softplus(self._step_sizes(dim, dt_min, dt_max)))
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)

    def _run_scan(
        self,
        x: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Core.scan`; ``state`` is ``(batch, dim, state_size)``, floating."""
        dt, B, C = linear(self.x_proj, x).split(self.split, dim=-1)
        y, state = selective_scan(
            x.mT,
            zero_delta_after_length(linear(self.dt_proj, dt).mT, lengths),
            -self.A_log.exp(),
            B.mT,
            C.mT,
            self.D,
            linear(self.gate, x).mT,
            self.delta_bias,
            True,
            True,
            initial_state=state,
            reset=reset,
            cu_seqlens=cu_seqlens,
        )
        return linear(self.out_proj, y.mT), state

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Core.step`; ``state`` is ``(batch, dim, state_size)``, floating."""
        dt, B, C = linear(self.x_proj, x).split(self.split, dim=-1)
        delta, z = linear(self.dt_proj, dt), linear(self.gate, x)
        y, state = selective_scan_step(state, x, delta, -self.A_log.exp(), B, C, self.D, z, self.delta_bias, True)
        return linear(self.out_proj, y), state
