"""y_t = bias + sum_j weight[:, 0, -1 - j] x_{t-j}: Mamba's causal depthwise convolution over a sequence, or one step.

Between calls ``conv_state`` holds the last ``d_conv`` inputs, ``(batch, d_inner, d_conv)``, the newest last.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext.nn.precision import to_opmath
from eaml_ext.nn.submodule import is_plain


def causal_conv(
    x: Tensor,
    conv_state: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = bias + sum_j weight[:, 0, -1 - j] x_{t-j}`` per channel, over the ``d_conv`` last inputs of the episode.

    Args:
        x: ``(batch, length, dim)``, floating.
        conv_state: ``(batch, dim, d_conv)``, floating; the inputs before x, the newest last; zeros if absent.
        weight: ``(dim, 1, d_conv)``, floating; as in ``nn.Conv1d(dim, dim, d_conv, groups=dim)``.
        bias: ``(dim,)``, floating.
        reset: ``(batch, length)``, bool; an episode starts at t, and inputs before it count as zero.
        lengths: ``(batch,)``, integer; the number of steps of each row, ``length`` if absent.

    Returns:
        y, of the shape and dtype of ``x``, and the ``conv_state`` after each row's last step.

    >>> weight = torch.tensor([[[0.5, 1.0]]])
    >>> y, conv_state = causal_conv(torch.tensor([[[2.0], [4.0], [6.0]]]), None, weight, None)
    >>> y.flatten().tolist(), conv_state.flatten().tolist()
    ([2.0, 5.0, 8.0], [4.0, 6.0])
    """
    inputs, conv_state, in_episode = _conv_inputs(x, conv_state, weight.shape[-1], reset, lengths)
    return _convolve(inputs, weight, bias, in_episode).to(x.dtype), conv_state


def conv1d_scan(
    conv1d: nn.Module,
    d_conv: int,
    x: Tensor,
    conv_state: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`causal_conv` of the module ``conv1d``, which is called where its weights alone do not define it."""
    if _is_plain_depthwise(conv1d, d_conv):
        return causal_conv(x, conv_state, conv1d.weight, conv1d.bias, reset, lengths)
    inputs, conv_state, in_episode = _conv_inputs(x, conv_state, d_conv, reset, lengths)
    return _call_conv1d(conv1d, inputs, d_conv, in_episode).to(x.dtype), conv_state


def conv1d_step(conv1d: nn.Module, d_conv: int, conv_state: Tensor) -> Tensor:
    """The output ``(batch, dim)`` at the newest input of ``conv_state`` ``(batch, dim, d_conv)``."""
    if not _is_plain_depthwise(conv1d, d_conv):
        y = _call_conv1d(conv1d, conv_state.mT, d_conv, None)[:, 0]
    else:
        y = (to_opmath(conv_state) * to_opmath(conv1d.weight).squeeze(1)).sum(-1)
        y = y if conv1d.bias is None else y + to_opmath(conv1d.bias)
    return y.to(conv_state.dtype)


def _conv_inputs(
    x: Tensor, conv_state: Tensor | None, d_conv: int, reset: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs ``(batch, d_conv - 1 + length, dim)``, the next ``conv_state``, and the mask of ``_in_episode``."""
    length = x.shape[1]
    before = x.new_zeros(x.shape[0], d_conv, x.shape[2]) if conv_state is None else conv_state.mT.to(x.dtype)
    inputs = torch.cat([before, x], dim=1)
    in_episode = None if reset is None else _in_episode(reset, d_conv)
    if lengths is None:
        last = inputs[:, length:]
        kept = None if in_episode is None or not length else in_episode[:, -1]
    else:
        positions = lengths.unsqueeze(-1) + torch.arange(d_conv, device=x.device)
        last = inputs.take_along_dim(positions.unsqueeze(-1), dim=1)
        kept = None
        if in_episode is not None:  # a row without steps keeps its whole conv_state
            index = lengths.view(-1, 1, 1).long()
            kept = F.pad(in_episode, (0, 0, 1, 0), value=True).take_along_dim(index, dim=1)[:, 0]
    if kept is not None:
        last = last.masked_fill(~kept.flip(-1).unsqueeze(-1), 0)
    return inputs[:, 1:], last.mT.contiguous(), in_episode


def _in_episode(reset: Tensor, d_conv: int) -> Tensor:
    """``(batch, length, d_conv)``, bool: whether the input j steps before t belongs to the episode of t."""
    past = F.pad(reset, (d_conv - 1, 0))
    masks = [torch.ones_like(reset)]
    for j in range(1, d_conv):
        masks.append(masks[-1] & ~past[:, d_conv - j : d_conv - j + reset.shape[1]])
    return torch.stack(masks, dim=-1)


def _convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None, in_episode: Tensor | None) -> Tensor:
    """``(batch, d_conv - 1 + length, dim)`` -> ``(batch, length, dim)``."""
    d_conv = weight.shape[-1]
    length = inputs.shape[1] - d_conv + 1
    if in_episode is None and length and not torch.is_grad_enabled():
        # One pass over memory. Not with gradients: the double backward of conv2d loops over the groups.
        taps = weight.to(inputs.dtype).unsqueeze(2)
        bias = None if bias is None else bias.to(inputs.dtype)
        return F.conv2d(inputs.mT.unsqueeze(2), taps, bias, groups=len(taps)).squeeze(2).mT
    taps, inputs = to_opmath(weight).squeeze(1).mT, to_opmath(inputs)
    y = None if bias is None else to_opmath(bias)
    for j in reversed(range(d_conv)):
        start = d_conv - 1 - j
        x, w = inputs[:, start : start + length], taps[start]
        x = x if in_episode is None or j == 0 else x.masked_fill(~in_episode[..., j : j + 1], 0)
        y = x * w if y is None else torch.addcmul(y, x, w)
    assert y is not None
    return y


def _call_conv1d(conv1d: nn.Module, inputs: Tensor, d_conv: int, in_episode: Tensor | None) -> Tensor:
    """:func:`_convolve` by a call of ``conv1d``, which pads by ``d_conv - 1`` on both sides."""
    x = inputs.mT
    if in_episode is not None:  # each step becomes a row with its own masked inputs
        x = x.unfold(2, d_conv, 1).masked_fill(~in_episode.flip(-1).unsqueeze(1), 0).permute(0, 2, 1, 3).flatten(0, 1)
    rows, dim, size = x.shape
    if size < d_conv:
        return inputs[:, :0]
    y: Tensor = conv1d(x)
    wanted = (rows, dim, size + d_conv - 1)
    if y.shape != wanted:
        raise ValueError(f"Mamba: conv1d must map {(rows, dim, size)} to {wanted}, got {tuple(y.shape)}")
    y = y[..., d_conv - 1 : size]
    return y.mT if in_episode is None else y.reshape(*in_episode.shape[:2], dim)


def _is_plain_depthwise(conv1d: nn.Module, d_conv: int) -> TypeGuard[nn.Conv1d]:
    """Whether a call of ``conv1d`` computes :func:`_convolve` with its weight and bias."""
    if not is_plain(conv1d, nn.Conv1d):
        return False
    return conv1d.weight.shape[1:] == (1, d_conv) and conv1d.stride == conv1d.dilation == (1,)
