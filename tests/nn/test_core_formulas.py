"""Cores: each computes its published formula, and its parameters start from the published distributions."""

import math

import pytest
import torch
import torch.nn.functional as F
from core_cases import DIM, STATES, make, sequence

from eaml_ext.nn import SSM
from eaml_ext.nn.cores import CORES, CORES_WITH_STEP_SIZE, LRU, S4D, S5, SSD, MambaCore, Retention, make_core
from eaml_ext.ops import selective_scan_reference


def cplx(pairs):
    return torch.view_as_complex(pairs.detach().contiguous())


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


def diagonal(core, x, decay, B, conjugates):
    """h_t = lambda h_{t-1} + B x_t, y_t = conjugates Re(C h_t) + D x_t, step by step."""
    h, ys = torch.zeros(x.shape[0], len(decay), dtype=torch.complex128), []
    for t in range(x.shape[1]):
        h = decay * h + x[:, t].to(B.dtype) @ B.T
        ys.append(conjugates * (h @ cplx(core.C).T).real + core.D * x[:, t])
    return F.glu(core.out_proj(F.gelu(torch.stack(ys, dim=1))))


def s5(core, x):
    """Zero-order hold with Lambda and Delta of each state (S5, equation 5), conjugate pairs."""
    A, dt = torch.complex(-core.A_log.exp(), core.A_imag), core.log_dt.exp()
    return diagonal(core, x, torch.exp(A * dt), ((torch.exp(A * dt) - 1) / A).unsqueeze(-1) * cplx(core.B), 2)


def lru(core, x):
    """lambda = exp(-exp(nu_log) + i exp(theta_log)), inputs scaled by exp(gamma_log) (LRU, appendix A)."""
    decay = torch.exp(torch.complex(-core.nu_log.exp(), core.theta_log.exp()))
    return diagonal(core, x, decay, core.gamma_log.exp().unsqueeze(-1) * cplx(core.B), 1)


def s6(core, x):
    """h_t = exp(dt A) h_{t-1} + dt B u_t with dt, B and C of x, gated by silu (Mamba, algorithm 2)."""
    dt, B, C = core.x_proj(x).split(core.split, dim=-1)
    A, z = -core.A_log.exp(), core.gate(x).mT
    y = selective_scan_reference(x.mT, core.dt_proj(dt).mT, A, B.mT, C.mT, core.D, z, core.delta_bias, True)
    return core.out_proj(y.mT)


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


PUBLISHED = {"s6": s6, "s4d": s4d, "s5": s5, "lru": lru, "ssd": ssd, "retention": retention, "rwkv": rwkv}


@pytest.mark.parametrize("name", PUBLISHED)
def test_core_scan_computes_the_published_formula(name):
    core, x = make(name), sequence(length=11)
    with torch.no_grad():
        for p in core.parameters():  # no parameter stays at a special value such as 0 or 1
            p.add_(0.05 * torch.randn_like(p))
    y, want = core.scan(x)[0], PUBLISHED[name](core, x)
    assert want.std() > 1e-3
    # Retention keeps gamma and theta in float32.
    torch.testing.assert_close(
        y, want, rtol=1e-5 if name == "retention" else 1e-9, atol=1e-6 if name == "retention" else 1e-10
    )


def test_mamba_core_scan_equals_the_block():
    core, x = make("mamba"), sequence()
    assert isinstance(core, MambaCore)
    assert torch.equal(core.scan(x)[0], core.block(x))


def test_s4d_a_starts_as_s4d_lin():
    core = S4D(6, 5)
    A = torch.complex(-core.A_log.exp(), core.A_imag)
    torch.testing.assert_close(A, torch.complex(torch.full((6, 5), -0.5), torch.pi * torch.arange(5.0).expand(6, 5)))


