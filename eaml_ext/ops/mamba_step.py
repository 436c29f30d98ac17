"""One step of a Mamba block between its outer projections, in one call on a CPU: at batch 1 calls would cost most."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from eaml_ext._torch_compat import dispatch_mode_active, has_kernel
from eaml_ext.ops._library import library
from eaml_ext.ops._typed import register_fake
from eaml_ext.ops.causal_conv1d import causal_conv1d, causal_conv1d_reference
from eaml_ext.ops.causal_conv1d._schema import MAX_KERNEL_WIDTH
from eaml_ext.ops.row_invariant_linear import MAX_ROWS_IN_PLACE, PLAIN
from eaml_ext.ops.selective_scan import selective_scan_reference, selective_scan_step
from eaml_ext.ops.selective_scan._autograd import can_skip_autograd

Linear = Callable[[Tensor, Tensor], Tensor]
Results = tuple[Tensor, Tensor, Tensor]

torch.library.define(
    "eaml_ext::mamba_step",
    "(Tensor xz, Tensor conv_state, Tensor ssm_state, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj, "
    "Tensor dt_proj, Tensor? dt_bias, Tensor A, Tensor D) -> (Tensor, Tensor, Tensor)",
)

_op = library.mamba_step.default
_ON_CPU = has_kernel("eaml_ext::mamba_step", "CPU")
# The dtype of arithmetic for each dtype of xz.
_OPMATH = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def mamba_step(
    xz: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    *,
    linear: Linear = F.linear,
) -> Results:
    """``x = silu(conv(x));  dt, B, C = x_proj x;  selective_scan_step(ssm_state, x, dt_proj dt, A, B, C, D, z)``.

    Without gradients one kernel of the CPU runs the whole step for up to eight rows. In float32 and float64 it has the
    bits of the ops one by one, with a ``linear`` whose rows are independent of the batch. In reduced precision it
    rounds y alone, once. Other calls run op by op, with the derivatives of the ops.

    Args:
        xz: ``(batch, 2 * dim)``, float32, float64, bfloat16 or float16; the input x and the gate z.
        conv_state: ``(batch, dim, width)``, dtype of ``xz``; the last inputs of the convolution, the newest last.
        ssm_state: ``(batch, dim, dstate)``, in full precision.
        conv_weight: ``(dim, width)``, in full precision.
        conv_bias: ``(dim,)``, in full precision.
        x_proj: ``(rank + 2 * dstate, dim)``, dtype of ``xz``.
        dt_proj: ``(dim, rank)``, dtype of ``xz``.
        dt_bias: ``(dim,)``, in full precision.
        A: ``(dim, dstate)``, in full precision.
        D: ``(dim,)``, in full precision.
        linear: ``(x, weight) -> x W^T``, for calls op by op.

    Returns:
        y ``(batch, dim)``, then ``conv_state`` and ``ssm_state`` after the step.

    >>> xz, conv_state, ssm_state = torch.randn(1, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2, 3)
    >>> weights = torch.randn(2, 4), None, torch.randn(7, 2), torch.randn(2, 1), None
    >>> y, conv_state, ssm_state = mamba_step(xz, conv_state, ssm_state, *weights, -torch.ones(2, 3), torch.ones(2))
    >>> y.shape, conv_state.shape, ssm_state.shape
    (torch.Size([1, 2]), torch.Size([1, 2, 4]), torch.Size([1, 2, 3]))
    """
    args = (xz, conv_state, ssm_state, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    if _raw_op_accepts(args):
        with contextlib.suppress(ValueError):  # the ops below raise an error that names the argument
            results: Results = _op(*args)
            return results
    x, z = xz.chunk(2, dim=-1)
    u = causal_conv1d(x.unsqueeze(-1), conv_weight, conv_bias, None, conv_state[..., 1:], activation="silu")[..., 0]
    delta, B, C = _project(u, x_proj, dt_proj, A.shape[-1], linear)
    y, ssm_state = selective_scan_step(ssm_state, u, delta, A, B, C, D, z, dt_bias, True)
    return y, _push(conv_state, x), ssm_state


def mamba_step_reference(
    xz: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
) -> Results:
    """Run :func:`mamba_step` on the references of its ops, in full precision: its specification."""
    full = _OPMATH[xz.dtype]
    x, z = xz.to(full).chunk(2, dim=-1)
    before = conv_state[..., 1:].to(full)
    conv = causal_conv1d_reference(x.unsqueeze(-1), conv_weight, conv_bias, None, before, activation="silu")
    assert isinstance(conv, Tensor)
    u = conv[..., 0]
    delta, B, C = _project(u, x_proj.to(full), dt_proj.to(full), A.shape[-1], F.linear)
    u, delta, B, C, z = (v.unsqueeze(-1) for v in (u, delta, B, C, z))
    y, ssm_state = selective_scan_reference(u, delta, A, B, C, D, z, dt_bias, True, True, initial_state=ssm_state)
    return y.squeeze(-1).to(xz.dtype), _push(conv_state, xz[:, : conv_state.shape[1]]), ssm_state


torch.library.impl("eaml_ext::mamba_step", "CompositeExplicitAutograd", mamba_step_reference)


def _project(u: Tensor, x_proj: Tensor, dt_proj: Tensor, dstate: int, linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
    dt, B, C = linear(u, x_proj).split((dt_proj.shape[1], dstate, dstate), dim=-1)
    return linear(dt, dt_proj), B, C


def _push(conv_state: Tensor, x: Tensor) -> Tensor:
    return torch.cat([conv_state[..., 1:], x.unsqueeze(-1)], dim=-1)


def _raw_op_accepts(args: tuple[Tensor | None, ...]) -> bool:
    """Return whether the raw op may run, which checks shapes and dtypes itself."""
    xz, conv_state, *_, x_proj, _, _, _, _ = args
    if torch.compiler.is_compiling() or not _ON_CPU or any(v is not None and type(v) not in PLAIN for v in args):
        return False
    assert xz is not None and conv_state is not None and x_proj is not None
    if not xz.is_cpu or xz.dtype != x_proj.dtype or xz.dtype not in _OPMATH:
        return False
    if len(xz) > MAX_ROWS_IN_PLACE or conv_state.shape[-1] > MAX_KERNEL_WIDTH:
        return False
    return can_skip_autograd(args) and not dispatch_mode_active()


@register_fake("eaml_ext::mamba_step")
def _fake(xz: Tensor, conv_state: Tensor, ssm_state: Tensor, *_: Any) -> Results:
    batch, dim, width = conv_state.shape
    return xz.new_empty(batch, dim), xz.new_empty(batch, dim, width), ssm_state.new_empty(ssm_state.shape)


@register_flop_formula(library.mamba_step, get_raw=True)
def _count_flops(xz: Tensor, conv_state: Tensor, ssm_state: Tensor, *args: Any, **_: Any) -> int:
    """Count products and sums of the convolution, of both projections and of the scan."""
    x_proj, dt_proj = args[2:4]
    rows, projections = xz.shape[0], x_proj.numel() + dt_proj.numel()
    return int(2 * conv_state.numel() + 2 * rows * projections + 6 * ssm_state.numel())
