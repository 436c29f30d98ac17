"""y_t = silu(bias + sum_j weight[:, 0, -1 - j] x_{t-j}): Mamba's convolution over a sequence, or one step.

Between calls ``conv_state`` holds the last ``d_conv`` inputs, ``(batch, d_inner, d_conv)``, the newest last.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext.nn._slots import slotted_row
from eaml_ext.nn.padding import count_sequences
from eaml_ext.nn.submodule import is_plain
from eaml_ext.ops import causal_conv1d

Activation = Callable[[Tensor], Tensor]


def causal_conv(
    x: Tensor,
    conv_state: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    silu: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = bias + sum_j weight[:, 0, -1 - j] x_{t-j}`` per channel, over the ``d_conv`` last inputs of the episode.

    Args:
        x: ``(batch, length, dim)``, floating.
        conv_state: ``(batch, dim, d_conv)``, floating; the inputs before x, the newest last; zeros if absent. With
            ``cu_seqlens`` it has one row per sequence.
        weight: ``(dim, 1, d_conv)``, floating; as in ``nn.Conv1d(dim, dim, d_conv, groups=dim)``.
        bias: ``(dim,)``, floating.
        reset: ``(batch, length)``, bool; an episode starts at t, and inputs before it count as zero.
        lengths: ``(batch,)``, integer; the number of steps of each row, ``length`` if absent.
        silu: return ``silu(y)``.
        cu_seqlens: ``(sequences + 1,)``, int32; the boundaries of the sequences packed into the only row.

    Returns:
        y, of the shape and dtype of ``x``, and the ``conv_state`` after the last step of each row or sequence.

    >>> weight = torch.tensor([[[0.5, 1.0]]])
    >>> y, conv_state = causal_conv(torch.tensor([[[2.0], [4.0], [6.0]]]), None, weight, None)
    >>> y.flatten().tolist(), conv_state.flatten().tolist()
    ([2.0, 5.0, 8.0], [4.0, 6.0])
    """

    def convolve(x: Tensor, conv_state: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        before = None if conv_state is None else conv_state[..., 1:].to(x.dtype)
        return _convolve(x.mT, before, weight, bias, reset, silu, cu_seqlens).mT

    size = weight.shape[-1]
    if cu_seqlens is None or reset is None:
        y = convolve(x, conv_state, reset, cu_seqlens)
    else:  # the op takes one of the two
        y = _convolve_slotted(lambda x, reset: convolve(x, None, reset, None), x, conv_state, size, reset, cu_seqlens)
    return y, _next_state(x, conv_state, size, reset, lengths, cu_seqlens)


def conv1d_scan(
    conv1d: nn.Module,
    act: Activation,
    d_conv: int,
    x: Tensor,
    conv_state: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``act`` of :func:`causal_conv` of the module ``conv1d``.

    The modules are called where their type and weights do not define them.
    """
    if is_plain_depthwise(conv1d, d_conv):
        silu = is_silu(act)
        y, conv_state = causal_conv(x, conv_state, conv1d.weight, conv1d.bias, reset, lengths, silu, cu_seqlens)
        return y if silu else act(y), conv_state

    def call(inputs: Tensor, reset: Tensor | None) -> Tensor:
        return _call_conv1d(conv1d, inputs, d_conv, None if reset is None else _in_episode(reset, d_conv))

    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], d_conv - 1, x.shape[2]) if conv_state is None else conv_state[..., 1:].mT
        y = call(torch.cat([before.to(x.dtype), x], dim=1), reset)
    else:

        def call_padded(x: Tensor, reset: Tensor | None) -> Tensor:
            return call(F.pad(x, (0, 0, d_conv - 1, 0)), reset)

        y = _convolve_slotted(call_padded, x, conv_state, d_conv, reset, cu_seqlens)
    return act(y.to(x.dtype)), _next_state(x, conv_state, d_conv, reset, lengths, cu_seqlens)


def conv1d_step(conv1d: nn.Module, act: Activation, d_conv: int, conv_state: Tensor) -> Tensor:
    """The output ``(batch, dim)`` at the newest input of ``conv_state`` ``(batch, dim, d_conv)``."""
    if not is_plain_depthwise(conv1d, d_conv):
        return act(_call_conv1d(conv1d, conv_state.mT, d_conv, None)[:, 0].to(conv_state.dtype))
    silu = is_silu(act)
    y = _convolve(conv_state[..., -1:], conv_state[..., :-1], conv1d.weight, conv1d.bias, None, silu)[..., 0]
    return y if silu else act(y)


def _convolve(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`causal_conv1d` of x ``(batch, dim, length)``, with parameters of any floating dtype."""
    opmath = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps = weight.squeeze(1)
    if taps.dtype != opmath:
        taps, bias = taps.to(opmath), None if bias is None else bias.to(opmath)
    activation: Literal["silu"] | None = "silu" if silu else None
    return causal_conv1d(x, taps, bias, None, before, activation=activation, reset=reset, cu_seqlens=cu_seqlens)


def _convolve_slotted(
    convolve: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    conv_state: Tensor | None,
    d_conv: int,
    reset: Tensor | None,
    cu_seqlens: Tensor,
) -> Tensor:
    """Return ``convolve(x, reset)`` of packed sequences, run on a row with each sequence's last inputs before it."""
    row = slotted_row(cu_seqlens, x.shape[1], d_conv - 1)
    before = None if conv_state is None else conv_state[..., 1:].mT.reshape(-1, x.shape[2]).to(x.dtype)
    y = convolve(row.insert(x, before), None if reset is None else row.insert(reset))
    return y[:, row.steps]


def _next_state(
    x: Tensor,
    conv_state: Tensor | None,
    d_conv: int,
    reset: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The last ``d_conv`` inputs of the last episode of each row, or of each packed sequence."""
    batch, length, dim = x.shape
    rows = count_sequences(x, cu_seqlens)
    before = x.new_zeros(rows, dim, d_conv) if conv_state is None else conv_state.to(x.dtype)
    is_exported = torch.compiler.is_exporting() and cu_seqlens is None
    is_whole = lengths is None and cu_seqlens is None  # each row is one sequence without padding
    if is_exported:  # torch.export can prove that these sizes and indices are valid at every length
        last = torch.cat([before, x.mT], dim=2)
        if lengths is None:
            last = last[..., length:].contiguous()
        else:
            newest = lengths.unsqueeze(1) + torch.arange(d_conv, device=x.device)
            last = last.gather(2, newest.unsqueeze(1).expand(rows, dim, d_conv))
    elif is_whole:
        last = torch.cat([before, x[:, max(length - d_conv, 0) :].mT], dim=2)[..., -d_conv:].contiguous()
    if (is_exported or is_whole) and reset is None:
        return last
    # Each sequence is a part of the steps of all rows: its boundaries (rows, 1), its last positions (rows, d_conv).
    if cu_seqlens is None:
        begin = length * torch.arange(rows, device=x.device).unsqueeze(1)
        end = begin + (length if lengths is None else lengths.unsqueeze(1))
    else:
        begin, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    positions, steps = end + torch.arange(-d_conv, 0, device=x.device), batch * length
    if not (is_exported or is_whole):
        from_state = (positions - begin + d_conv).clamp(0, d_conv - 1)
        last = before.take_along_dim(from_state.unsqueeze(1), dim=2)
        if steps:
            from_x = x.reshape(steps, dim)[positions.clamp(0, steps - 1)].mT
            last = torch.where((positions >= begin).unsqueeze(1), from_x, last)
    if reset is None:
        return last
    resets = F.pad(reset.reshape(steps).cumsum(0), (1, 0))  # up to each step
    # The episode of each input; those in conv_state have that before the first step.
    episode = resets[torch.maximum(positions + 1, begin).clamp(max=steps)]
    return last.masked_fill((episode != episode[:, -1:]).unsqueeze(1), 0)


def _in_episode(reset: Tensor, d_conv: int) -> Tensor:
    """``(batch, length, d_conv)``, bool: whether the input j steps before t belongs to the episode of t."""
    past = F.pad(reset, (d_conv - 1, 0))
    masks = [torch.ones_like(reset)]
    for j in range(1, d_conv):
        masks.append(masks[-1] & ~past[:, d_conv - j : d_conv - j + reset.shape[1]])
    return torch.stack(masks, dim=-1)


def _call_conv1d(conv1d: nn.Module, inputs: Tensor, d_conv: int, in_episode: Tensor | None) -> Tensor:
    """Convolve ``(batch, d_conv - 1 + length, dim)`` by a call of ``conv1d``, which pads by ``d_conv - 1``."""
    if inputs.shape[1] < d_conv:
        return inputs[:, :0]
    x = inputs.mT
    if in_episode is not None:  # each step becomes a row with its own masked inputs
        x = x.unfold(2, d_conv, 1).masked_fill(~in_episode.flip(-1).unsqueeze(1), 0).permute(0, 2, 1, 3).flatten(0, 1)
    rows, dim, size = x.shape
    y: Tensor = conv1d(x)
    wanted = (rows, dim, size + d_conv - 1)
    if y.shape != wanted:
        raise ValueError(f"conv1d must map {(rows, dim, size)} to {wanted}, got {tuple(y.shape)}")
    y = y[..., d_conv - 1 : size]
    return y.mT if in_episode is None else y.reshape(*in_episode.shape[:2], dim)


def is_plain_depthwise(conv1d: Any, d_conv: int) -> TypeGuard[nn.Conv1d]:
    """Whether a call of ``conv1d`` computes :func:`causal_conv` with its weight and bias."""
    if not is_plain(conv1d, nn.Conv1d):
        return False
    return conv1d.weight.shape[1:] == (1, d_conv) and conv1d.stride == conv1d.dilation == (1,)


def is_silu(act: Any) -> bool:
    """Return whether a call of ``act`` computes ``silu`` alone."""
    return is_plain(act, nn.SiLU)
