"""adapt_many equals an Adapter for each user, with all guards and failures of single users."""

import copy
import math
import re

import pytest
import torch
from adapter_data import OFF, mlp, users, vector
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from eaml_ext import SSM
from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.experience import ExperienceBuffer, retrieval

USERS = 5


def linear_streams(calls, poisoned=()):
    """Batches of one linear task per user; ``poisoned``: (call, user, value) whose targets are multiplied."""
    weights = torch.randn(USERS, 4, 1, dtype=torch.float64)
    for call in range(calls):
        x = torch.randn(USERS, 12, 4, dtype=torch.float64)
        y = x @ weights + 0.1 * torch.randn(USERS, 12, 1, dtype=torch.float64)
        for at, user, value in poisoned:
            if at == call:
                y[user] *= value
        yield {"states": x, "targets": y}


POISONED = [
    (15, 1, 1e4),
    (18, 2, math.nan),
    (22, 2, -1e3),
    *((call, 3, -50.0) for call in range(16, 30)),
    (25, 4, 1e200),
]


@pytest.mark.parametrize("steps", [1, 4])
def test_adapt_many_with_history_equals_adapters(steps):
    model = nn.Linear(4, 1).double()
    cfg = AdaptationConfig(lr=0.05, ema_decay=0.9, max_steps_per_call=steps)
    shared = Adapter(model, cfg)
    alone = [Adapter(copy.deepcopy(model), cfg) for _ in range(USERS)]
    params, history = None, shared.history(USERS)
    for batch in linear_streams(40, POISONED):
        params, losses = shared.adapt_many(F.mse_loss, batch, params, history)
        averages = shared.ema_params(history)
        for i, own in enumerate(alone):
            value = own.adapt(F.mse_loss, {name: value[i] for name, value in batch.items()})
            assert value == pytest.approx(float(losses[i]), rel=1e-9, nan_ok=True)
            assert (own.last_steps, own.rollbacks) == (history.last_steps[i], history.rollbacks[i])
            average = dict(own.ema_model().named_parameters())
            for name, p in own.model.named_parameters():
                torch.testing.assert_close(params[name][i], p.detach(), rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(averages[name][i], average[name].detach(), rtol=1e-9, atol=1e-12)
    assert history.rollbacks[0] == 0 and all(n > 0 for n in history.rollbacks[1:]), "the guards must have acted"


@pytest.mark.parametrize("extras", ["", "mask", "experience", "hidden"])
def test_adapt_many_without_history_equals_adapters(extras):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()
            self.register_buffer("shift", torch.ones(1))

        def forward(self, x, hidden=None):
            return self.inner(x) + self.shift + (0 if hidden is None else hidden[0])

    model = Recurrent().double()
    data = {name: value.double() for name, value in users().items()}
    data["targets"][1] *= 100  # this one is clipped and projected
    buffer, retriever = None, None
    if extras == "mask":
        data["mask"] = torch.stack([torch.randperm(12) < 7 for _ in range(5)])
    elif extras == "hidden":
        data["hidden_state"] = (torch.randn(5, 12, 1).double(),)
    elif extras == "experience":
        buffer = ExperienceBuffer(100)
        buffer.add(torch.randn(50, 4).double(), torch.randn(50, 1).double(), context_embedding=torch.randn(50, 2))
        data["context_embedding"] = torch.randn(5, 2)
        retriever = retrieval.nearest(6)
    cfg = AdaptationConfig(lr=0.05, grad_clip_norm=0.5, trust_region_eps=0.005, ema_decay=None)
    adapter = Adapter(model, cfg, buffer, 0.5, retriever=retriever)
    before = vector(model)
    params, losses = adapter.adapt_many(F.mse_loss, data)
    again, _ = adapter.adapt_many(F.mse_loss, data, params)
    assert torch.equal(vector(model), before), "the model itself does not change"
    for i in range(5):
        own = copy.deepcopy(model)
        mine = {n: (v[0][i],) if isinstance(v, tuple) else v[i] for n, v in data.items()}
        alone = Adapter(own, cfg, buffer, 0.5, retriever=retriever)
        assert alone.adapt(F.mse_loss, mine) == pytest.approx(float(losses[i]))
        for name, p in own.named_parameters():
            torch.testing.assert_close(params[name][i], p.detach())
        alone.adapt(F.mse_loss, mine)
        for name, p in own.named_parameters():
            torch.testing.assert_close(again[name][i], p.detach())
    one = {name: value[2] for name, value in params.items()}
    assert functional_call(model, one, data["states"][2]).shape == (12, 1)


def test_adapt_many_default_ssm_equals_adapters():
    model = SSM(3, output_dim=2)
    cfg = AdaptationConfig(max_steps_per_call=3)
    batch = {"states": torch.randn(USERS, 2, 16, 3), "targets": torch.randn(USERS, 2, 16, 2)}
    params, losses = Adapter(model, cfg).adapt_many(F.mse_loss, batch)
    for i in range(USERS):
        own = Adapter(copy.deepcopy(model), cfg)
        assert own.adapt(F.mse_loss, {name: v[i] for name, v in batch.items()}) == pytest.approx(float(losses[i]))
        for name, p in own.model.named_parameters():
            torch.testing.assert_close(params[name][i], p.detach(), rtol=1e-4, atol=1e-6)


def test_adapt_many_parameters_of_two_dtypes_keep_them():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 1)})
    model["b"].double()
    model.forward = lambda x: model["b"](model["a"](x).double())
    batch = {"states": torch.randn(2, 8, 4), "targets": torch.randn(2, 8, 1)}

    def loss(predictions, targets):
        return F.mse_loss(predictions, targets.double())

    params, _ = Adapter(model).adapt_many(loss, batch)
    own = copy.deepcopy(model)
    own.forward = lambda x: own["b"](own["a"](x).double())
    Adapter(own).adapt(loss, {name: value[1] for name, value in batch.items()})
    for name, p in own.named_parameters():
        assert params[name].dtype == p.dtype
        torch.testing.assert_close(params[name][1], p.detach())


