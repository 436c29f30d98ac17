"""u = norm(x + f(x));  y = core(u);  y + g(norm(u + y)), f and g perceptrons: a core between two feedforward layers."""

from collections.abc import Callable

from torch import Tensor, nn

from eaml_ext.nn._row_invariant import linear, silu
from eaml_ext.nn.cores import Core, make_core
from eaml_ext.nn.padding import given


class Perceptron(nn.Module):
    """Compute ``W2 silu(W1 x + b1) + b2``; the number of hidden units is twice that of inputs."""

    def __init__(self, dim: int):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.down, silu(linear(self.up, x)))


class FeedForward(Core):
    """Wrap a core in two feedforward layers.

    The embedding of :class:`eaml_ext.nn.SSM` is linear. The layer before the core makes its input a nonlinear function
    of action and observation.

    Args:
        dim, state_size: as in :class:`eaml_ext.nn.cores.Core`.
        core, dt_min, dt_max: as in :func:`eaml_ext.nn.cores.make_core`.
    """

    def __init__(
        self,
        dim: int,
        state_size: int,
        *,
        core: str | Callable[[int, int], nn.Module],
        dt_min: float | None = None,
        dt_max: float | None = None,
    ):
        super().__init__(dim, state_size)
        self.core = make_core(core, self.dim, self.state_size, dt_min, dt_max)
        self.state_shape = self.core.state_shape
        self.before, self.norm_before = Perceptron(self.dim), nn.RMSNorm(self.dim)
        self.after, self.norm_after = Perceptron(self.dim), nn.RMSNorm(self.dim)

    def _run_scan(
        self,
        x: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Core.scan`; the state is that of the wrapped core."""
        u = self.norm_before(x + self.before(x))
        y, state = self.core.scan(u, state, reset, **given(lengths=lengths, cu_seqlens=cu_seqlens))
        return y + self.after(self.norm_after(u + y)), state

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Core.step`."""
        u = self.norm_before(x + self.before(x))
        y, state = self.core.step(u, state)
        return y + self.after(self.norm_after(u + y)), state
