"""nn.Mamba2: the parameters of mamba_ssm, the quadratic form, states, resets, derivatives, errors."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mamba_layer_checks import (
    check_bfloat16,
    check_inference_params,
    check_maml_outer_gradient,
    check_per_task_weights,
    check_resets,
    check_steps_and_splits,
    sequence,
)
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune

from eaml_ext.nn import Mamba2
from eaml_ext.ops import selective_scan

OPTIONS = [
    {},
    {"ngroups": 2, "headdim": 2},
    {"d_ssm": 8, "bias": True},
    {"D_has_hdim": True, "conv_bias": False, "d_conv": 2},
    {"rmsnorm": False, "dt_limit": (0.02, 0.05)},
    {"norm_before_gate": True, "ngroups": 4, "headdim": 3},
    {"learnable_init_states": True},
]


def layer(**options):
    """A layer with random numbers in every parameter, 12 inner channels and 3 heads."""
    m = Mamba2(6, **{"d_state": 3, "headdim": 4, **options}).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return m


def quadratic(m, x):
    """The paper's dual form, y = (L o C B^T) (dt x) with L_ts = exp(sum_{s < i <= t} dt_i a), head by head."""
    z0, x0, z, xBC, dt = m.in_proj(x).split(
        [m.d_inner - m.d_ssm] * 2 + [m.d_ssm, m.d_ssm + 2 * m.ngroups * m.d_state, m.nheads], dim=-1
    )
    xBC = F.conv1d(F.pad(xBC.mT, (m.d_conv - 1, 0)), m.conv1d.weight, m.conv1d.bias, groups=xBC.shape[-1])
    u, B, C = F.silu(xBC.mT).split([m.d_ssm, *[m.ngroups * m.d_state] * 2], dim=-1)
    dt = F.softplus(dt + m.dt_bias).clamp(*m.dt_limit)
    D = m.D if m.D_has_hdim else m.D.repeat_interleave(m.headdim)
    heads = []
    for h in range(m.nheads):
        group = slice(h * m.ngroups // m.nheads * m.d_state, (h * m.ngroups // m.nheads + 1) * m.d_state)
        total = (-m.A_log[h].exp() * dt[..., h]).cumsum(-1)  # (batch, length)
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril().exp().tril()
        v = u[..., h * m.headdim : (h + 1) * m.headdim]
        y = (decay * (C[..., group] @ B[..., group].mT)) @ (dt[..., h, None] * v)
        if m.init_states is not None:
            y = y + total.exp().unsqueeze(-1) * (C[..., group] @ m.init_states[h].mT)
        heads.append(y)
    y = torch.cat(heads, dim=-1) + D * u
    y = y if m.rmsnorm and m.norm_before_gate else y * F.silu(z)
    if m.rmsnorm:
        parts = [p / (p.square().mean(-1, keepdim=True) + 1e-5).sqrt() for p in y.chunk(m.ngroups, dim=-1)]
        y = torch.cat(parts, dim=-1) * m.norm.weight
        y = y * F.silu(z) if m.norm_before_gate else y
    return m.out_proj(torch.cat([F.silu(z0) * x0, y], dim=-1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mamba2_computes_the_quadratic_form(options):
    m, x = layer(**options), sequence()
    torch.testing.assert_close(m(x), quadratic(m, x))
    with torch.no_grad():  # the convolution has another path without gradients
        torch.testing.assert_close(m(x), quadratic(m, x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mamba2_parameter_gradients_equal_those_of_the_quadratic_form(options):
    m, x = layer(**options), sequence().requires_grad_()
    inputs = [x, *m.parameters()]
    weight = sequence()
    got, want = (torch.autograd.grad((f(x) * weight).sum(), inputs) for f in (m, lambda x: quadratic(m, x)))
    assert all(g.abs().max() > 0 for g in want)
    torch.testing.assert_close(got, want)


def test_mamba2_scan_receives_a_decay_with_stride_zero_over_the_states(monkeypatch):
    """The kernels compute the decay of a channel once for all its states if A has this stride."""
    m, strides = layer(), []

    def scan(u, delta, A, *args, **options):
        strides.append(A.stride())
        return selective_scan(u, delta, A, *args, **options)

    monkeypatch.setattr("eaml_ext.nn._mamba2_mixer.selective_scan", scan)
    m(sequence()).sum().backward()
    assert strides == [(1, 0)]


# --- the parameters of mamba_ssm -------------------------------------------------------------------------------------


def test_mamba2_loads_a_checkpoint_of_mamba_ssm():
    """Names and shapes are copied from mamba_ssm.Mamba2(768) and, with init_states, from Mamba2Simple."""
    inner, state, heads = 1536, 128, 24
    channels = inner + 2 * state
    checkpoint = {
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "in_proj.weight": (2 * inner + 2 * state + heads, 768),
        "conv1d.weight": (channels, 1, 4),
        "conv1d.bias": (channels,),
        "norm.weight": (inner,),
        "out_proj.weight": (768, inner),
    }
    checkpoint = {name: torch.randn(shape) for name, shape in checkpoint.items()}
    m = Mamba2(768)
    m.load_state_dict(checkpoint, strict=True)
    assert all(torch.equal(value, checkpoint[name]) for name, value in m.state_dict().items())
    other = Mamba2(8, headdim=4, bias=True, conv_bias=False, rmsnorm=False, D_has_hdim=True, learnable_init_states=True)
    shapes = {name: tuple(value.shape) for name, value in other.state_dict().items()}
    assert shapes["init_states"] == (4, 4, 128) and shapes["D"] == (16,) and shapes["out_proj.bias"] == (8,)
    assert not {"conv1d.bias", "norm.weight"} & set(shapes)


def test_mamba2_initialisation_equals_that_of_mamba_ssm():
    torch.manual_seed(3)
    m = Mamba2(32, d_state=5, headdim=8, conv_init=0.1, dt_min=0.01, dt_max=0.2, A_init_range=(2, 4))
    torch.manual_seed(3)
    in_proj = nn.Linear(32, 64 + 64 + 10 + 8, bias=False)
    conv = nn.Conv1d(74, 74, 4, groups=74)
    nn.init.uniform_(conv.weight, -0.1, 0.1)
    step = torch.exp(torch.rand(8) * math.log(20) + math.log(0.01))
    rate = torch.empty(8).uniform_(2, 4)
    out_proj = nn.Linear(64, 32, bias=False)
    assert torch.equal(m.in_proj.weight, in_proj.weight) and torch.equal(m.conv1d.weight, conv.weight)
    assert torch.equal(m.conv1d.bias, conv.bias) and torch.equal(m.out_proj.weight, out_proj.weight)
    torch.testing.assert_close(F.softplus(m.dt_bias), step)
    assert torch.equal(m.A_log, rate.log())
    assert torch.equal(m.D, torch.ones(8)) and torch.equal(m.norm.weight, torch.ones(64))
    assert all(p._no_weight_decay for p in (m.dt_bias, m.A_log, m.D))
    half = Mamba2(32, headdim=8, dtype=torch.bfloat16)
    assert half.D.dtype == torch.float32
    assert {p.dtype for name, p in half.named_parameters() if name != "D"} == {torch.bfloat16}


# --- states, resets, padding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("no_grad", [False, True])
def test_mamba2_scan_equals_steps_and_split_scans(no_grad, options):
    check_steps_and_splits(layer(**options), no_grad)


def test_mamba2_resets_separate_episodes_in_state_and_convolution():
    check_resets(layer(ngroups=3))


@pytest.mark.parametrize("options", [{}, {"dt_limit": (0.5, 2.0)}, {"learnable_init_states": True}], ids=str)
def test_mamba2_padded_batch_equals_its_rows_alone(options):
    m, x, lengths = layer(**options), sequence(batch=4), torch.tensor([9, 4, 1, 0])
    for row, n in enumerate(lengths.tolist()):
        x[row, n:] = float("nan")  # padding may have any values
    x.requires_grad_()
    y, last = m.scan(x, lengths=lengths)
    (g,) = torch.autograd.grad(y.square().sum() + sum(s.square().sum() for s in last), x)
    for row, n in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        alone = x[one, :n].detach().requires_grad_()
        want, end = m.scan(alone)
        torch.testing.assert_close(y[one, :n], want)
        torch.testing.assert_close(tuple(s[one] for s in last), end)
        assert y[row, n:].eq(0).all() and g[row, n:].eq(0).all()
        loss = want.square().sum() + sum(s.square().sum() for s in end)
        (w,) = torch.autograd.grad(loss, alone, materialize_grads=True)
        torch.testing.assert_close(g[one, :n], w)


def test_mamba2_gradient_reaches_init_states_through_scan_and_steps():
    m, x = layer(learnable_init_states=True), sequence(length=3)
    state, total = m.allocate_inference_cache(2), 0
    for t in range(3):
        y, *state = m.step(x[:, t], *state)
        total = total + y.square().sum()
    by_steps = torch.autograd.grad(total, list(m.parameters()))
    by_scan = torch.autograd.grad(m(x).square().sum(), list(m.parameters()))
    torch.testing.assert_close(by_steps, by_scan)


def test_mamba2_inference_params_keep_the_states_of_a_layer():
    check_inference_params(layer(layer_idx=4))
    memory = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    with pytest.raises(ValueError, match=r"^Mamba2: inference_params needs a layer_idx, got a layer without one$"):
        layer()(sequence(), inference_params=memory)


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ngroups": 2, "norm_before_gate": True, "d_ssm": 4}], ids=str)
def test_mamba2_second_derivatives_pass_gradgradcheck(options):
    m = Mamba2(3, d_state=2, d_conv=2, headdim=2, **options).double()
    names, values = zip(*((name, p.detach()) for name, p in m.named_parameters()), strict=True)
    leaves = [v.add(0.3 * torch.randn_like(v)).requires_grad_() for v in values]

    def run(x, *p):
        return functional_call(m, dict(zip(names, p, strict=True)), (x,))

    x = sequence(batch=1, length=3, width=3).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *leaves))
    assert torch.autograd.gradgradcheck(run, (x, *leaves))


def test_mamba2_maml_outer_gradient_equals_that_of_the_quadratic_form():
    check_maml_outer_gradient(layer(ngroups=3, dt_limit=(0.3, 1.2)), quadratic)


def test_mamba2_per_task_weights_under_vmap_equal_a_loop():
    check_per_task_weights(layer(ngroups=3))


# --- dtypes, submodules, errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ngroups": 2, "norm_before_gate": True}], ids=str)
def test_mamba2_in_bfloat16_and_under_autocast_is_close_to_float32(options):
    check_bfloat16(lambda **more: Mamba2(16, d_state=8, headdim=8, **options, **more))


@pytest.mark.parametrize("name", ["in_proj", "conv1d", "norm", "out_proj"])
def test_mamba2_pruned_submodule_takes_effect_and_trains(name):
    m, x = layer(), sequence()
    plain = m(x)
    prune.random_unstructured(getattr(m, name), "weight", 0.5)
    for _ in range(2):  # a second backward needs the mask to be applied again
        m(x).square().mean().backward()
    y = m(x)
    assert not torch.allclose(y, plain)
    state, ys = m.allocate_inference_cache(2), []
    for t in range(9):
        out, *state = m.step(x[:, t], *state)
        ys.append(out)
    torch.testing.assert_close(torch.stack(ys, dim=1), y)
    prune.remove(getattr(m, name), "weight")
    torch.testing.assert_close(y, m(x))


def bad_calls():
    m, x = Mamba2(6, 5, headdim=4), torch.randn(2, 4, 6)
    conv, ssm = m.allocate_inference_cache(2)
    yield lambda: Mamba2(0), ValueError, "Mamba2: d_model must be > 0, got 0"
    yield lambda: Mamba2(6, 1.5), TypeError, "Mamba2: d_state must be an integer, got 1.5"
    yield lambda: Mamba2(6, d_conv=-1), ValueError, "Mamba2: d_conv must be > 0, got -1"
    yield lambda: Mamba2(6, headdim=4, conv_init=0), ValueError, "Mamba2: conv_init must be > 0, got 0"
    yield lambda: Mamba2(6, headdim=4, conv_init=math.inf), ValueError, "Mamba2: conv_init must be finite, got inf"
    yield lambda: Mamba2(6, expand=0.1), ValueError, "Mamba2: expand must make d_model 6"
    yield lambda: Mamba2(6, headdim=5), ValueError, "Mamba2: headdim must divide the 12 channels of the scan, got 5"
    yield lambda: Mamba2(6, headdim=0), ValueError, "Mamba2: headdim must be > 0, got 0"
    yield lambda: Mamba2(6, d_ssm=16), ValueError, "Mamba2: d_ssm must be at most expand * d_model = 12, got 16"
    yield lambda: Mamba2(6, headdim=4, ngroups=2), ValueError, "Mamba2: ngroups must divide the 3 heads, got 2"
    yield lambda: Mamba2(6, headdim=4, A_init_range=3), TypeError, "Mamba2: A_init_range must be two numbers, got 3"
    yield (
        lambda: Mamba2(6, headdim=4, A_init_range=(1, math.inf)),
        ValueError,
        "Mamba2: A_init_range must be finite and in ascending order, got (1, inf)",
    )
    yield lambda: Mamba2(6, headdim=4, A_init_range=(0, 1)), ValueError, "Mamba2: A_init_range must be > 0, got 0"
    yield (
        lambda: Mamba2(6, headdim=4, dt_limit=(0.2, 0.1)),
        ValueError,
        "Mamba2: dt_limit must be in ascending order, got (0.2, 0.1)",
    )
    yield lambda: Mamba2(6, headdim=4, dt_limit=(-1, 1)), ValueError, "Mamba2: dt_limit must be >= 0, got -1"
    yield lambda: Mamba2(6, headdim=4, dt_min=0), ValueError, "Mamba2: dt_min must be > 0, got 0"
    yield lambda: Mamba2(6, headdim=4, dt_max=1e-4), ValueError, "Mamba2: dt_max must be finite and at least dt_min"
    yield lambda: Mamba2(6, headdim=4, chunk_size=0), ValueError, "Mamba2: chunk_size must be > 0, got 0"
    yield lambda: Mamba2(6, headdim=4, rmsnorm=1), TypeError, "Mamba2: rmsnorm must be True or False, got int"
    yield lambda: Mamba2(6, headdim=4, bias=None), TypeError, "Mamba2: bias must be True or False, got NoneType"
    yield lambda: Mamba2(6, headdim=4, process_group=m), ValueError, "Mamba2: process_group must be None, got Mamba2"
    yield lambda: Mamba2(6, headdim=4, activation="silu"), TypeError, "unexpected keyword argument 'activation'"
    yield lambda: m(x, seqlen=4), TypeError, "unexpected keyword argument 'seqlen'"
    yield lambda: m([1.0]), TypeError, "Mamba2.scan: x must be a torch.Tensor"
    yield lambda: m(x[0]), ValueError, "Mamba2.scan: x must have shape (batch, length, 6)"
    yield lambda: m(x.double()), TypeError, "Mamba2.scan: x must be float32"
    yield lambda: m.scan(x, (conv[:1], ssm)), ValueError, "Mamba2.scan: conv_state must have shape (2, 22, 4)"
    yield lambda: m.scan(x, (conv, ssm.flatten(1, 2))), ValueError, "ssm_state must have shape (2, 3, 4, 5)"
    yield lambda: m.scan(x, None, torch.zeros(2, 3).bool()), ValueError, "Mamba2.scan: reset must have shape"
    yield lambda: m.scan(x, lengths=[1, 2]), TypeError, "Mamba2.scan: lengths must be a torch.Tensor, got list"
    yield (
        lambda: layer(learnable_init_states=True).scan(x.double(), reset=torch.zeros(2, 4).bool()),
        ValueError,
        "Mamba2.scan: reset and seq_idx must be None with learnable_init_states, got a tensor",
    )
    yield lambda: m.step(x, conv, ssm), ValueError, "Mamba2.step: x must have length 1, got 4"
    yield lambda: m.step(x[:, 0], conv, ssm.long()), TypeError, "Mamba2.step: ssm_state must be floating point"
    yield lambda: m.allocate_inference_cache(-1), ValueError, "batch_size must be >= 0"


@pytest.mark.parametrize("call, error, text", list(bad_calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_mamba2_bad_input_raises_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)
