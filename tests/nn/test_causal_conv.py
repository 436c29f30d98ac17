"""causal_conv: the convolution of each episode alone, the returned state, and derivatives."""

import pytest
import torch
import torch.nn.functional as F

from eaml_ext.nn._causal_conv import causal_conv


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
