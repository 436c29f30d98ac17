"""Arguments, dispatcher schemas, fake kernels and operation counts of the convolution's ops."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from eaml_ext.ops._library import library
from eaml_ext.ops._typed import register_fake

MAX_KERNEL_WIDTH = 4  # kMaxWidth in csrc/causal_conv1d/params.h
REDUCED_PRECISION = (torch.bfloat16, torch.float16)


class ConvInputs(NamedTuple):
    """The differentiable arguments as the ops take them.

    Attributes:
        x: ``(batch, dim, length)``.
        weight: ``(dim, width)`` or, per task, ``(tasks, dim, width)``; float32 for ``x`` in reduced precision.
        bias: ``(dim,)`` or ``(tasks, dim)``, dtype of ``weight``.
        initial_states: ``(batch, sequences, dim, width - 1)``, dtype of ``x``; one sequence without ``cu_seqlens``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_states: Tensor | None


class ConvOptions(NamedTuple):
    """The arguments without a gradient.

    Attributes:
        reset: ``(batch, length)``, bool.
        cu_seqlens: ``(batch, sequences + 1)``, or ``(1, sequences + 1)`` for all rows, int32.
        silu: whether the output passes through silu.
    """

    reset: Tensor | None
    cu_seqlens: Tensor | None
    silu: bool


NUM_INPUTS = len(ConvInputs._fields)

# ---- schemas -----------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? reset, Tensor? cu_seqlens, bool silu"
)
torch.library.define("eaml_ext::causal_conv1d", f"({_ARGUMENTS}) -> Tensor")
# Gradients of x, weight, bias and initial_states, empty for an absent argument.
torch.library.define(
    "eaml_ext::causal_conv1d_backward", f"(Tensor grad_y, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)

# ---- shapes of results, for torch.compile, torch.export and FakeTensor -------------------------------------------


def empty_gradients(x: ConvInputs) -> tuple[Tensor, ...]:
    """Allocate gradients; that of x has its strides."""
    others = (x.x.new_empty(0) if v is None else v.new_empty(v.shape) for v in x[1:])
    return (torch.empty_like(x.x), *others)


@register_fake("eaml_ext::causal_conv1d")
def _fake(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x)


@register_fake("eaml_ext::causal_conv1d_backward")
def _backward_fake(grad_y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return empty_gradients(ConvInputs(*args[:NUM_INPUTS]))


# ---- operation counts for torch.utils.flop_counter ---------------------------------------------------------------


@register_flop_formula(library.causal_conv1d, get_raw=True)
def _count_flops(x: Tensor, weight: Tensor, *args: Any, **_: Any) -> int:
    return 2 * x.numel() * weight.shape[-1]


@register_flop_formula(library.causal_conv1d_backward, get_raw=True)
def _count_backward_flops(grad_y: Tensor, x: Tensor, weight: Tensor, *args: Any, **_: Any) -> int:
    silu = args[-1]  # its derivative needs the sum again
    return (6 if silu else 4) * x.numel() * weight.shape[-1]
