import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.functional import mse_loss

from eaml_ext.meta import MetaMAML
from eaml_ext.rl import SSMMetaPolicy


def policy(**options):
    return SSMMetaPolicy(5, 3, 8, state_size=4, **options).double()


def data(batch=4, time=9):
    reset = torch.zeros(batch, time, dtype=torch.bool)
    reset[:, 6] = True
    reset[0, 2] = True
    return torch.randn(batch, time, 5, dtype=torch.float64), reset


@pytest.mark.parametrize("continuous", [False, True])
def test_forward_returns_one_tensor_of_logits_or_means(continuous):
    net = SSMMetaPolicy(state_dim=84, action_dim=4, continuous=continuous)
    x = torch.randn(2, 7, 84)
    assert net(torch.randn(32, 84)).shape == (32, 4) and net(x).shape == (2, 7, 4)
    distribution, value, _ = net.scan(x)
    parameters = distribution.mean if continuous else distribution.logits
    assert torch.allclose(parameters, net(x) if continuous else net(x).log_softmax(-1), atol=1e-6)
    assert value.shape == (2, 7) and distribution.sample().shape == ((2, 7, 4) if continuous else (2, 7))
    assert distribution.log_prob(distribution.sample()).shape == (2, 7)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"num_layers": 2, "feedforward": True}])
def test_scan_with_resets_equals_steps_with_resets(continuous, options):
    net, (x, reset) = policy(continuous=continuous, **options), data()
    whole, values, last = net.scan_tensors(x, None, reset)
    state = torch.full_like(net.init_hidden(4), torch.inf)  # the reset at step 0 must remove it
    steps = []
    for t in range(x.shape[1]):
        start = reset[:, t] if t else torch.ones(4, dtype=torch.bool)
        *out, state = net.step_tensors(x[:, t], state, start)
        steps.append(out)
    parameters, v = (torch.stack(column, 1) for column in zip(*steps, strict=True))
    assert torch.allclose(parameters, whole) and torch.allclose(v, values) and torch.allclose(state, last)


@pytest.mark.parametrize("feedforward", [False, True])
def test_scan_packed_trials_equal_each_alone(feedforward):
    net, (x, _) = policy(feedforward=feedforward), data(batch=1)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, 6] = True  # an episode starts inside the second trial
    parameters, values, last = net.scan_tensors(x, None, reset, torch.tensor([0, 4, 9], dtype=torch.int32))
    distribution, _, _ = net.scan(x, None, reset, torch.tensor([0, 4, 9], dtype=torch.int32))
    assert torch.equal(distribution.logits, net.distribution(parameters).logits)
    for i, steps in enumerate((slice(0, 4), slice(4, 9))):
        want = net.scan_tensors(x[:, steps], None, reset[:, steps])
        torch.testing.assert_close((parameters[:, steps], values[:, steps], last[i : i + 1]), want)


def test_scan_resets_cut_outputs_and_gradients():
    net, (x, reset) = policy(), data()
    x.requires_grad_()
    _, values, _ = net.scan(x, torch.randn_like(net.init_hidden(4)), reset)
    assert torch.allclose(values[:, 6:], net.scan(x[:, 6:])[1])
    (gradient,) = torch.autograd.grad(values[:, 8].sum(), x)
    assert (gradient[:, :6] == 0).all() and (gradient[:, 6:] != 0).any(-1).all()


@pytest.mark.parametrize("continuous", [False, True])
def test_scan_policy_gradient_loss_passes_gradgradcheck(continuous):
    net, (x, reset) = SSMMetaPolicy(5, 2, 4, state_size=2, continuous=continuous).double(), data(2, 8)
    distribution, _, _ = net.scan(x, None, reset)
    action = distribution.sample()
    names, values = zip(*net.named_parameters(), strict=True)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            distribution, value, _ = self.net.scan(x, None, reset)
            return -(distribution.log_prob(action) * value).mean() - 0.1 * distribution.entropy().mean()

    def loss(*params):
        return functional_call(Loss(), {f"net.{n}": p for n, p in zip(names, params, strict=True)}, (x,))

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, values, fast_mode=True)


