"""Sequences of different lengths in one batch: padded rows, whose states stay after their last step, or packed ones."""

from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._torch_compat import is_functorch_wrapped_tensor
from eaml_ext.ops._packing import check_cu_seqlens, reset_from_seq_idx


def given(**options: Tensor | None) -> dict[str, Tensor]:
    """Return the options that are not None: a derived class need not take the others."""
    return {name: value for name, value in options.items() if value is not None}


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


def check_boundaries(
    where: str, x: Tensor, reset: Any, lengths: Any = None, cu_seqlens: Any = None, seq_idx: Any = None
) -> Tensor | None:
    """Check the arguments that divide the rows of ``x`` ``(batch, length, *)`` into sequences, except ``lengths``.

    Under torch.compile the ops check ``cu_seqlens``, whose values cannot be read.

    Returns:
        ``reset``, or the resets of ``seq_idx``.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: one has the wrong shape, device or value; ``seq_idx`` is given beside ``reset`` or ``cu_seqlens``,
            or ``cu_seqlens`` beside ``lengths``.

    >>> check_boundaries("f", torch.zeros(1, 3, 2), None, seq_idx=torch.tensor([[4, 4, 5]]))
    tensor([[False, False,  True]])
    """
    if seq_idx is not None:
        for other, value in (("reset", reset), ("cu_seqlens", cu_seqlens)):
            if value is not None:
                raise ValueError(f"{where}: seq_idx must be None beside {other}, got {type(seq_idx).__name__}")
    if cu_seqlens is not None and lengths is not None:
        raise ValueError(f"{where}: cu_seqlens must be None beside lengths, got {type(cu_seqlens).__name__}")
    if reset is not None:
        check_reset(where, reset, x)
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        check_cu_seqlens(where, cu_seqlens, x.shape[0], x.shape[1])
        _check.device(where, "cu_seqlens", cu_seqlens, x.device, "x")
    if seq_idx is not None:
        _check.tensor(where, "seq_idx", seq_idx)
        _check.dtype(where, "seq_idx", seq_idx, (torch.int32, torch.int64))
        _check.shape(where, "seq_idx", seq_idx, x.shape[:2], f"(batch, length) = {tuple(x.shape[:2])}")
        _check.device(where, "seq_idx", seq_idx, x.device, "x")
        reset = reset_from_seq_idx(seq_idx)
    return reset  # type: ignore[no-any-return]


def count_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return how many sequences, each with a state, ``x`` ``(batch, *)`` holds: its rows, or those packed into one."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


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
