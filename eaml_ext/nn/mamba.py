"""x, z = in_proj(x);  x = silu(conv(x));  dt, B, C = x_proj(x);  out_proj(selective_scan(x, dt_proj(dt), A, B, C, z)).

The Mamba block of Gu & Dao 2023 ("Mamba", figure 3), in mamba_ssm's names. ``mixer_scan`` and ``mixer_step`` compute it
for any module that holds its parameters under those names, as the one of transformers does.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext.nn.padding import check_lengths, check_reset, padded, stop
from eaml_ext.nn.precision import wide
from eaml_ext.ops import selective_scan, selective_scan_step


def causal_conv(
    x: Tensor,
    window: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = bias + sum_j weight[:, 0, -1 - j] x_{t-j}`` per channel, over the ``width`` last inputs of the episode.

    Args:
        x: ``(batch, length, dim)``.
        window: the inputs before x, ``(batch, dim, width)``, the newest last; zeros if absent.
        weight: ``(dim, 1, width)``, as of ``nn.Conv1d(dim, dim, width, groups=dim)``.
        bias: ``(dim,)``.
        reset: ``(batch, length)`` bool: an episode starts at t, what was before it counts as zero.
        lengths: ``(batch,)``: the last step of each row, ``length`` if absent.

    Returns:
        y like ``x``, and the window after the last step.
    """
    length, width = x.shape[1], weight.shape[-1]
    before = x.new_zeros(x.shape[0], width, x.shape[2]) if window is None else window.mT.to(x.dtype)
    inputs = torch.cat([before, x], dim=1)
    keep = None if reset is None else _kept(reset, width)
    if lengths is None:
        last = inputs[:, length:]
        kept = None if keep is None or not length else keep[:, -1]
    else:
        at = lengths.unsqueeze(-1) + torch.arange(width, device=x.device)
        last = inputs.take_along_dim(at.unsqueeze(-1), dim=1)
        kept = None
        if keep is not None:  # of a row without steps, the whole window before
            kept = F.pad(keep, (0, 0, 1, 0), value=True).take_along_dim(lengths.view(-1, 1, 1).long(), dim=1)[:, 0]
    if kept is not None:
        last = last.masked_fill(~kept.flip(-1).unsqueeze(-1), 0)
    y = _convolve(inputs[:, 1:], weight, bias, keep).to(x.dtype)
    return y, last.mT.contiguous()


def _kept(reset: Tensor, width: int) -> Tensor:
    """(batch, length, width) bool: whether the input j steps before t belongs to the episode of t."""
    past = F.pad(reset, (width - 1, 0))
    kept = [torch.ones_like(reset)]
    for j in range(1, width):
        kept.append(kept[-1] & ~past[:, width - j : width - j + reset.shape[1]])
    return torch.stack(kept, dim=-1)


def _convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
    """``inputs`` (batch, width - 1 + length, dim) -> (batch, length, dim)."""
    width = weight.shape[-1]
    length = inputs.shape[1] - width + 1
    if keep is None and length and not torch.is_grad_enabled():
        # One pass over memory. Where gradients are asked for, its double backward would take channels one by one.
        taps = weight.to(inputs.dtype).unsqueeze(2)
        bias = None if bias is None else bias.to(inputs.dtype)
        return F.conv2d(inputs.mT.unsqueeze(2), taps, bias, groups=len(taps)).squeeze(2).mT
    taps, inputs = wide(weight).squeeze(1).mT, wide(inputs)
    y = None if bias is None else wide(bias)
    for j in reversed(range(width)):
        start = width - 1 - j
        x, w = inputs[:, start : start + length], taps[start]
        x = x if keep is None or j == 0 else x.masked_fill(~keep[..., j : j + 1], 0)
        y = x * w if y is None else torch.addcmul(y, x, w)
    assert y is not None
    return y


