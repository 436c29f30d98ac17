"""S_t = gamma exp(i theta) S_{t-1} + conj(k_t) v_t;  o_t = Re(q_t S_t), gamma fixed per head: RetNet's retention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext.nn._row_invariant import linear, silu
from eaml_ext.nn.cores.base import Core
from eaml_ext.nn.padding import unit_step_delta
from eaml_ext.nn.precision import as_complex, as_real, to_opmath
from eaml_ext.ops import selective_scan


class Retention(Core):
    """Multi-scale retention: linear attention whose state decays by ``gamma = 1 - 2^(-5 - head)`` a step.

    With more than 8 heads the exponents are spaced evenly from 5 to 12, because beyond 12 float32 hardly decays. The
    rotation of queries and keys by their position is part of the state's decay, so positions are not counted. Each head
    is normalised and gated by silu; an output projection follows.

    Args:
        dim: width of input and output.
        state_size: size of a head's queries and keys; even.
        num_heads: divides ``dim`` into heads of at least 2; heads of about 16 channels if absent.

    Source: Sun et al. 2023, "Retentive Network", equations 1 to 8.

    >>> y, state = Retention(8, 4).scan(torch.randn(2, 5, 8))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8, 2, 2]))
    """

    log_gamma: Tensor
    theta: Tensor

    def __init__(self, dim: int, state_size: int = 16, *, num_heads: int | None = None):
        super().__init__(dim, state_size)
        dim, state_size = self.dim, self.state_size
        if state_size % 2:
            raise ValueError(f"Retention: state_size must be even, got {state_size}")
        self.num_heads, self.head_dim = self._heads(num_heads, smallest=2)
        self.state_shape = (dim, state_size // 2, 2)
        key_dim = self.num_heads * state_size
        self.split = (key_dim, key_dim, dim, dim)
        self.in_proj = nn.Linear(dim, sum(self.split), bias=False)  # q, k, v, gate
        self.out_proj = nn.Linear(dim, dim, bias=False)
        exponents = torch.linspace(5, 4 + min(self.num_heads, 8), self.num_heads, dtype=torch.float64)
        pairs = torch.arange(state_size // 2, dtype=torch.float64)
        self.register_buffer("log_gamma", torch.log1p(-(2**-exponents)).float())
        self.register_buffer("theta", (1e4 ** -(2 * pairs / state_size)).float())

    def _run_scan(
        self,
        x: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Core.scan`; ``state`` is ``(batch, dim, state_size / 2, 2)``, floating."""
        heads = self.num_heads
        q, k, v, gate = linear(self.in_proj, x).split(self.split, dim=-1)
        q, k = (p.unflatten(-1, (heads, self.state_size // 2, 2)) for p in (q, k))
        k = k * k.new_tensor([1.0, -1.0])  # conjugate
        scale = 0.5 / math.sqrt(self.state_size)  # 0.5 because the op returns 2 Re(C . h) for complex states
        log_gamma, theta = torch.broadcast_tensors(to_opmath(self.log_gamma).unsqueeze(-1), to_opmath(self.theta))
        u = v.mT
        y, last = selective_scan(
            u,
            unit_step_delta(u, lengths),
            torch.complex(log_gamma, theta).unsqueeze(1).expand(heads, self.head_dim, -1).flatten(0, 1),
            as_complex(k).permute(0, 2, 3, 1),
            as_complex(scale * q).permute(0, 2, 3, 1),
            return_last_state=True,
            initial_state=None if state is None else as_complex(state),
            reset=reset,
            cu_seqlens=cu_seqlens,
        )
        y = F.layer_norm(y.mT.unflatten(-1, (heads, self.head_dim)), (self.head_dim,)).flatten(-2)
        return linear(self.out_proj, silu(gate) * y), as_real(last)
