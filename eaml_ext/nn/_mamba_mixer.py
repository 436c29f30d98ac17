"""x, z = in_proj(x);  x = silu(conv(x));  dt, B, C = x_proj(x);  out_proj(selective_scan(x, dt_proj(dt), A, B, C, z)).

The Mamba block of Gu & Dao 2023 ("Mamba", figure 3) on any module with the submodules of :class:`MambaMixerLayer`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from eaml_ext._torch_compat import own_parameters, own_submodules
from eaml_ext.nn._causal_conv import conv1d_scan, conv1d_step, is_plain_depthwise, is_silu
from eaml_ext.nn._decoding import linear_step, project_step
from eaml_ext.nn._row_invariant import linear, project
from eaml_ext.nn.padding import zero_delta_after_length
from eaml_ext.nn.precision import to_opmath
from eaml_ext.nn.submodule import is_plain
from eaml_ext.ops import selective_scan, selective_scan_step
from eaml_ext.ops.mamba_step import Weights, mamba_step

_LINEAR_LAYERS = ("in_proj", "x_proj", "dt_proj", "out_proj")


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
    weights = plain_weights(layer)
    if weights is not None:
        return mamba_step(x, conv_state.to(x.dtype), ssm_state, *weights, linear=project_step)
    xz = linear_step(layer.in_proj, x)
    x, z = xz.chunk(2, dim=-1)
    conv_state = torch.cat([conv_state[..., 1:].to(x.dtype), x.unsqueeze(-1)], dim=-1)
    x = conv1d_step(layer.conv1d, layer.act, layer.d_conv, conv_state)
    delta, B, C, dt_bias = _project_delta(layer, x)
    A, D = -torch.exp(to_opmath(layer.A_log)), to_opmath(layer.D)
    y, ssm_state = selective_scan_step(ssm_state, x, delta, A, B, C, D, z, dt_bias, True)
    return linear_step(layer.out_proj, y), conv_state, ssm_state


def plain_weights(layer: MambaMixerLayer) -> Weights | None:
    """The weights that :func:`mamba_step` takes, in order; None where the submodules must be called instead.

    The dicts of the modules are read, because an attribute of a module takes a microsecond.
    """
    if not isinstance(layer, nn.Module):
        return None
    modules = own_submodules(layer)
    conv1d = modules.get("conv1d")
    linears: list[Any] = [modules.get(name) for name in _LINEAR_LAYERS]
    if not (is_plain_depthwise(conv1d, layer.d_conv) and is_silu(modules.get("act"))):
        return None
    if not all(is_plain(module, nn.Linear) for module in linears):
        return None
    conv, (in_proj, x_proj, dt_proj, out_proj) = own_parameters(conv1d), map(own_parameters, linears)
    try:
        if x_proj["bias"] is not None:
            return None
        conv_bias, dt_bias = conv["bias"], dt_proj["bias"]
        return (
            in_proj["weight"],
            in_proj["bias"],
            to_opmath(conv["weight"]),
            None if conv_bias is None else to_opmath(conv_bias),
            x_proj["weight"],
            dt_proj["weight"],
            None if dt_bias is None else to_opmath(dt_bias),
            to_opmath(layer.A_log),
            to_opmath(layer.D),
            out_proj["weight"],
            out_proj["bias"],
        )
    except KeyError:  # a tensor that is no parameter
        return None


def _project_delta(layer: MambaMixerLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Delta, B, C, and the bias that the op adds to delta in full precision; None where ``dt_proj`` added it."""
    d_state, dt_proj = layer.A_log.shape[1], layer.dt_proj
    x = linear(layer.x_proj, x)
    dt, B, C = x.split((x.shape[-1] - 2 * d_state, d_state, d_state), dim=-1)
    if is_plain(dt_proj, nn.Linear):
        return project(dt, dt_proj.weight), B, C, None if dt_proj.bias is None else to_opmath(dt_proj.bias)
    return dt_proj(dt), B, C, None
