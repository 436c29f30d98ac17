"""causal_conv: the convolution of each episode alone, the returned state, and derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eaml_ext.nn._causal_conv import causal_conv, conv1d_scan, conv1d_step


@pytest.mark.parametrize("no_grad", [False, True])
def test_causal_conv_equals_conv1d_and_returns_the_last_inputs(no_grad):
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 7, 3), (3, 1, 4), (3,)))
    with torch.set_grad_enabled(not no_grad):
        y, conv_state = causal_conv(x, None, weight, bias)
        torch.testing.assert_close(y.mT, F.conv1d(F.pad(x.mT, (3, 0)), weight, bias, groups=3))
        assert torch.equal(conv_state, x[:, -4:].mT)
        first, state = causal_conv(x[:, :2], None, weight, bias)
        second, state = causal_conv(x[:, 2:], state, weight, bias)
        torch.testing.assert_close(torch.cat([first, second], dim=1), y)
        assert torch.equal(state, conv_state)


@pytest.mark.parametrize("with_reset", [False, True])
def test_causal_conv_has_first_and_second_derivatives(with_reset):
    x, conv_state = torch.randn(2, 4, 2, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)
    weight, bias = torch.randn(2, 1, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    reset = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1]]).bool() if with_reset else None
    inputs = tuple(v.requires_grad_() for v in (x, conv_state, weight, bias))

    def conv(*v):
        return causal_conv(*v, reset)

    assert torch.autograd.gradcheck(conv, inputs) and torch.autograd.gradgradcheck(conv, inputs)


def test_causal_conv_resets_and_lengths_keep_inputs_of_the_last_episode():
    x, before = torch.randn(4, 6, 2), torch.randn(4, 2, 3)
    weight = torch.randn(2, 1, 3)
    reset, lengths = torch.zeros(4, 6, dtype=torch.bool), torch.tensor([6, 2, 0, 4])
    reset[0, 4], reset[1, 1], reset[2, 0], reset[3, 5] = True, True, True, True  # the last two lie beyond the rows
    y, conv_state = causal_conv(x, before, weight, None, reset, lengths)
    expected = torch.stack(
        [
            F.pad(x[0, 4:].mT, (1, 0)),
            F.pad(x[1, 1:2].mT, (2, 0)),
            before[2],
            x[3, 1:4].mT,
        ]
    )
    assert torch.equal(conv_state, expected)
    alone, _ = causal_conv(x[:1, 4:], None, weight, None)
    assert torch.equal(y[:1, 4:], alone)


@pytest.mark.parametrize("act", [nn.SiLU(), nn.Tanh()])
@pytest.mark.parametrize("bias", [False, True])
def test_conv1d_scan_and_step_apply_the_activation_once(act, bias):
    conv1d, x = nn.Conv1d(5, 5, 4, groups=5, padding=3, bias=bias), torch.randn(2, 7, 5)
    y, conv_state = conv1d_scan(conv1d, act, 4, x, None, None, None)
    torch.testing.assert_close(y, act(conv1d(x.mT)[..., :7]).mT)
    assert torch.equal(conv1d_step(conv1d, act, 4, conv_state), y[:, -1])
