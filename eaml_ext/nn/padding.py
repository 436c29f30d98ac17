"""Sequences of different lengths in one batch: after its last step a row's state stays, bit for bit."""

from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check


def check_lengths(where: str, lengths: Any, x: Tensor) -> None:
    """Raise unless ``lengths`` holds an integer from 0 to the length of ``x`` ``(batch, length, *)`` for each row."""
    _check.tensor(where, "lengths", lengths)
    _check.dtype(where, "lengths", lengths, (torch.int64, torch.int32))
    _check.shape(where, "lengths", lengths, x.shape[:1], f"(batch,) = {tuple(x.shape[:1])}")
    _check.device(where, "lengths", lengths, x.device, "x")
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(lengths):
        return  # its numbers cannot be looked at
    if bool(((lengths < 0) | (lengths > x.shape[1])).any()):
        raise ValueError(f"{where}: lengths must be from 0 to {x.shape[1]}, got {lengths.tolist()}")


def check_reset(where: str, reset: Any, x: Tensor) -> None:
    """Raise unless ``reset`` is a bool for each step of ``x`` ``(batch, length, *)``."""
    _check.tensor(where, "reset", reset)
    _check.dtype(where, "reset", reset, (torch.bool,))
    _check.shape(where, "reset", reset, x.shape[:2], f"(batch, length) = {tuple(x.shape[:2])}")
    _check.device(where, "reset", reset, x.device, "x")


def padding_mask(lengths: Tensor, length: int) -> Tensor:
    """``(batch, length)`` bool: the steps after each row's last."""
    return torch.arange(length, device=lengths.device) >= lengths.unsqueeze(-1)


def zero_delta_after_length(delta: Tensor, lengths: Tensor | None) -> Tensor:
    """``delta`` ``(batch, dim, length)``, before softplus, so low after each row's last step that time stands still."""
    if lengths is None:
        return delta
    return delta.masked_fill(padding_mask(lengths, delta.shape[-1]).unsqueeze(1), -1e4)


def unit_step_delta(like: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The step size ``(batch, dim, length)`` of a recurrence that is discrete already: 1, and 0 after the last step."""
    if lengths is None:
        return like.new_ones(()).expand(like.shape)
    return (~padding_mask(lengths, like.shape[-1])).to(like.dtype).unsqueeze(1).expand(like.shape)
