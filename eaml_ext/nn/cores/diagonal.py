"""h_t = lambda h_{t-1} + B x_t;  y_t = Re(C h_t) + D x_t: one complex diagonal state for all channels (S5, LRU)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext.nn.cores.base import Core
from eaml_ext.nn.padding import unit_step_delta
from eaml_ext.nn.precision import as_complex, as_real, to_opmath, zero_order_hold
from eaml_ext.ops import selective_scan


class _Diagonal(Core):
    """Dense maps into and out of the state; GELU and a gated linear unit follow."""

    C: nn.Parameter
    pairs = 1  # 2 where a state stands for a conjugate pair

    def __init__(self, dim: int, state_size: int):
        super().__init__(dim, state_size)
        dim, state_size = self.dim, self.state_size
        self.state_shape = (state_size, 2)
        self.D = nn.Parameter(torch.randn(dim))
        self.out_proj = nn.Linear(dim, 2 * dim)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Complex: the logarithm of lambda, ``(state_size,)``, and the map of x to the state, ``(state_size, dim)``."""
        raise NotImplementedError(f"{type(self).__name__}: discrete is not defined")

    def scan(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x`` (batch, time, dim), ``state`` (batch, state_size, 2), ``reset`` (batch, time) bool -> (y, state)."""
        decay, B = self.discrete()
        C = self.pairs * as_complex(self.C)
        # The op has real inputs and outputs: real and imaginary parts of B x drive a state each, of which the real and
        # the imaginary part are read; the sums of the four are Re h and Im h.
        one, i = torch.ones_like(decay), 1j * torch.ones_like(decay)
        drive = torch.cat([one, i, one, i]).unsqueeze(-1)
        read = torch.cat([one, one, -i, -i]).unsqueeze(-1) / 2
        v = F.linear(x, torch.cat([B.real, B.imag]).to(x.dtype))
        u = torch.cat([v, v], dim=-1).mT
        start = None
        if state is not None:
            h = as_complex(state)
            start = torch.cat([h, torch.zeros_like(h)] * 2, dim=1).unsqueeze(-1)
        y, last = selective_scan(
            u,
            unit_step_delta(u, lengths),
            torch.cat([decay] * 4).unsqueeze(-1),
            drive,
            read,
            return_last_state=True,
            initial_state=start,
            reset=reset,
        )
        out = torch.cat([C.real, C.real, -C.imag, -C.imag], dim=1)
        y = F.linear(y.mT, out.to(y.dtype)) + self.D * x
        p = self.state_size
        return F.glu(self.out_proj(F.gelu(y))), as_real((last[:, :p] + last[:, p : 2 * p]).squeeze(-1))


class LRU(_Diagonal):
    """The linear recurrent unit: ``lambda = exp(-exp(nu) + i exp(theta))``, stable whatever the parameters.

    Args:
        dim: width of input and output.
        state_size: complex states **in all**, shared by the channels; about ``dim`` is usual.
        r_min, r_max: |lambda| starts uniform on the ring between them.
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
        squared = (r_min**2 + torch.rand(state_size) * (r_max**2 - r_min**2)).clamp(min=1e-12)
        self.nu = nn.Parameter((-0.5 * squared.log()).log())
        self.theta = nn.Parameter((max_phase * torch.rand(state_size).clamp(min=1e-6)).log())
        self.gamma = nn.Parameter(0.5 * torch.log1p(-squared))  # logarithm of the input's normaliser
        self.B = nn.Parameter(torch.randn(state_size, dim, 2) / math.sqrt(2 * dim))
        self.C = nn.Parameter(torch.randn(dim, state_size, 2) / math.sqrt(state_size))

    def discrete(self) -> tuple[Tensor, Tensor]:
        decay = torch.complex(-to_opmath(self.nu).exp(), to_opmath(self.theta).exp())
        return decay, to_opmath(self.gamma).exp().unsqueeze(-1) * as_complex(self.B)


class S5(_Diagonal):
    """S5: a continuous diagonal system of many inputs and outputs, discretised by zero-order hold.

    The state's ``state_size`` entries stand for conjugate pairs. Lambda, B and C start from the diagonalised HiPPO-N
    matrix of twice that size, step sizes log-uniform in [0.001, 0.1]; the real part of lambda stays negative.

    Args:
        dim: width of input and output.
        state_size: conjugate pairs **in all**, shared by the channels; ``dim / 2`` is usual.
        dt_min, dt_max: the step sizes start log-uniform between them.

    Source: Smith et al. 2023, "Simplified State Space Layers for Sequence Modeling", equations 2, 3 and 5, sections 3
    and 4.3.

    >>> y, state = S5(8, 6).scan(torch.randn(2, 5, 8))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 6, 2]))
    """

    pairs = 2

    def __init__(self, dim: int, state_size: int = 16, *, dt_min: float = 1e-3, dt_max: float = 0.1):
        super().__init__(dim, state_size)
        dim, state_size = self.dim, self.state_size
        frequencies, vectors = _hippo_normal(state_size)
        self.A_log = nn.Parameter(torch.full((state_size,), math.log(0.5)))  # of minus the real part
        self.A_imag = nn.Parameter(frequencies)
        self.log_dt = nn.Parameter(self._step_sizes(state_size, dt_min, dt_max).log())
        B = torch.randn(2 * state_size, dim) / math.sqrt(dim)
        C = torch.randn(dim, 2 * state_size) / math.sqrt(2 * state_size)
        self.B = nn.Parameter(as_real(vectors.mH @ B.to(vectors.dtype)))
        self.C = nn.Parameter(as_real(C.to(vectors.dtype) @ vectors))

    def discrete(self) -> tuple[Tensor, Tensor]:
        A = torch.complex(-to_opmath(self.A_log).exp(), to_opmath(self.A_imag))
        z = to_opmath(self.log_dt).exp() * A
        return z, (zero_order_hold(z) / A).unsqueeze(-1) * as_complex(self.B)


def _hippo_normal(pairs: int) -> tuple[Tensor, Tensor]:
    """The positive frequencies and eigenvectors of HiPPO-N, ``-1/2 + S`` with S skew; (pairs,), (2 pairs, pairs)."""
    root = (torch.arange(2 * pairs, dtype=torch.float64) + 0.5).sqrt()
    product = root.unsqueeze(-1) * root
    skew = product.triu(1) - product.tril(-1)
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    return frequencies[pairs:].float(), vectors[:, pairs:].to(torch.complex64)
