"""Arguments that pack several sequences into a row."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from eaml_ext.ops._packing import check_cu_seqlens, reset_from_seq_idx


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("values", [(0, 5), (0, 2, 2, 5), (0, 0, 5, 5)])
def test_check_cu_seqlens_valid_returns_it(values):
    cu_seqlens = int32(*values)
    assert check_cu_seqlens("op", cu_seqlens, 1, 5) is cu_seqlens


@pytest.mark.parametrize(
    ("cu_seqlens", "batch", "error", "message"),
    [
        ([0, 5], 1, TypeError, "op: cu_seqlens must be a torch.Tensor, got list"),
        (int32(0, 5).long(), 1, TypeError, "op: cu_seqlens must be int32, got int64"),
        (int32(0, 5)[None], 1, ValueError, r"op: cu_seqlens must have shape \(sequences \+ 1,\), got \(1, 2\)"),
        (int32(), 1, ValueError, r"op: cu_seqlens must have shape \(sequences \+ 1,\), got \(0,\)"),
        (int32(0, 5), 2, ValueError, "op: with cu_seqlens the batch must be 1, got 2"),
        (int32(1, 5), 1, ValueError, "op: cu_seqlens must go from 0 to 5, got 1 to 5"),
        (int32(0, 4), 1, ValueError, "op: cu_seqlens must go from 0 to 5, got 0 to 4"),
        (int32(0, 3, 2, 5), 1, ValueError, r"op: cu_seqlens must not decrease, got \[0, 3, 2, 5\]"),
    ],
)
def test_check_cu_seqlens_invalid_raises(cu_seqlens, batch, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        check_cu_seqlens("op", cu_seqlens, batch, 5)


def test_check_cu_seqlens_without_readable_values_checks_shapes_alone():
    wrong = int32(3, 2)
    torch.vmap(lambda v: check_cu_seqlens("op", v, 1, 5))(wrong[None])
    with FakeTensorMode() as mode:
        check_cu_seqlens("op", mode.from_tensor(wrong), 1, 5)
    check_cu_seqlens("op", wrong.to("meta"), 1, 5)


@pytest.mark.parametrize(
    ("seq_idx", "expected"),
    [
        ([[7, 7, 3, 3, 7], [-1, 0, 1, 1, -1]], [[0, 0, 1, 0, 1], [0, 1, 1, 0, 1]]),
        ([[4], [5]], [[0], [0]]),
        ([[], []], [[], []]),
    ],
)
def test_reset_from_seq_idx_marks_each_change(seq_idx, expected):
    reset = reset_from_seq_idx(torch.tensor(seq_idx, dtype=torch.int32))
    assert reset.dtype == torch.bool and reset.tolist() == expected
