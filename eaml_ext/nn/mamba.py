"""x, z = in_proj(x);  x = silu(conv(x));  dt, B, C = x_proj(x);  out_proj(selective_scan(x, dt_proj(dt), A, B, C, z)).

The Mamba block of Gu & Dao 2023 ("Mamba", figure 3), in mamba_ssm's names. ``mixer_scan`` and ``mixer_step`` compute it
for any module that holds its submodules and parameters, ``act`` and ``d_conv`` under those names.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext.nn.padding import check_lengths, check_reset, padding_mask, zero_delta_after_length
from eaml_ext.nn.precision import to_opmath
from eaml_ext.nn.submodule import is_plain, reference_weight
from eaml_ext.ops import selective_scan, selective_scan_step
from eaml_ext.ops._sizes import SIZE_LIMIT, check_size


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
    inputs, last, keep = _conv_inputs(x, window, weight.shape[-1], reset, lengths)
    return _convolve(inputs, weight, bias, keep).to(x.dtype), last


def _conv_inputs(
    x: Tensor, window: Tensor | None, width: int, reset: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs ``(batch, width - 1 + length, dim)`` of the convolution, the window after, and the mask of _kept."""
    length = x.shape[1]
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
    return inputs[:, 1:], last.mT.contiguous(), keep


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
    taps, inputs = to_opmath(weight).squeeze(1).mT, to_opmath(inputs)
    y = None if bias is None else to_opmath(bias)
    for j in reversed(range(width)):
        start = width - 1 - j
        x, w = inputs[:, start : start + length], taps[start]
        x = x if keep is None or j == 0 else x.masked_fill(~keep[..., j : j + 1], 0)
        y = x * w if y is None else torch.addcmul(y, x, w)
    assert y is not None
    return y


def _call_conv(conv: nn.Module, inputs: Tensor, width: int, keep: Tensor | None) -> Tensor:
    """:func:`_convolve` by ``conv``'s own forward, which pads by ``width - 1`` on both sides."""
    x = inputs.mT
    if keep is not None:  # each step has a window of its own
        x = x.unfold(2, width, 1).masked_fill(~keep.flip(-1).unsqueeze(1), 0).permute(0, 2, 1, 3).flatten(0, 1)
    rows, dim, size = x.shape
    if size < width:
        return inputs[:, :0]
    y: Tensor = conv(x)
    if y.shape != (rows, dim, size + width - 1):
        wanted = (rows, dim, size + width - 1)
        raise ValueError(f"Mamba: conv1d must map {(rows, dim, size)} to {wanted}, got {tuple(y.shape)}")
    y = y[..., width - 1 : size]
    return y.mT if keep is None else y.reshape(*keep.shape[:2], dim)


def _is_plain_conv(layer: Any) -> bool:
    """Whether ``conv1d`` does no more than :func:`_convolve` with its weight and bias."""
    conv = layer.conv1d
    if not is_plain(conv, nn.Conv1d):
        return False
    return conv.weight.shape[1:] == (1, layer.d_conv) and conv.stride == conv.dilation == (1,)


