"""Derivatives of the scan that no kernel computes: they differentiate the reference.

A derivative of a formula is another formula, so that one autograd function, :class:`Composite`, has every order. The
formulas use reverse mode alone, because levels of forward mode nest only inside ``torch.func``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eaml_ext.ops._typed import Function
from eaml_ext.ops.fallback import warn_beyond_second_order
from eaml_ext.ops.selective_scan._reference import fill_zeros, reference
from eaml_ext.ops.selective_scan._schema import NUM_INPUTS, ScanInputs, ScanOptions, split_args, state_shape

Formula = Callable[..., tuple[Tensor, ...]]


def _differentiable(args: Sequence[Any]) -> list[int]:
    """Return the positions of tensors that have a gradient."""
    return [
        i
        for i, value in enumerate(args)
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    ]


def _pull(formula: Formula, args: Sequence[Any], cotangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """J^T g, one gradient per differentiable argument."""
    indices = _differentiable(args)

    def bound(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(args)
        for i, tensor in zip(indices, tensors, strict=True):
            full[i] = tensor
        return formula(*full)

    outs_and_pullback: Any = torch.func.vjp(bound, *(args[i] for i in indices))
    outs, pullback = outs_and_pullback
    grads: tuple[Tensor, ...] = pullback(fill_zeros(cotangents, outs))
    return grads


def _push(formula: Formula, args: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """J v, the gradient in g of <v, J^T g>, for one tangent per differentiable argument."""
    zeros = [torch.zeros_like(out) for out in formula(*args)]
    values = [args[i] for i in _differentiable(args)]
    return _pull(lambda *g: _pull(formula, args, g), zeros, fill_zeros(tangents, values))


def _scan_of(options: Sequence[Any]) -> Formula:
    """Return the formula ``x -> (y, last state)``."""
    return lambda *x: reference(ScanInputs(*x), ScanOptions(*options))[:2]


def jvp_formula(*args: Any) -> tuple[Tensor, ...]:
    """Compute ``selective_scan_jvp``."""
    x, v, options = split_args(args, NUM_INPUTS, NUM_INPUTS)
    return _push(_scan_of(options), x, fill_zeros(v, x))


def backward_jvp_formula(*args: Any) -> tuple[Tensor, ...]:
    """Compute ``selective_scan_backward_jvp``: a result per present input, after J(x) v with ``outputs``."""
    (grad_y, grad_state, *w), x, v, (*options, outputs) = split_args(args, 4, NUM_INPUTS, NUM_INPUTS)
    scan = _scan_of(options)
    if grad_state is None:
        inputs = ScanInputs(*x)
        grad_state = inputs.A.new_zeros(state_shape(inputs, ScanOptions(*options)))
    # The gradient of <v, J(x)^T g> is J v in g and d/de J(x + e v)^T g in x.
    y, last, *grads = _pull(lambda *p: _pull(scan, p[2:], p[:2]), (grad_y, grad_state, *x), fill_zeros(v, x))
    results = [a + b for a, b in zip(grads, _pull(scan, x, w), strict=True)]
    return (y, last, *results) if outputs else tuple(results)


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
    """Return J^T g of a formula with one entry per argument, None for one without a gradient; warn once."""
    warn_beyond_second_order("selective_scan")
    count = len(args)
    grads = Composite.apply(lambda *p: _pull(formula, p[:count], p[count:]), *args, *cotangents)
    by_index = dict(zip(_differentiable(args), grads, strict=True))
    return tuple(by_index.get(i) for i in range(count))


def jvp_of(formula: Formula, args: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Return J v of a formula, for one tangent per argument; warn once."""
    warn_beyond_second_order("selective_scan")
    count = len(args)
    present = [tangents[i] for i in _differentiable(args)]
    outs: tuple[Tensor, ...] = Composite.apply(lambda *p: _push(formula, p[:count], p[count:]), *args, *present)
    return outs
