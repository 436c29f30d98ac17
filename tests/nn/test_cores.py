"""Cores: each against its published formula, and all of them under the contract of SSM."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from eaml_ext.nn import SSM, Mamba, SSMLayer
from eaml_ext.nn.cores import CORES, CORES_WITH_STEP_SIZE, LRU, RWKV, S4D, S5, SSD, MambaCore, Retention, make_core
from eaml_ext.ops import selective_scan_reference

DIM, STATES = 32, 4
NAMES = sorted(CORES)


def make(name):
    return make_core(name, DIM, STATES).double()


def sequence(batch=2, length=7):
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def cplx(pairs):
    return torch.view_as_complex(pairs.detach().contiguous())


# --- published formulas ----------------------------------------------------------------------------------------------


def s4d(core, x):
    """The convolution with K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l) (S4D, equation 7 and table 1)."""
    length = x.shape[1]
    A, dt = torch.complex(-core.A_log.exp(), core.A_imag), core.log_dt.exp().unsqueeze(-1)
    weights = cplx(core.C) * (torch.exp(dt * A) - 1) / A
    lags = torch.arange(length)
    K = 2 * torch.einsum("dn,dnl->dl", weights, torch.exp((dt * A).unsqueeze(-1) * lags)).real
    lag = lags.unsqueeze(-1) - lags
    kernel = torch.where(lag >= 0, K[:, lag.clamp(min=0)], 0.0)  # (dim, to, from)
    y = torch.einsum("dts,bsd->btd", kernel, x) + core.D * x
    return F.glu(core.out_proj(F.gelu(y)))


def diagonal(core, x, decay, B, pairs):
    """h_t = lambda h_{t-1} + B x_t, y_t = pairs Re(C h_t) + D x_t, one step after another."""
    h, ys = torch.zeros(x.shape[0], len(decay), dtype=torch.complex128), []
    for t in range(x.shape[1]):
        h = decay * h + x[:, t].to(B.dtype) @ B.T
        ys.append(pairs * (h @ cplx(core.C).T).real + core.D * x[:, t])
    return F.glu(core.out_proj(F.gelu(torch.stack(ys, dim=1))))


def s5(core, x):
    """Zero-order hold with Lambda and Delta of each state (S5, equation 5), conjugate pairs."""
    A, dt = torch.complex(-core.A_log.exp(), core.A_imag), core.log_dt.exp()
    return diagonal(core, x, torch.exp(A * dt), ((torch.exp(A * dt) - 1) / A).unsqueeze(-1) * cplx(core.B), 2)


def lru(core, x):
    """lambda = exp(-exp(nu_log) + i exp(theta_log)), inputs scaled by exp(gamma_log) (LRU, appendix A)."""
    decay = torch.exp(torch.complex(-core.nu_log.exp(), core.theta_log.exp()))
    return diagonal(core, x, decay, core.gamma_log.exp().unsqueeze(-1) * cplx(core.B), 1)


def ssd(core, x):
    """The dual, quadratic form: (L o C B^T)(dt x) with L_ts = exp(-a sum_{s < i <= t} dt_i) (Mamba-2, equation 3)."""
    z, B, C, delta = core.in_proj(x).split(core.split, dim=-1)
    dt = F.softplus(delta + core.delta_bias)  # (batch, time, heads)
    total = (dt * -core.A_log.exp()).cumsum(dim=1)
    L = torch.exp(total.unsqueeze(2) - total.unsqueeze(1)) * torch.ones(x.shape[1], x.shape[1]).tril()[..., None]
    heads = x.unflatten(-1, (core.num_heads, -1))
    y = torch.einsum("btsh,btn,bsn,bsh,bshp->bthp", L, C, B, dt, heads) + core.D.unsqueeze(-1) * heads
    y = y.flatten(-2) * F.silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * core.norm.weight
    return core.out_proj(y)


def retention(core, x):
    """The parallel form: (Q K^T o D) V with rotated Q and K, D_ts = gamma^(t-s), heads normalised (RetNet, 5 to 8)."""
    q, k, v, gate = core.in_proj(x).split(core.split, dim=-1)
    h, length = core.num_heads, x.shape[1]
    q, k, v = (p.unflatten(-1, (h, -1)).transpose(1, 2) for p in (q, k, v))
    angle = torch.arange(length).unsqueeze(-1) * 10000.0 ** (-torch.arange(0, STATES, 2) / STATES)

    def rotate(p):
        a, b = p[..., ::2], p[..., 1::2]
        turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        return torch.stack(turned, dim=-1).flatten(-2)

    gamma = 1 - 2.0 ** (-5 - torch.arange(h, dtype=torch.float64))
    lag = torch.arange(length).unsqueeze(-1) - torch.arange(length)
    D = torch.where(lag >= 0, gamma[:, None, None] ** lag, 0.0)
    out = ((rotate(q) @ rotate(k).mT) / math.sqrt(STATES) * D) @ v
    out = F.group_norm(out.transpose(1, 2).flatten(0, 1).flatten(1), h).reshape(x.shape)
    return core.out_proj(F.silu(gate) * out)


def rwkv(core, x):
    """wkv_t = diag(u) k_t v_t + sum_{i < t} diag(w)^(t-1-i) k_i v_i (Eagle, equations 3 to 9)."""
    before = F.pad(x, (0, 0, 1, 0))[:, :-1]
    layers = (core.receptance, core.key, core.value, core.gate)
    r, k, v, g = (layer(x + (before - x) * mu) for layer, mu in zip(layers, core.token_shift_mix, strict=True))
    h = core.num_heads
    r, k, v = (p.unflatten(-1, (h, -1)) for p in (r, k, v))
    w, outs = torch.exp(-core.decay.exp()), []
    for t in range(x.shape[1]):
        wkv = core.bonus.unsqueeze(-1) * k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        for i in range(t):
            wkv = wkv + (w ** (t - 1 - i)).unsqueeze(-1) * k[:, i].unsqueeze(-1) * v[:, i].unsqueeze(-2)
        outs.append((r[:, t].unsqueeze(-2) @ wkv).squeeze(-2))
    out = torch.stack(outs, dim=1)
    out = (out - out.mean(-1, keepdim=True)) / (out.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return core.out_proj(F.silu(g) * (out.flatten(-2) * core.norm[0] + core.norm[1]))


PUBLISHED = {"s4d": s4d, "s5": s5, "lru": lru, "ssd": ssd, "retention": retention, "rwkv": rwkv}


@pytest.mark.parametrize("name", PUBLISHED)
def test_core_computes_the_published_formula(name):
    core, x = make(name), sequence(length=11)
    with torch.no_grad():
        for p in core.parameters():  # nothing at a value of its own, as ones or zeros
            p.add_(0.05 * torch.randn_like(p))
    y, want = core.scan(x)[0], PUBLISHED[name](core, x)
    assert want.std() > 1e-3
    # Retention keeps gamma and theta in float32.
    torch.testing.assert_close(
        y, want, rtol=1e-5 if name == "retention" else 1e-9, atol=1e-6 if name == "retention" else 1e-10
    )


def test_mamba_core_is_the_block():
    core, x = make("mamba"), sequence()
    assert isinstance(core, MambaCore)
    assert torch.equal(core.scan(x)[0], core.block(x))


def test_initialisations_are_the_published_ones():
    core = S4D(6, 5)
    A = torch.complex(-core.A_log.exp(), core.A_imag)
    torch.testing.assert_close(A, torch.complex(torch.full((6, 5), -0.5), torch.pi * torch.arange(5.0).expand(6, 5)))
    core = S5(6, 5)  # S5, section 4.3: the eigenvalues of HiPPO-N
    n = torch.arange(10, dtype=torch.float64) + 0.5
    hippo = -0.5 * torch.eye(10) - (n.outer(n).sqrt().tril(-1) - n.outer(n).sqrt().triu(1))
    eigenvalues = torch.linalg.eigvals(hippo)
    want = eigenvalues[eigenvalues.imag > 0].imag.sort().values
    torch.testing.assert_close(core.A_imag.detach(), want.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(eigenvalues.real, torch.full((10,), -0.5, dtype=torch.float64))
    core = LRU(6, 500, r_min=0.4, r_max=0.8, max_phase=1.0)
    size = torch.exp(-core.nu_log.exp())
    assert 0.39 < size.min() < 0.45 and 0.75 < size.max() < 0.81 and core.theta_log.exp().max() <= 1
    torch.testing.assert_close(core.gamma_log.exp(), (1 - size**2).sqrt())
    for core in (S4D(64, 2), S5(4, 64), SSD(64, 2, num_heads=64)):
        step = F.softplus(core.delta_bias) if isinstance(core, SSD) else core.log_dt.exp()
        assert 0.99e-3 <= step.min() < 3e-3 and 0.04 < step.max() <= 0.101
    decay = SSD(64, 2).A_log.exp()
    assert decay.min() >= 1 and decay.max() <= 16
    gamma = 1 - Retention(2048, 2).log_gamma.exp()
    assert gamma.min() >= 0.9 * 2**-12 and gamma.max() <= 1.1 * 2**-5


def steps(core):
    """The initial step sizes of any core that has some."""
    if isinstance(core, MambaCore):
        return F.softplus(core.block.dt_proj.bias)
    return core.log_dt.exp() if hasattr(core, "log_dt") else F.softplus(core.delta_bias)


@pytest.mark.parametrize("name", CORES_WITH_STEP_SIZE)
def test_step_sizes_start_log_uniform_in_the_given_range(name):
    for options, (low, high) in {(): (1e-3, 0.1), (("dt_min", 0.01), ("dt_max", 1.0)): (0.01, 1.0)}.items():
        core = make_core(name, 4096, 512, **dict(options))  # hundreds of step sizes at least, in heads of 16 for ssd
        step = steps(core).detach()
        assert low * 0.999 <= step.min() and step.max() <= high * 1.001
        place = (step / low).log() / math.log(high / low)  # uniform in [0, 1]
        assert abs(place.mean() - 0.5) < 4 * (12 * len(step)) ** -0.5 and abs(place.std() - 12**-0.5) < 0.03
    same = make_core(name, 32, 4, 0.3, 0.3)
    torch.testing.assert_close(steps(same), torch.full_like(steps(same), 0.3))


@pytest.mark.parametrize("name", CORES_WITH_STEP_SIZE)
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dt_min": 0.0}, ValueError, "dt_min must be > 0, got 0.0"),
        ({"dt_min": "1"}, TypeError, "dt_min must be a number, got '1'"),
        ({"dt_max": -1.0}, ValueError, "dt_max must be > 0, got -1.0"),
        ({"dt_min": 0.2, "dt_max": 0.1}, ValueError, "dt_max must be finite and at least dt_min, 0.2, got 0.1"),
        ({"dt_min": 0.2}, ValueError, "dt_max must be finite and at least dt_min, 0.2, got 0.1"),
        ({"dt_max": math.inf}, ValueError, "dt_max must be finite and at least dt_min, 0.001, got inf"),
    ],
)
def test_bad_step_sizes_are_refused(name, options, error, text):
    with pytest.raises(error, match=f"^(S6|Mamba|S4D|S5|SSD): {text}$"):
        make_core(name, DIM, STATES, **options)


@pytest.mark.parametrize("option", ["dt_min", "dt_max"])
def test_cores_without_step_sizes_refuse_them(option):
    for name in sorted(set(CORES) - set(CORES_WITH_STEP_SIZE)):
        text = f"^make_core: {option} must be None for core '{name}', which has no step size, got 0.5$"
        with pytest.raises(ValueError, match=text):
            make_core(name, DIM, STATES, **{option: 0.5})
    text = f"^make_core: {option} must be None for a callable core, got 0.5$"
    with pytest.raises(ValueError, match=text):
        SSM(3, 8, 2, core=SSD, **{option: 0.5})


def test_retention_keeps_its_decays_across_precisions():
    core = Retention(32, 4)
    assert "log_gamma" in core.state_dict()
    assert core.double().log_gamma.dtype == torch.float64


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_scan_equals_steps_equals_split_scans(name):
    core, x = make(name), sequence()
    whole, last = core.scan(x)
    assert whole.shape == x.shape and last.shape == (2, *core.state_shape)
    for cut in (1, 4):
        a, state = core.scan(x[:, :cut])
        b, end = core.scan(x[:, cut:], state)
        torch.testing.assert_close(torch.cat([a, b], dim=1), whole)
        torch.testing.assert_close(end, last)
    state, ys = x.new_zeros(2, *core.state_shape), []
    for t in range(x.shape[1]):
        y, state = core.step(x[:, t], state)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys, dim=1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("name", NAMES)
def test_resets_cut_a_sequence_into_episodes(name):
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


def net_of(name):
    return SSM(3, 16, 2, state_size=2, core=name).double()


@pytest.mark.parametrize("name", NAMES)
def test_per_task_weights_under_vmap_equal_a_loop(name):
    net, x = net_of(name), torch.randn(3, 2, 5, 3, dtype=torch.float64)
    params = {k: p.detach() + 0.1 * torch.randn(3, *p.shape, dtype=p.dtype) for k, p in net.named_parameters()}

    def loss(p, x):
        return functional_call(net, p, (x,)).square().sum()

    together = vmap(grad(loss))(params, x)
    for i in range(3):
        alone = grad(loss)({k: p[i] for k, p in params.items()}, x[i])
        torch.testing.assert_close({k: g[i] for k, g in together.items()}, alone, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_maml_outer_gradient_equals_the_reference_loop(name, monkeypatch):
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
    home = "eaml_ext.nn._mamba_mixer" if name == "mamba" else type(net.cores[0]).__module__
    monkeypatch.setattr(sys.modules[home], "selective_scan", selective_scan_reference)
    by_loop = grad(outer)(params)
    for k in ours:
        assert (ours[k] - by_loop[k]).abs().max() <= 1e-8 * by_loop[k].abs().max(), k


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
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
def test_models_of_every_core_are_saved_and_loaded(name, tmp_path):
    net, x = SSM(3, 16, 2, state_size=2, num_layers=2, core=name), torch.randn(2, 5, 3)
    net.save(tmp_path / "m")
    assert torch.equal(SSM.load(tmp_path / "m")(x), net(x))
    state = net.init_hidden(2)
    assert torch.equal(net.scan(x, state)[0], net(x))
    torch.testing.assert_close(net.step(x[:, 0], state)[0], net(x)[:, 0])
    assert SSMLayer(3, 16, core=name)(x[0]).shape == (5, 16)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_takes_every_core(name):
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
def test_models_in_bfloat16(name):
    net, x = SSM(3, 32, 2, core=name), torch.randn(2, 6, 3)
    want = net(x)
    y, state = net.bfloat16().scan(x.bfloat16())
    stepped, _ = net.step(x[:, 0].bfloat16(), net.init_hidden(2))
    assert y.dtype == stepped.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)
    torch.testing.assert_close(stepped.float(), want[:, 0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_overflows_over_a_long_sequence(name):
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
def test_bad_input_gets_one_sentence(call, error, text):
    with pytest.raises(error) as info:
        call()
    assert text in str(info.value) and "\n" not in str(info.value)


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_padded_batches_equal_their_rows_alone(name):
    net = SSM(3, 16, 2, state_size=4, num_layers=2, core=name).double()
    x, lengths = torch.randn(5, 9, 3, dtype=torch.float64), torch.tensor([9, 6, 1, 0, 2])
    before = net.scan(torch.randn(5, 4, 3, dtype=torch.float64))[1].detach()
    reset = torch.zeros(5, 9, dtype=torch.bool)
    reset[0, 3] = reset[1, 5] = reset[1, 7] = reset[4, 1] = True
    for row, n in enumerate(lengths.tolist()):
        x[row, n:] = float("nan")  # padding may hold anything
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
def test_lengths_under_vmap_equal_a_loop(name):
    net, x = net_of(name), torch.randn(2, 3, 5, 3, dtype=torch.float64)
    lengths = torch.tensor([[5, 2, 0], [1, 4, 3]])
    y, last = vmap(lambda x, n: net.scan(x, lengths=n))(x, lengths)
    for i in range(2):
        torch.testing.assert_close((y[i], last[i]), net.scan(x[i], lengths=lengths[i]))


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
def test_bad_lengths_get_one_sentence(lengths, error, text):
    for scan, width in ((SSM(4, 8, 2).scan, 4), (Mamba(4).scan, 4)):
        with pytest.raises(error) as info:
            scan(torch.randn(2, 3, width), lengths=lengths)
        assert text in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("core", sorted(CORES))
def test_what_was_before_a_reset_may_be_nan(core):
    x, reset = torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    x[0, 1], reset[0, 2] = torch.nan, True
    y, state = SSM(3, 32, 2, core=core).scan(x, reset=reset)
    assert y[0, 2:].isfinite().all() and y[1].isfinite().all() and state.isfinite().all()


@pytest.mark.parametrize("core", sorted(CORES))
def test_lengths_of_any_integer_type(core):
    model, x, reset = SSM(3, 32, 2, core=core), torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    lengths = torch.tensor([3, 5])
    got, want = (model.scan(x, reset=reset, lengths=n)[0] for n in (lengths.int(), lengths))
    assert torch.equal(got, want)