@pytest.mark.parametrize("how", ["data", "divergence"])
def test_adapt_many_loss_of_one_user_not_finite_returns_that_user_alone(how):
    model, data = nn.Linear(4, 1), users()
    if how == "data":
        data["targets"][3, 0] = math.nan
    else:
        data["states"][3] *= 1e9
    adapter = Adapter(model, AdaptationConfig(**OFF, lr=0.1, max_steps_per_call=20))
    params, losses = adapter.adapt_many(F.mse_loss, data)
    assert torch.isfinite(losses).tolist() == [True, True, True, False, True]
    assert torch.equal(params["weight"][3], model.weight) and torch.equal(params["bias"][3], model.bias)
    assert torch.isfinite(params["weight"]).all()
    assert all(not torch.equal(params["weight"][i], model.weight) for i in (0, 1, 2, 4))


@pytest.mark.parametrize("guarded", [False, True])
def test_adapt_many_spike_of_one_user_leaves_others_unchanged(guarded):
    """Without the spike rule one corrupted batch moves a user's parameters far, with it they stay."""
    off = {"grad_clip_norm": None, "trust_region_eps": None}
    adapter = Adapter(nn.Linear(4, 1).double(), AdaptationConfig(lr=0.05, ema_decay=0.9, **off))
    params, history = None, adapter.history(USERS) if guarded else None
    for batch in linear_streams(40, [(39, 2, -1e3)]):
        before = params
        params, _ = adapter.adapt_many(F.mse_loss, batch, params, history)
    moved = (params["weight"] - before["weight"]).flatten(1).norm(dim=1)
    assert float(moved[[0, 1, 3, 4]].max()) < 0.5
    assert float(moved[2]) < 0.5 if guarded else float(moved[2]) > 10


@pytest.mark.parametrize("guard", ["grad_clip_norm", "trust_region_eps"])
def test_adapt_many_steep_loss_of_one_user_diverges_only_without_the_guard(guard):
    model, data = nn.Linear(4, 1), users()
    data["states"][3] *= 30
    results = {}
    for guarded in (False, True):
        cfg = AdaptationConfig(**{**OFF, "lr": 0.01, "max_steps_per_call": 8, guard: 0.1 if guarded else None})
        params, losses = Adapter(model, cfg).adapt_many(F.mse_loss, data)
        distance = torch.cat([(params[n] - p.detach()).flatten(1) for n, p in model.named_parameters()], 1).norm(dim=1)
        results[guarded] = float(losses[3]), distance
    assert results[False][0] > 1e6
    assert results[True][0] < 1e4
    radius = 8 * 0.01 * 0.1 if guard == "grad_clip_norm" else 0.1 * float(vector(model).norm())
    assert float(results[True][1].max()) <= radius * (1 + 1e-5)


