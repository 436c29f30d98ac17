"""Derivatives of the scan that no kernel computes: they differentiate the reference."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from eaml_ext.ops import _composite as composite
from eaml_ext.ops.fallback import warn_beyond_second_order
from eaml_ext.ops.selective_scan._reference import fill_zeros, reference
from eaml_ext.ops.selective_scan._schema import NUM_INPUTS, ScanInputs, ScanOptions, split_args, state_shape


def vjp_of(
    formula: composite.Formula, args: Sequence[Any], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return J^T g of a formula, see ``_composite.py``; warn once."""
    warn_beyond_second_order("selective_scan")
    return composite.vjp_of(formula, args, cotangents)


def jvp_of(formula: composite.Formula, args: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Return J v of a formula, see ``_composite.py``; warn once."""
    warn_beyond_second_order("selective_scan")
    return composite.jvp_of(formula, args, tangents)


def _scan_of(options: Sequence[Any]) -> composite.Formula:
    """Return the formula ``x -> (y, last state)``."""
    return lambda *x: reference(ScanInputs(*x), ScanOptions(*options))[:2]


def jvp_formula(*args: Any) -> tuple[Tensor, ...]:
    """Compute ``selective_scan_jvp``."""
    x, v, options = split_args(args, NUM_INPUTS, NUM_INPUTS)
    return composite.jvp_formula(_scan_of(options), x, fill_zeros(v, x))


def backward_jvp_formula(*args: Any) -> tuple[Tensor, ...]:
    """Compute ``selective_scan_backward_jvp``: a result per present input, after J(x) v with ``outputs``."""
    (grad_y, grad_state, *w), x, v, (*options, outputs) = split_args(args, 4, NUM_INPUTS, NUM_INPUTS)
    scan = _scan_of(options)
    if grad_state is None:
        inputs = ScanInputs(*x)
        grad_state = inputs.A.new_zeros(state_shape(inputs, ScanOptions(*options)))
    # The gradient of <v, J(x)^T g> is J v in g and d/de J(x + e v)^T g in x.
    y, last, *grads = composite.vjp_formula(
        lambda *p: composite.vjp_formula(scan, p[2:], p[:2]), (grad_y, grad_state, *x), fill_zeros(v, x)
    )
    results = [a + b for a, b in zip(grads, composite.vjp_formula(scan, x, w), strict=True)]
    return (y, last, *results) if outputs else tuple(results)
