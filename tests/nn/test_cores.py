"""All cores keep one contract: scan, step, resets, task weights, second order, precision, errors."""

import sys

import pytest
import torch
from core_cases import DIM, NAMES, STATES, make, net_of, sequence
from torch.func import functional_call, grad, vmap

from eaml_ext.nn import SSM, SSMLayer
from eaml_ext.nn.cores import LRU, RWKV, SSD, MambaCore, Retention, make_core
from eaml_ext.ops import selective_scan_reference


@pytest.mark.parametrize("name", NAMES)
def test_core_scan_equals_steps_and_split_scans(name):
    core, x = make(name), sequence()
    whole, last = core.scan(x)
    assert whole.shape == x.shape and last.shape == (2, *core.state_shape)
    for split in (1, 4):
        a, state = core.scan(x[:, :split])
        b, end = core.scan(x[:, split:], state)
        torch.testing.assert_close(torch.cat([a, b], dim=1), whole)
        torch.testing.assert_close(end, last)
    state, ys = x.new_zeros(2, *core.state_shape), []
    for t in range(x.shape[1]):
        y, state = core.step(x[:, t], state)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys, dim=1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("name", NAMES)
def test_core_scan_resets_separate_episodes(name):
    core, x = make(name), sequence(length=9)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, [0, 4, 5]] = True
    reset[1, 8] = True
    before = core.scan(sequence())[1]
    y, last = core.scan(x, before, reset)
    for row, start, stop in ((0, 0, 4), (0, 4, 5), (0, 5, 9), (1, 8, 9)):
        alone, end = core.scan(x[row : row + 1, start:stop])
        torch.testing.assert_close(y[row : row + 1, start:stop], alone)
        if stop == 9:
            torch.testing.assert_close(last[row : row + 1], end)
    torch.testing.assert_close(y[1:, :8], core.scan(x[1:, :8], before[1:])[0])
    assert not torch.allclose(y[0, 0], core.scan(x[:1], before[:1])[0][0, 0])  # the state before matters
    x.requires_grad_()
    (g,) = torch.autograd.grad(core.scan(x, None, reset)[0][0, 5:].square().sum(), x)
    assert g[0, :5].abs().max() == 0 and g[0, 5:].abs().max() > 0  # exactly


