"""The guarded update on one model: its steps, its guards with and without, its rollbacks."""

import copy
import math

import pytest
import torch
from adapter_data import OFF, Stream, batch, mlp, vector
from torch import nn
from torch.nn import functional as F

from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.adaptation._update import Evaluation, gradient_descent, guarded_update


@pytest.mark.parametrize("guarded", [False, True])
def test_adapt_guards_on_or_off_steps_equal_the_formulas(guarded):
    lr, clip, eps, weight = 0.05, 0.2, 0.004, 0.7
    guards = {"grad_clip_norm": clip, "trust_region_eps": eps} if guarded else OFF
    model, data, memory = mlp().double(), batch(), batch(8)
    data, memory = ({k: v.double() for k, v in d.items()} for d in (data, memory))
    expected = copy.deepcopy(model)
    adapter = Adapter(
        model,
        AdaptationConfig(**{**OFF, "lr": lr, "max_steps_per_call": 3, **guards}),
        experience_weight=weight,
        retriever=lambda *_: memory,
    )
    anchor = vector(expected)
    clipped = projected = 0
    for _ in range(3):
        current = F.mse_loss(expected(data["states"]), data["targets"])
        remembered = F.mse_loss(expected(memory["states"]), memory["targets"])
        total = current + weight * remembered
        grads = torch.autograd.grad(total / (1 + weight), list(expected.parameters()))
        g = torch.cat([grad.flatten() for grad in grads])
        if guarded and g.norm() > clip:
            g, clipped = g * clip / g.norm(), clipped + 1
        theta = vector(expected) - lr * g
        if guarded and (theta - anchor).norm() > eps * anchor.norm():
            theta = anchor + (theta - anchor) * (eps * anchor.norm() / (theta - anchor).norm())
            projected += 1
        nn.utils.vector_to_parameters(theta, expected.parameters())
    assert adapter.adapt(F.mse_loss, data) == pytest.approx(float(total.detach()), rel=1e-12)
    assert adapter.last_steps == 3
    torch.testing.assert_close(vector(model), vector(expected), rtol=1e-12, atol=1e-14)
    assert not guarded or (clipped and projected), "both guards must have acted"


def test_adapt_train_or_eval_mode_learns_and_changes_nothing_else():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.0), nn.Linear(16, 1))
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    for training in (True, False):
        model.train(training)
        adapter, data = Adapter(model, AdaptationConfig(lr=0.1)), batch()
        with torch.no_grad():  # test-time adaptation is usually called inside no_grad
            losses = [adapter.adapt(nn.MSELoss(), data) for _ in range(20)]
        assert losses[-1] < losses[0]
        assert model.training is training and model[1].training is training
    assert torch.equal(model[0].weight, frozen)
    assert all((p.grad == 1).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)])
def test_adapt_other_optimizer_steps_equal_its_own(make):
    model, reference, data = mlp(), mlp(), batch()
    reference.load_state_dict(model.state_dict())
    adapter = Adapter(model, AdaptationConfig(**OFF, lr=0.01, max_steps_per_call=2), optimizer=make)
    optimizer = make(list(reference.parameters()), lr=0.01)
    for _ in range(3):
        adapter.adapt(F.mse_loss, data)
    for _ in range(6):
        optimizer.zero_grad()
        F.mse_loss(reference(data["states"]), data["targets"]).backward()
        optimizer.step()
    torch.testing.assert_close(vector(model), vector(reference))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("guarded", [False, True])
def test_adapt_steep_loss_diverges_only_without_gradient_clip(guarded):
    model = nn.Linear(4, 1)
    data = {"states": 30 * torch.randn(16, 4), "targets": torch.randn(16, 1)}
    cfg = AdaptationConfig(**{**OFF, "lr": 0.01, "grad_clip_norm": 1.0 if guarded else None})
    adapter = Adapter(model, cfg)
    losses = [adapter.adapt(F.mse_loss, data) for _ in range(20)]
    if guarded:
        assert adapter.rollbacks == 0 and losses[-1] < losses[0]
    else:
        assert adapter.rollbacks > 0 or losses[-1] > 1e6 * losses[0]


