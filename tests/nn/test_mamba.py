"""nn.Mamba: the parameters of mamba_ssm, the published block, states, resets, derivatives, errors."""

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

from eaml_ext.nn import Mamba
from eaml_ext.ops import selective_scan_reference


def block(**options):
    return Mamba(6, d_state=3, **options).double()


def published(m, x):
    """Figure 3 and algorithm 2 of the paper with a loop over time, from zero states."""
    x, z = m.in_proj(x).mT.chunk(2, dim=1)
    x = F.silu(F.conv1d(F.pad(x, (m.d_conv - 1, 0)), m.conv1d.weight, m.conv1d.bias, groups=m.d_inner))
    delta, B, C = m.x_proj(x.mT).split((m.dt_rank, m.d_state, m.d_state), dim=-1)
    delta = delta @ m.dt_proj.weight.T
    A = -m.A_log.exp()
    y = selective_scan_reference(x, delta.mT, A, B.mT, C.mT, m.D, z, m.dt_proj.bias, True)
    return m.out_proj(y.mT)


@pytest.mark.parametrize(
    "options",
    [{}, {"d_conv": 1}, {"d_conv": 7, "expand": 3, "bias": True}, {"conv_bias": False, "dt_rank": 4}],
    ids=str,
)
def test_mamba_computes_the_published_block(options):
    m, x = block(**options), sequence()
    torch.testing.assert_close(m(x), published(m, x))
    with torch.no_grad():  # the convolution has another path without gradients
        torch.testing.assert_close(m(x), published(m, x))
        torch.testing.assert_close(m(x[:, :2]), published(m, x[:, :2]))


def test_mamba_loads_a_checkpoint_of_mamba_ssm():
    """Names and shapes are copied from mamba_ssm.Mamba(768)."""
    inner, state, width, rank = 1536, 16, 4, 48
    checkpoint = {
        "A_log": (inner, state),
        "D": (inner,),
        "in_proj.weight": (2 * inner, 768),
        "conv1d.weight": (inner, 1, width),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * state, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (768, inner),
    }
    checkpoint = {name: torch.randn(shape) for name, shape in checkpoint.items()}
    m = Mamba(768)
    m.load_state_dict(checkpoint, strict=True)
    assert all(torch.equal(value, checkpoint[name]) for name, value in m.state_dict().items())
    biased = Mamba(8, bias=True, conv_bias=False).state_dict()
    assert {"in_proj.bias", "out_proj.bias"} < set(biased) and "conv1d.bias" not in biased


def test_mamba_initialisation_equals_that_of_mamba_ssm():
    torch.manual_seed(3)
    m = Mamba(32, d_state=5, dt_min=0.01, dt_max=0.2)
    torch.manual_seed(3)
    in_proj = nn.Linear(32, 128, bias=False)
    conv = nn.Conv1d(64, 64, 4, groups=64)
    x_proj = nn.Linear(64, 2 + 10, bias=False)
    nn.Linear(2, 64)
    dt_weight = torch.empty(64, 2).uniform_(-(2**-0.5), 2**-0.5)
    step = torch.exp(torch.rand(64) * math.log(20) + math.log(0.01))
    out_proj = nn.Linear(64, 32, bias=False)
    assert torch.equal(m.in_proj.weight, in_proj.weight) and torch.equal(m.conv1d.weight, conv.weight)
    assert torch.equal(m.conv1d.bias, conv.bias) and torch.equal(m.x_proj.weight, x_proj.weight)
    assert torch.equal(m.dt_proj.weight, dt_weight) and torch.equal(m.out_proj.weight, out_proj.weight)
    torch.testing.assert_close(F.softplus(m.dt_proj.bias), step)
    torch.testing.assert_close(m.A_log.exp(), torch.arange(1.0, 6.0).expand(64, 5))
    assert torch.equal(m.D, torch.ones(64))
    constant = Mamba(32, dt_init="constant", dt_scale=0.5, dtype=torch.bfloat16)
    assert constant.dt_proj.weight.unique().item() == torch.tensor(0.5 * 2**-0.5).bfloat16()
    assert constant.A_log.dtype == constant.D.dtype == torch.float32 and constant.in_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("no_grad", [False, True])
def test_mamba_scan_equals_steps_and_split_scans(no_grad):
    check_steps_and_splits(block(), no_grad)


def test_mamba_resets_separate_episodes_in_state_and_convolution():
    check_resets(block())


def test_mamba_steps_have_the_gradient_of_the_scan():
    m, x = block(), sequence(length=3).requires_grad_()
    state, total = m.allocate_inference_cache(2), 0
    for t in range(3):
        y, *state = m.step(x[:, t], *state)
        total = total + y.square().sum()
    (by_steps,) = torch.autograd.grad(total, x)
    (by_scan,) = torch.autograd.grad(m(x).square().sum(), x)
    torch.testing.assert_close(by_steps, by_scan)


def test_mamba_per_task_weights_under_vmap_equal_a_loop():
    check_per_task_weights(block())


def test_mamba_maml_outer_gradient_equals_that_of_the_published_block():
    check_maml_outer_gradient(block(), published)


def test_mamba_in_bfloat16_and_under_autocast_is_close_to_float32():
    check_bfloat16(lambda **options: Mamba(16, **options))
    assert Mamba(16, dtype=torch.bfloat16).A_log.dtype == torch.float32


def test_mamba_inference_params_keep_the_states_of_a_layer():
    check_inference_params(block(layer_idx=4))


