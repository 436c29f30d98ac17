"""y = x W^T + bias, whose rows have the same bits in any batch: torch's own product rounds them by its shape."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from eaml_ext._torch_compat import has_kernel, is_check_of_op
from eaml_ext.ops._inference import may_run_kernel
from eaml_ext.ops._library import library
from eaml_ext.ops._typed import Function, register_fake

torch.library.define("eaml_ext::row_invariant_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("eaml_ext::row_invariant_linear", "CompositeExplicitAutograd", F.linear)

MAX_ROWS_IN_PLACE = 8  # kFewRows in csrc/row_invariant_linear/cpu/kernel.h

_op = library.row_invariant_linear.default
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ON_CPU = has_kernel("eaml_ext::row_invariant_linear", "CPU")


def is_row_invariant(x: Tensor) -> bool:
    """Return whether :func:`row_invariant_linear` has a kernel for ``x``: on the CPU, in float32 and float64."""
    return _ON_CPU and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def reads_in_place(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the kernel is the fastest product: few rows on the CPU, without derivatives and transforms.

    It reads the weight once at the rate of the memory, and bfloat16 and float16 without a conversion in memory.
    """
    if not (_ON_CPU and may_run_kernel((x, weight, bias))):
        return False
    if x.dim() == 0 or x.numel() > MAX_ROWS_IN_PLACE * x.shape[-1]:
        return False
    return x.dtype in _DTYPES and weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)


def row_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, with rows that have the same bits in any batch and with any number of threads.

    The kernel adds the products of each output in the order of the inputs, starting from the bias. Gradients are
    torch's own products, exact in every order; their bits may depend on the batch. Transforms of ``torch.func`` and
    forward-mode differentiation are not defined.

    Args:
        x: ``(*, inputs)``, float32 or float64, on the CPU.
        weight: ``(outputs, inputs)``, dtype of ``x``.
        bias: ``(outputs,)``, dtype of ``x``.

    Returns:
        ``(*, outputs)``.

    Raises:
        ValueError: an argument has another shape or dtype.

    >>> x, weight = torch.randn(64, 30), torch.randn(8, 30)
    >>> torch.equal(row_invariant_linear(x, weight)[:1], row_invariant_linear(x[:1], weight))
    True
    """
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    run = _RowInvariantLinear.apply if torch.is_grad_enabled() else _op
    try:
        y: Tensor = run(rows, weight, bias)
    except RuntimeError as error:
        if not is_check_of_op(error, "row_invariant_linear"):
            raise
        raise ValueError(str(error)) from None
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


class _RowInvariantLinear(Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = _op(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        of_x, of_weight, of_bias = ctx.needs_input_grad  # type: ignore[attr-defined]
        return grad @ weight if of_x else None, grad.mT @ x if of_weight else None, grad.sum(0) if of_bias else None


@register_fake("eaml_ext::row_invariant_linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@register_flop_formula(torch.ops.eaml_ext.row_invariant_linear)
def _flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Count a product and a sum for every input of every output; the arguments are shapes."""
    return 2 * math.prod(x) * weight[0]