def test_s5_a_starts_as_the_eigenvalues_of_hippo_n():
    """S5, section 4.3."""
    core = S5(6, 5)
    n = torch.arange(10, dtype=torch.float64) + 0.5
    hippo = -0.5 * torch.eye(10) - (n.outer(n).sqrt().tril(-1) - n.outer(n).sqrt().triu(1))
    eigenvalues = torch.linalg.eigvals(hippo)
    want = eigenvalues[eigenvalues.imag > 0].imag.sort().values
    torch.testing.assert_close(core.A_imag.detach(), want.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(eigenvalues.real, torch.full((10,), -0.5, dtype=torch.float64))


def test_lru_lambda_starts_in_the_given_ring():
    core = LRU(6, 500, r_min=0.4, r_max=0.8, max_phase=1.0)
    size = torch.exp(-core.nu_log.exp())
    assert 0.39 < size.min() < 0.45 and 0.75 < size.max() < 0.81 and core.theta_log.exp().max() <= 1
    torch.testing.assert_close(core.gamma_log.exp(), (1 - size**2).sqrt())


def test_core_default_step_sizes_start_in_the_published_range():
    for core in (S4D(64, 2), S5(4, 64), SSD(64, 2, num_heads=64)):
        step = step_sizes(core)
        assert 0.99e-3 <= step.min() < 3e-3 and 0.04 < step.max() <= 0.101


def test_ssd_and_retention_decays_start_in_the_published_ranges():
    decay = SSD(64, 2).A_log.exp()
    assert decay.min() >= 1 and decay.max() <= 16
    gamma = 1 - Retention(2048, 2).log_gamma.exp()
    assert gamma.min() >= 0.9 * 2**-12 and gamma.max() <= 1.1 * 2**-5


def step_sizes(core):
    """Return the initial step sizes of a core that has some."""
    if isinstance(core, MambaCore):
        return F.softplus(core.block.dt_proj.bias)
    return core.log_dt.exp() if hasattr(core, "log_dt") else F.softplus(core.delta_bias)


@pytest.mark.parametrize("name", CORES_WITH_STEP_SIZE)
def test_core_step_sizes_start_log_uniform_in_the_given_range(name):
    for options, (low, high) in {(): (1e-3, 0.1), (("dt_min", 0.01), ("dt_max", 1.0)): (0.01, 1.0)}.items():
        core = make_core(name, 4096, 512, **dict(options))  # 256 step sizes or more
        step = step_sizes(core).detach()
        assert low * 0.999 <= step.min() and step.max() <= high * 1.001
        uniform = (step / low).log() / math.log(high / low)  # in [0, 1]
        assert abs(uniform.mean() - 0.5) < 4 * (12 * len(step)) ** -0.5 and abs(uniform.std() - 12**-0.5) < 0.03
    same = make_core(name, 32, 4, 0.3, 0.3)
    torch.testing.assert_close(step_sizes(same), torch.full_like(step_sizes(same), 0.3))


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
def test_core_bad_step_sizes_raise(name, options, error, text):
    with pytest.raises(error, match=f"^(S6|Mamba|S4D|S5|SSD): {text}$"):
        make_core(name, DIM, STATES, **options)


@pytest.mark.parametrize("option", ["dt_min", "dt_max"])
def test_make_core_step_sizes_for_a_core_without_them_raise(option):
    for name in sorted(set(CORES) - set(CORES_WITH_STEP_SIZE)):
        text = f"^make_core: {option} must be None for core '{name}', which has no step size, got 0.5$"
        with pytest.raises(ValueError, match=text):
            make_core(name, DIM, STATES, **{option: 0.5})
    text = f"^make_core: {option} must be None for a callable core, got 0.5$"
    with pytest.raises(ValueError, match=text):
        SSM(3, 8, 2, core=SSD, **{option: 0.5})


def test_retention_to_float64_converts_its_decays():
    core = Retention(32, 4)
    assert "log_gamma" in core.state_dict()
    assert core.double().log_gamma.dtype == torch.float64
