"""h_t = lambda h_{t-1} + B x_t;  y_t = Re(C h_t) + D x_t: LRU and S5, whose channels share one complex state."""

import math

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext.nn._row_invariant import gelu, glu, linear, project
from eaml_ext.nn.cores.base import Core
from eaml_ext.nn.padding import unit_step_delta
from eaml_ext.nn.precision import as_complex, as_real, to_opmath, zero_order_hold
from eaml_ext.ops import selective_scan


class _Diagonal(Core):
    """Dense maps into and out of the state; GELU and a gated linear unit follow."""

    C: nn.Parameter
    conjugates = 1  # 2 where a state represents itself and its conjugate

    def __init__(self, dim: int, state_size: int):
        super().__init__(dim, state_size)
        dim, state_size = self.dim, self.state_size
        self.state_shape = (state_size, 2)
        self.D = nn.Parameter(torch.randn(dim))
        self.out_proj = nn.Linear(dim, 2 * dim)

    def discretize(self) -> tuple[Tensor, Tensor]:
        """Return log(lambda), ``(state_size,)``, and the B of the recurrence, ``(state_size, dim)``, both complex."""
        raise NotImplementedError(f"{type(self).__name__}: discretize is not defined")

    def _run_scan(
        self,
        x: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Core.scan`; ``state`` is ``(batch, state_size, 2)``, floating."""
        log_lambda, B = self.discretize()
        C = self.conjugates * as_complex(self.C)
        # The op's inputs and outputs are real, so Re(B x) and Im(B x) each drive a complex state h1, h2, h = h1 + h2.
        # Each is scanned twice, once to read its real part and once to read its imaginary part.
        one, i = torch.ones_like(log_lambda), 1j * torch.ones_like(log_lambda)
        op_B = torch.cat([one, i, one, i]).unsqueeze(-1)
        op_C = torch.cat([one, one, -i, -i]).unsqueeze(-1) / 2
        Bx = project(x, torch.cat([B.real, B.imag]).to(x.dtype))
        u = torch.cat([Bx, Bx], dim=-1).mT
        initial_state = None
        if state is not None:
            h = as_complex(state)
            initial_state = torch.cat([h, torch.zeros_like(h)] * 2, dim=1).unsqueeze(-1)
        y, last = selective_scan(
            u,
            unit_step_delta(u, lengths),
            torch.cat([log_lambda] * 4).unsqueeze(-1),
            op_B,
            op_C,
            return_last_state=True,
            initial_state=initial_state,
            reset=reset,
            cu_seqlens=cu_seqlens,
        )
        real_C = torch.cat([C.real, C.real, -C.imag, -C.imag], dim=1)
        y = project(y.mT, real_C.to(y.dtype)) + self.D * x
        n = self.state_size
        return glu(linear(self.out_proj, gelu(y))), as_real((last[:, :n] + last[:, n : 2 * n]).squeeze(-1))


class LRU(_Diagonal):
    """Linear recurrent unit: ``lambda = exp(-exp(nu_log) + i exp(theta_log))``, stable for all parameters.

    Args:
        dim: width of input and output.
        state_size: complex states **in all**, shared by the channels; about ``dim`` is usual.
        r_min, r_max: lambda starts uniform on the ring ``r_min <= |lambda| <= r_max``.
        max_phase: the phase of lambda starts uniform in [0, max_phase], radians.

    Source: Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences", equations 5 to 7 and
    appendix A.

    >>> y, state = LRU(8, 6).scan(torch.randn(2, 5, 8))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 6, 2]))
    """

    def __init__(
        self,
        dim: int,
        state_size: int = 16,
        *,
        r_min: float = 0.0,
        r_max: float = 0.99,
        max_phase: float = 2 * math.pi,
    ):
        super().__init__(dim, state_size)
        dim, state_size = self.dim, self.state_size
        r_min = _check.positive("LRU", "r_min", r_min, zero=True)
        r_max, max_phase = _check.positive("LRU", "r_max", r_max), _check.positive("LRU", "max_phase", max_phase)
        if not r_min <= r_max < 1:
            raise ValueError(f"LRU: r_max must be at least r_min, {r_min}, and below 1, got {r_max}")
        abs_squared = (r_min**2 + torch.rand(state_size) * (r_max**2 - r_min**2)).clamp(min=1e-12)
        self.nu_log = nn.Parameter((-0.5 * abs_squared.log()).log())
        self.theta_log = nn.Parameter((max_phase * torch.rand(state_size).clamp(min=1e-6)).log())
        self.gamma_log = nn.Parameter(0.5 * torch.log1p(-abs_squared))  # gamma = sqrt(1 - |lambda|^2) scales the input
        self.B = nn.Parameter(torch.randn(state_size, dim, 2) / math.sqrt(2 * dim))
        self.C = nn.Parameter(torch.randn(dim, state_size, 2) / math.sqrt(state_size))

    def discretize(self) -> tuple[Tensor, Tensor]:
        log_lambda = torch.complex(-to_opmath(self.nu_log).exp(), to_opmath(self.theta_log).exp())
        return log_lambda, to_opmath(self.gamma_log).exp().unsqueeze(-1) * as_complex(self.B)


class S5(_Diagonal):
    """S5: a continuous diagonal system of many inputs and outputs, discretised by zero-order hold.

    Each of the ``state_size`` states represents a conjugate pair. A, B and C start from the diagonalised HiPPO-N matrix
    of twice that size. Step sizes start log-uniform in [0.001, 0.1]. The real part of A stays negative.

    Args:
        dim: width of input and output.
        state_size: conjugate pairs **in all**, shared by the channels; ``dim / 2`` is usual.
        dt_min, dt_max: step sizes start log-uniform between them.

    Source: Smith et al. 2023, "Simplified State Space Layers for Sequence Modeling", equations 2, 3 and 5, sections 3
    and 4.3.

    >>> y, state = S5(8, 6).scan(torch.randn(2, 5, 8))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 6, 2]))
    """

    conjugates = 2

    def __init__(self, dim: int, state_size: int = 16, *, dt_min: float = 1e-3, dt_max: float = 0.1):
        super().__init__(dim, state_size)
        dim, state_size = self.dim, self.state_size
        frequencies, vectors = _hippo_normal(state_size)
        self.A_log = nn.Parameter(torch.full((state_size,), math.log(0.5)))  # the real part of A is -exp(A_log)
        self.A_imag = nn.Parameter(frequencies)
        self.log_dt = nn.Parameter(self._step_sizes(state_size, dt_min, dt_max).log())
        B = torch.randn(2 * state_size, dim) / math.sqrt(dim)
        C = torch.randn(dim, 2 * state_size) / math.sqrt(2 * state_size)
        self.B = nn.Parameter(as_real(vectors.mH @ B.to(vectors.dtype)))
        self.C = nn.Parameter(as_real(C.to(vectors.dtype) @ vectors))

    def discretize(self) -> tuple[Tensor, Tensor]:
        A = torch.complex(-to_opmath(self.A_log).exp(), to_opmath(self.A_imag))
        dt_A = to_opmath(self.log_dt).exp() * A
        return dt_A, (zero_order_hold(dt_A) / A).unsqueeze(-1) * as_complex(self.B)


def _hippo_normal(pairs: int) -> tuple[Tensor, Tensor]:
    """Return the positive frequencies ``(pairs,)`` and eigenvectors ``(2 * pairs, pairs)`` of HiPPO-N.

    HiPPO-N is ``-1/2 + S`` with S skew-symmetric, so its eigenvalues are ``-1/2 +- i frequency``.
    """
    root = (torch.arange(2 * pairs, dtype=torch.float64) + 0.5).sqrt()
    product = root.unsqueeze(-1) * root
    skew = product.triu(1) - product.tril(-1)
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    return frequencies[pairs:].float(), vectors[:, pairs:].to(torch.complex64)
