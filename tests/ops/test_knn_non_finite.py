"""knn and its reference return NaN and infinities, and gradients that are not finite, in the same places."""

from typing import Any

import pytest
import torch
from knn_checks import assert_same
from torch import Tensor

from eaml_ext.ops.knn import METRICS, knn, knn_reference


def sort_by_bits(x: Tensor, dim: int, stable: bool) -> tuple[Tensor, Tensor]:
    """Sort as a radix sort does on CUDA: a NaN with a sign is less than all numbers (pytorch/pytorch#190781)."""
    assert stable
    if x.is_floating_point():
        bits = torch.where(x == 0, 0, x).view(torch.int64 if x.dtype is torch.float64 else torch.int32)
        order = torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits).argsort(dim=dim, stable=True)
    else:
        order = x.argsort(dim=dim, stable=True)
    return x.gather(dim, order), order


def inputs(dtype: torch.dtype, place: str, bad: float) -> dict[str, Tensor]:
    """Return tensors of 3 queries and 40 keys, some of whose numbers are ``bad``."""
    make = torch.Generator().manual_seed(0)
    x = {name: torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}
    x[place].view(-1)[[0, 5, -1]] = bad
    return x


SHAPES = {"queries": (3, 6), "keys": (40, 6), "bias": (40,)}
BAD = [torch.nan, -torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_knn_reference_with_radix_sort_orders_every_nan_last(metric, dtype, monkeypatch):
    calls = [(inputs(dtype, place, bad), k) for place in SHAPES for bad in BAD for k in (3, 40)]
    want = [knn_reference(k=k, metric=metric, **x) for x, k in calls]
    monkeypatch.setattr(Tensor, "sort", sort_by_bits)
    for (x, k), expected in zip(calls, want, strict=True):
        assert_same(knn_reference(k=k, metric=metric, **x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("place", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_knn_non_finite_gradients_are_where_reference_has_them(metric, place, dtype, device):
    for bad in BAD:
        for k in (3, 40):
            x = {name: t.to(device) for name, t in inputs(dtype, place, bad).items()}
            got, want = (gradients(f, x, k, metric) for f in (knn, knn_reference))
            for name, a, b in zip(x, got, want, strict=True):
                assert torch.equal(a.isfinite(), b.isfinite()), f"gradient of {name}, {bad} in {place}"


def gradients(function: Any, x: dict[str, Tensor], k: int, metric: str) -> tuple[Tensor, ...]:
    leaves = {name: t.detach().requires_grad_() for name, t in x.items()}
    return torch.autograd.grad(function(k=k, metric=metric, **leaves).values.sum(), tuple(leaves.values()))
