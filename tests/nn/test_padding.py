"""Sequences of different lengths in one batch: rows equal the same rows alone, and padding has no influence."""

import pytest
import torch
import torch.nn.functional as F
from core_cases import NAMES, net_of
from torch.func import vmap

from eaml_ext.nn import SSM, Mamba, Mamba2
from eaml_ext.nn.padding import padding_mask, unit_step_delta, zero_delta_after_length, zero_padding


@pytest.mark.parametrize("name", NAMES)
def test_scan_padded_batch_equals_its_rows_alone(name):
    net = SSM(3, 16, 2, state_size=4, num_layers=2, core=name).double()
    x, lengths = torch.randn(5, 9, 3, dtype=torch.float64), torch.tensor([9, 6, 1, 0, 2])
    before = net.scan(torch.randn(5, 4, 3, dtype=torch.float64))[1].detach()
    reset = torch.zeros(5, 9, dtype=torch.bool)
    reset[0, 3] = reset[1, 5] = reset[1, 7] = reset[4, 1] = True
    for row, n in enumerate(lengths.tolist()):
        x[row, n:] = float("nan")  # padding may have any values
    for given, resets in ((before, None), (before, reset), (None, reset)):
        x.requires_grad_()
        y, last = net.scan(x, given, resets, lengths)
        (g,) = torch.autograd.grad(y.square().sum() + last.square().sum(), x)
        for row, n in enumerate(lengths.tolist()):
            one = slice(row, row + 1)
            alone = x[one, :n].detach().requires_grad_()
            start = None if given is None else given[one]
            want, end = net.scan(alone, start, None if resets is None else resets[one, :n])
            torch.testing.assert_close(y[one, :n], want)
            torch.testing.assert_close(last[one], end)
            assert y[row, n:].eq(0).all() and g[row, n:].eq(0).all()
            (w,) = torch.autograd.grad(want.square().sum() + end.square().sum(), alone, materialize_grads=True)
            torch.testing.assert_close(g[one, :n], w)


@pytest.mark.parametrize("name", NAMES)
def test_scan_lengths_under_vmap_equal_a_loop(name):
    net, x = net_of(name), torch.randn(2, 3, 5, 3, dtype=torch.float64)
    lengths = torch.tensor([[5, 2, 0], [1, 4, 3]])
    y, last = vmap(lambda x, n: net.scan(x, lengths=n))(x, lengths)
    for i in range(2):
        torch.testing.assert_close((y[i], last[i]), net.scan(x[i], lengths=lengths[i]))


def test_forward_lengths_equal_scan():
    net, x, lengths = SSM(3, 8, 2), torch.randn(2, 5, 3), torch.tensor([2, 5])
    assert torch.equal(net(x, lengths=lengths), net.scan(x, lengths=lengths)[0])
    with pytest.raises(ValueError, match=r"x must have shape \(batch, time, 3\), got \(2, 3\)"):
        net(x[:, 0], lengths=lengths)


@pytest.mark.parametrize(
    "lengths, error, text",
    [
        ([1, 2], TypeError, "lengths must be a torch.Tensor, got list"),
        (torch.tensor([1.0, 2.0]), TypeError, "lengths must be int64 or int32, got float32"),
        (torch.tensor([1]), ValueError, "lengths must have shape (batch,) = (2,), got (1,)"),
        (torch.tensor([1, 4]), ValueError, "lengths must be from 0 to 3, got [1, 4]"),
        (torch.tensor([-1, 2]), ValueError, "lengths must be from 0 to 3, got [-1, 2]"),
        (torch.tensor([1, 2], device="meta"), ValueError, "lengths is on meta, x is on cpu"),
    ],
    ids=str,
)
def test_scan_bad_lengths_raise_one_sentence(lengths, error, text):
    for scan, width in ((SSM(4, 8, 2).scan, 4), (Mamba(4).scan, 4), (Mamba2(4, headdim=4).scan, 4)):
        with pytest.raises(error) as info:
            scan(torch.randn(2, 3, width), lengths=lengths)
        assert text in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("core", NAMES)
def test_scan_nan_before_a_reset_does_not_reach_later_steps(core):
    x, reset = torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    x[0, 1], reset[0, 2] = torch.nan, True
    y, state = SSM(3, 32, 2, core=core).scan(x, reset=reset)
    assert y[0, 2:].isfinite().all() and y[1].isfinite().all() and state.isfinite().all()


@pytest.mark.parametrize("core", NAMES)
def test_scan_int32_lengths_equal_int64_lengths(core):
    model, x, reset = SSM(3, 32, 2, core=core), torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    lengths = torch.tensor([3, 5])
    got, want = (model.scan(x, reset=reset, lengths=n)[0] for n in (lengths.int(), lengths))
    assert torch.equal(got, want)


def test_padding_functions_lengths_mark_zero_and_stop():
    lengths = torch.tensor([2, 0, 3])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0]]).bool()
    assert torch.equal(padding_mask(lengths, 3), mask)
    x, reset = torch.full((3, 3, 2), torch.nan), torch.ones(3, 3, dtype=torch.bool)
    x[~mask] = 1.0
    zeroed, kept, padding = zero_padding(x, reset, lengths)
    assert torch.equal(zeroed, (~mask).float().unsqueeze(-1).expand(3, 3, 2)) and torch.equal(kept, ~mask)
    assert torch.equal(padding.squeeze(-1), mask) and zero_padding(x, None, lengths)[1] is None
    delta = torch.ones(3, 2, 3)
    stopped = F.softplus(zero_delta_after_length(delta, lengths))
    assert (stopped == 0).eq(mask.unsqueeze(1)).all() and zero_delta_after_length(delta, None) is delta
    assert torch.equal(unit_step_delta(delta, lengths), (~mask).float().unsqueeze(1).expand(3, 2, 3))
    assert torch.equal(unit_step_delta(delta), delta)
