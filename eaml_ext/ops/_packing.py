"""Arguments that pack several sequences into a row: ``cu_seqlens`` of flash-attention, ``seq_idx`` of mamba_ssm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eaml_ext import _check
from eaml_ext._torch_compat import dispatch_mode_active, is_functorch_wrapped_tensor


def check_cu_seqlens(op: str, cu_seqlens: Any, batch: int, length: int) -> Tensor:
    """Return ``cu_seqlens``, the boundaries of the sequences that are packed into a row.

    Sequence ``i`` has the steps ``cu_seqlens[i]`` to ``cu_seqlens[i + 1] - 1``; it may be empty. The values are checked
    on a CPU alone, because reading those of another device waits for it; traced tensors have none.

    Args:
        op: the public function, which starts every message.
        cu_seqlens: ``(sequences + 1,)``, int32.
        batch: the rows of the input; must be 1.
        length: the steps of the row, the last value of ``cu_seqlens``.

    Raises:
        TypeError: ``cu_seqlens`` is not a tensor or not int32.
        ValueError: it has the wrong shape or values, or ``batch`` is not 1.
    """
    _check.tensor(op, "cu_seqlens", cu_seqlens)
    _check.dtype(op, "cu_seqlens", cu_seqlens, (torch.int32,))
    assert isinstance(cu_seqlens, Tensor)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"{op}: with cu_seqlens the batch must be 1, got {batch}")
    if cu_seqlens.device.type == "cpu" and not dispatch_mode_active() and not is_functorch_wrapped_tensor(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != length:
            raise ValueError(f"{op}: cu_seqlens must go from 0 to {length}, got {values[0]} to {values[-1]}")
        if values != sorted(values):
            raise ValueError(f"{op}: cu_seqlens must not decrease, got {values}")
    return cu_seqlens


def reset_from_seq_idx(seq_idx: Tensor) -> Tensor:
    """Return the resets of ``seq_idx``, ``(batch, length)``: True at each step whose index differs from that before.

    The first step is False: its sequence continues the initial state, if there is one.

    >>> reset_from_seq_idx(torch.tensor([[0, 0, 1, 1]], dtype=torch.int32))
    tensor([[False, False,  True, False]])
    """
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (min(1, seq_idx.shape[1]), 0))
