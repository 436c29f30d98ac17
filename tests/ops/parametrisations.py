"""Options over which other libraries test their operators: combinations, and bounds of rounding errors.

Every pair of options of two parameters occurs. The oracles are the formulas of docs/ops.md in float64, complex128 or
integers, written without this library. A tolerance counts roundings: each entry has a bound, relative to the sum of the
absolute values of its terms.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLAG = (False, True)


@pytest.fixture(autouse=True)
def _one_thread(_seed_and_threads: None) -> None:
    """Use one thread: on tensors as small as these, two threads take ten times as long."""
    torch.set_num_threads(1)


def covering(options: dict[str, Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Return rows of one choice per parameter that contain every pair of choices of two parameters; greedy."""
    choices = [range(len(values)) for values in options.values()]
    left = {
        frozenset(((i, a), (j, b)))
        for i, j in itertools.combinations(range(len(choices)), 2)
        for a, b in itertools.product(choices[i], choices[j])
    }
    rows = []
    while left:
        row = dict(min(left, key=sorted))
        for i in range(len(choices)):
            if i not in row:
                new = {a: sum(frozenset(((i, a), pair)) in left for pair in row.items()) for a in choices[i]}
                row[i] = max(new, key=lambda a: (new[a], (a + len(rows)) % len(new)))
        left -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append(tuple(values[row[i]] for i, values in enumerate(options.values())))
    return rows


def product(make: Callable[..., Any], options: dict[str, Sequence[Any]], **fewer: Sequence[Any]) -> Iterator[Any]:
    """Yield all combinations of options, with fewer choices for some parameters."""
    return itertools.starmap(make, itertools.product(*(options | fewer).values()))


def label(case: Iterable[Any]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case)


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def assert_near(
    name: str, got: Tensor, want: Tensor, magnitude: Tensor, roundings: float, accumulated: torch.dtype
) -> None:
    """|got - want| <= half an ulp in the dtype of ``got``, plus ``roundings`` epsilons of the accumulation dtype.

    The epsilons are relative to ``magnitude``, the sum of the absolute values of the terms of each entry.
    """
    out, opmath = torch.finfo(got.dtype), torch.finfo(accumulated)
    got, want, magnitude = got.detach().cpu().to(want.dtype), want.detach(), magnitude.detach()
    assert got.shape == want.shape == magnitude.shape, f"{name}: {tuple(got.shape)}, {tuple(want.shape)}"
    bound = out.eps / 2 * want.abs().clamp(min=out.tiny) + roundings * opmath.eps * (magnitude + opmath.tiny)
    error = (got - want).abs()
    assert (error <= bound).all(), f"{name}: {(error / bound).max().item():.3g} times the bound"