def _conv(
    layer: Any, x: Tensor, window: Tensor | None, reset: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`causal_conv` by ``layer.conv1d``."""
    if _is_plain_conv(layer):
        return causal_conv(x, window, layer.conv1d.weight, layer.conv1d.bias, reset, lengths)
    inputs, last, keep = _conv_inputs(x, window, layer.d_conv, reset, lengths)
    return _call_conv(layer.conv1d, inputs, layer.d_conv, keep).to(x.dtype), last


def _conv_step(layer: Any, window: Tensor) -> Tensor:
    """The newest output of :func:`_conv`, ``(batch, dim)``, from the window that ends with its input."""
    conv = layer.conv1d
    if not _is_plain_conv(layer):
        y = _call_conv(conv, window.mT, layer.d_conv, None)[:, 0]
    else:
        y = (to_opmath(window) * to_opmath(conv.weight).squeeze(1)).sum(-1)
        y = y if conv.bias is None else y + to_opmath(conv.bias)
    return y.to(window.dtype)


def _project_delta(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The step size, B and C of ``x``, and the bias that is still to be added to the step size, in full precision."""
    state, proj = layer.A_log.shape[1], layer.dt_proj
    x = layer.x_proj(x)
    delta, B, C = x.split((x.shape[-1] - 2 * state, state, state), dim=-1)
    if is_plain(proj, nn.Linear):
        return F.linear(delta, proj.weight), B, C, None if proj.bias is None else to_opmath(proj.bias)
    return proj(delta), B, C, None


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
    x, z = layer.in_proj(x).chunk(2, dim=-1)
    x, conv_state = _conv(layer, x, conv_state, reset, lengths)
    x = layer.act(x)
    x = x if mask is None else x * mask.unsqueeze(-1).to(x.dtype)
    delta, B, C, bias = _project_delta(layer, x)
    y, last = selective_scan(
        x.mT,
        zero_delta_after_length(delta.mT, lengths),
        -torch.exp(to_opmath(layer.A_log)),
        B.mT,
        C.mT,
        to_opmath(layer.D),
        z.mT,
        bias,
        True,
        True,
        initial_state=ssm_state,
        reset=reset,
    )
    return layer.out_proj(y.mT), conv_state, last


def mixer_step(layer: Any, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of :func:`mixer_scan`, ``x`` ``(batch, d_model)``."""
    x, z = layer.in_proj(x).chunk(2, dim=-1)
    conv_state = torch.cat([conv_state[..., 1:].to(x.dtype), x.unsqueeze(-1)], dim=-1)
    x = layer.act(_conv_step(layer, conv_state))
    delta, B, C, bias = _project_delta(layer, x)
    y, last = selective_scan_step(
        ssm_state,
        x,
        delta,
        -torch.exp(to_opmath(layer.A_log)),
        B,
        C,
        to_opmath(layer.D),
        z,
        bias,
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
        d_model, d_state = check_size("Mamba", "d_model", d_model), check_size("Mamba", "d_state", d_state)
        d_conv, expand = check_size("Mamba", "d_conv", d_conv), _check.positive("Mamba", "expand", expand)
        dt_min, dt_max = _check.positive("Mamba", "dt_min", dt_min), _check.positive("Mamba", "dt_max", dt_max)
        dt_scale = _check.positive("Mamba", "dt_scale", dt_scale)
        dt_init_floor = _check.positive("Mamba", "dt_init_floor", dt_init_floor)
        for name, flag in (("conv_bias", conv_bias), ("bias", bias), ("use_fast_path", use_fast_path)):
            _check.flag("Mamba", name, flag)
        if not dt_min <= dt_max < math.inf:
            raise ValueError(f"Mamba: dt_max must be finite and at least dt_min, {dt_min}, got {dt_max}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"Mamba: dt_init must be 'random' or 'constant', got {dt_init!r}")
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"Mamba: dt_rank must be 'auto' or an integer, got {dt_rank!r}")
        rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else check_size("Mamba", "dt_rank", dt_rank)
        if not 1 <= expand * d_model < SIZE_LIMIT:
            raise ValueError(
                f"Mamba: expand must make d_model {d_model} at least 1 channel and less than {SIZE_LIMIT} channels "
                f"wide, got {expand}"
            )
        inner = int(expand * d_model)

        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank, self.layer_idx, self.use_fast_path = inner, rank, layer_idx, bool(use_fast_path)
        conv_bias, bias = bool(conv_bias), bool(bias)
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

    def forward(
        self, x: Tensor, inference_params: Any = None, *, _entry: Callable[[Tensor], Any] | None = None
    ) -> Tensor:
        """``(batch, length, d_model)`` -> the same shape.

        ``inference_params`` is mamba_ssm's ``InferenceParams``: ``key_value_memory_dict[layer_idx]`` holds both states
        between calls, and a call with ``seqlen_offset`` 0 starts from zero states. A later call may be of any length.

        Raises:
            TypeError: ``inference_params`` lacks an attribute.
            ValueError: the layer has no ``layer_idx``, ``seqlen_offset`` is not 0 and there are no states to continue
                from, or ``batch_size_offset`` is not 0.
        """
        if _entry is not None:  # another method of this layer, called so that hooks run
            y: Tensor = _entry(x)
            return y
        if inference_params is None:
            return self.scan(x)[0]
        if self.layer_idx is None:
            raise ValueError("Mamba: inference_params needs a layer_idx, got a layer without one")
        for name in ("key_value_memory_dict", "seqlen_offset"):
            if not hasattr(inference_params, name):
                kind = type(inference_params).__name__
                raise TypeError(f"Mamba: inference_params must have the attribute {name}, got {kind} without it")
        if getattr(inference_params, "batch_size_offset", 0):
            offset = inference_params.batch_size_offset
            raise ValueError(f"Mamba: inference_params.batch_size_offset must be 0, got {offset}")
        memory, state = inference_params.key_value_memory_dict, None
        if inference_params.seqlen_offset:
            state = memory.get(self.layer_idx)
            if state is None:
                raise ValueError(
                    f"Mamba: inference_params.key_value_memory_dict must hold the states of layer {self.layer_idx} "
                    f"where seqlen_offset is {inference_params.seqlen_offset}, got none: begin with seqlen_offset 0"
                )
        y, memory[self.layer_idx] = self.scan(x, state)
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
            padding = padding_mask(lengths, x.shape[1])
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
        batch_size = check_size("Mamba.allocate_inference_cache", "batch_size", batch_size, zero=True)
        weight = reference_weight(self.conv1d, self.in_proj)
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype)
        return conv_state, to_opmath(weight).new_zeros(batch_size, self.d_inner, self.d_state)

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"

    def _check_input(self, where: str, x: Any, ranks: tuple[int, ...]) -> None:
        _check.tensor(where, "x", x)
        if x.dim() not in ranks or x.shape[-1] != self.d_model:
            wanted = f"(batch, {self.d_model}) or (batch, 1, {self.d_model})"
            wanted = wanted if 2 in ranks else f"(batch, length, {self.d_model})"
            raise ValueError(f"{where}: x must have shape {wanted}, got {tuple(x.shape)}")
        like = reference_weight(self.in_proj, self.conv1d)
        _check.device(where, "x", x, like.device, "the layer")
        if not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            _check.dtype(where, "x", x, (like.dtype,))

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