@pytest.mark.parametrize("continuous", [False, True])
def test_scan_every_parameter_has_a_gradient(continuous):
    net, (x, reset) = policy(continuous=continuous), data()
    distribution, value, _ = net.scan(x, None, reset)
    (distribution.log_prob(distribution.sample()).sum() + value.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_step_per_task_parameters_under_vmap_equal_a_loop():
    net, (x, reset) = policy(continuous=True), data()
    many = {n: p.detach() + 0.1 * torch.randn(3, *p.shape, dtype=p.dtype) for n, p in net.named_parameters()}

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, state, reset):
            return self.net.step_tensors(x, state, reset)

    step = Step()

    def call(params, x, state, reset):
        return functional_call(step, {f"net.{n}": p for n, p in params.items()}, (x, state, reset))

    states = torch.randn(3, *net.init_hidden(4).shape, dtype=torch.float64)
    together = vmap(call, in_dims=(0, None, 0, None))(many, x[:, 0], states, reset[:, 6])
    for i in range(3):
        alone = call({n: p[i] for n, p in many.items()}, x[:, 0], states[i], reset[:, 6])
        for a, b in zip(together, alone, strict=True):
            assert torch.allclose(a[i], b)


def test_normalise_scales_observations_and_leaves_constants():
    net, scale = policy(), torch.tensor([1.0, 0.01, 100.0, 3.0, 1.0], dtype=torch.float64)
    x = torch.randn(6, 50, 5, dtype=torch.float64)
    scaled = (x - x.mean((0, 1))) / x.std((0, 1), correction=0)
    scaled[..., 3] = 7.0
    want, obs = net.scan(scaled)[1], x * scale - 5 * scale
    obs[..., 3] = 7.0
    net.normalise(obs)
    assert torch.allclose(net.scan(obs)[1], want)
    assert torch.allclose(net.step(obs[:, 0])[1], want[:, 0])
    assert torch.allclose(net(obs).log_softmax(-1), net.scan(obs)[0].logits)


def test_load_returns_the_saved_policy(tmp_path):
    net, (x, _) = SSMMetaPolicy(5, 3, 8, continuous=True, dt_min=0.2, dt_max=0.3), data()
    net.normalise(x.float() * 3 + 1)
    net.save(tmp_path / "policy")
    again = SSMMetaPolicy.load(tmp_path / "policy")
    assert torch.equal(net(x.float()), again(x.float())) and again.options == net.options
    step = torch.nn.functional.softplus(net.ssm.cores[0].delta_bias)
    assert net.options["dt_min"] == 0.2 and net.options["dt_max"] == 0.3 and 0.199 < step.min() <= step.max() < 0.301
    custom = SSMMetaPolicy(5, 3, 8, core=lambda dim, size: type(net.ssm.cores[0])(dim, size))
    with pytest.raises(ValueError, match=r"^SSMMetaPolicy.save: core is a custom callable"):
        custom.save(tmp_path / "custom")


def test_load_returns_the_saved_policy_with_feedforward(tmp_path):
    net, (x, _) = SSMMetaPolicy(5, 3, 8, core="s5", dt_min=0.2, dt_max=0.3, feedforward=True), data()
    net.save(tmp_path / "policy")
    again = SSMMetaPolicy.load(tmp_path / "policy")
    assert torch.equal(net(x.float()), again(x.float())) and again.options == net.options
    step = again.ssm.cores[0].core.log_dt.exp()
    assert again.options["core"] == "s5" and 0.199 < step.min() <= step.max() < 0.301
    assert torch.equal(pickle.loads(pickle.dumps(net))(x.float()), net(x.float()))


def test_feedforward_layers_enclose_the_core():
    class Tenfold(nn.Module):
        state_shape = (1,)

        def scan(self, x, state=None, reset=None):
            return 10 * x, x.new_zeros(len(x), 1)

        def step(self, x, state):
            return 10 * x, state

    net = SSMMetaPolicy(5, 3, 8, core=lambda dim, size: Tenfold(), feedforward=True).double()
    layer, x = net.ssm.cores[0], torch.randn(4, 9, 8, dtype=torch.float64)

    def perceptron(layer, x):
        return layer.down(nn.functional.silu(layer.up(x)))

    u = layer.norm_before(x + perceptron(layer.before, x))
    want = 10 * u + perceptron(layer.after, layer.norm_after(11 * u))
    y, state = layer.scan(x)
    torch.testing.assert_close((y, layer.step(x[:, 0], state)[0]), (want, want[:, 0]))


