"""Layers inside the context that makes rows independent of the batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eaml_ext.nn._row_invariant import gelu, glu, linear, project, row_invariant, silu

FUNCTIONS = {"silu": (silu, F.silu), "gelu": (gelu, F.gelu), "glu": (glu, F.glu)}


@pytest.mark.kernels
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("width", [2, 18, 64, 100])
def test_activation_row_has_the_bits_of_the_batch(name, width):
    x = 3 * torch.randn(1200, width)
    with row_invariant():
        whole = FUNCTIONS[name][0](x)
        for first, last in ((0, 1), (3, 5), (700, 1000), (1199, 1200)):
            assert torch.equal(FUNCTIONS[name][0](x[first:last].clone()), whole[first:last])


@pytest.mark.kernels
@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation_value_and_derivatives_equal_torch(name):
    function, expected = FUNCTIONS[name]
    x = torch.cat([torch.linspace(-200, 200, 402), torch.zeros(2)]).double().requires_grad_()
    with row_invariant():
        y = function(x)
    torch.testing.assert_close(y, expected(x), rtol=1e-12, atol=1e-12)
    grads = []
    for out in (y, expected(x)):
        (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        grads.append((first.detach(), second))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


@pytest.mark.kernels
@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation_large_float32_has_finite_gradients(name):
    x = torch.tensor([-1e4, -100.0, -88.0, 88.0, 100.0, 1e4]).requires_grad_()
    with row_invariant():
        y = FUNCTIONS[name][0](x)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert grad.isfinite().all() and second.isfinite().all()


@pytest.mark.kernels
def test_linear_inside_the_context_runs_the_kernel_and_outside_torch(monkeypatch):
    calls = []
    from eaml_ext.nn import _row_invariant

    def record(*args):
        calls.append(args)
        return F.linear(*args)

    monkeypatch.setattr(_row_invariant, "row_invariant_linear", record)
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    with pytest.raises(KeyError), row_invariant():
        with row_invariant():
            linear(layer, x)
        project(x, layer.weight)
        raise KeyError
    assert len(calls) == 2
    linear(layer, x)
    project(x, layer.weight)
    assert len(calls) == 2


@pytest.mark.kernels
def test_linear_of_hooked_layer_or_under_a_transform_calls_the_layer(monkeypatch):
    from eaml_ext.nn import _row_invariant

    monkeypatch.setattr(_row_invariant, "row_invariant_linear", None)
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    with row_invariant():
        mapped = torch.func.vmap(lambda x: linear(layer, x))(x)
        torch.testing.assert_close(mapped, layer(x))
        with torch.autocast("cpu"):
            assert linear(layer, x).dtype == torch.bfloat16
        layer.register_forward_hook(lambda *_: torch.zeros(()))
        assert linear(layer, x) == 0
