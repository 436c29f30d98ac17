"""Bits, values and derivatives of the linear layer whose rows do not depend on the batch."""

import random

import pytest
import torch
import torch.nn.functional as F

from eaml_ext.ops.row_invariant_linear import row_invariant_linear

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (7, 5, 3), (100, 64, 64), (131, 17, 33), (49, 64, 37), (300, 3, 20), (60, 200, 150)]


def arguments(rows, inputs, outputs, dtype, bias=True):
    x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    return x, weight, torch.randn(outputs, dtype=dtype) if bias else None


@pytest.fixture
def set_threads():
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.mark.kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_invariant_linear_rows_have_the_bits_of_the_batch(dtype, bias, set_threads):
    rng = random.Random(0)
    for sizes in SIZES:
        x, weight, b = arguments(*sizes, dtype, bias)
        set_threads(2)
        whole = row_invariant_linear(x, weight, b)
        for threads in (1, 2):
            set_threads(threads)
            for count in {min(n, len(x)) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 48, 49, len(x))}:
                first = rng.randrange(len(x) - count + 1)
                part = row_invariant_linear(x[first : first + count], weight, b)
                assert torch.equal(part, whole[first : first + count]), (sizes, count, threads)


@pytest.mark.parametrize("sizes", [*SIZES, (1, 100, 50), (8, 70, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_invariant_linear_is_close_to_float64(sizes, dtype):
    x, weight, bias = arguments(*sizes, dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    # A sum of n terms in any order is off by at most n roundings of the sum of their magnitudes.
    magnitude = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    bound = (x.shape[1] + 2) * torch.finfo(dtype).eps * magnitude
    assert ((row_invariant_linear(x, weight, bias) - exact).abs() <= bound).all()


@pytest.mark.kernels
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_invariant_linear_half_types_have_the_bits_of_float32_rounded_once(rows, dtype):
    for inputs, outputs in ((64, 48), (33, 17), (3, 5), (130, 1)):
        x, weight, bias = arguments(rows, inputs, outputs, dtype)
        weight.view(-1)[:2] = torch.tensor([torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max])
        want = row_invariant_linear(x.float(), weight.float(), bias.float()).to(dtype)
        assert torch.equal(row_invariant_linear(x, weight, bias), want)


@pytest.mark.kernels
def test_row_invariant_linear_strides_and_leading_sizes_keep_the_bits():
    x, weight, bias = arguments(60, 30, 20, torch.float32)
    y = row_invariant_linear(x, weight, bias)
    assert torch.equal(row_invariant_linear(x.mT.contiguous().mT, weight.mT.contiguous().mT, bias), y)
    assert torch.equal(row_invariant_linear(x.view(3, 4, 5, 30), weight, bias), y.view(3, 4, 5, 20))


def test_row_invariant_linear_derivatives_pass_gradcheck_and_gradgradcheck():
    inputs = [t.requires_grad_() for t in arguments(5, 4, 3, torch.float64)]
    assert torch.autograd.gradcheck(row_invariant_linear, inputs)
    assert torch.autograd.gradgradcheck(row_invariant_linear, inputs)
    for chosen in range(3):
        some = [t.detach().requires_grad_(i == chosen) for i, t in enumerate(inputs)]
        (grad,) = torch.autograd.grad(row_invariant_linear(*some).square().sum(), some[chosen])
        expected = [t.detach().requires_grad_(i == chosen) for i, t in enumerate(inputs)]
        torch.testing.assert_close(grad, torch.autograd.grad(F.linear(*expected).square().sum(), expected[chosen])[0])


@pytest.mark.parametrize("sizes", [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_row_invariant_linear_empty_sizes_equal_torch(sizes):
    x, weight, bias = arguments(*sizes, torch.float32)
    assert torch.equal(row_invariant_linear(x, weight, bias), F.linear(x, weight, bias))


def test_row_invariant_linear_non_finite_row_leaves_the_other_rows():
    x, weight, bias = arguments(8, 5, 3, torch.float32)
    y = row_invariant_linear(x, weight, bias)
    x[3, 2] = torch.nan
    changed = row_invariant_linear(x, weight, bias)
    assert changed[3].isnan().all()
    assert torch.equal(torch.cat([changed[:3], changed[4:]]), torch.cat([y[:3], y[4:]]))


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 1)])
def test_row_invariant_linear_wrong_weight_raises(shape):
    with pytest.raises((ValueError, RuntimeError), match="row_invariant_linear: x, weight and bias must be"):
        torch.ops.eaml_ext.row_invariant_linear(torch.randn(2, 4), torch.randn(shape), None)


@pytest.mark.parametrize("bias", [True, False])
def test_row_invariant_linear_passes_opcheck(bias):
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.eaml_ext.row_invariant_linear.default, arguments(6, 4, 3, dtype, bias))
