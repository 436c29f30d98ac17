"""A reference on a GPU, or in place of a derivative without a kernel, warns once per op."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from eaml_ext.ops import fallback, knn, selective_scan


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(fallback, "_warned", set())


def test_reference_of_gpu_tensor_warns_once_per_op(fresh):
    on_gpu = SimpleNamespace(device=torch.device("cuda", 1))  # the only attribute that is read
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for op in ("knn", "selective_scan", "knn"):
            assert fallback.reference_of(op)(lambda x, y: y)(on_gpu, 3) == 3
    assert [str(w.message).split(",")[0] for w in caught] == [
        "knn: no CUDA kernel takes these tensors",
        "selective_scan: no CUDA kernel takes these tensors",
    ]
    assert str(caught[0].message).endswith("the slow pure-PyTorch reference runs on cuda:1")
    assert caught[0].category is RuntimeWarning


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_reference_of_cpu_tensor_calls_warn_once_without_warning(fresh, monkeypatch, reference_only):
    calls = []
    monkeypatch.setattr(fallback, "warn_once", lambda op, device: calls.append((op, device.type)))
    x = torch.randn(2, 3, 4)
    knn(x[0], x[1], 1)
    selective_scan(x, x.abs(), -torch.ones(3, 2), torch.ones(2, 2, 4), torch.ones(2, 2, 4))
    assert calls == ([("knn", "cpu"), ("selective_scan", "cpu")] if reference_only else [])


def test_derivatives_above_second_order_warn_once_and_lower_ones_never(fresh):
    x = torch.rand(1, 2, 3, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = selective_scan(x, x, -torch.ones(2, 2), torch.ones(1, 2, 3), torch.ones(1, 2, 3))
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        assert not caught
        (third,) = torch.autograd.grad(second.sum(), x, create_graph=True)
        torch.autograd.grad(third.sum(), x)
    assert [str(w.message).split(",")[0] for w in caught] == [
        "selective_scan: no kernel computes derivatives above the second order"
    ]
    assert caught[0].category is RuntimeWarning
