"""Derivatives and vmap of the scan.

f is the scan, x its inputs. Four autograd functions close the calculus up to second order, because each derivative of
one is another:

- ``_Scan``: f(x).
- ``_Vjp``: J(x)^T g.
- ``_Jvp``: J(x) v.
- ``_VjpJvp``: d/de of J(x + e v)^T (g + e w), the forward-mode derivative of ``_Vjp``. It is the reverse-mode one too,
  as grad_x <v, J(x)^T g> = d/de J(x + e v)^T g. Its kernel is the backward kernel, run on dual numbers.

The derivatives of ``_VjpJvp`` and the forward-mode derivative of ``_Jvp`` have no kernel: ``_higher_order``
differentiates the reference, to any order.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eaml_ext._torch_compat import transforms_active
from eaml_ext.ops._library import library
from eaml_ext.ops._typed import Function
from eaml_ext.ops.selective_scan._higher_order import backward_jvp_formula, jvp_formula, jvp_of, vjp_of
from eaml_ext.ops.selective_scan._schema import ARGUMENTS, NUM_INPUTS, NUM_OPTIONS, ScanInputs, ScanOptions, split_args

_NO_GRADIENTS = (None,) * NUM_OPTIONS


def can_skip_autograd(x: Sequence[Tensor | None]) -> bool:
    """Return whether the raw op may be called: no derivative is recorded and no transform is active."""
    if transforms_active():
        return False
    return not torch.is_grad_enabled() or not any(v is not None and v.requires_grad for v in x)


def select_present(values: Sequence[Any], x: Sequence[Any]) -> tuple[Any, ...]:
    """Return the entries of ``values`` whose argument in ``x`` is present."""
    return tuple(v for v, argument in zip(values, x, strict=True) if argument is not None)


def scatter_args(values: Sequence[Any], x: Sequence[Any]) -> tuple[Any, ...]:
    """Return one entry per argument of ``x``: None for an absent one, else the next of ``values``."""
    entries = iter(values)
    return tuple(None if argument is None else next(entries) for argument in x)


class _ScanFunction(Function):
    def __init_subclass__(cls) -> None:
        # Cached, because apply() computes it at each call.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    @classmethod
    def apply_or_forward(cls, tensors: Sequence[Tensor | None], *others: Any) -> Any:
        """Call ``forward`` where no derivative can be recorded, else ``apply``."""
        return cls.forward(*tensors, *others) if can_skip_autograd(tensors) else cls.apply(*tensors, *others)


def _save(ctx: Any, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> None:
    """Save tensors and options for reverse and forward mode."""
    reset, cu_seqlens, *ctx.flags = options
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, reset, cu_seqlens)
    ctx.save_for_forward(*tensors, reset, cu_seqlens)


def _saved(ctx: Any) -> tuple[list[Any], ScanOptions]:
    *tensors, reset, cu_seqlens = ctx.saved_tensors
    return tensors, ScanOptions(reset, cu_seqlens, *ctx.flags)


class _Scan(_ScanFunction):
    """``(*x, *options)`` -> (y, last state, saved states) = f(x). The saved states have no gradient."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        outs: tuple[Tensor, ...] = library.selective_scan(*args, True)
        return outs

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, options = split_args(inputs, NUM_INPUTS)
        ctx.mark_non_differentiable(output[2])
        _save(ctx, (*x, output[2]), options)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        (*x, saved), options = _saved(ctx)
        if grad_y is None and grad_state is None:
            return (None,) * NUM_INPUTS + _NO_GRADIENTS
        grad_y = torch.zeros_like(x[0]) if grad_y is None else grad_y
        grads = _Vjp.apply_or_forward((grad_y, grad_state, *x), *options, saved)
        return scatter_args(grads, x) + _NO_GRADIENTS

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        (*x, _), options = _saved(ctx)
        return (*_Jvp.apply(*x, *tangents[:NUM_INPUTS], *options), None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        (x, options), (x_dims, option_dims) = (split_args(values, NUM_INPUTS) for values in (args, in_dims))
        folding = VmapBatchFolding(info.batch_size, x, x_dims, options)
        outs = _Scan.apply(*folding.fold_inputs(x, x_dims), *folding.fold_options(options, option_dims))
        return tuple(map(folding.unfold_rows, outs)), (0, 0, 0)


class _Vjp(_ScanFunction):
    """``(grad_y, grad_state, *x, *options, saved)`` -> J(x)^T (grad_y, grad_state), one gradient per present input."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        _, x, _ = split_args(args, 2, NUM_INPUTS)
        return select_present(library.selective_scan_backward(*args), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        tensors, options, _ = split_args(inputs, 2 + NUM_INPUTS, NUM_OPTIONS)
        _save(ctx, tensors, options)

    @staticmethod
    def backward(ctx: Any, *v: Any) -> tuple[Tensor | None, ...]:
        (grad_y, grad_state, *x), options = _saved(ctx)
        outputs = any(ctx.needs_input_grad[:2])
        tensors = (grad_y, grad_state, None, None, *x, *scatter_args(v, x))
        results = _VjpJvp.apply_or_forward(tensors, *options, outputs)
        (y, last), grads = (results[:2], results[2:]) if outputs else ((None, None), results)
        return (y, None if grad_state is None else last, *scatter_args(grads, x), *_NO_GRADIENTS, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        (grad_y, grad_state, *x), options = _saved(ctx)
        cotangent_tangents, v, _ = split_args(tangents, 2, NUM_INPUTS)
        return tuple(_VjpJvp.apply(grad_y, grad_state, *cotangent_tangents, *x, *v, *options, False))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        sizes = 2, NUM_INPUTS, NUM_OPTIONS
        cotangents, x, options, (saved,) = split_args(args, *sizes)
        cotangent_dims, x_dims, option_dims, (saved_dim,) = split_args(in_dims, *sizes)
        # Gradients of shared parameters differ between samples, so all parameters become per-task.
        folding = VmapBatchFolding(info.batch_size, x, x_dims, options, per_sample=True)
        folded_saved = folding.fold_rows(saved, saved_dim)
        grads = _Vjp.apply(
            *map(folding.fold_rows, cotangents, cotangent_dims),
            *folding.fold_inputs(x, x_dims),
            *folding.fold_options(options, option_dims),
            folded_saved if folded_saved is None else folded_saved.contiguous(),  # kernels take no strides of it
        )
        return folding.unfold_gradients(grads), (0,) * len(grads)


class _Jvp(_ScanFunction):
    """``(*x, *v, *options)`` -> J(x) v, the tangents of y and of the last state."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        outs: tuple[Tensor, ...] = library.selective_scan_jvp(*args)
        return outs

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(ctx, *split_args(inputs, 2 * NUM_INPUTS))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, options = _saved(ctx)
        x, v = split_args(tensors, NUM_INPUTS)
        if grad_y is None and grad_state is None:
            return (None,) * (2 * NUM_INPUTS) + _NO_GRADIENTS
        grad_y = torch.zeros_like(x[0]) if grad_y is None else grad_y
        to_x = _VjpJvp.apply(grad_y, grad_state, None, None, *x, *v, *options, False)
        to_v = scatter_args(_Vjp.apply(grad_y, grad_state, *x, *options, None), x)
        to_v = tuple(None if tangent is None else grad for grad, tangent in zip(to_v, v, strict=True))
        return scatter_args(to_x, x) + to_v + _NO_GRADIENTS

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        tensors, options = _saved(ctx)
        return jvp_of(jvp_formula, (*tensors, *options), tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        sizes = NUM_INPUTS, NUM_INPUTS
        (x, v, options), (x_dims, v_dims, option_dims) = (split_args(values, *sizes) for values in (args, in_dims))
        folding = VmapBatchFolding(info.batch_size, x, x_dims, options, per_sample=True)
        outs = _Jvp.apply(
            *folding.fold_inputs(x, x_dims),
            *folding.fold_inputs(v, v_dims),
            *folding.fold_options(options, option_dims),
        )
        return tuple(map(folding.unfold_rows, outs)), (0, 0)


class _VjpJvp(_ScanFunction):
    """``(*g, *w, *x, *v, *options, outputs)`` -> d/de J(x + e v)^T (g + e w), one result per present input.

    g is (grad_y, grad_state) and w its tangent. With ``outputs``, J(x) v comes before these results.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        _, x, _ = split_args(args, 4, NUM_INPUTS)
        y, last, *grads = library.selective_scan_backward_jvp(*args)
        outputs, results = args[-1], select_present(grads, x)
        return (y, last, *results) if outputs else results

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        tensors, options, (ctx.outputs,) = split_args(inputs, 4 + 2 * NUM_INPUTS, NUM_OPTIONS)
        _save(ctx, tensors, options)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors, options = _saved(ctx)
        return vjp_of(backward_jvp_formula, (*tensors, *options, ctx.outputs), grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        tensors, options = _saved(ctx)
        return jvp_of(backward_jvp_formula, (*tensors, *options, ctx.outputs), tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        sizes = 4, NUM_INPUTS, NUM_INPUTS, NUM_OPTIONS
        cotangents, x, v, options, (outputs,) = split_args(args, *sizes)
        cotangent_dims, x_dims, v_dims, option_dims, _ = split_args(in_dims, *sizes)
        folding = VmapBatchFolding(info.batch_size, x, x_dims, options, per_sample=True)
        results = _VjpJvp.apply(
            *map(folding.fold_rows, cotangents, cotangent_dims),
            *folding.fold_inputs(x, x_dims),
            *folding.fold_inputs(v, v_dims),
            *folding.fold_options(options, option_dims),
            outputs,
        )
        rows, grads = (results[:2], results[2:]) if outputs else ((), results)
        results = (*map(folding.unfold_rows, rows), *folding.unfold_gradients(grads))
        return results, (0,) * len(results)


class VmapBatchFolding:
    """Fold a vmapped dimension into the batch: rows become ``(size * batch, *)``, parameters per-task.

    Args:
        size: samples of the vmapped dimension.
        x: the inputs of the scan, as vmap passes them.
        in_dims: for each input, the index of its vmapped dimension, None where all samples share it.
        options: the options of the scan.
        per_sample: give every parameter an entry per sample, also where all samples share it, so that its gradient is
            separate for each sample.
    """

    def __init__(
        self,
        size: int,
        x: Sequence[Tensor | None],
        in_dims: Sequence[int | None],
        options: Sequence[Any],
        per_sample: bool = False,
    ):
        self.size, self.x, self.in_dims, self.per_sample = size, x, in_dims, per_sample
        _, _, _, B_invariant, C_invariant, _ = options
        ranks = {"A": 2, "D": 1, "delta_bias": 1}  # of parameters that all rows share
        if B_invariant:
            ranks["B"] = 2
        if C_invariant:
            ranks["C"] = 2
        self.ranks = [ranks.get(name) for name in ARGUMENTS]

    def _with_samples(self, value: Tensor, in_dim: int | None) -> Tensor:
        """Return ``value`` with the samples as its first dimension."""
        return value.expand(self.size, *value.shape) if in_dim is None else value.movedim(in_dim, 0)

    def fold_rows(self, value: Tensor | None, in_dim: int | None) -> Tensor | None:
        """``(size, batch, *)`` -> ``(size * batch, *)``."""
        return None if value is None else self._with_samples(value, in_dim).flatten(0, 1)

    def _fold_parameter(self, value: Tensor | None, in_dim: int | None, rank: int) -> Tensor | None:
        """``([size,] [tasks,] *)`` -> ``(size * tasks, *)``; a parameter that all rows share is returned as it is."""
        if value is None or (in_dim is None and value.dim() == rank and not self.per_sample):
            return value
        value = self._with_samples(value, in_dim)
        return value if value.dim() == rank + 1 else value.flatten(0, 1)

    def fold_inputs(self, values: Sequence[Tensor | None], in_dims: Sequence[int | None]) -> tuple[Tensor | None, ...]:
        """Fold inputs or their tangents, in the order of :class:`ScanInputs`."""
        return tuple(
            self.fold_rows(value, dim) if rank is None else self._fold_parameter(value, dim, rank)
            for value, dim, rank in zip(values, in_dims, self.ranks, strict=True)
        )

    def fold_options(self, options: Sequence[Any], in_dims: Sequence[int | None]) -> ScanOptions:
        """Fold ``reset``; ``cu_seqlens`` and the flags are the same for all samples."""
        reset, cu_seqlens, *flags = options
        if in_dims[1] is not None:
            raise ValueError("selective_scan: cu_seqlens must be the same for all samples of a vmap")
        return ScanOptions(self.fold_rows(reset, in_dims[0]), cu_seqlens, *flags)

    def unfold_rows(self, value: Tensor) -> Tensor:
        """``(size * batch, *)`` -> ``(size, batch, *)``."""
        return value.reshape(self.size, value.shape[0] // self.size, *value.shape[1:])

    def unfold_gradients(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Unfold the gradients of the present inputs, one entry per sample in each."""
        entries = iter(grads)
        unfolded = []
        for value, in_dim, rank in zip(self.x, self.in_dims, self.ranks, strict=True):
            if value is None:
                continue
            grad = next(entries)
            shared = rank is not None and value.dim() - (in_dim is not None) == rank
            unfolded.append(grad if shared else self.unfold_rows(grad))
        return tuple(unfolded)


def differentiable_scan(x: ScanInputs, options: ScanOptions) -> tuple[Tensor, Tensor]:
    """Run the scan with derivatives of every order, to the second by kernels.

    Returns:
        ``y`` and the last state.
    """
    y, last, _ = _Scan.apply(*x, *options)
    return y, last
