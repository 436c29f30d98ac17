"""Steps without gradients: the kernels that they run on, their bits, reduced precision and quantised layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eaml_ext.nn import Mamba, Mamba2, linear_step, norm_step
from eaml_ext.nn._row_invariant import linear, project, row_invariant
from eaml_ext.ops import mamba_step as module


def steps(block, x):
    states, ys = block.allocate_inference_cache(len(x)), []
    for t in range(x.shape[1]):
        y, *states = block.step(x[:, t], *states)
        ys.append(y)
    return torch.stack(ys, dim=1), tuple(states)


@pytest.fixture
def kernel_calls(monkeypatch):
    """The calls of the kernel that computes a whole step."""
    calls, op = [], module._op

    def record(*args):
        calls.append(args)
        return op(*args)

    monkeypatch.setattr(module, "_op", record)
    return calls


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"d_conv": 2, "bias": True, "conv_bias": False, "d_state": 5}], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 9])
def test_steps_in_row_invariant_have_the_bits_of_the_scan(options, dtype, batch, kernel_calls):
    block, x = Mamba(24, **options, dtype=dtype), torch.randn(batch, 7, 24, dtype=dtype)
    with torch.no_grad(), row_invariant():
        y, states = steps(block, x)
        want, last = block.scan(x)
    assert len(kernel_calls) == (7 if batch <= 8 else 0)
    assert torch.equal(y, want) and all(torch.equal(a, b) for a, b in zip(states, last, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_steps_without_gradients_equal_those_with_gradients(dtype, kernel_calls):
    block, x = Mamba(24, dtype=dtype), torch.randn(3, 7, 24, dtype=dtype)
    want, _ = steps(block, x)
    assert want.requires_grad and not kernel_calls
    with torch.no_grad():
        y, states = steps(block, x)
    assert len(kernel_calls) == 7
    assert y.dtype == states[0].dtype == dtype
    torch.testing.assert_close(y, want.detach(), rtol=0, atol=8 * torch.finfo(dtype).eps * want.abs().max().item())


@pytest.mark.parametrize("kind", ["hook", "autocast", "func", "adapter", "attribute", "act", "compile"])
def test_step_that_its_kernel_does_not_compute_runs_op_by_op(kind, kernel_calls):
    block, x = Mamba(8, d_state=4), torch.randn(2, 8)
    states = block.allocate_inference_cache(2)
    with torch.no_grad():
        want = block.step(x, *states)[0]
        kernel_calls.clear()
        if kind == "hook":
            block.x_proj.register_forward_hook(lambda layer, args, y: 2 * y)
            assert not torch.allclose(block.step(x, *states)[0], want)
        elif kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(block.step(x, *states)[0].float(), want, rtol=0.1, atol=0.05)
        elif kind == "func":
            y = torch.vmap(lambda x, c, s: block.step(x[None], c[None], s[None])[0][0])(x, *states)
            torch.testing.assert_close(y, want)
        elif kind == "adapter":
            block.dt_proj = nn.Sequential(block.dt_proj)
            torch.testing.assert_close(block.step(x, *states)[0], want)
        elif kind == "attribute":
            weight = block.x_proj.weight.clone()
            del block.x_proj.weight
            block.x_proj.weight = 2 * weight
            assert not torch.allclose(block.step(x, *states)[0], want)
        elif kind == "act":
            block.act = nn.Tanh()
            assert not torch.allclose(block.step(x, *states)[0], want)
        else:
            compiled = torch.compile(lambda x, *states: block.step(x, *states)[0], backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x, *states), want)
    assert not kernel_calls


@pytest.mark.parametrize("make", [lambda: Mamba(8), lambda: Mamba2(8, headdim=4)], ids=["mamba", "mamba2"])
def test_step_is_exported_for_any_batch(make):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = make(), nn.Linear(8, 5)

        def forward(self, x, *states):
            y, *states = self.block.step(x, *states)
            return linear_step(self.head, y), *states

    model, batch = Step().eval(), torch.export.Dim("batch", max=64)
    args = torch.randn(4, 8), *model.block.allocate_inference_cache(4)
    with torch.no_grad():
        exported = torch.export.export(
            model, args, dynamic_shapes={"x": {0: batch}, "states": ({0: batch}, {0: batch})}
        )
        args = torch.randn(20, 8), *model.block.allocate_inference_cache(20)
        for got, want in zip(exported.module()(*args), model(*args), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["x", "conv_state", "ssm_state"])
@pytest.mark.parametrize("form", ["meta", "sparse", "integer", "number", "absent"])
def test_step_arguments_that_no_kernel_may_take_raise_with_their_name(name, form):
    block = Mamba(8)
    args = dict(
        zip(("x", "conv_state", "ssm_state"), (torch.randn(2, 8), *block.allocate_inference_cache(2)), strict=True)
    )
    bad = {
        "meta": lambda x: x.to("meta"),
        "sparse": lambda x: x.to_sparse(),
        "integer": lambda x: x.long(),
        "number": lambda x: x.sum(),
        "absent": lambda x: None,
    }
    args[name] = bad[form](args[name])
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=rf"^Mamba\.step: {name} "):
        block.step(**args)


def test_step_takes_the_attributes_that_a_scan_takes():
    class Slower(Mamba):
        @property
        def D(self):
            return 2 * self._parameters["D"]

        @D.setter
        def D(self, value):
            self.register_parameter("D", value)

    block, x = Mamba(8), torch.randn(2, 1, 8)
    block.__class__ = Slower
    with torch.no_grad():
        torch.testing.assert_close(block.step(x, *block.allocate_inference_cache(2))[0], block(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(1,), (8,), (9,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_step_is_close_to_the_layer(rows, dtype, bias):
    layer, x = nn.Linear(30, 17, bias=bias, dtype=dtype), torch.randn(*rows, 30, dtype=dtype)
    with torch.no_grad():
        y = linear_step(layer, x)
    assert y.dtype == dtype and y.shape == (*rows, 17) and not y.requires_grad
    torch.testing.assert_close(
        y.double(), layer.double()(x.double()).detach(), rtol=0, atol=30 * torch.finfo(dtype).eps
    )
    with torch.enable_grad():
        assert linear_step(layer, x.double()).requires_grad


def test_linear_step_layer_with_another_forward_is_called():
    layer, x = nn.Linear(3, 2), torch.randn(1, 3)
    with torch.no_grad():
        want = layer(x)
        assert torch.equal(linear_step(nn.Sequential(layer, nn.ReLU()), x), want.relu())
        layer.register_forward_hook(lambda module, args, y: 2 * y)
        assert torch.equal(linear_step(layer, x), 2 * want)


class Doubling(torch.Tensor):
    """A weight that stands for twice its numbers, as a quantised one stands for others than it stores."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, torch.Tensor) else a for a in args]
        if function is F.linear:
            return F.linear(plain[0], 2 * plain[1], *plain[2:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("row_invariant_rows", [False, True])
def test_weights_of_a_derived_tensor_class_are_left_to_torch(row_invariant_rows, monkeypatch):
    """torchao's quantised weights are such tensors, in layers of the class nn.Linear."""
    block, x = Mamba(8), torch.randn(2, 8)
    doubled = copy.deepcopy(block)
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        layer = getattr(doubled, name)
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubling), requires_grad=False)
        getattr(block, name).weight.data *= 2
    states = block.allocate_inference_cache(2)
    with torch.no_grad():
        want = block.step(x, *states)
        if row_invariant_rows:
            with row_invariant():
                got, whole = doubled.step(x, *states), doubled(x.unsqueeze(1))[:, 0]
                assert torch.equal(project(x, doubled.in_proj.weight), linear(doubled.in_proj, x))
        else:
            got, whole = doubled.step(x, *states), doubled(x.unsqueeze(1))[:, 0]
    torch.testing.assert_close(tuple(got), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole, want[0], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [lambda: Mamba(32), lambda: Mamba2(32, headdim=16)], ids=["mamba", "mamba2"])
