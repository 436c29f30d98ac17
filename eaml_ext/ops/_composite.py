"""Functions of tensors as one autograd function, with derivatives of every order and mode.

Inside ``jvp`` of an autograd function, torch disables forward mode: outer levels of it see the calls of autograd
functions there, and no other operation. So ``jvp`` has to be one such call, of :class:`Composite`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eaml_ext.ops._typed import Function

Formula = Callable[..., tuple[Tensor, ...]]


class Composite(Function):
    """``(formula, *args)`` -> formula(*args), differentiable in every floating tensor among the arguments.

    A formula has no tensors but its arguments. A derivative of a formula is another formula. Both use reverse mode
    alone, because levels of forward mode nest only inside ``torch.func``.
    """

    @staticmethod
    def forward(formula: Formula, *args: Any) -> tuple[Tensor, ...]:
        return tuple(out.clone() for out in formula(*args))  # the gradient of an identity is its argument

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.formula, *args = inputs
        tensors = [value if isinstance(value, Tensor) else None for value in args]
        ctx.constants = [None if isinstance(value, Tensor) else value for value in args]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        args, count = _args(ctx), len(ctx.constants)
        grads = Composite.apply(lambda *p: _vjp(ctx.formula, p[:count], p[count:]), *args, *cotangents)
        by_index = dict(zip(_differentiable(args), grads, strict=True))
        return (None, *(by_index.get(i) for i in range(count)))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        args, count = _args(ctx), len(ctx.constants)
        present = [tangents[i] for i in _differentiable(args)]
        outs: tuple[Tensor, ...] = Composite.apply(lambda *p: _jvp(ctx.formula, p[:count], p[count:]), *args, *present)
        return outs

    @staticmethod
    def vmap(info: Any, in_dims: Any, formula: Formula, *args: Any) -> Any:
        outs = Composite.apply(torch.vmap(formula, in_dims[1:]), *args)
        return outs, (0,) * len(outs)


def _args(ctx: Any) -> list[Any]:
    pairs = zip(ctx.saved_tensors, ctx.constants, strict=True)
    return [constant if tensor is None else tensor for tensor, constant in pairs]


def _differentiable(args: Sequence[Any]) -> list[int]:
    """Return the positions of tensors that have a gradient."""
    return [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()]


def _vjp(formula: Formula, args: Sequence[Any], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """J^T g, one gradient per differentiable argument."""
    indices = _differentiable(args)

    def bound(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(args)
        for i, tensor in zip(indices, tensors, strict=True):
            full[i] = tensor
        return formula(*full)

    outs_and_pullback: Any = torch.func.vjp(bound, *(args[i] for i in indices))
    grads: tuple[Tensor, ...] = outs_and_pullback[1](tuple(cotangents))
    return grads


def _jvp(formula: Formula, args: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """J v, the gradient in g of <v, J^T g>, for one tangent per differentiable argument."""
    zeros = [torch.zeros_like(out) for out in formula(*args)]
    values = [args[i] for i in _differentiable(args)]
    filled = [torch.zeros_like(v) if t is None else t for t, v in zip(tangents, values, strict=True)]
    return _vjp(lambda *g: _vjp(formula, args, g), zeros, filled)
