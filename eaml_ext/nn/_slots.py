"""Rows of packed sequences with slots before each sequence, for what precedes it: inputs of a state, or an empty step.

A causal filter over such a row reads the slots in place of the end of the sequence before.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SlottedRow(NamedTuple):
    """Positions of a row that has ``size`` slots before each packed sequence, and of the row without slots.

    Attributes:
        source: ``(length + sequences * size,)``, int64; the step at each position, or ``length + i`` for slot ``i``.
        steps: ``(length,)``, int64; the position of each step.
        cu_seqlens: ``(sequences + 1,)``, int32; boundaries of the sequences, which begin with their slots.
    """

    source: Tensor
    steps: Tensor
    cu_seqlens: Tensor

    def insert(self, x: Tensor, slots: Tensor | None = None) -> Tensor:
        """Return ``x`` with slots.

        Args:
            x: ``(1, length, *)``.
            slots: ``(sequences * size, *)``; zeros if absent.

        Returns:
            ``(1, length + sequences * size, *)``.
        """
        num_slots = self.source.shape[0] - self.steps.shape[0]
        row = x[0]
        slots = row.new_zeros(num_slots, *row.shape[1:]) if slots is None else slots
        return torch.cat([row, slots])[self.source].unsqueeze(0)


def slotted_row(cu_seqlens: Tensor, length: int, size: int) -> SlottedRow:
    """Return the positions of a row with ``size`` slots before each sequence.

    Wrong boundaries, which are not checked on a GPU, give wrong positions inside the row.

    Args:
        cu_seqlens: ``(sequences + 1,)``, integer; boundaries of the sequences.
        length: steps of the row.
        size: slots of a sequence.

    >>> row = slotted_row(torch.tensor([0, 2, 3]), 3, 1)
    >>> row.insert(torch.tensor([[5, 6, 7]])), row.steps, row.cu_seqlens
    (tensor([[0, 5, 6, 0, 7]]), tensor([1, 2, 4]), tensor([0, 3, 5], dtype=torch.int32))
    """
    device, sequences = cu_seqlens.device, cu_seqlens.shape[0] - 1
    begin = cu_seqlens.long().clamp(0, length)
    slotted_begin = begin + size * torch.arange(sequences + 1, device=device)

    def sequence_at(boundaries: Tensor, positions: Tensor) -> Tensor:
        """The last sequence that begins at the position or before; the ones before it may be empty."""
        return torch.searchsorted(boundaries[1:], positions, right=True).clamp(max=sequences - 1)

    positions = torch.arange(length + sequences * size, device=device)
    sequence = sequence_at(slotted_begin, positions)
    offset = positions - slotted_begin[sequence]
    source = torch.where(offset < size, length + sequence * size + offset, begin[sequence] + offset - size)
    steps = torch.arange(length, device=device)
    steps = steps + (sequence_at(begin, steps) + 1) * size
    return SlottedRow(source.clamp(0, max(len(positions) - 1, 0)), steps, slotted_begin.int())