def mixer_scan(
    layer: Any,
    x: Tensor,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A sequence through the parameters of ``layer``: y, and both states after the last step.

    ``mask`` ``(batch, length)`` zeroes what enters the scan where it is 0.
    """
    rank, state = layer.dt_proj.weight.shape[1], layer.A_log.shape[1]
    x, z = layer.in_proj(x).chunk(2, dim=-1)
    x, conv_state = causal_conv(x, conv_state, layer.conv1d.weight, layer.conv1d.bias, reset, lengths)
    x = layer.act(x)
    x = x if mask is None else x * mask.unsqueeze(-1).to(x.dtype)
    delta, B, C = layer.x_proj(x).split((rank, state, state), dim=-1)
    y, last = selective_scan(
        x.mT,
        stop(F.linear(delta, layer.dt_proj.weight).mT, lengths),
        -torch.exp(wide(layer.A_log)),
        B.mT,
        C.mT,
        wide(layer.D),
        z.mT,
        wide(layer.dt_proj.bias),
        True,
        True,
        initial_state=ssm_state,
        reset=reset,
    )
    return layer.out_proj(y.mT), conv_state, last


def mixer_step(layer: Any, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of :func:`mixer_scan`, ``x`` ``(batch, d_model)``."""
    rank, state = layer.dt_proj.weight.shape[1], layer.A_log.shape[1]
    x, z = layer.in_proj(x).chunk(2, dim=-1)
    conv_state = torch.cat([conv_state[..., 1:].to(x.dtype), x.unsqueeze(-1)], dim=-1)
    mixed = (wide(conv_state) * wide(layer.conv1d.weight).squeeze(1)).sum(-1)
    if layer.conv1d.bias is not None:
        mixed = mixed + wide(layer.conv1d.bias)
    x = layer.act(mixed.to(x.dtype))
    delta, B, C = layer.x_proj(x).split((rank, state, state), dim=-1)
    y, last = selective_scan_step(
        ssm_state,
        x,
        F.linear(delta, layer.dt_proj.weight),
        -torch.exp(wide(layer.A_log)),
        B,
        C,
        wide(layer.D),
        z,
        wide(layer.dt_proj.bias),
        True,
    )
    return layer.out_proj(y), conv_state, last


class Mamba(nn.Module):
    """Mamba's block: the constructor, parameter names and initialisation of ``mamba_ssm.Mamba``, whose weights load.

    Runs on a CPU, takes and returns states, knows episode resets, and is differentiable twice. Given the same seed, the
    parameters are drawn as there, in the same order.

    Args:
        d_model: width of input and output.
        d_state: states per channel.
        d_conv: width of the causal convolution.
        expand: the block is ``int(expand * d_model)`` channels wide inside.
        dt_rank: rank of the step size's projection, ``"auto"``: ``ceil(d_model / 16)``.
        dt_min, dt_max: step sizes start log-uniform between them, and at least ``dt_init_floor``.
        dt_init: ``"random"`` or ``"constant"``, the projection's weights, of scale ``dt_scale * dt_rank ** -0.5``.
        conv_bias, bias: whether the convolution, and the input and output projections, have one.
        use_fast_path: taken for compatibility; there is one path.
        layer_idx: the key of this layer's states in ``inference_params``.
        device, dtype: of the parameters; ``A_log`` and ``D`` are float32 at least.

    Raises:
        TypeError, ValueError: an argument is out of its range, or an input or state has the wrong shape, dtype or
            device.

    Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3.4.

    >>> block = Mamba(16)
    >>> x = torch.randn(2, 10, 16)
    >>> block(x).shape
    torch.Size([2, 10, 16])
    >>> y, (conv_state, ssm_state) = block.scan(x[:, :9])
    >>> y, conv_state, ssm_state = block.step(x[:, 9:], conv_state, ssm_state)
    >>> torch.allclose(y, block(x)[:, 9:], atol=1e-5), conv_state.shape, ssm_state.shape
    (True, torch.Size([2, 32, 4]), torch.Size([2, 32, 16]))
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)):
            _check.positive("Mamba", name, size, integer=True)
        for name, value in (
            ("expand", expand),
            ("dt_min", dt_min),
            ("dt_max", dt_max),
            ("dt_scale", dt_scale),
            ("dt_init_floor", dt_init_floor),
        ):
            _check.positive("Mamba", name, value)
        for name, flag in (("conv_bias", conv_bias), ("bias", bias), ("use_fast_path", use_fast_path)):
            _check.flag("Mamba", name, flag)
        if not dt_min <= dt_max < math.inf:
            raise ValueError(f"Mamba: dt_max must be finite and at least dt_min, {dt_min}, got {dt_max}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"Mamba: dt_init must be 'random' or 'constant', got {dt_init!r}")
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"Mamba: dt_rank must be 'auto' or an integer, got {dt_rank!r}")
        rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        _check.positive("Mamba", "dt_rank", rank, integer=True)
        inner = int(expand * d_model)
        if inner < 1:
            raise ValueError(f"Mamba: expand must make d_model {d_model} at least 1 channel wide, got {expand}")

        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank, self.layer_idx, self.use_fast_path = inner, rank, layer_idx, use_fast_path
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, **kind)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, padding=d_conv - 1, groups=inner, bias=conv_bias, **kind)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False, **kind)
        self.dt_proj = nn.Linear(rank, inner, **kind)
        scale = dt_scale * rank**-0.5
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, scale)
        else:
            nn.init.uniform_(self.dt_proj.weight, -scale, scale)
        drawn = torch.rand(inner, **kind)
        step = torch.exp(drawn * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # its softplus is the step
        full = torch.float64 if dtype == torch.float64 else torch.float32
        states = torch.arange(1, d_state + 1, dtype=full, device=device)
        self.A_log = nn.Parameter(states.log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner, dtype=full, device=device))
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **kind)
        # Marks that training code for mamba_ssm looks for.
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        self.A_log._no_weight_decay = self.D._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, inference_params: Any = None) -> Tensor:
        """``(batch, length, d_model)`` -> the same shape.

        ``inference_params`` is mamba_ssm's: ``key_value_memory_dict[layer_idx]`` holds both states between calls, and
        ``seqlen_offset`` 0 starts anew. Here a later call may be of any length.
        """
        if inference_params is None:
            return self.scan(x)[0]
        if self.layer_idx is None:
            raise ValueError("Mamba: inference_params needs a layer_idx, got a layer without one")
        memory = inference_params.key_value_memory_dict
        y, memory[self.layer_idx] = self.scan(x, memory[self.layer_idx] if inference_params.seqlen_offset else None)
        return y

    def scan(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A sequence from a state.

        Args:
            x: ``(batch, length, d_model)``.
            state: ``(conv_state, ssm_state)`` before the first step, as of :meth:`step`; zeros if absent.
            reset: ``(batch, length)`` bool: an episode starts at t; neither state nor convolution sees what was before.
            lengths: ``(batch,)`` integers: row b is ``lengths[b]`` steps long, what follows is padding.

        Returns:
            y like ``x``, zero on padding, and the state after each row's last step.
        """
        self._check_input("Mamba.scan", x, (3,))
        conv_state, ssm_state = (None, None) if state is None else state
        if state is not None:
            self._check_states("Mamba.scan", x, conv_state, ssm_state)
        if reset is not None:
            check_reset("Mamba.scan", reset, x)
        if lengths is not None:
            check_lengths("Mamba.scan", lengths, x)
            padding = padded(lengths, x.shape[1])
            reset = None if reset is None else reset & ~padding
            padding = padding.unsqueeze(-1)
            x = x.masked_fill(padding, 0)  # it may hold anything, NaN too
        y, conv_state, ssm_state = mixer_scan(self, x, conv_state, ssm_state, reset, lengths=lengths)
        return y if lengths is None else y.masked_fill(padding, 0), (conv_state, ssm_state)

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step. The states are returned, not changed in place as in mamba_ssm, so that gradients pass.

        Args:
            x: ``(batch, 1, d_model)``, or ``(batch, d_model)``.
            conv_state: the last inputs of the convolution, ``(batch, d_inner, d_conv)``, the newest last.
            ssm_state: ``(batch, d_inner, d_state)``.

        Returns:
            y like ``x``, and both states.
        """
        self._check_input("Mamba.step", x, (2, 3))
        if x.dim() == 3 and x.shape[1] != 1:
            raise ValueError(f"Mamba.step: x must have length 1, got {x.shape[1]}")
        self._check_states("Mamba.step", x, conv_state, ssm_state)
        y, conv_state, ssm_state = mixer_step(self, x.flatten(1) if x.dim() == 3 else x, conv_state, ssm_state)
        return y.reshape(*x.shape[:-1], self.d_model), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both states before the first step, zeros; ``max_seqlen`` does not matter, ``dtype`` is the convolution's."""
        _check.positive("Mamba.allocate_inference_cache", "batch_size", batch_size, zero=True, integer=True)
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype)
        return conv_state, wide(weight).new_zeros(batch_size, self.d_inner, self.d_state)

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"

    def _check_input(self, where: str, x: Any, ranks: tuple[int, ...]) -> None:
        _check.tensor(where, "x", x)
        if x.dim() not in ranks or x.shape[-1] != self.d_model:
            wanted = f"(batch, {self.d_model}) or (batch, 1, {self.d_model})"
            wanted = wanted if 2 in ranks else f"(batch, length, {self.d_model})"
            raise ValueError(f"{where}: x must have shape {wanted}, got {tuple(x.shape)}")
        _check.device(where, "x", x, self.in_proj.weight.device, "the layer")
        if not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            _check.dtype(where, "x", x, (self.in_proj.weight.dtype,))

    def _check_states(self, where: str, x: Tensor, conv_state: Any, ssm_state: Any) -> None:
        for name, value, width in (("conv_state", conv_state, self.d_conv), ("ssm_state", ssm_state, self.d_state)):
            _check.tensor(where, name, value)
            shape = (x.shape[0], self.d_inner, width)
            _check.shape(where, name, value, shape, str(shape))
            _check.device(where, name, value, x.device, "x")
            if not value.is_floating_point():
                raise TypeError(
                    f"{where}: {name} must be floating point, got {str(value.dtype).removeprefix('torch.')}"
                )