def test_mamba_inference_params_preallocated_states_are_continued():
    """mamba_ssm's generation allocates the cache before the first call."""
    m, x = block(layer_idx=0), sequence()
    _, states = m.scan(x[:, :5])
    memory = SimpleNamespace(seqlen_offset=5, key_value_memory_dict={0: states}, batch_size_offset=0)
    torch.testing.assert_close(m(x[:, 5:], inference_params=memory), m(x)[:, 5:])


@pytest.mark.parametrize(
    ("attributes", "error", "text"),
    [
        (
            {"seqlen_offset": 3, "key_value_memory_dict": {}},
            ValueError,
            "Mamba: inference_params.key_value_memory_dict must hold the states of layer 4 where seqlen_offset is 3, "
            "got none: begin with seqlen_offset 0",
        ),
        (
            {"seqlen_offset": 3, "key_value_memory_dict": {1: None}},
            ValueError,
            "Mamba: inference_params.key_value_memory_dict must hold the states of layer 4 where seqlen_offset is 3, "
            "got none: begin with seqlen_offset 0",
        ),
        (
            {"seqlen_offset": 0},
            TypeError,
            "Mamba: inference_params must have the attribute key_value_memory_dict, got SimpleNamespace without it",
        ),
        (
            {"key_value_memory_dict": {}},
            TypeError,
            "Mamba: inference_params must have the attribute seqlen_offset, got SimpleNamespace without it",
        ),
        (
            {"seqlen_offset": 0, "key_value_memory_dict": {}, "batch_size_offset": 2},
            ValueError,
            "Mamba: inference_params.batch_size_offset must be 0, got 2",
        ),
    ],
)
def test_mamba_inference_params_without_states_or_attributes_raise(attributes, error, text):
    m, memory = block(layer_idx=4), SimpleNamespace(**attributes)
    with pytest.raises(error) as caught:
        m(sequence(), inference_params=memory)
    assert str(caught.value) == text
    assert getattr(memory, "key_value_memory_dict", {}) in ({}, {1: None})  # unchanged


def bad_calls():
    m, x = Mamba(6), torch.randn(2, 4, 6)
    conv, ssm = m.allocate_inference_cache(2)
    step = x[:, :1]
    yield lambda: Mamba(0), ValueError, "d_model must be > 0"
    yield lambda: Mamba(6, 1.5), TypeError, "d_state must be an integer"
    yield lambda: Mamba(6, d_conv=-1), ValueError, "d_conv must be > 0"
    yield lambda: Mamba(6, expand=0), ValueError, "expand must be > 0"
    yield lambda: Mamba(6, expand=0.1), ValueError, "expand must make d_model 6"
    yield lambda: Mamba(6, dt_rank="all"), ValueError, "dt_rank must be 'auto'"
    yield lambda: Mamba(6, dt_rank=0), ValueError, "dt_rank must be > 0"
    yield lambda: Mamba(6, dt_min=0), ValueError, "dt_min must be > 0"
    yield lambda: Mamba(6, dt_max=1e-4), ValueError, "dt_max must be finite and at least dt_min"
    yield lambda: Mamba(6, dt_init="zero"), ValueError, "dt_init must be"
    yield lambda: Mamba(6, dt_scale=-1), ValueError, "dt_scale must be > 0"
    yield lambda: Mamba(6, dt_init_floor="a"), TypeError, "dt_init_floor must be a number"
    yield lambda: Mamba(6, conv_bias=1), TypeError, "conv_bias must be True or False"
    yield lambda: Mamba(6, bias=None), TypeError, "bias must be True or False"
    yield lambda: Mamba(6, use_fast_path="no"), TypeError, "use_fast_path must be True or False"
    yield lambda: m([1.0]), TypeError, "x must be a torch.Tensor"
    yield lambda: m(x[0]), ValueError, "x must have shape (batch, length, 6)"
    yield lambda: m(x.double()), TypeError, "x must be float32"
    yield lambda: m(x.to("meta")), ValueError, "x is on meta"
    yield lambda: m(x, inference_params=SimpleNamespace()), ValueError, "needs a layer_idx"
    yield lambda: m.scan(x, (conv[:1], ssm)), ValueError, "conv_state must have shape (2, 12, 4)"
    yield lambda: m.scan(x, (conv, ssm.long())), TypeError, "ssm_state must be floating point"
    yield lambda: m.scan(x, None, torch.zeros(2, 4)), TypeError, "reset must be bool"
    yield lambda: m.scan(x, None, torch.zeros(2, 3).bool()), ValueError, "reset must have shape"
    yield lambda: m.scan(x, None, [True]), TypeError, "reset must be a torch.Tensor"
    yield lambda: m.step(x, conv, ssm), ValueError, "x must have length 1"
    yield lambda: m.step(x[0, 0], conv, ssm), ValueError, "x must have shape"
    yield lambda: m.step(step, None, ssm), TypeError, "conv_state must be a torch.Tensor"
    yield lambda: m.step(step, conv, ssm[..., :2]), ValueError, "ssm_state must have shape (2, 12, 16)"
    yield lambda: m.step(step, conv, ssm.to("meta")), ValueError, "ssm_state is on meta"
    yield lambda: m.allocate_inference_cache(-1), ValueError, "batch_size must be >= 0"


@pytest.mark.parametrize("call, error, text", list(bad_calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_mamba_bad_input_raises_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)
