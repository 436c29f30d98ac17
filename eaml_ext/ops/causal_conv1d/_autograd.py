"""Derivatives and vmap of the convolution.

Its sum is linear in (x, initial_states), and in (weight, bias). Two autograd functions close the calculus:

- ``_Conv``: y = silu(sum), or y = sum.
- ``_Vjp``: J^T g. The derivative of this derivative consists of sums, of vector-Jacobian products without silu, and of
  silu's derivatives, element by element. So both functions have derivatives of every order and mode, by kernels.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eaml_ext._torch_compat import transforms_active
from eaml_ext.ops._composite import Composite
from eaml_ext.ops._library import library
from eaml_ext.ops._sigmoid import sigmoid
from eaml_ext.ops._typed import Function
from eaml_ext.ops.causal_conv1d._schema import NUM_INPUTS, ConvInputs, ConvOptions

_NO_GRADIENTS = (None,) * len(ConvOptions._fields)


def can_skip_autograd(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether the raw op may be called: no derivative is recorded and no transform is active."""
    if transforms_active():
        return False
    return not torch.is_grad_enabled() or not any(v is not None and v.requires_grad for v in tensors)


class _ConvFunction(Function):
    def __init_subclass__(cls) -> None:
        # Cached, because apply() computes it at each call.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    @classmethod
    def apply_or_forward(cls, *args: Any) -> Any:
        """Call ``forward`` where no derivative can be recorded, else ``apply``."""
        tensors = [v for v in args if isinstance(v, Tensor)]
        return cls.forward(*args) if can_skip_autograd(tensors) else cls.apply(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


class _Conv(_ConvFunction):
    """``(*x, *options)`` -> y."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        y: Tensor = library.causal_conv1d(*args)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *x, reset, cu_seqlens = ctx.saved_tensors
        return (*scatter_args(_Vjp.apply_or_forward(grad_y, *x, reset, cu_seqlens, ctx.silu), x), *_NO_GRADIENTS)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        *x, reset, cu_seqlens = ctx.saved_tensors
        (tangent,) = Composite.apply(_jvp_formula, *x, *tangents[:NUM_INPUTS], reset, cu_seqlens, ctx.silu)
        return tangent  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        folding = VmapBatchFolding(info.batch_size, args, in_dims)
        return folding.unfold_rows(_Conv.apply(*folding.arguments())), 0


class _Vjp(_ConvFunction):
    """``(grad_y, *x, *options)`` -> J(x)^T grad_y, one gradient per present input."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        grads = library.causal_conv1d_backward(*args)
        return tuple(grad for grad, v in zip(grads, args[1 : 1 + NUM_INPUTS], strict=True) if v is not None)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, *x, reset, cu_seqlens = ctx.saved_tensors
        to_grad_y, grads = _second_order(grad_y, ConvInputs(*x), scatter_args(v, x), reset, cu_seqlens, ctx.silu)
        return (to_grad_y, *scatter_args(grads, x), *_NO_GRADIENTS)

    @staticmethod
    def jvp(ctx: Any, grad_y_tangent: Tensor | None, *tangents: Any) -> tuple[Tensor, ...]:
        grad_y, *x, reset, cu_seqlens = ctx.saved_tensors
        v = tangents[:NUM_INPUTS]
        grads: tuple[Tensor, ...] = Composite.apply(
            _vjp_jvp_formula, grad_y, *x, grad_y_tangent, *v, reset, cu_seqlens, ctx.silu
        )
        return grads

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad_y: Tensor, *args: Any) -> Any:
        # Gradients of shared parameters differ between samples, so all parameters become per-task.
        folding = VmapBatchFolding(info.batch_size, args, in_dims[1:], per_sample=True)
        grads = _Vjp.apply(folding.fold_rows(grad_y, in_dims[0]), *folding.arguments())
        return folding.unfold_gradients(grads), (0,) * len(grads)


# ---- derivatives in the opmath type ------------------------------------------------------------------------------