def test_adapt_many_dropout_differs_between_users():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))
    data = {name: value[:1].expand(6, *value.shape[1:]) for name, value in users().items()}
    _, losses = Adapter(model, AdaptationConfig()).adapt_many(F.mse_loss, data)
    assert len(set(losses.tolist())) == 6


def test_adapt_many_wrong_history_raises():
    adapter = Adapter(nn.Linear(4, 1).double())
    (batch,) = linear_streams(1)
    for count, error, text in ((0, ValueError, "users must be > 0, got 0"), ("5", TypeError, "users must be an int")):
        with pytest.raises(error, match=f"^Adapter.history: {text}"):
            adapter.history(count)
    with pytest.raises(TypeError, match=r"^Adapter.adapt_many: history must come from Adapter.history, got dict"):
        adapter.adapt_many(F.mse_loss, batch, None, {})
    with pytest.raises(ValueError, match=r"^Adapter.adapt_many: history is of 3 users, the batch of 5"):
        adapter.adapt_many(F.mse_loss, batch, None, adapter.history(3))
    with pytest.raises(TypeError, match=r"^Adapter.adapt_many: params must be a dict of tensors by name, got list"):
        adapter.adapt_many(F.mse_loss, batch, [1])
    with pytest.raises(TypeError, match=r"^Adapter.ema_params: history must come from Adapter.history, got NoneType"):
        adapter.ema_params(None)
    with pytest.raises(ValueError, match=r"^Adapter.ema_params: history has seen no call of adapt_many yet"):
        adapter.ema_params(adapter.history(5))
    with pytest.raises(ValueError, match=r"^Adapter.adapt_many: takes plain gradient steps, but this adapter has an"):
        Adapter(nn.Linear(4, 1).double(), optimizer=torch.optim.Adam).adapt_many(F.mse_loss, batch)
    history = adapter.history(5)
    with pytest.raises(ValueError, match="loss_fn must return a scalar"):
        adapter.adapt_many(lambda p, t: p, batch, None, history)
    assert history.average is None and history.count[0] == 0, "an error leaves the history alone"


def test_adapt_many_history_of_another_model_raises_and_is_unchanged():
    batch = {"states": torch.randn(2, 3, 4), "targets": torch.randn(2, 3, 1)}
    small, large = (Adapter(nn.Sequential(nn.Linear(4, n), nn.Linear(n, 1)), AdaptationConfig()) for n in (2, 3))
    history = small.history(2)
    small.adapt_many(F.mse_loss, batch, None, history)
    before = copy.deepcopy(history.__dict__)
    with pytest.raises(ValueError, match="history is of"):
        large.adapt_many(F.mse_loss, batch, None, history)
    assert torch.equal(history.average, before["average"]) and history.last_steps == before["last_steps"]


def test_adapt_many_wrong_params_or_uneven_experience_raise():
    adapter, data = Adapter(mlp()), users(3)
    params, _ = adapter.adapt_many(F.mse_loss, data)
    cases = [
        ({}, ValueError, "params has , wanted 0.weight"),
        ({**params, "2.bias": params["2.bias"][:2]}, ValueError, "params['2.bias'] must have shape (3, 1), got (2, 1)"),
        ({**params, "2.bias": 1}, TypeError, "params['2.bias'] must be a torch.Tensor, got int"),
        ({**params, "2.bias": params["2.bias"].double()}, TypeError, "params['2.bias'] must be float32, got float64"),
        ({**params, "2.bias": params["2.bias"].to("meta")}, ValueError, "params['2.bias'] is on meta"),
    ]
    for bad, error, text in cases:
        with pytest.raises(error, match=r"^Adapter.adapt_many: " + re.escape(text)):
            adapter.adapt_many(F.mse_loss, data, bad)
    sizes = iter((1, 2, 2))

    def uneven(*_):
        n = next(sizes)
        return {"states": torch.zeros(n, 4), "targets": torch.zeros(n, 1)}

    with pytest.raises(ValueError, match="the retriever must find equally many experiences for all users"):
        Adapter(mlp(), retriever=uneven).adapt_many(F.mse_loss, data)
