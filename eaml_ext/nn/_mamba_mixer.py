"""x, z = in_proj(x);  x = silu(conv(x));  dt, B, C = x_proj(x);  out_proj(selective_scan(x, dt_proj(dt), A, B, C, z)).

The Mamba block of Gu & Dao 2023 ("Mamba", figure 3) on any module with the submodules of :class:`MambaMixerLayer`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from eaml_ext.nn._causal_conv import conv1d_scan, conv1d_step, plain_silu_taps
from eaml_ext.nn._row_invariant import linear, linear_step, project
from eaml_ext.nn.padding import zero_delta_after_length
from eaml_ext.nn.precision import to_opmath
from eaml_ext.nn.submodule import is_plain
from eaml_ext.ops import selective_scan, selective_scan_step
from eaml_ext.ops.mamba_step import mamba_step


class MambaMixerLayer(Protocol):
    """The submodules and parameters of a Mamba block, in mamba_ssm's names."""

    @property
    def d_conv(self) -> int:
        """Width of the convolution."""

    @property
    def in_proj(self) -> nn.Module:
        """``(*, d_model)`` -> ``(*, 2 * d_inner)``: x and the gate z."""

    @property
    def conv1d(self) -> nn.Module:
        """``(batch, d_inner, length)`` -> ``(batch, d_inner, length + d_conv - 1)``."""

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """The activation after the convolution."""

    @property
    def x_proj(self) -> nn.Module:
        """``(*, d_inner)`` -> ``(*, dt_rank + 2 * d_state)``: dt, B and C."""

    @property
    def dt_proj(self) -> nn.Module:
        """``(*, dt_rank)`` -> ``(*, d_inner)``."""

    @property
    def A_log(self) -> Tensor:
        """``(d_inner, d_state)``, floating; ``A = -exp(A_log)``."""

    @property
    def D(self) -> Tensor:
        """``(d_inner,)``, floating."""

    @property
    def out_proj(self) -> nn.Module:
        """``(*, d_inner)`` -> ``(*, d_model)``."""


def mixer_scan(
    layer: MambaMixerLayer,
    x: Tensor,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a sequence through the block that ``layer`` holds.

    Args:
        layer: the module with the submodules and parameters.
        x: ``(batch, length, d_model)``, floating.
        conv_state: ``(batch, d_inner, d_conv)``, floating; zeros if absent. With ``cu_seqlens`` states have one row per
            sequence.
        ssm_state: ``(batch, d_inner, d_state)``, floating; zeros if absent.
        reset: ``(batch, length)``, bool; an episode starts at t.
        mask: ``(batch, length)``; the input of the scan is multiplied by it, so 0 marks padding.
        lengths: ``(batch,)``, integer; the number of steps of each row.
        cu_seqlens: ``(sequences + 1,)``, int32; the boundaries of the sequences packed into the only row.

    Returns:
        y, of the shape of ``x``, then ``conv_state`` and ``ssm_state`` after the last step of each row or sequence.
    """
    x, z = linear(layer.in_proj, x).chunk(2, dim=-1)
    x, conv_state = conv1d_scan(layer.conv1d, layer.act, layer.d_conv, x, conv_state, reset, lengths, cu_seqlens)
    x = x if mask is None else x * mask.unsqueeze(-1).to(x.dtype)
    delta, B, C, delta_bias = _project_delta(layer, x)
    y, ssm_state = selective_scan(
        x.mT,
        zero_delta_after_length(delta.mT, lengths),
        -torch.exp(to_opmath(layer.A_log)),
        B.mT,
        C.mT,
        to_opmath(layer.D),
        z.mT,
        delta_bias,
        True,
        True,
        initial_state=ssm_state,
        reset=reset,
        cu_seqlens=cu_seqlens,
    )
    return linear(layer.out_proj, y.mT), conv_state, ssm_state


def mixer_step(
    layer: MambaMixerLayer, x: Tensor, conv_state: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one step of :func:`mixer_scan`, ``x`` and y ``(batch, d_model)``."""
    xz = linear_step(layer.in_proj, x)
    conv_state = conv_state.to(xz.dtype)
    A, D = -torch.exp(to_opmath(layer.A_log)), to_opmath(layer.D)
    x_proj, dt_proj, taps = layer.x_proj, layer.dt_proj, plain_silu_taps(layer.conv1d, layer.act, layer.d_conv)
    if taps is not None and is_plain(x_proj, nn.Linear) and x_proj.bias is None and is_plain(dt_proj, nn.Linear):
        dt_bias = None if dt_proj.bias is None else to_opmath(dt_proj.bias)
        weights = *(None if v is None else to_opmath(v) for v in taps), x_proj.weight, dt_proj.weight, dt_bias
        y, conv_state, ssm_state = mamba_step(xz, conv_state, ssm_state, *weights, A, D, linear=project)
    else:
        x, z = xz.chunk(2, dim=-1)
        conv_state = torch.cat([conv_state[..., 1:], x.unsqueeze(-1)], dim=-1)
        x = conv1d_step(layer.conv1d, layer.act, layer.d_conv, conv_state)
        delta, B, C, dt_bias = _project_delta(layer, x)
        y, ssm_state = selective_scan_step(ssm_state, x, delta, A, B, C, D, z, dt_bias, True)
    return linear_step(layer.out_proj, y), conv_state, ssm_state


def _project_delta(layer: MambaMixerLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Delta, B, C, and the bias that the op adds to delta in full precision; None where ``dt_proj`` added it."""
    d_state, dt_proj = layer.A_log.shape[1], layer.dt_proj
    x = linear(layer.x_proj, x)
    dt, B, C = x.split((x.shape[-1] - 2 * d_state, d_state, d_state), dim=-1)
    if is_plain(dt_proj, nn.Linear):
        return project(dt, dt_proj.weight), B, C, None if dt_proj.bias is None else to_opmath(dt_proj.bias)
    return dt_proj(dt), B, C, None
