"""knn and its reference return NaN and infinities, and gradients that are not finite, in the same places."""

from typing import Any

import pytest
import torch
from knn_checks import assert_same
from torch import Tensor

from eaml_ext.ops.knn import METRICS, knn, knn_reference


def sort_by_bits(x: Tensor, dim: int, stable: bool) -> tuple[Tensor, Tensor]:
    """Sort by bits: a NaN with a sign is first, as in CUDA's radix sort (pytorch/pytorch#190781), and -0 precedes 0."""
    assert stable
    if x.is_floating_point():
        bits = x.view(torch.int64 if x.dtype is torch.float64 else torch.int32)
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


@pytest.mark.parametrize("dtype, tiny", [(torch.float32, 1e-30), (torch.float64, 1e-200)], ids=str)
def test_knn_reference_with_radix_sort_orders_zeros_by_index(dtype, tiny, monkeypatch):
    signs = torch.where(torch.arange(40) % 3 == 0, -1, 1)
    queries, keys = torch.full((1, 8), tiny, dtype=dtype), (signs * tiny).to(dtype)[:, None].repeat(1, 8)
    monkeypatch.setattr(Tensor, "sort", sort_by_bits)
    want = knn_reference(queries, keys, 40, metric="inner_product")  # products of both signs that are rounded to zero
    assert (want.values == 0).all() and want.indices.tolist() == [list(range(40))]
    assert_same(knn(queries, keys, 40, metric="inner_product"), want)


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
