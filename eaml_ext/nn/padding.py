"""Sequences of different lengths in one batch: after its last step a row's state stays, bit for bit."""

from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._torch_compat import is_functorch_wrapped_tensor


def check_lengths(where: str, lengths: Any, x: Tensor) -> None:
    """Raise unless ``lengths`` is ``(batch,)``, int64 or int32, in [0, length] of ``x`` ``(batch, length, *)``.

    Under torch.compile and vmap the values are not checked, because they cannot be read.
    """
    _check.tensor(where, "lengths", lengths)
    _check.dtype(where, "lengths", lengths, (torch.int64, torch.int32))
    _check.shape(where, "lengths", lengths, x.shape[:1], f"(batch,) = {tuple(x.shape[:1])}")
    _check.device(where, "lengths", lengths, x.device, "x")
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(lengths):
        return
    if bool(((lengths < 0) | (lengths > x.shape[1])).any()):
        raise ValueError(f"{where}: lengths must be from 0 to {x.shape[1]}, got {lengths.tolist()}")


def check_reset(where: str, reset: Any, x: Tensor) -> None:
    """Raise unless ``reset`` is ``(batch, length)``, bool, on the device of ``x`` ``(batch, length, *)``."""
    _check.tensor(where, "reset", reset)
    _check.dtype(where, "reset", reset, (torch.bool,))
    _check.shape(where, "reset", reset, x.shape[:2], f"(batch, length) = {tuple(x.shape[:2])}")
    _check.device(where, "reset", reset, x.device, "x")


def padding_mask(lengths: Tensor, length: int) -> Tensor:
    """Mark the steps after each row's last.

    Args:
        lengths: ``(batch,)``, integer.
        length: steps of the padded sequences.

    Returns:
        ``(batch, length)``, bool.

    >>> padding_mask(torch.tensor([1, 3]), 3).int().tolist()
    [[0, 1, 1], [0, 0, 0]]
    """
    return torch.arange(length, device=lengths.device) >= lengths.unsqueeze(-1)


def zero_padding(x: Tensor, reset: Tensor | None, lengths: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Zero the padding of a batch, which may hold anything, NaN too.

    Args:
        x: ``(batch, length, dim)``.
        reset: ``(batch, length)``, bool, or None.
        lengths: ``(batch,)``, integer.

    Returns:
        ``x`` and ``reset`` without what they held on padding, and the mask of the padding, ``(batch, length, 1)``.
    """
    padding = padding_mask(lengths, x.shape[1])
    reset = None if reset is None else reset & ~padding
    padding = padding.unsqueeze(-1)
    return x.masked_fill(padding, 0), reset, padding


def zero_delta_after_length(delta: Tensor, lengths: Tensor | None) -> Tensor:
    """Make the step size zero after each row's last step, so that the state stays.

    Args:
        delta: ``(batch, dim, length)``, floating; before softplus, which maps the -1e4 written here to 0.
        lengths: ``(batch,)``, integer; None leaves ``delta`` as it is.

    Returns:
        ``(batch, dim, length)``.
    """
    if lengths is None:
        return delta
    return delta.masked_fill(padding_mask(lengths, delta.shape[-1]).unsqueeze(1), -1e4)


def unit_step_delta(like: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return the step size of a recurrence that is already discrete: 1, and 0 after each row's last step.

    Args:
        like: ``(batch, dim, length)``, floating; gives shape, dtype and device.
        lengths: ``(batch,)``, integer; None: all rows have ``length`` steps.

    Returns:
        ``(batch, dim, length)``, expanded without memory of its own.
    """
    if lengths is None:
        return like.new_ones(()).expand(like.shape)
    return (~padding_mask(lengths, like.shape[-1])).to(like.dtype).unsqueeze(1).expand(like.shape)