def scatter_args(values: Sequence[Any], x: Sequence[Any]) -> tuple[Any, ...]:
    """Return one entry per argument of ``x``: None for an absent one, else the next of ``values``."""
    entries = iter(values)
    return tuple(None if argument is None else next(entries) for argument in x)


def to_opmath(x: ConvInputs) -> ConvInputs:
    """Return the inputs in the dtype of ``weight``, in which sums are computed."""
    return ConvInputs._make(None if v is None else v.to(x.weight.dtype) for v in x)


def fill_zeros(tangents: Sequence[Tensor | None], x: ConvInputs) -> ConvInputs:
    """Return the tangents of the present inputs, in their dtype, zeros in place of None."""
    pairs = zip(tangents, x, strict=True)
    return ConvInputs._make(
        None if v is None else torch.zeros_like(v) if t is None else t.to(v.dtype) for t, v in pairs
    )


def _conv(x: ConvInputs, reset: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    sums: Tensor = _Conv.apply_or_forward(*x, reset, cu_seqlens, False)
    return sums


def _vjp(grad: Tensor, x: ConvInputs, reset: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = _Vjp.apply_or_forward(grad, *x, reset, cu_seqlens, False)
    return grads


def _sum_jvp(x: ConvInputs, v: ConvInputs, reset: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The tangent of the sum, which has products of x with weight, and a bias."""
    by_x = _conv(v._replace(weight=x.weight), reset, cu_seqlens)
    return by_x + _conv(x._replace(weight=v.weight, bias=None), reset, cu_seqlens)


def _silu_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and second derivative of silu."""
    s = sigmoid(x)
    slope = s * (1 - s)
    return s + x * slope, slope * (2 + x * (1 - 2 * s))


def _second_order(
    grad_y: Tensor,
    inputs: ConvInputs,
    v: Sequence[Tensor | None],
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return J v, and d/de J(x + e v)^T grad_y for each present input.

    These are the gradients of <v, J(x)^T grad_y>; the second is also the tangent of J(x)^T grad_y.
    """
    x = to_opmath(inputs)
    tangent = fill_zeros(v, x)
    grad = grad_y.to(x.weight.dtype)
    to_grad_y = sums = _sum_jvp(x, tangent, reset, cu_seqlens)
    if silu:
        first, second = _silu_derivatives(_conv(x, reset, cu_seqlens))
        to_grad_y = first * sums
        curvature = _vjp(grad * second * sums, x, reset, cu_seqlens)
        grad = grad * first
    results = list(_vjp(grad, tangent, reset, cu_seqlens))
    if x.bias is not None:
        results[2] = torch.zeros_like(results[2])  # the sum has no product with the bias
    if silu:
        results = [a + b for a, b in zip(results, curvature, strict=True)]
    present = [value for value in inputs if value is not None]
    return to_grad_y.to(grad_y.dtype), tuple(r.to(value.dtype) for r, value in zip(results, present, strict=True))


def _jvp_formula(*args: Any) -> tuple[Tensor]:
    """``(*x, *v, *options)`` -> J(x) v."""
    inputs, v, (reset, cu_seqlens, silu) = args[:NUM_INPUTS], args[NUM_INPUTS : 2 * NUM_INPUTS], args[2 * NUM_INPUTS :]
    x = to_opmath(ConvInputs(*inputs))
    tangent = _sum_jvp(x, fill_zeros(v, x), reset, cu_seqlens)
    if silu:
        tangent = tangent * _silu_derivatives(_conv(x, reset, cu_seqlens))[0]
    return (tangent.to(inputs[0].dtype),)


def _vjp_jvp_formula(grad_y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """``(grad_y, *x, w, *v, *options)`` -> d/de J(x + e v)^T (grad_y + e w)."""
    x, (w, *v), options = args[:NUM_INPUTS], args[NUM_INPUTS : 1 + 2 * NUM_INPUTS], args[1 + 2 * NUM_INPUTS :]
    _, grads = _second_order(grad_y, ConvInputs(*x), v, *options)
    if w is None:
        return grads
    by_cotangent = _Vjp.apply_or_forward(w, *x, *options)
    return tuple(a + b for a, b in zip(grads, by_cotangent, strict=True))


# ---- vmap --------------------------------------------------------------------------------------------------------


class VmapBatchFolding:
    """Fold a vmapped dimension into the batch: rows become ``(size * batch, *)``, parameters per-task.

    Args:
        size: samples of the vmapped dimension.
        args: inputs and options of the convolution, as vmap passes them.
        in_dims: for each, the index of its vmapped dimension, None where all samples share it.
        per_sample: give the parameters an entry per sample also where all samples share them.
    """

    def __init__(self, size: int, args: Sequence[Any], in_dims: Sequence[int | None], per_sample: bool = False):
        self.size, self.args, self.in_dims, self.per_sample = size, args, in_dims, per_sample
        self.shared = [  # parameters without tasks
            v is not None and rank is not None and v.dim() - (in_dim is not None) == rank
            for v, in_dim, rank in zip(args[:NUM_INPUTS], in_dims, (None, 2, 1, None), strict=False)
        ]

    def _with_samples(self, value: Tensor, in_dim: int | None) -> Tensor:
        return value.expand(self.size, *value.shape) if in_dim is None else value.movedim(in_dim, 0)

    def fold_rows(self, value: Tensor | None, in_dim: int | None) -> Tensor | None:
        """``(size, batch, *)`` -> ``(size * batch, *)``."""
        if value is None:
            return None
        value = self._with_samples(value, in_dim)
        return value.reshape(self.size * value.shape[1], *value.shape[2:])

    def _fold_parameter(self, value: Any, index: int) -> Any:
        in_dim = self.in_dims[index]
        if not self.shared[index]:
            return self.fold_rows(value, in_dim)
        return value if in_dim is None and not self.per_sample else self._with_samples(value, in_dim)

    def arguments(self) -> tuple[Any, ...]:
        """Return the folded inputs and options."""
        x, weight, bias, states, reset, cu_seqlens, silu = self.args
        dims = self.in_dims
        weight, bias = self._fold_parameter(weight, 1), self._fold_parameter(bias, 2)
        if bias is not None and weight.dim() - bias.dim() != 1:  # both are per task or none is
            tasks = weight.shape[0] if weight.dim() == 3 else bias.shape[0]
            weight, bias = weight.expand(tasks, *weight.shape[-2:]), bias.expand(tasks, bias.shape[-1])
        if cu_seqlens is not None and (dims[5] is not None or cu_seqlens.shape[0] > 1):
            cu_seqlens = self._with_samples(cu_seqlens, dims[5])
            batch = x.shape[0] if dims[0] is None else x.movedim(dims[0], 0).shape[1]
            cu_seqlens = cu_seqlens.expand(self.size, batch, -1).reshape(self.size * batch, -1)
        return (
            self.fold_rows(x, dims[0]),
            weight,
            bias,
            self.fold_rows(states, dims[3]),
            self.fold_rows(reset, dims[4]),
            cu_seqlens,
            silu,
        )

    def unfold_rows(self, value: Tensor) -> Tensor:
        """``(size * batch, *)`` -> ``(size, batch, *)``."""
        return value.reshape(self.size, value.shape[0] // self.size, *value.shape[1:])

    def unfold_gradients(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Unfold the gradients of the present inputs, one entry per sample in each."""
        present = [shared for v, shared in zip(self.args[:NUM_INPUTS], self.shared, strict=True) if v is not None]
        return tuple(grad if shared else self.unfold_rows(grad) for grad, shared in zip(grads, present, strict=True))


def differentiable_conv(x: ConvInputs, options: ConvOptions) -> Tensor:
    """Run the convolution with derivatives of every order, by kernels."""
    y: Tensor = _Conv.apply(*x, *options)
    return y
