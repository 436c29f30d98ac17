"""Calls of an op, their derivatives and layouts, and comparisons of results: helpers of the tests of the ops."""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)


class Call(NamedTuple):
    """One call: its present tensors by argument name, and its other arguments."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]


Build = Callable[[torch.dtype, str], Call]
Function = Callable[..., Any]


# ---- comparing ---------------------------------------------------------------------------------------------------


def outputs(function: Function, call: Call, **changes: Any) -> tuple[Tensor, ...]:
    out = function(**{**call.tensors, **changes}, **call.options)
    return (out,) if isinstance(out, Tensor) else tuple(out)


def floating(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x for x in tensors if x.is_floating_point())


def noise(like: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Return scattered numbers that float32 represents, the same in every precision; vmap forbids a generator."""

    def scattered(x: Tensor, start: int) -> Tensor:
        angle = torch.arange(x.numel(), device=x.device, dtype=torch.float64) * 2.4 + start
        return (1.4 * angle.sin()).float().to(x.dtype).reshape(x.shape)

    return [scattered(x, seed + i) for i, x in enumerate(like)]


def close(got: Sequence[Tensor], want: Sequence[Tensor], factor: float, floor: float = 0.0) -> None:
    """|got - want| <= factor * eps * max|want| in each tensor, eps that of ``got``; integers are equal.

    The largest entry is the scale, because sums of mixed sign lose relative precision in their small entries.

    Args:
        factor: the successive roundings of one output; each op states its own.
        floor: the least scale, for drawn inputs whose only entry may cancel.
    """
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, f"result {i} has shape {tuple(a.shape)}, wanted {tuple(b.shape)}"
        if not a.is_floating_point():
            assert torch.equal(a, b), f"result {i} is not the same"
            continue
        a64, b64 = a.detach().double(), b.detach().double()
        finite = b64.isfinite()
        assert torch.equal(a64.isfinite(), finite), f"result {i} is finite elsewhere"
        a64, b64 = a64[finite], b64[finite]
        if a64.numel():
            error, scale = (a64 - b64).abs().max().item(), max(b64.abs().max().item(), floor)
            eps = torch.finfo(a.dtype).eps
            assert error <= factor * eps * scale, f"result {i}: {error / eps / max(scale, 1e-300):.1f} roundings off"


def gradients(
    outs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Return torch.autograd.grad, zeros where no output depends on an input, as in a sum over no steps."""
    pairs = [(out, c) for out, c in zip(outs, cotangents, strict=True) if out.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in inputs)
    outs, cotangents = zip(*pairs, strict=True)
    options = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(outs, inputs, cotangents, **options)


def leaves(call: Call, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: call.tensors[name].detach().requires_grad_() for name in names}


def derivatives(
    function: Function,
    call: Call,
    inner: Sequence[str],
    outer: Sequence[str] | None = None,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, ...]:
    """Return first and second derivatives.

    The first are gradients for random cotangents with respect to ``inner``. The second are gradients of a random
    functional of the first, with respect to ``outer`` (``inner`` if None) and to the cotangents.
    """
    outer = inner if outer is None else outer
    x = leaves(call, {**dict.fromkeys(inner), **dict.fromkeys(outer)})
    outs = floating(outputs(function, call, **x))
    cotangents = [layout(c).requires_grad_() for c in noise(outs)]
    first = gradients(outs, [x[name] for name in inner], cotangents, create_graph=True)
    second = gradients(first, [*(x[name] for name in outer), *cotangents], [layout(v) for v in noise(first, 1)])
    return *(g.detach() for g in first), *second


def tangents(function: Function, call: Call, names: Sequence[str]) -> tuple[Tensor, ...]:
    primals = tuple(call.tensors[name] for name in names)

    def of(*values: Tensor) -> tuple[Tensor, ...]:
        return floating(outputs(function, call, **dict(zip(names, values, strict=True))))

    return torch.func.jvp(of, primals, tuple(noise(primals, 2)))[1]


def to_float64(call: Call) -> Call:
    tensors = {n: x.double() if x.is_floating_point() else x for n, x in call.tensors.items()}
    return call._replace(tensors=tensors)


def loss_of(function: Function, call: Call, names: Sequence[str]) -> Callable[..., Tensor]:
    """Return a nonlinear scalar function of the named arguments; squares keep relative errors, sines do not."""

    def loss(*values: Tensor) -> Tensor:
        outs = floating(outputs(function, call, **dict(zip(names, values, strict=True))))
        return sum((out.square() * w).sum() for out, w in zip(outs, noise(outs, 3), strict=True))

    return loss


# ---- inputs ------------------------------------------------------------------------------------------------------


def subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield subsets of the names: singles, pairs, all but one, all; each once."""
    sizes = dict.fromkeys((1, 2, len(names) - 1, len(names)))
    return itertools.chain.from_iterable(itertools.combinations(names, n) for n in sizes if 0 < n <= len(names))


def varied(x: Tensor, size: int, dim: int) -> Tensor:
    """Stack ``size`` tensors close to ``x`` along a new dimension."""
    if x.is_floating_point():
        copies = [x * (1 + 0.1 * torch.randn_like(x)) for _ in range(size)]
    else:
        copies = [x ^ (torch.rand(x.shape, device=x.device) < 0.3) for _ in range(size)]
    return torch.stack(copies, dim)


def mapped(
    call: Call, names: Iterable[str], size: int, draw: random.Random
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors with the named ones stacked, and the dimension over which each is mapped."""
    dims = {name: draw.randint(-x.dim() - 1, x.dim()) if name in names else None for name, x in call.tensors.items()}
    tensors = {n: x if dims[n] is None else varied(x, size, dims[n]) for n, x in call.tensors.items()}
    return tensors, dims


def parameters(choices: Mapping[str, Any], representative: Sequence[str], mark: Any = pytest.mark.kernels) -> list[Any]:
    """Return a test parameter per choice; ``mark`` is on all but the representative ones, if any are named."""
    rest = choices.keys() - (representative or choices)
    return [pytest.param(x, id=name, marks=[mark] * (name in rest)) for name, x in choices.items()]


def drawn_subsets(names: Sequence[str], count: int, draw: random.Random) -> list[list[str]]:
    """Return all names, then random non-empty subsets."""
    return [list(names), *(draw.sample(names, draw.randint(1, len(names))) for _ in range(count - 1))]


def sample(tensors: Mapping[str, Tensor], dims: Mapping[str, Any], i: int) -> dict[str, Tensor]:
    return {n: x if dims[n] is None else x.select(dims[n], i) for n, x in tensors.items()}


def transposed(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def channel_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else transposed(x)


def sliced(x: Tensor) -> Tensor:
    """Return a view of every second entry of a larger tensor, with an offset."""
    larger = x.new_zeros([2 * size + 1 for size in x.shape])
    view = larger[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def expanded(x: Tensor) -> Tensor:
    """Repeat the first entry along the first dimension, with stride 0."""
    return x[:1].expand_as(x)


LAYOUTS = (torch.Tensor.contiguous, transposed, channel_last, sliced, expanded)
