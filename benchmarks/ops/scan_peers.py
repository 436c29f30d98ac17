"""The selective scans that the benchmark compares. Each prepares the same passes over the same numbers.

A PyTorch peer is one function of (u, delta, A, B, C), with sequences ``(batch, channels, length)``, and PyTorch
differentiates it. JAX differentiates its own. Packages are imported when their peer is loaded.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eaml_ext.ops import selective_scan, selective_scan_reference, selective_scan_step

PASSES = ("forward", "+backward", "+double backward", "double backward alone", "jvp", "MAML step")
INNER_LR = 10.0  # of a loss that is a mean over all outputs
TOLERANCE = 1e-4  # of the largest entry of each exact result

Pass = Callable[[], Any]
Scan = Callable[..., Any]


@dataclass
class Problem:
    """Arguments of a scan, a tangent for each, and a cotangent of y (a regression's target in the MAML step)."""

    arguments: list[Tensor]
    tangents: list[Tensor]
    grad: Tensor

    @property
    def channel_last(self) -> bool:
        return self.grad.stride(1) == 1

    def double(self) -> "Problem":
        return Problem([x.double() for x in self.arguments], [v.double() for v in self.tangents], self.grad.double())

    def leaves(self) -> list[Tensor]:
        return [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in self.arguments]


def problem(
    batch: int, length: int, dim: int, state: int, *, channel_last: bool = True, dtype: torch.dtype = torch.float32
) -> Problem:
    """Random numbers; channel-last memory is what a layer produces. A stays float32 beside a half type."""

    def sequence(width: int) -> Tensor:
        if channel_last:
            return torch.randn(batch, length, width, dtype=dtype).transpose(1, 2)
        return torch.randn(batch, width, length, dtype=dtype)

    wide = torch.promote_types(dtype, torch.float32)
    A = -torch.arange(1, state + 1, dtype=wide).repeat(dim, 1)
    arguments = [sequence(dim), sequence(dim) - 2, A, sequence(state), sequence(state)]
    return Problem(arguments, [torch.randn_like(x) for x in arguments], sequence(dim))


class Peer(Protocol):
    """``prepare`` returns one pass, ready to be timed; ``outputs`` is what that pass computes."""

    growth: int  # the time of its gradients grows with this power of the length; 0: not predicted

    def prepare(self, name: str, p: Problem) -> Pass: ...

    def outputs(self, name: str, p: Problem) -> list[Tensor]: ...


# --- passes in PyTorch -----------------------------------------------------------------------------------------------


def forward(scan: Scan, p: Problem) -> Pass:
    def run() -> list[Tensor]:
        with torch.no_grad():
            return [scan(*p.arguments)]

    return run


def backward(scan: Scan, p: Problem) -> Pass:
    x = p.leaves()
    return lambda: torch.autograd.grad(scan(*x), x, p.grad)


def double_backward(scan: Scan, p: Problem) -> Pass:
    """Forward, backward and double backward."""
    x = p.leaves()

    def run() -> Sequence[Tensor]:
        grads = torch.autograd.grad(scan(*x), x, p.grad, create_graph=True)
        return torch.autograd.grad(grads, x, [g.detach() for g in grads])

    return run


def double_backward_alone(scan: Scan, p: Problem) -> Pass:
    """Double backward through a kept graph."""
    x = p.leaves()
    grads = torch.autograd.grad(scan(*x), x, p.grad, create_graph=True)
    cotangents = [g.detach() for g in grads]
    return lambda: torch.autograd.grad(grads, x, cotangents, retain_graph=True)


def jvp(scan: Scan, p: Problem) -> Pass:
    return lambda: torch.func.jvp(scan, tuple(p.arguments), tuple(p.tangents))


def maml_step(scan: Scan, p: Problem) -> Pass:
    """The gradient of the loss after one step of SGD on all arguments."""
    x = p.leaves()

    def run() -> Sequence[Tensor]:
        grads = torch.autograd.grad(F.mse_loss(scan(*x), p.grad), x, create_graph=True)
        adapted = [a - INNER_LR * g for a, g in zip(x, grads, strict=True)]
        return torch.autograd.grad(F.mse_loss(scan(*adapted), p.grad), x)

    return run


def one_step(step: Scan, p: Problem) -> Pass:
    """The first time step, from a state of ones."""
    u, delta, A, B, C = (x[..., 0] if x.dim() == 3 else x for x in p.arguments)
    h = A.new_ones(len(u), *A.shape)

    def run() -> list[Tensor]:
        with torch.no_grad():
            return list(step(h, u, delta, A, B, C))

    return run


class Torch:
    """A scan (and a step of it) whose derivatives are PyTorch's to take."""

    def __init__(self, scan: Scan, step: Scan | None = None, growth: int = 1) -> None:
        self.scan, self.step, self.growth = scan, step, growth

    def prepare(self, name: str, p: Problem) -> Pass:
        if name != "step":
            make = (forward, backward, double_backward, double_backward_alone, jvp, maml_step)[PASSES.index(name)]
            return make(self.scan, p)
        if self.step is None:
            raise LookupError("its package has a scan and nothing for a single step")
        return one_step(self.step, p)

    def outputs(self, name: str, p: Problem) -> list[Tensor]:
        return list(self.prepare(name, p)())


# --- peers -----------------------------------------------------------------------------------------------------------


def ours() -> Peer:
    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
        return selective_scan(u, delta, A, B, C, delta_softplus=True)

    def step(h: Tensor, *x: Tensor) -> Any:
        return selective_scan_step(h, *x, delta_softplus=True)

    return Torch(scan, step, growth=0)


def exact() -> Peer:
    """The specification."""

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
        return selective_scan_reference(u, delta, A, B, C, delta_softplus=True)

    def step(h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
        u, delta, B, C = (x.unsqueeze(-1) for x in (u, delta, B, C))
        options: Any = {"delta_softplus": True, "return_last_state": True, "initial_state": h}
        y, h = selective_scan_reference(u, delta, A, B, C, **options)
        return y.squeeze(-1), h

    return Torch(scan, step)


def loop() -> Peer:
    """The recurrence one step at a time, discretised as it goes on contiguous slices; the product with C is a bmm."""

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        dt, u, B, C = (t.permute(2, 0, 1).contiguous() for t in (F.softplus(delta), u, B, C))
        h, ys = A.new_zeros(u.shape[1], *A.shape), []
        for dt_t, u_t, B_t, C_t in zip(dt.unbind(0), u.unbind(0), B.unbind(0), C.unbind(0), strict=True):
            h = torch.exp(dt_t.unsqueeze(-1) * A) * h + (dt_t * u_t).unsqueeze(-1) * B_t.unsqueeze(1)
            ys.append(torch.bmm(h, C_t.unsqueeze(-1)).squeeze(-1))
        return torch.stack(ys, dim=-1)

    def step(h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        dt = F.softplus(delta)
        h = torch.exp(dt.unsqueeze(-1) * A) * h + (dt * u).unsqueeze(-1) * B.unsqueeze(1)
        return torch.bmm(h, C.unsqueeze(-1)).squeeze(-1), h

    return Torch(scan, step)


def by_linear_scan(linear_scan: Callable[[Tensor, Tensor], Tensor]) -> Scan:
    """A selective scan from h_t = a_t h_{t-1} + x_t, a and x ``(batch, length, dim, state)``."""

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        dt, u, B, C = (t.transpose(1, 2) for t in (F.softplus(delta), u, B, C))
        h = linear_scan(torch.exp(dt.unsqueeze(-1) * A), (dt * u).unsqueeze(-1) * B.unsqueeze(2))
        return (h @ C.unsqueeze(-1)).squeeze(-1).transpose(1, 2)

    return scan


def mambapy() -> Peer:
    from mambapy.pscan import pscan

    return Torch(by_linear_scan(pscan))


def associative_scan() -> Peer:
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def states(a: Tensor, x: Tensor) -> Tensor:
        pair: Any = scan(combine, (a, x), dim=1, combine_mode="generic")
        return pair[1]

    return Torch(by_linear_scan(states))


def torchlpc() -> Peer:
    """(batch, dim, state) is its batch."""
    from torchlpc import Recurrence

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        dt = F.softplus(delta)
        decay = torch.exp(dt.unsqueeze(2) * A.unsqueeze(-1))
        impulse = (dt * u).unsqueeze(2) * B.unsqueeze(1)
        rows = decay.flatten(0, 2).contiguous(), impulse.flatten(0, 2).contiguous()
        h = Recurrence.apply(*rows, u.new_zeros(len(rows[0])))
        return (h.view(decay.shape) * C.unsqueeze(1)).sum(2)

    return Torch(scan)


def transformers() -> Peer:
    """The scan of its slow path, what its Mamba runs on a CPU: discretised whole, then a loop over time.

    The gradient of a slice it takes at a step is as large as the whole, so that gradients grow with length squared.
    """
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan, mamba_selective_state_update

    def scan(*x: Tensor) -> Any:
        return mamba_selective_scan(*x, delta_softplus=True)

    def step(h: Tensor, *x: Tensor) -> tuple[Tensor, Tensor]:
        return mamba_selective_state_update(h, *x, dt_softplus=True), h  # h changes in place

    return Torch(scan, step, growth=2)


class Jax:
    """jit of lax.scan, sequences in the memory order of the problem's (an array's axes are its memory's)."""

    growth = 0

    def __init__(self) -> None:
        if torch.get_num_threads() == 1:
            os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax

        self.jax = jax

    def prepare(self, name: str, p: Problem) -> Pass:
        jax, jit = self.jax, self.jax.jit
        x, v = (tuple(self.array(t, p) for t in tensors) for tensors in (p.arguments, p.tangents))
        target = self.array(p.grad, p)
        scan = self.scan_last if p.channel_last else self.scan_first

        def gradients(*x: Any) -> Any:
            return jax.vjp(scan, *x)[1](target)

        def twice(*x: Any) -> Any:
            grads, pull = jax.vjp(gradients, *x)
            return pull(grads)

        def loss(*x: Any) -> Any:
            return ((scan(*x) - target) ** 2).mean()

        def adapted_loss(*x: Any) -> Any:
            grads = jax.grad(loss, argnums=range(5))(*x)
            return loss(*(a - INNER_LR * g for a, g in zip(x, grads, strict=True)))

        def call(function: Any, *arguments: Any) -> Pass:
            function = jit(function)
            return lambda: jax.block_until_ready(function(*arguments))

        match name:
            case "forward":
                return call(lambda *x: (scan(*x),), *x)
            case "+backward":
                return call(gradients, *x)
            case "+double backward":
                return call(twice, *x)
            case "double backward alone":
                grads, pull = jit(lambda *x: jax.vjp(gradients, *x))(*x)
                return call(lambda pull, grads: pull(grads), pull, grads)
            case "jvp":
                return call(lambda x, v: jax.jvp(scan, x, v), x, v)
            case "MAML step":
                return call(jax.grad(adapted_loss, argnums=range(5)), *x)
            case _:
                time = 1 if p.channel_last else 2
                now = [a.take(0, axis=time) if a.ndim == 3 else a for a in x]
                return call(self.step, jax.numpy.ones((len(now[0]), *x[2].shape), x[2].dtype), *now)

    def step(self, h: Any, u: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
        return self.update(h, u, self.jax.nn.softplus(delta), A, B, C)

    def update(self, h: Any, u: Any, dt: Any, A: Any, B: Any, C: Any) -> Any:
        h = self.jax.numpy.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None]
        return (h * C[:, None]).sum(-1), h

    def scan_last(self, u: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
        """Sequences are (batch, length, channels)."""
        jax = self.jax

        def body(h: Any, now: Any) -> Any:
            u, dt, B, C = now
            y, h = self.update(h, u, dt, A, B, C)
            return h, y

        sequences = tuple(s.swapaxes(0, 1) for s in (u, jax.nn.softplus(delta), B, C))
        _, y = jax.lax.scan(body, jax.numpy.zeros((u.shape[0], *A.shape), u.dtype), sequences)
        return y.swapaxes(0, 1)

    def scan_first(self, u: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
        u, delta, B, C = (s.swapaxes(1, 2) for s in (u, delta, B, C))
        return self.scan_last(u, delta, A, B, C).swapaxes(1, 2)

    def array(self, x: Tensor, p: Problem) -> Any:
        return self.jax.numpy.asarray((x.transpose(1, 2) if p.channel_last and x.dim() == 3 else x).numpy())

    def outputs(self, name: str, p: Problem) -> list[Tensor]:
        tensors = [torch.from_numpy(np.array(out)) for out in self.prepare(name, p)()]
        swapped = p.channel_last and name != "step"
        return [x.transpose(1, 2) if swapped and x.dim() == 3 else x for x in tensors]


PEERS: dict[str, Callable[[], Peer]] = {
    "ours": ours,
    "loop": loop,
    "mambapy": mambapy,
    "assoc_scan": associative_scan,
    "torchlpc": torchlpc,
    "jax": Jax,
    "transformers": transformers,
}


# --- checks ----------------------------------------------------------------------------------------------------------


def error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, each tensor's relative to its largest expected entry."""
    pairs = zip(actual, expected, strict=True)
    return max(float((a.double() - e).abs().max() / e.abs().max()) for a, e in pairs)


def failures(peers: dict[str, Peer], name: str, p: Problem) -> dict[str, str]:
    """The peers whose pass cannot be measured, and why: it fails, or differs from the reference in float64."""
    expected = exact().outputs(name, p.double())
    why = {}
    for peer_name, peer in peers.items():
        try:
            off = error(peer.outputs(name, p), expected)
        except Exception as failure:  # whatever a package raises, the table says it
            why[peer_name] = f"none: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:100]}"
        else:
            if not off <= TOLERANCE:
                why[peer_name] = f"wrong: off by {off:.1e}"
    return why
