"""h_t = exp(-dt_t a) h_{t-1} + dt_t B_t u_t;  y_t = C_t . h_t + D u_t, with one dt and a per head: Mamba-2's SSD."""

import torch
from torch import Tensor, nn

from eaml_ext.nn._row_invariant import linear
from eaml_ext.nn._step_size import inverse_softplus
from eaml_ext.nn.cores.base import Core
from eaml_ext.nn.padding import zero_delta_after_length
from eaml_ext.nn.precision import to_opmath
from eaml_ext.ops import selective_scan


class SSD(Core):
    """Mamba-2's state-space duality: :class:`S6` with one decay and one step size per head.

    B and C are shared by the heads. The output is gated and normalised. As in the paper, decays start uniform in
    [1, 16] and step sizes log-uniform in [0.001, 0.1].

    Args:
        dim: width of input and output.
        state_size: states per channel.
        num_heads: divides ``dim``; heads of about 16 channels if absent.
        dt_min, dt_max: step sizes start log-uniform between them.

    Source: Dao & Gu 2024, "Transformers are SSMs", equation 2 and section 7.

    >>> y, state = SSD(8, 4).scan(torch.randn(2, 5, 8))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8, 4]))
    """

    def __init__(
        self,
        dim: int,
        state_size: int = 16,
        *,
        num_heads: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ):
        super().__init__(dim, state_size)
        dim, state_size = self.dim, self.state_size
        self.state_shape = (dim, state_size)
        self.num_heads, self.head_dim = self._heads(num_heads)
        self.split = (dim, state_size, state_size, self.num_heads)
        self.in_proj = nn.Linear(dim, sum(self.split), bias=False)  # z, B, C, dt
        self.A_log = nn.Parameter(torch.empty(self.num_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.delta_bias = nn.Parameter(inverse_softplus(self._step_sizes(self.num_heads, dt_min, dt_max)))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def _run_scan(
        self,
        x: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Core.scan`; ``state`` is ``(batch, dim, state_size)``, floating."""
        z, B, C, dt = linear(self.in_proj, x).split(self.split, dim=-1)
        y, last = selective_scan(
            x.mT,
            zero_delta_after_length(self._per_channel(dt).mT, lengths),
            -self._per_channel(to_opmath(self.A_log).exp()).unsqueeze(-1).expand(self.dim, self.state_size),
            B.mT,
            C.mT,
            self._per_channel(to_opmath(self.D)),
            z.mT,
            self._per_channel(to_opmath(self.delta_bias)),
            True,
            True,
            initial_state=state,
            reset=reset,
            cu_seqlens=cu_seqlens,
        )
        return linear(self.out_proj, self.norm(y.mT)), last

    def _per_channel(self, x: Tensor) -> Tensor:
        """``(*, num_heads)`` -> ``(*, dim)``: repeat each head's number for its channels."""
        return x.unsqueeze(-1).expand(*x.shape, self.head_dim).flatten(-2)
