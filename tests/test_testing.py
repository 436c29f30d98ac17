"""check_second_order finds right, raising and silently wrong second derivatives of functions with known faults."""

import math

import numpy as np
import pytest
import torch
from torch.autograd.function import once_differentiable

from eaml_ext.ops import knn, selective_scan
from eaml_ext.testing import check_second_order


def randn(*shape: int, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, **options).requires_grad_()


class _Sin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()


class DetachedSin(_Sin):
    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors[0].detach().cos() * dy.detach()


class NumpySin(_Sin):
    @staticmethod
    def backward(ctx, dy):
        return torch.from_numpy(np.cos(ctx.saved_tensors[0].detach().numpy()) * dy.detach().numpy())


class OnceDifferentiableSin(_Sin):
    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return ctx.saved_tensors[0].cos() * dy


class HalfConnectedSin(_Sin):
    """The gradient depends on ``x`` in autograd's graph, but not on the output's gradient."""

    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors[0].cos() * dy.detach()


class NaNSin(_Sin):
    """The gradient is right, its derivative is 0 * infinity."""

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return x.cos() * dy + (x - x.detach()).square().sqrt()


class DetachedDouble(torch.autograd.Function):
    """A linear function: its own second derivative is 0, that of a loss is not."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy.detach()


def float32_sin(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise TypeError(f"float32 only, got {x.dtype}")
    return x.sin()


def test_check_second_order_smooth_functions_are_right():
    for fn in (torch.sin, torch.exp, lambda x: 1e8 * x.sin(), lambda x: (x.sin(), 1e-6 * x.prod())):
        result = check_second_order(fn, randn(5))
        assert result.verdict == result.grad.verdict == result.backward.verdict == "right"
        assert result.grad.relative_error == result.backward.relative_error < 1e-9
        assert result.grad.error is result.backward.error is None and result.dtype == torch.float64


@pytest.mark.parametrize("complex_states", [False, True])
def test_check_second_order_selective_scan_is_right(complex_states):
    u, delta, z = randn(2, 4, 9), randn(2, 4, 9), randn(2, 4, 9)
    A, B, C = -randn(4, 3).detach().abs(), randn(2, 3, 9), randn(2, 3, 9)
    if complex_states:
        A, B, C = torch.complex(A, A.flip(0)), randn(4, 3, dtype=torch.complex64), randn(4, 3, dtype=torch.complex64)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 4] = True

    def scan(*inputs):
        *rest, reset = inputs
        return selective_scan(*rest, delta_softplus=True, return_last_state=True, reset=reset)

    result = check_second_order(scan, u, delta, A.requires_grad_(), B, C, None, z, reset)
    assert result.verdict == "right" and result.dtype == torch.float64
    assert result.grad.relative_error < 1e-8


def test_check_second_order_knn_with_integer_outputs_is_right():
    assert check_second_order(lambda q, x: tuple(knn(q, x, 3)), randn(4, 5), randn(20, 5) + 0.1).verdict == "right"


@pytest.mark.parametrize("function", [DetachedSin, NumpySin, HalfConnectedSin, DetachedDouble])
def test_check_second_order_backward_outside_the_graph_is_silently_wrong(function):
    result = check_second_order(function.apply, randn(5))
    assert result.verdict == result.grad.verdict == result.backward.verdict == "silently wrong"
    assert result.grad.relative_error == result.backward.relative_error > 0.05
    assert result.grad.error is None


def test_check_second_order_one_wrong_input_of_two_is_silently_wrong():
    result = check_second_order(lambda x, y: x.sin() * y + DetachedSin.apply(y), randn(5), randn(5))
    assert result.verdict == "silently wrong"


def test_check_second_order_one_wrong_element_of_a_thousand_is_silently_wrong():
    result = check_second_order(lambda x: torch.cat([x[:-1].sin(), DetachedSin.apply(x[-1:])]), randn(1000))
    assert result.verdict == "silently wrong" and 1e-6 < result.grad.relative_error < 0.2


def test_check_second_order_nan_is_silently_wrong():
    result = check_second_order(NaNSin.apply, randn(5))
    assert result.verdict == "silently wrong" and math.isnan(result.grad.relative_error)


def test_check_second_order_agrees_with_the_outer_gradient_of_maml():
    """The error of a step's outer gradient, against float64 finite differences, is silent where the check finds it."""
    for function, verdict in ((torch.sin, "right"), (DetachedSin.apply, "silently wrong")):

        def outer(theta, function=function):
            (g,) = torch.autograd.grad((function(theta) - 1).square().sum(), theta, create_graph=True)
            return (function(theta - 0.1 * g) - 1).square().sum()

        theta = randn(5, dtype=torch.float64)
        (found,) = torch.autograd.grad(outer(theta), theta)
        step = 1e-6 * torch.eye(5, dtype=torch.float64)
        moved = [[(theta.detach() + sign * row).requires_grad_() for sign in (1, -1)] for row in step]
        truth = torch.stack([(outer(a) - outer(b)).detach() / 2e-6 for a, b in moved])
        right = torch.allclose(found, truth, rtol=1e-6, atol=1e-8)
        assert right == (verdict == "right") and check_second_order(function, theta).verdict == verdict