@pytest.mark.parametrize("form", ["int8", "bfloat16"])
def test_small_weights_steps_are_close_to_the_scan_and_to_float32(make, form):
    from torch.ao.quantization import quantize_dynamic

    block, x = make().eval(), torch.randn(2, 12, 32)
    with torch.no_grad():
        want = block(x)
        small = copy.deepcopy(block).to(torch.bfloat16) if form == "bfloat16" else quantize_dynamic(block, {nn.Linear})
        inputs = x.to(torch.bfloat16) if form == "bfloat16" else x
        y, (conv_state, ssm_state) = steps(small, inputs)
        whole = small(inputs)
    error = 0.1 if form == "int8" else 0.03
    largest = want.abs().max()
    assert 0 < (y.float() - want).abs().max() < error * largest
    assert (y.float() - whole.float()).abs().max() < error * largest
    assert ssm_state.dtype == torch.float32 and conv_state.dtype == inputs.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("rows", [(1,), (70,), (2, 3), (0,)], ids=str)
def test_norm_step_is_close_to_the_layer(rows, options, dtype):
    layer, x = nn.RMSNorm(30, **options, dtype=dtype), 1e-2 * torch.randn(*rows, 30, dtype=dtype)
    if layer.weight is not None:
        nn.init.normal_(layer.weight)
    with torch.no_grad():
        y, want = norm_step(layer, x), layer(x)
    assert y.dtype == dtype and y.shape == x.shape
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, want, rtol=eps, atol=eps)
    assert norm_step(layer, x.requires_grad_()).requires_grad


def test_norm_step_other_layers_are_called():
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        for layer in (nn.LayerNorm(4), nn.RMSNorm((3, 4)), nn.Identity()):
            assert torch.equal(norm_step(layer, x), layer(x))
        layer = nn.RMSNorm(4)
        layer.register_forward_hook(lambda module, args, y: 2 * y)
        torch.testing.assert_close(norm_step(layer, x), 2 * nn.functional.rms_norm(x, (4,)))