@pytest.mark.parametrize("guarded", [False, True])
def test_adapt_corrupted_call_moves_at_most_by_the_trust_region(guarded):
    stream, model = Stream(), nn.Linear(4, 1)
    eps = 0.05
    adapter = Adapter(model, AdaptationConfig(**{**OFF, "lr": 0.1, "trust_region_eps": eps if guarded else None}))
    for _ in range(100):
        adapter.adapt(F.mse_loss, stream.batch())
    before, error = vector(model), stream.error(model)
    assert error < 0.01
    adapter.adapt(F.mse_loss, stream.batch(scale=-1e3))
    moved = (vector(model) - before).norm()
    if guarded:
        assert moved <= eps * before.norm() * (1 + 1e-5)
        assert stream.error(model) < 0.05
    else:
        assert stream.error(model) > 1e3


def test_adapt_long_stream_trust_region_restarts_with_each_call():
    stream, model = Stream(), nn.Linear(4, 1)
    start = vector(model)
    adapter = Adapter(model, AdaptationConfig(lr=0.1, trust_region_eps=0.02))
    for _ in range(300):
        anchor = vector(model)
        adapter.adapt(F.mse_loss, stream.batch())
        assert (vector(model) - anchor).norm() <= 0.02 * anchor.norm() * (1 + 1e-5)
    assert stream.error(model) < 0.01 and (vector(model) - start).norm() > 0.2 * start.norm()


def test_adapt_parameters_at_zero_move_by_trust_region_eps():
    model = nn.Linear(4, 1)
    nn.init.zeros_(model.weight)
    adapter = Adapter(model, AdaptationConfig(lr=10.0, trust_region_eps=0.1), parameters="weight")
    adapter.adapt(F.mse_loss, batch())
    assert float(model.weight.detach().norm()) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("guarded", [False, True])
def test_adapt_loss_spike_rolls_back_only_with_ema_decay(guarded):
    stream, model = Stream(), nn.Linear(4, 1)
    adapter = Adapter(model, AdaptationConfig(**{**OFF, "lr": 0.05, "ema_decay": 0.9 if guarded else None}))
    for _ in range(60):
        adapter.adapt(F.mse_loss, stream.batch())
    assert adapter.rollbacks == 0 and stream.error(model) < 0.01
    value = adapter.adapt(F.mse_loss, stream.batch(scale=-1e3))
    assert value > 1e4, "the offending loss is what is reported"
    if guarded:
        assert adapter.rollbacks == 1 and adapter.last_steps == 0
        assert stream.error(model) < 0.01
        assert torch.equal(vector(model), vector(adapter.ema_model()))
    else:
        assert stream.error(model) > 1e3


def test_adapt_third_consecutive_spike_is_accepted():
    stream, model = Stream(), nn.Linear(4, 1)
    adapter = Adapter(model, AdaptationConfig(lr=0.05, trust_region_eps=None, grad_clip_norm=None))
    for _ in range(60):
        adapter.adapt(F.mse_loss, stream.batch())
    stream.weight = -20 * stream.weight
    steps = []
    for _ in range(40):
        adapter.adapt(F.mse_loss, stream.batch())
        steps.append(adapter.last_steps)
    assert steps == [0, 0] + [5] * 38
    assert stream.error(model) < 1.0