@pytest.mark.parametrize("name", NAMES)
def test_core_per_task_weights_under_vmap_equal_a_loop(name):
    net, x = net_of(name), torch.randn(3, 2, 5, 3, dtype=torch.float64)
    params = {k: p.detach() + 0.1 * torch.randn(3, *p.shape, dtype=p.dtype) for k, p in net.named_parameters()}

    def loss(p, x):
        return functional_call(net, p, (x,)).square().sum()

    together = vmap(grad(loss))(params, x)
    for i in range(3):
        alone = grad(loss)({k: p[i] for k, p in params.items()}, x[i])
        torch.testing.assert_close({k: g[i] for k, g in together.items()}, alone, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_core_maml_outer_gradient_equals_the_reference(name, monkeypatch):
    """Second order, one inner step, tasks under vmap."""
    net = net_of(name)
    x, y = torch.randn(2, 1, 6, 3, dtype=torch.float64), torch.randn(2, 1, 6, 2, dtype=torch.float64)
    params = {k: p.detach() for k, p in net.named_parameters()}

    def outer(p):
        def task(x, y):
            def inner(q):
                return (functional_call(net, q, (x,)) - y).square().mean()

            return inner({k: p[k] - 0.1 * g for k, g in grad(inner)(p).items()})

        return vmap(task)(x, y).mean()

    ours = grad(outer)(params)
    module = "eaml_ext.nn._mamba_mixer" if name == "mamba" else type(net.cores[0]).__module__
    monkeypatch.setattr(sys.modules[module], "selective_scan", selective_scan_reference)
    want = grad(outer)(params)
    for k in ours:
        assert (ours[k] - want[k]).abs().max() <= 1e-8 * want[k].abs().max(), k


@pytest.mark.parametrize("name", NAMES)
def test_core_every_parameter_has_a_gradient_and_the_loss_falls(name):
    net = SSM(3, 16, 2, state_size=4, core=name)
    x = torch.randn(8, 20, 3)
    target = x.cumsum(dim=1)[..., :2] / 5  # needs memory
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    losses = []
    for _ in range(40):
        loss = (net(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_ssm_of_every_core_is_saved_and_loaded(name, tmp_path):
    net, x = SSM(3, 16, 2, state_size=2, num_layers=2, core=name), torch.randn(2, 5, 3)
    net.save(tmp_path / "m")
    assert torch.equal(SSM.load(tmp_path / "m")(x), net(x))
    state = net.init_hidden(2)
    assert torch.equal(net.scan(x, state)[0], net(x))
    torch.testing.assert_close(net.step(x[:, 0], state)[0], net(x)[:, 0])
    assert SSMLayer(3, 16, core=name)(x[0]).shape == (5, 16)


@pytest.mark.parametrize("name", NAMES)
def test_core_under_autocast_is_close_to_float32(name):
    core, x = make_core(name, DIM, STATES), torch.randn(2, 6, DIM)
    want, want_state = core.scan(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = core.scan(x)
        stepped, _ = core.step(x[:, 0], torch.zeros(2, *core.state_shape))
    assert state.dtype == torch.float32
    scale = want.abs().max().item()
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05 * scale)
    torch.testing.assert_close(state, want_state, rtol=0.05, atol=0.05 * want_state.abs().max().item())
    torch.testing.assert_close(stepped.float(), want[:, 0], rtol=0.05, atol=0.05 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_ssm_in_bfloat16_is_close_to_float32(name):
    net, x = SSM(3, 32, 2, core=name), torch.randn(2, 6, 3)
    want = net(x)
    y, state = net.bfloat16().scan(x.bfloat16())
    stepped, _ = net.step(x[:, 0].bfloat16(), net.init_hidden(2))
    assert y.dtype == stepped.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)
    torch.testing.assert_close(stepped.float(), want[:, 0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_core_long_sequence_stays_finite(name):
    core = make_core(name, 16, 4)
    y, state = core.scan(torch.randn(1, 3000, 16).requires_grad_())
    y.square().mean().backward()
    assert y.isfinite().all() and state.isfinite().all()
    assert all(p.grad.isfinite().all() for p in core.parameters())


def bad_calls():
    for name in NAMES:
        core = make_core(name, 16, 4)
        yield lambda c=core: type(c)(0), ValueError, "must be > 0"
        yield lambda c=core: type(c)(16, 2.5), TypeError, "state_size must be an integer"
        x = torch.randn(2, 3, 16)
        yield lambda c=core, x=x: c.scan(x, None, torch.zeros(2, 3)), TypeError, "reset must be bool"
    yield lambda: RWKV(16).scan(x, None, torch.zeros(2, 4).bool()), ValueError, "reset must have shape"
    yield lambda: SSD(16, num_heads=3), ValueError, "SSD: num_heads must divide dim 16, got 3"
    yield lambda: SSD(16, num_heads=True), TypeError, "num_heads must be an integer"
    yield lambda: Retention(16, 3), ValueError, "Retention: state_size must be even, got 3"
    yield lambda: Retention(16, num_heads=16), ValueError, "heads of 2 channels or more"
    yield lambda: RWKV(16, num_heads=16), ValueError, "heads of 2 channels or more"
    yield lambda: LRU(16, r_min=-1), ValueError, "r_min must be >= 0"
    yield lambda: LRU(16, r_max=1.0), ValueError, "r_max must be at least r_min, 0.0, and below 1"
    yield lambda: LRU(16, max_phase=0), ValueError, "max_phase must be > 0"
    yield lambda: MambaCore(16, d_conv=0), ValueError, "d_conv must be > 0"
    yield lambda: MambaCore(16, expand=-1), ValueError, "expand must be > 0"


@pytest.mark.parametrize("call, error, text", list(bad_calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_core_bad_input_raises_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)
