"""x, B, C = conv(x, B, C);  delta = clamp(softplus(dt + dt_bias));  y = selective_scan(x, delta, -exp(A_log), B, C, D).

The part of Mamba-2's block between its two projections (Dao & Gu 2024, "Transformers are SSMs", section 7), on any
module with the attributes of :class:`Mamba2MixerLayer`.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext.nn._causal_conv import conv1d_scan, conv1d_step
from eaml_ext.nn.padding import padding_mask
from eaml_ext.nn.precision import to_opmath
from eaml_ext.ops import selective_scan, selective_scan_step

UNLIMITED = (0.0, math.inf)


class Mamba2MixerLayer(Protocol):
    """The submodules, parameters and sizes of a Mamba-2 block, in mamba_ssm's names."""

    @property
    def d_conv(self) -> int:
        """Width of the convolution."""

    @property
    def d_ssm(self) -> int:
        """Channels of the scan: those of all heads."""

    @property
    def ngroups(self) -> int:
        """Groups of heads, each with its own B and C."""

    @property
    def conv1d(self) -> nn.Module:
        """``(batch, conv_dim, length)`` -> ``(batch, conv_dim, length + d_conv - 1)``."""

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """The activation after the convolution."""

    @property
    def dt_bias(self) -> Tensor:
        """``(nheads,)``, floating."""

    @property
    def A_log(self) -> Tensor:
        """``(nheads,)``, floating; ``A = -exp(A_log)``."""

    @property
    def D(self) -> Tensor:
        """``(nheads,)`` or ``(d_ssm,)``, floating."""


def mamba2_scan(
    layer: Mamba2MixerLayer,
    x: Tensor,
    dt: Tensor,
    gate: Tensor | None = None,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_limit: tuple[float, float] = UNLIMITED,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a sequence through the convolution and the scan that ``layer`` holds.

    Args:
        layer: the module with the submodules and parameters.
        x: ``(batch, length, conv_dim)``, floating; x, B and C side by side.
        dt: ``(batch, length, nheads)``, floating; step sizes before bias and softplus.
        gate: ``(batch, length, d_ssm)``, floating; y is multiplied by its silu.
        conv_state: ``(batch, conv_dim, d_conv)``, floating; zeros if absent. With ``cu_seqlens`` states have one row
            per sequence.
        ssm_state: ``(batch, nheads, headdim, d_state)``, floating; zeros if absent.
        reset: ``(batch, length)``, bool; an episode starts at t.
        mask: ``(batch, length)``; the output of the convolution is multiplied by it, so 0 marks padding.
        lengths: ``(batch,)``, integer; the number of steps of each row.
        cu_seqlens: ``(sequences + 1,)``, int32; the boundaries of the sequences packed into the only row.
        dt_limit: step sizes are clamped between its two numbers.

    Returns:
        y ``(batch, length, d_ssm)``, then ``conv_state`` and ``ssm_state`` after the last step of each row or sequence.
    """
    x, conv_state = conv1d_scan(layer.conv1d, layer.act, layer.d_conv, x, conv_state, reset, lengths, cu_seqlens)
    x, B, C = _split_groups(layer, x if mask is None else x * mask.unsqueeze(-1).to(x.dtype))
    delta = _step_sizes(layer, dt, dt_limit).to(x.dtype)
    if lengths is not None:
        delta = delta.masked_fill(padding_mask(lengths, delta.shape[1]).unsqueeze(-1), 0)
    A, D = _decay_and_skip(layer, B.shape[-1])
    y, ssm_state = selective_scan(
        x.mT,
        _per_channel(layer, delta).mT,
        A,
        B.movedim(1, -1),
        C.movedim(1, -1),
        D,
        None if gate is None else gate.mT,
        return_last_state=True,
        initial_state=None if ssm_state is None else ssm_state.flatten(1, 2),
        reset=reset,
        cu_seqlens=cu_seqlens,
    )
    return y.mT, conv_state, ssm_state.unflatten(1, (len(layer.A_log), -1))


def mamba2_step(
    layer: Mamba2MixerLayer,
    x: Tensor,
    dt: Tensor,
    gate: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    dt_limit: tuple[float, float] = UNLIMITED,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one step of :func:`mamba2_scan`, with inputs and y without the dimension of time."""
    conv_state = torch.cat([conv_state[..., 1:].to(x.dtype), x.unsqueeze(-1)], dim=-1)
    x, B, C = _split_groups(layer, conv1d_step(layer.conv1d, layer.act, layer.d_conv, conv_state))
    delta = _per_channel(layer, _step_sizes(layer, dt, dt_limit).to(x.dtype))
    A, D = _decay_and_skip(layer, B.shape[-1])
    y, ssm_state = selective_scan_step(ssm_state.flatten(1, 2), x, delta, A, B, C, D, gate)
    return y, conv_state, ssm_state.unflatten(1, (len(layer.A_log), -1))


def _split_groups(layer: Mamba2MixerLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(*, conv_dim)`` -> x ``(*, d_ssm)``, and B and C ``(*, ngroups, d_state)``."""
    size = (x.shape[-1] - layer.d_ssm) // 2
    x, B, C = x.split((layer.d_ssm, size, size), dim=-1)
    shape = (layer.ngroups, size // layer.ngroups)
    return x, B.unflatten(-1, shape), C.unflatten(-1, shape)


def _step_sizes(layer: Mamba2MixerLayer, dt: Tensor, limit: tuple[float, float]) -> Tensor:
    """``(*, nheads)`` -> ``(*, nheads)``, in full precision. The op's softplus would run for every channel."""
    delta = F.softplus(to_opmath(dt) + to_opmath(layer.dt_bias))
    return delta if tuple(limit) == UNLIMITED else delta.clamp(*limit)


def _decay_and_skip(layer: Mamba2MixerLayer, d_state: int) -> tuple[Tensor, Tensor]:
    """A ``(d_ssm, d_state)``, with stride 0 over the states so that kernels share the decay, and D ``(d_ssm,)``."""
    A, D = _per_channel(layer, -to_opmath(layer.A_log).exp()), to_opmath(layer.D)
    return A.unsqueeze(-1).expand(layer.d_ssm, d_state), D if len(D) == layer.d_ssm else _per_channel(layer, D)


def _per_channel(layer: Mamba2MixerLayer, x: Tensor) -> Tensor:
    """``(*, nheads)`` -> ``(*, d_ssm)``: repeat each head's number for its channels."""
    return x.unsqueeze(-1).expand(*x.shape, layer.d_ssm // x.shape[-1]).flatten(-2)
