"""h_t = exp(dt A) h_{t-1} + A^-1 (exp(dt A) - 1) B u_t;  y_t = 2 Re(C . h_t) + D u_t: complex, time-invariant."""

import math

import torch
from torch import Tensor, nn

from eaml_ext.nn._row_invariant import gelu, glu, linear
from eaml_ext.nn.cores.base import Core
from eaml_ext.nn.padding import unit_step_delta
from eaml_ext.nn.precision import as_complex, as_real, to_opmath, zero_order_hold
from eaml_ext.ops import selective_scan


class S4D(Core):
    """A filter bank: per channel ``state_size`` conjugate pairs of damped oscillations, the same at every step.

    Discretised by zero-order hold. A starts as S4D-Lin, ``-1/2 + i pi n``, B is 1, and the step sizes start log-uniform
    in [0.001, 0.1]. GELU and a gated linear unit follow.

    Args:
        dim: width of input and output.
        state_size: conjugate pairs per channel; each has a real and an imaginary part.
        dt_min, dt_max: step sizes start log-uniform between them.

    Source: Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models", equations 2, 7
    and 10.

    >>> y, state = S4D(8, 4).scan(torch.randn(2, 5, 8))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8, 4, 2]))
    """

    def __init__(self, dim: int, state_size: int = 16, *, dt_min: float = 1e-3, dt_max: float = 0.1):
        super().__init__(dim, state_size)
        dim, state_size = self.dim, self.state_size
        self.state_shape = (dim, state_size, 2)
        self.log_dt = nn.Parameter(self._step_sizes(dim, dt_min, dt_max).log())
        self.A_log = nn.Parameter(torch.full((dim, state_size), math.log(0.5)))  # the real part of A is -exp(A_log)
        self.A_imag = nn.Parameter(math.pi * torch.arange(float(state_size)).repeat(dim, 1))
        self.C = nn.Parameter(torch.randn(dim, state_size, 2) / math.sqrt(2))
        self.D = nn.Parameter(torch.randn(dim))
        self.out_proj = nn.Linear(dim, 2 * dim)

    def _run_scan(
        self,
        x: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Core.scan`; ``state`` is ``(batch, dim, state_size, 2)``, floating."""
        A = torch.complex(-to_opmath(self.A_log).exp(), to_opmath(self.A_imag))
        dt_A = to_opmath(self.log_dt).exp().unsqueeze(-1) * A
        u = x.mT
        y, last = selective_scan(
            u,
            unit_step_delta(u, lengths),
            dt_A,
            zero_order_hold(dt_A) / A,
            as_complex(self.C),
            to_opmath(self.D),
            return_last_state=True,
            initial_state=None if state is None else as_complex(state),
            reset=reset,
            cu_seqlens=cu_seqlens,
        )
        return glu(linear(self.out_proj, gelu(y.mT))), as_real(last)