def test_check_second_order_once_differentiable_raises_by_backward_and_is_silent_by_grad():
    result = check_second_order(OnceDifferentiableSin.apply, randn(5))
    assert result.verdict == result.grad.verdict == "silently wrong" and result.grad.relative_error > 0.5
    assert result.backward.verdict == "raises" and result.backward.relative_error is None
    assert result.backward.error.startswith("RuntimeError: trying to differentiate twice a function that was marked")
    assert "\n" not in str(result) and str(result).startswith(
        "silently wrong in float64 (autograd.grad: silently wrong"
    )


def test_once_differentiable_under_a_linear_loss_is_silent_by_backward():
    """The docstring of check_second_order states this."""
    x = randn(5)
    (g,) = torch.autograd.grad(OnceDifferentiableSin.apply(x).sum(), x, create_graph=True)
    (x - g).sum().backward()
    assert torch.equal(x.grad, torch.ones(5))


def test_check_second_order_torch_function_without_double_backward_raises():
    result = check_second_order(torch.cdist, randn(4, 3), randn(5, 3) + 1)
    assert result.verdict == result.grad.verdict == result.backward.verdict == "raises"
    assert "_cdist_backward" in result.grad.error and "_cdist_backward" in result.backward.error


@pytest.mark.parametrize("fn", [torch.relu, torch.abs, torch.sign, lambda x: x * 0])
def test_check_second_order_piecewise_linear_function_is_right(fn):
    assert check_second_order(fn, randn(50)).verdict == "right"


@pytest.mark.parametrize("fn", [float32_sin, lambda x: x.float().sin().to(x.dtype)], ids=["raises", "rounds"])
def test_check_second_order_float32_only_function_is_checked_in_float32(fn):
    result = check_second_order(fn, randn(20))
    assert result.verdict == "right" and result.dtype == torch.float32 and 0 < result.grad.relative_error < 1e-2
    wrong = check_second_order(lambda x: fn(x) + DetachedSin.apply(x), randn(20))
    assert wrong.verdict == "silently wrong" and wrong.dtype == torch.float32


def test_check_second_order_many_kinks_in_float32_raise_value_error():
    network = torch.nn.Sequential(torch.nn.Linear(5, 300), torch.nn.ReLU(), torch.nn.Linear(300, 5))
    with pytest.raises(ValueError, match=r"^check_second_order: finite differences are unreliable"):
        check_second_order(network, randn(20, 5))
    assert check_second_order(network.double(), randn(20, 5)).verdict == "right"


def test_check_second_order_float64_only_random_function_raises_value_error():
    noise = torch.Generator().manual_seed(0)  # not the generator that the check restores
    layer = torch.nn.Linear(5, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^check_second_order: finite differences are unreliable"):
        check_second_order(lambda x: layer(x).sin() * torch.rand(5, generator=noise), randn(5))


def test_check_second_order_function_in_bfloat16_raises_value_error():
    with pytest.raises(ValueError, match=r"^check_second_order: finite differences are unreliable"):
        check_second_order(lambda x: x.bfloat16().sin(), randn(5))


def test_check_second_order_at_a_kink_raises_value_error():
    x = randn(20).detach()
    x[3] = 0
    with pytest.raises(
        ValueError, match=r"^check_second_order: finite differences are unreliable: fn has a kink nearby"
    ):
        check_second_order(torch.relu, x.requires_grad_())
    assert check_second_order(torch.sin, x).verdict == "right"


def test_check_second_order_integer_and_other_inputs_are_passed_on():
    def fn(index, table, power, scale, mask):
        assert index.dtype == torch.int64 and mask.dtype == torch.bool and scale.dtype == torch.float64
        return torch.nn.functional.embedding(index, table) ** power * scale * mask[:, None]

    mask = torch.tensor([True, True, False])
    result = check_second_order(fn, torch.tensor([1, 2, 2]), randn(4, 3), 3, torch.tensor(0.5), mask)
    assert result.verdict == "right"


def test_check_second_order_dropout_has_the_same_mask_in_every_call():
    before = torch.get_rng_state()
    assert check_second_order(lambda x: torch.nn.functional.dropout(x, 0.5) ** 2, randn(40)).verdict == "right"
    assert torch.equal(torch.get_rng_state(), before)


def test_check_second_order_leaves_gradients_inputs_and_grad_mode_unchanged():
    layer = torch.nn.Linear(5, 5, dtype=torch.float64)
    layer.weight.grad = torch.ones(5, 5, dtype=torch.float64)
    x = randn(5)
    value = x.detach().clone()
    with torch.no_grad():
        assert check_second_order(lambda x: layer(x).tanh(), x).verdict == "right"
    assert torch.equal(layer.weight.grad, torch.ones(5, 5, dtype=torch.float64)) and layer.bias.grad is None
    assert x.grad is None and torch.equal(x, value)


def test_check_second_order_wrong_arguments_raise_one_sentence():
    for inputs in ((), (3,), (torch.ones(3), torch.arange(3))):
        with pytest.raises(ValueError, match=r"^check_second_order: no input is a floating-point tensor that requires"):
            check_second_order(lambda *x: x[0], *inputs)
    with pytest.raises(ValueError, match=r"^check_second_order: no output of fn depends on an input that requires"):
        check_second_order(lambda x: x.detach(), randn(3))
    with pytest.raises(ValueError, match=r"^check_second_order: fn returns infinite numbers or NaN$"):
        check_second_order(lambda x: x / 0, randn(3))
    with pytest.raises(TypeError, match=r"^check_second_order: fn's result must be a torch.Tensor, got float"):
        check_second_order(lambda x: 1.0, randn(3))
    with pytest.raises(ZeroDivisionError):
        check_second_order(lambda x: x * (1 / 0), randn(3))
