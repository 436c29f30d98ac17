"""Derivatives of the scan above the second order, and forward over forward mode, which differentiate the reference."""

import pytest
import torch
from op_calls import Call, close, floating, gradients, leaves, loss_of, noise, outputs
from scan_cases import CASES, FACTOR, OPTIONAL, REPRESENTATIVE, build, differentiable
from torch import Tensor

from eaml_ext.ops import selective_scan, selective_scan_reference

pytestmark = pytest.mark.filterwarnings("ignore:selective_scan. no kernel computes:RuntimeWarning")

THIRD_ORDER = 4 * FACTOR  # each derivative adds roundings


def third_derivatives(function, call: Call) -> tuple[Tensor, ...]:
    """Differentiate three times by autograd in every input and cotangent."""
    names = differentiable(call)
    x = [*leaves(call, names).values()]
    outs = floating(outputs(function, call, **dict(zip(names, x, strict=True))))
    cotangents = [c.requires_grad_() for c in noise(outs)]
    first = gradients(outs, x, cotangents, create_graph=True)
    second = gradients(first, [*x, *cotangents], noise(first, 1), create_graph=True)
    return gradients(second, [*x, *cotangents], noise(second, 2))


@pytest.mark.parametrize("name", [*REPRESENTATIVE, "y_alone", "all"])
def test_third_derivative_by_autograd_matches_reference(name, device):
    call = CASES[name](torch.float64, device)
    close(third_derivatives(selective_scan, call), third_derivatives(selective_scan_reference, call), THIRD_ORDER)


@pytest.mark.parametrize("sizes", [{"length": 0}, {"batch": 0}, {"length": 34}], ids=str)
def test_third_derivative_empty_and_long_sequences_match_reference(sizes, device):
    call = build(*OPTIONAL, dim=2, state=2, softplus=True, **sizes)(torch.float64, device)
    close(third_derivatives(selective_scan, call), third_derivatives(selective_scan_reference, call), THIRD_ORDER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_third_derivative_half_types_have_dtypes_of_inputs(dtype, device):
    full = CASES["all"](torch.float32, device)
    tensors = {n: x.to(dtype) if n in ("u", "delta", "z", "B", "C") else x for n, x in full.tensors.items()}
    got = third_derivatives(selective_scan, full._replace(tensors=tensors))
    wide = {n: x.float() if x.is_floating_point() else x for n, x in tensors.items()}
    want = third_derivatives(selective_scan_reference, full._replace(tensors=wide))
    for name, a, b in zip(differentiable(full), got[: len(tensors) - 1], want, strict=False):
        assert a.dtype == tensors[name].dtype
        assert (a.float() - b).norm() <= 0.1 * b.norm(), name  # dozens of roundings to 8 bits


def test_second_derivative_passes_gradcheck(device):
    """Finite differences of kernels check third derivatives without the reference's own."""
    call = build(*OPTIONAL, batch=1, dim=1, length=2, state=2, softplus=True)(torch.float64, device)
    names = differentiable(call)
    loss = loss_of(selective_scan, call, names)

    def second(*x: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss(*x), x, create_graph=True)
        return torch.autograd.grad(first, x, noise(first, 1), create_graph=True)

    assert torch.autograd.gradcheck(second, [*leaves(call, names).values()])


def nested_jacobians(f, x):
    return torch.func.jacrev(torch.func.jacfwd(torch.func.grad(f)))(x)


def jacfwd_of_hessian(f, x):
    return torch.func.jacfwd(torch.func.hessian(f))(x)


def jvp_of_jvp(f, x):
    v = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x)
    return torch.func.jvp(lambda p: torch.func.jvp(f, (p,), (v,))[1], (x,), (v.flip(-1),))[1]


def gradient_of_jvp_of_jvp(f, x):
    return torch.func.grad(lambda p: jvp_of_jvp(f, p))(x)


@pytest.mark.parametrize("transform", [nested_jacobians, jacfwd_of_hessian, jvp_of_jvp, gradient_of_jvp_of_jvp])
@pytest.mark.parametrize("name", ["delta", "A", "reset"])
def test_torch_func_third_order_under_vmap_matches_reference(name, transform, device):
    """``reset``: the derivatives are those in u, and vmap is over resets, too."""
    call = build(*OPTIONAL, batch=1, dim=2, length=3, state=2)(torch.float64, device)
    draw = torch.Generator().manual_seed(0)
    wrt = "u" if name == "reset" else name
    many = torch.stack([call.tensors[wrt] * (i + 1) for i in range(3)])
    resets = (torch.rand(3, 1, 3, generator=draw) > 0.5).to(device)

    def of(function):
        def single(x: Tensor, reset: Tensor) -> Tensor:
            changed = {**call.tensors, "reset": reset} if name == "reset" else call.tensors
            return transform(loss_of(function, call._replace(tensors=changed), (wrt,)), x)

        return torch.vmap(single)(many, resets)

    close([of(selective_scan)], [of(selective_scan_reference)], THIRD_ORDER)


def test_loss_of_second_derivative_in_input_has_gradient_of_parameters(device):
    """A residual with u_xx, as of a physics-informed network, is differentiated in the parameters."""
    call = build("D", "z", batch=1, dim=3, length=6, state=4)(torch.float64, device)

    def gradient(function) -> tuple[Tensor, ...]:
        parameters = leaves(call, ("A", "D", "B"))
        x = call.tensors["u"].detach().requires_grad_()
        (y, _) = outputs(function, call, **parameters, u=x.sin(), delta=x.square() + 0.1)
        (y_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (y_xx,) = torch.autograd.grad(y_x.sum(), x, create_graph=True)
        return torch.autograd.grad((y_xx - y).square().sum(), [*parameters.values()])

    close(gradient(selective_scan), gradient(selective_scan_reference), THIRD_ORDER)