def test_adapt_loss_spikes_inside_a_call_rolls_back():
    stream, model = Stream(), nn.Linear(4, 1)
    adapter = Adapter(model, AdaptationConfig(lr=0.05, trust_region_eps=None, grad_clip_norm=None))
    for _ in range(60):
        adapter.adapt(F.mse_loss, stream.batch())
    before = vector(adapter.ema_model())
    data = stream.batch()
    # The first loss is ordinary, but its gradient moves the parameters far.
    value = adapter.adapt(lambda p, t: F.mse_loss(p, t) + 1e5 * (p - p.detach()).sum(), data)
    assert value > 1e3 and adapter.rollbacks == 1 and adapter.last_steps == 1
    assert (vector(model) - before).norm() < 0.01 and stream.error(model) < 0.05


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_adapt_non_finite_loss_or_gradient_rolls_back(poison):
    stream = Stream()
    plain, guarded = nn.Linear(4, 1), nn.Linear(4, 1)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    adapter = Adapter(guarded, AdaptationConfig(**OFF, lr=0.05))
    for i in range(60):
        data = stream.batch()
        if i % 20 == 10:
            data["targets"][0] = poison
        optimizer.zero_grad()
        F.mse_loss(plain(data["states"]), data["targets"]).backward()
        optimizer.step()
        value = adapter.adapt(F.mse_loss, data)
        assert math.isfinite(value) == (i % 20 != 10)
    assert not vector(plain).norm() < 1e6
    assert adapter.rollbacks == 3 and stream.error(guarded) < 0.01


def test_adapt_rollback_restores_buffers_and_optimizer():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    adapter = Adapter(model, AdaptationConfig(), optimizer=torch.optim.Adam)
    adapter.adapt(F.mse_loss, batch())
    before = {name: b.clone() for name, b in model.named_buffers()}
    bad = batch()
    bad["states"][0] = math.nan
    assert math.isnan(adapter.adapt(F.mse_loss, bad))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert math.isfinite(adapter.adapt(F.mse_loss, batch())) and torch.isfinite(vector(model)).all()