def test_init_step_sizes_are_ten_times_those_of_mamba():
    step = torch.nn.functional.softplus(SSMMetaPolicy(5, 3, 512).ssm.cores[0].delta_bias)
    assert 0.0099 < step.min() < 0.02 and 0.5 < step.max() < 1.01
    assert SSMMetaPolicy(5, 3, core="lru").options["dt_min"] is None  # it has no step sizes


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"state_dim": 0}, ValueError, "state_dim must be > 0, got 0"),
        ({"action_dim": 1.5}, TypeError, "action_dim must be an integer, got 1.5"),
        ({"hidden_dim": -1}, ValueError, "hidden_dim must be > 0, got -1"),
        ({"continuous": 1}, TypeError, "continuous must be True or False, got int"),
        ({"dt_min": 0}, ValueError, "dt_min must be > 0, got 0"),
        ({"dt_max": 0.001}, ValueError, "dt_max must be finite and at least dt_min, 0.01, got 0.001"),
    ],
)
def test_init_bad_argument_raises(kwargs, error, text):
    where = "S6" if "dt_" in text else "SSMMetaPolicy"
    with pytest.raises(error, match=f"^{where}: {text}$"):
        SSMMetaPolicy(**{"state_dim": 5, "action_dim": 3, **kwargs})


def test_policy_bad_input_raises():
    net = policy()
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"^SSMMetaPolicy.step: reset must be bool, got int64$"):
        net.step(x, net.init_hidden(4), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^SSMMetaPolicy.step: reset must have shape \(4,\), got \(3,\)$"):
        net.step(x, net.init_hidden(4), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 5\)"):
        net.step(x[:, :4], net.init_hidden(4))
    for bad in (x[:, :4], x[:0]):
        with pytest.raises(
            ValueError, match=r"^SSMMetaPolicy.normalise: obs must have shape \(..., 5\), not empty, got"
        ):
            net.normalise(bad)
    with pytest.raises(TypeError, match=r"^SSMMetaPolicy.normalise: obs must be a torch.Tensor, got list$"):
        net.normalise([1.0])
    with pytest.raises(ValueError, match="state must have shape"):
        net.step(x, net.init_hidden(3))


@pytest.mark.parametrize("continuous", [False, True])
def test_meta_maml_trains_and_adapts_the_policy(continuous):
    net = SSMMetaPolicy(state_dim=6, action_dim=2, hidden_dim=8, continuous=continuous)
    maml = MetaMAML(net, inner_lr=0.1, outer_lr=1e-2)
    x, y = torch.randn(10, 6), torch.randn(10, 2)
    losses = [maml.meta_update([(x, y, x, y)] * 3, mse_loss) for _ in range(20)]
    assert losses[-1] < losses[0] and maml.skipped_updates == 0
    adapted = maml.adapt(x, y, mse_loss, num_steps=3)
    assert mse_loss(adapted(x), y) < mse_loss(net(x), y)


def test_init_numpy_scalars_become_python_numbers(tmp_path):
    sizes = {"hidden_dim": np.int32(8), "state_size": np.int16(4), "num_layers": np.uint8(2)}
    net = SSMMetaPolicy(np.int64(5), np.int64(3), **sizes, dt_min=np.float32(0.125), dt_max=np.float64(0.5))
    kinds = {name: type(value) for name, value in net.options.items()}
    assert set(kinds.values()) == {int, bool, str, float} and type(net.action_dim) is int
    net.save(tmp_path / "policy")
    assert SSMMetaPolicy.load(tmp_path / "policy").options == net.options
    assert net.init_hidden(np.int64(3)).shape[0] == 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_normalise_non_finite_observation_raises_and_changes_nothing(value):
    net = policy()
    net.normalise(torch.randn(20, 5))
    mean, std = net.mean.clone(), net.std.clone()
    bad = torch.randn(20, 5)
    bad[3, 2] = value
    with pytest.raises(ValueError, match=rf"^SSMMetaPolicy.normalise: obs must be finite, got {value}$"):
        net.normalise(bad)
    assert torch.equal(net.mean, mean) and torch.equal(net.std, std)


def test_normalise_large_constants_are_left_and_large_entries_that_vary_are_scaled():
    net = SSMMetaPolicy(3, 2, 8)
    obs = torch.full((1001, 3), 1e6 + 0.3125)
    obs[::2, 1] += 0.0625  # one unit in the last place of float32
    obs[:, 2] += torch.linspace(-10, 10, 1001)
    net.normalise(obs)
    assert net.mean[:2].tolist() == [0, 0] and net.std[:2].tolist() == [1, 1]
    assert abs(net.mean[2] - 1e6) < 1 and abs(net.std[2] - 10 / 3**0.5) < 0.02


def test_has_normalisation_is_true_after_normalise_and_in_copies():
    net = policy()
    assert not net.has_normalisation
    net.normalise(torch.ones(4, 5))
    assert not net.has_normalisation  # nothing varies
    net.normalise(torch.randn(4, 5))
    again = policy()
    again.load_state_dict(net.state_dict())
    assert net.has_normalisation and again.has_normalisation
