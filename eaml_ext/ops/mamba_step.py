"""One step of a Mamba block, its projections included, in one call on a CPU: at batch 1 calls would cost most."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from eaml_ext._torch_compat import has_kernel, is_check_of_op
from eaml_ext.ops._inference import PLAIN, may_run_kernel
from eaml_ext.ops._library import library
from eaml_ext.ops._typed import register_fake
from eaml_ext.ops.causal_conv1d import causal_conv1d, causal_conv1d_reference
from eaml_ext.ops.causal_conv1d._schema import MAX_KERNEL_WIDTH
from eaml_ext.ops.row_invariant_linear import MAX_ROWS_IN_PLACE
from eaml_ext.ops.selective_scan import selective_scan_reference, selective_scan_step

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Results = tuple[Tensor, Tensor, Tensor]
# in_proj, in_bias, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, out_bias
Weights = tuple[
    Tensor,
    Tensor | None,
    Tensor,
    Tensor | None,
    Tensor,
    Tensor,
    Tensor | None,
    Tensor,
    Tensor,
    Tensor,
    Tensor | None,
]

torch.library.define(
    "eaml_ext::mamba_step",
    "(Tensor x, Tensor conv_state, Tensor ssm_state, Tensor in_proj, Tensor? in_bias, Tensor conv_weight, "
    "Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, Tensor? dt_bias, Tensor A_log, Tensor D, Tensor out_proj, "
    "Tensor? out_bias) -> (Tensor, Tensor, Tensor)",
)

_op = library.mamba_step.default
_ON_CPU = has_kernel("eaml_ext::mamba_step", "CPU")
# The dtype of arithmetic for each dtype of x.
_OPMATH = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def mamba_step(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
    *,
    linear: Linear = F.linear,
) -> Results:
    """``x, z = in_proj x;  x = silu(conv(x));  dt, B, C = x_proj x;  out_proj(selective_scan_step(x, dt_proj dt, z))``.

    :func:`run_kernel` computes it where it can. Other calls run op by op, with the derivatives of the ops.

    Args:
        x: ``(batch, inputs)``, float32, float64, bfloat16 or float16.
        conv_state: ``(batch, dim, width)``, dtype of ``x``; the last inputs of the convolution, the newest last.
        ssm_state: ``(batch, dim, dstate)``, in full precision.
        in_proj: ``(2 * dim, inputs)``, dtype of ``x``; it makes the input of the convolution, then the gate z.
        in_bias: ``(2 * dim,)``, dtype of ``x``.
        conv_weight: ``(dim, 1, width)``, in full precision.
        conv_bias: ``(dim,)``, in full precision.
        x_proj: ``(rank + 2 * dstate, dim)``, dtype of ``x``.
        dt_proj: ``(dim, rank)``, dtype of ``x``.
        dt_bias: ``(dim,)``, in full precision.
        A_log: ``(dim, dstate)``, in full precision; A is ``-exp(A_log)``.
        D: ``(dim,)``, in full precision.
        out_proj: ``(outputs, dim)``, dtype of ``x``.
        out_bias: ``(outputs,)``, dtype of ``x``.
        linear: ``(x, weight, bias) -> x W^T + bias``, for calls op by op.

    Returns:
        y ``(batch, outputs)``, then ``conv_state`` and ``ssm_state`` after the step.

    >>> x, conv_state, ssm_state = torch.randn(1, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2, 3)
    >>> weights = torch.randn(4, 3), None, torch.randn(2, 1, 4), None, torch.randn(7, 2), torch.randn(2, 1), None
    >>> weights = *weights, torch.zeros(2, 3), torch.ones(2), torch.randn(3, 2), None
    >>> y, conv_state, ssm_state = mamba_step(x, conv_state, ssm_state, *weights)
    >>> y.shape, conv_state.shape, ssm_state.shape
    (torch.Size([1, 3]), torch.Size([1, 2, 4]), torch.Size([1, 2, 3]))
    """
    weights = (in_proj, in_bias, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, out_bias)
    results = run_kernel(x, conv_state, ssm_state, weights)
    if results is not None:
        return results
    x, z = linear(x, in_proj, in_bias).chunk(2, dim=-1)
    conv_state = conv_state.to(x.dtype)  # autocast may have another one
    taps, before = conv_weight.squeeze(1), conv_state[..., 1:]
    u = causal_conv1d(x.unsqueeze(-1), taps, conv_bias, None, before, activation="silu")[..., 0]
    delta, B, C = _project(u, x_proj, dt_proj, A_log.shape[-1], linear)
    y, ssm_state = selective_scan_step(ssm_state, u, delta, -torch.exp(A_log), B, C, D, z, dt_bias, True)
    return linear(y, out_proj, out_bias), _push(conv_state, x), ssm_state


def run_kernel(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: Weights) -> Results | None:
    """Run :func:`mamba_step` as one kernel; None where it cannot run, whatever the arguments are.

    It runs on a CPU without derivatives, for up to eight rows. In float32 and float64 it has the bits of the ops one by
    one, with a ``linear`` whose rows are independent of the batch. In reduced precision it rounds the results of
    ``in_proj`` and of the scan, and y, once each, and nothing else.

    Args:
        x, conv_state, ssm_state: as in :func:`mamba_step`.
        weights: the arguments of :func:`mamba_step` after them, in order.
    """
    if not _raw_op_accepts((x, conv_state, ssm_state), weights):
        return None
    try:
        results: Results = _op(x, conv_state, ssm_state, *weights)
    except (ValueError, RuntimeError) as error:
        if not is_check_of_op(error, "mamba_step"):
            raise
        return None
    return results


def mamba_step_reference(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
) -> Results:
    """Run :func:`mamba_step` on the references of its ops, in full precision: its specification."""
    dtype, full = x.dtype, _OPMATH[x.dtype]

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(full), None if bias is None else bias.to(full))

    x, z = linear(x.to(full), in_proj, in_bias).chunk(2, dim=-1)
    taps, before = conv_weight.squeeze(1), conv_state[..., 1:].to(full)
    conv = causal_conv1d_reference(x.unsqueeze(-1), taps, conv_bias, None, before, activation="silu")
    assert isinstance(conv, Tensor)
    u, A = conv[..., 0], -torch.exp(A_log)
    delta, B, C = _project(u, x_proj, dt_proj, A.shape[-1], linear)
    u, delta, B, C, z = (v.unsqueeze(-1) for v in (u, delta, B, C, z))
    y, ssm_state = selective_scan_reference(u, delta, A, B, C, D, z, dt_bias, True, True, initial_state=ssm_state)
    return linear(y.squeeze(-1), out_proj, out_bias).to(dtype), _push(conv_state, x.to(dtype)), ssm_state


torch.library.impl("eaml_ext::mamba_step", "CompositeExplicitAutograd", mamba_step_reference)


def _project(u: Tensor, x_proj: Tensor, dt_proj: Tensor, dstate: int, linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
    dt, B, C = linear(u, x_proj, None).split((dt_proj.shape[1], dstate, dstate), dim=-1)
    return linear(dt, dt_proj, None), B, C


def _push(conv_state: Tensor, x: Tensor) -> Tensor:
    return torch.cat([conv_state[..., 1:], x.unsqueeze(-1)], dim=-1)


def _raw_op_accepts(inputs: tuple[Tensor, Tensor, Tensor], weights: Weights) -> bool:
    """Return whether the raw op may run, which checks other shapes and dtypes itself."""
    if not (_ON_CPU and PLAIN.issuperset(map(type, inputs)) and may_run_kernel((*inputs, *weights))):
        return False
    x, conv_state, _ = inputs
    if x.dim() != 2 or x.shape[0] > MAX_ROWS_IN_PLACE or x.dtype not in _OPMATH:
        return False
    return conv_state.dim() == 3 and conv_state.shape[2] <= MAX_KERNEL_WIDTH


@register_fake("eaml_ext::mamba_step")
def _fake(x: Tensor, conv_state: Tensor, ssm_state: Tensor, *weights: Any) -> Results:
    out_proj = weights[-2]
    conv_shape = conv_state.shape
    return x.new_empty(len(x), len(out_proj)), x.new_empty(conv_shape), ssm_state.new_empty(ssm_state.shape)


@register_flop_formula(library.mamba_step, get_raw=True)
def _count_flops(x: Tensor, conv_state: Tensor, ssm_state: Tensor, *weights: Any, **_: Any) -> int:
    """Count products and sums of the convolution, of the projections and of the scan."""
    in_proj, _, _, _, x_proj, dt_proj, _, _, _, out_proj, _ = weights
    projections = sum(weight.numel() for weight in (in_proj, x_proj, dt_proj, out_proj))
    return int(2 * conv_state.numel() + 2 * x.shape[0] * projections + 6 * ssm_state.numel())