def test_adapt_optimizer_makes_parameters_nan_rolls_back():
    class Broken(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.fill_(math.nan)

    model = mlp()
    before = vector(model)
    adapter = Adapter(model, AdaptationConfig(), optimizer=Broken)
    assert math.isfinite(adapter.adapt(F.mse_loss, batch()))
    assert torch.equal(vector(model), before) and adapter.last_steps == 0


def test_ema_model_noisy_stream_has_half_the_error():
    stream, model = Stream(noise=2.0), nn.Linear(4, 1)
    adapter = Adapter(model, AdaptationConfig(lr=0.05, ema_decay=0.98))
    own, averaged = [], []
    for i in range(300):
        adapter.adapt(F.mse_loss, stream.batch(n=4))
        if i >= 150:
            own.append(stream.error(model))
            averaged.append(stream.error(adapter.ema_model()))
    assert sum(averaged) < 0.5 * sum(own)


@pytest.mark.parametrize("guarded", [False, True])
def test_adapt_corrupted_stream_stays_accurate_only_with_guards(guarded):
    stream, model = Stream(), mlp()
    unadapted = stream.error(model)
    adapter = Adapter(model, AdaptationConfig(lr=0.05) if guarded else AdaptationConfig(**OFF, lr=0.05))
    errors = []
    for i in range(200):
        adapter.adapt(F.mse_loss, stream.batch(scale=-1e4 if i % 50 == 37 else 1.0))
        errors.append(stream.error(model))
    assert all(math.isfinite(e) for e in errors)
    if guarded:
        assert max(errors) < 1.1 * unadapted and errors[-1] < 0.1 * unadapted
    else:
        assert max(errors) > 10 * unadapted


def test_adapt_loss_fails_at_a_later_step_model_is_restored():
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 0

    def loss(y, target):
        nonlocal calls
        calls += 1
        error = (y - target).square()
        return error if calls == 3 else error.mean()

    before = copy.deepcopy(model.state_dict())
    adapter = Adapter(model, AdaptationConfig(lr=0.1, max_steps_per_call=5))
    with pytest.raises(ValueError, match="scalar"):
        adapter.adapt(loss, {"states": torch.randn(8, 4), "targets": torch.randn(8, 4)})
    assert calls == 3 and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Following(nn.Module):
    """A model with a buffer whose shape follows the batch, as stateful recurrent layers have."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 1)
        self.register_buffer("h", torch.zeros(1, 4))

    def forward(self, x):
        self.h = self.inner(x).tanh() + self.h.detach().mean(0, keepdim=True)
        return self.out(self.h)


def test_adapt_buffer_that_follows_the_batch_is_restored():
    adapter = Adapter(Following(), AdaptationConfig(lr=0.1))
    adapter.adapt(F.mse_loss, batch(6))
    kept = adapter.model.h.detach().clone()
    assert kept.shape == (6, 4)
    bad = batch(3)
    assert math.isnan(adapter.adapt(F.mse_loss, {**bad, "targets": bad["targets"] * math.nan}))
    assert adapter.rollbacks == 1 and torch.equal(adapter.model.h, kept)
    with pytest.raises(KeyError):
        adapter.adapt(lambda y, t: {}["no"], batch(2))
    assert torch.equal(adapter.model.h, kept)
    with torch.inference_mode():
        adapter.model(bad["states"])
    adapter.reset()
    assert torch.equal(adapter.model.h, torch.zeros(1, 4))


# ------------------------------------------------------------------------------------------ the function by itself


def quadratic(target):
    """Return the evaluation of ``|theta - target|^2`` for each user."""

    def evaluate(theta):
        error = theta - target
        return Evaluation(error.square().sum(1), lambda: 2 * error)

    return evaluate


@pytest.mark.parametrize("guards", [OFF, {}])
def test_guarded_update_users_equal_updates_of_one_user(guards):
    cfg = AdaptationConfig(lr=0.1, **guards)
    theta, target = torch.randn(4, 3).double(), 5 * torch.randn(4, 3).double()
    target[2, 0] = math.nan
    result, totals = guarded_update(quadratic(target), theta, gradient_descent(cfg.lr), cfg)
    for i in range(4):
        rows = slice(i, i + 1)
        alone, total = guarded_update(quadratic(target[rows]), theta[rows], gradient_descent(cfg.lr), cfg)
        torch.testing.assert_close(result[rows], alone, rtol=1e-14, atol=0)
        torch.testing.assert_close(totals[rows], total, rtol=1e-14, atol=0, equal_nan=True)
    assert torch.equal(result[2], theta[2]) and totals[2].isnan()
    assert not guards or torch.allclose(result[:2], target[:2] + 0.8**5 * (theta - target)[:2])


def test_guarded_update_without_history_runs_under_transforms():
    """Without a history the update is pure: vmap runs it, and it has a gradient with respect to its start."""
    cfg, target = AdaptationConfig(lr=0.1, grad_clip_norm=2.0), torch.randn(3, 2)
    theta = torch.randn(4, 3, 2)
    step = gradient_descent(cfg.lr)
    batched = torch.func.vmap(lambda t: guarded_update(quadratic(target), t, step, cfg)[0])(theta)
    for i in range(4):
        torch.testing.assert_close(batched[i], guarded_update(quadratic(target), theta[i], step, cfg)[0])
    plain = AdaptationConfig(lr=0.1, **OFF)
    gradient = torch.func.grad(lambda t: guarded_update(quadratic(target), t, step, plain)[0].sum())(theta[0])
    torch.testing.assert_close(gradient, torch.full((3, 2), 0.8**5))


def test_adapt_optimizer_raises_after_it_moved_parameters_model_is_restored():
    class Failing(torch.optim.SGD):
        def step(self):
            super().step()
            raise OverflowError("no more")

    model, data = mlp(), batch()
    before = vector(model)
    with pytest.raises(OverflowError, match="no more"):
        Adapter(model, AdaptationConfig(lr=0.1), optimizer=Failing).adapt(F.mse_loss, data)
    assert torch.equal(vector(model), before) and all(p.grad is None for p in model.parameters())
