"""Functions of tensors as one autograd function, with derivatives of every order and mode.

A derivative of a formula is another formula, so one autograd function, :class:`Composite`, has every order. Formulas
use reverse mode alone, because levels of forward mode nest only inside ``torch.func``. Inside ``jvp`` of an autograd
function, torch disables forward mode: outer levels of it see the calls of autograd functions there, and no other
operation. So ``jvp`` has to be one such call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eaml_ext.ops._typed import Function

Formula = Callable[..., tuple[Tensor, ...]]


class Composite(Function):
    """``(formula, *args)`` -> formula(*args), differentiable to any order in every tensor of real or complex numbers.

    A formula has no tensors but its arguments.
    """

    @staticmethod
    def forward(formula: Formula, *args: Any) -> tuple[Tensor, ...]:
        return tuple(out.clone() for out in formula(*args))  # the gradient of an identity is its argument

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.formula, *args = inputs
        tensors = [value if isinstance(value, Tensor) else None for value in args]
        ctx.constants = [None if isinstance(value, Tensor) else value for value in args]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *vjp_of(ctx.formula, _args(ctx), cotangents))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return jvp_of(ctx.formula, _args(ctx), tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, formula: Formula, *args: Any) -> Any:
        outs = Composite.apply(torch.vmap(formula, in_dims[1:]), *args)
        return outs, (0,) * len(outs)


def _args(ctx: Any) -> list[Any]:
    pairs = zip(ctx.saved_tensors, ctx.constants, strict=True)
    return [constant if tensor is None else tensor for tensor, constant in pairs]


def vjp_of(formula: Formula, args: Sequence[Any], cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return J^T g of a formula with one entry per argument, None for one without a gradient."""
    count = len(args)
    grads = Composite.apply(lambda *p: vjp_formula(formula, p[:count], p[count:]), *args, *cotangents)
    by_index = dict(zip(_differentiable(args), grads, strict=True))
    return tuple(by_index.get(i) for i in range(count))


def jvp_of(formula: Formula, args: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Return J v of a formula, for one tangent per argument."""
    count = len(args)
    present = [tangents[i] for i in _differentiable(args)]
    outs: tuple[Tensor, ...] = Composite.apply(lambda *p: jvp_formula(formula, p[:count], p[count:]), *args, *present)
    return outs


def vjp_formula(formula: Formula, args: Sequence[Any], cotangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Compute J^T g, one gradient per differentiable argument."""
    indices = _differentiable(args)

    def bound(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(args)
        for i, tensor in zip(indices, tensors, strict=True):
            full[i] = tensor
        return formula(*full)

    outs_and_pullback: Any = torch.func.vjp(bound, *(args[i] for i in indices))
    outs, pullback = outs_and_pullback
    grads: tuple[Tensor, ...] = pullback(_fill_zeros(cotangents, outs))
    return grads


def jvp_formula(formula: Formula, args: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Compute J v, the gradient in g of <v, J^T g>, for one tangent per differentiable argument."""
    zeros = [torch.zeros_like(out) for out in formula(*args)]
    values = [args[i] for i in _differentiable(args)]
    return vjp_formula(lambda *g: vjp_formula(formula, args, g), zeros, _fill_zeros(tangents, values))


def _differentiable(args: Sequence[Any]) -> list[int]:
    """Return the positions of tensors that have a gradient."""
    tensors = [(i, value) for i, value in enumerate(args) if isinstance(value, Tensor)]
    return [i for i, value in tensors if value.is_floating_point() or value.is_complex()]


def _fill_zeros(tangents: Sequence[Tensor | None], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    pairs = zip(tangents, values, strict=True)
    return tuple(torch.zeros_like(v) if t is None else t for t, v in pairs)
