"""Parameters that are frozen, unfrozen or replaced during the life of an Adapter."""

import copy
import math

import pytest
import torch
from adapter_data import mlp, of_user, users, vector
from torch import nn
from torch.nn import functional as F

from eaml_ext.adaptation import AdaptationConfig, Adapter


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
def test_adapt_parameter_frozen_later_stays_and_unfrozen_again_adapts(optimizer):
    model, batch = mlp(), of_user(users(3), 0)
    adapter = Adapter(model, AdaptationConfig(lr=0.1, trust_region_eps=0.05), optimizer=optimizer)
    adapter.adapt(F.mse_loss, batch)
    model[0].requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with torch.no_grad():
        model[0].weight.add_(1.0)  # frozen parameters may still be set by hand
    for spoiled in (False, True):
        before = copy.deepcopy(model)
        targets = batch["targets"] * (math.nan if spoiled else 1)
        adapter.adapt(F.mse_loss, {**batch, "targets": targets})
        assert torch.equal(model[0].weight, before[0].weight) and torch.equal(model[0].bias, before[0].bias)
        assert not torch.equal(model[2].weight, before[2].weight)
        assert torch.equal(adapter.ema_model()[0].weight, model[0].weight)
    assert adapter.rollbacks == 1
    adapter.reset()
    assert torch.equal(model[0].weight, before[0].weight)
    model[0].requires_grad_(True)
    adapter.adapt(F.mse_loss, batch)
    assert not torch.equal(model[0].weight, before[0].weight)


def test_adapt_many_parameter_frozen_later_stays_for_each_user():
    model, batch = mlp(), users(3)
    adapter = Adapter(model, AdaptationConfig(lr=0.1, ema_decay=0.9))
    history = adapter.history(3)
    params, _ = adapter.adapt_many(F.mse_loss, batch, None, history)
    model[0].requires_grad_(False)
    spoiled = {**batch, "targets": batch["targets"].clone()}
    spoiled["targets"][1] = math.nan
    again, _ = adapter.adapt_many(F.mse_loss, spoiled, params, history)
    assert history.rollbacks == [0, 1, 0]
    for name in params:
        same = [torch.equal(a, b) for a, b in zip(again[name], params[name], strict=True)]
        assert same == [True] * 3 if name.startswith("0.") else same == [False] * 3, name
    model[0].requires_grad_(True)
    again, _ = adapter.adapt_many(F.mse_loss, batch, again, history)
    assert all(not torch.equal(again[name][0], params[name][0]) for name in params)


@pytest.mark.parametrize("call", ["adapt", "adapt_many", "adapt_stream"])
@pytest.mark.parametrize("change", ["unfreeze", "replace", "replace frozen", "assign"])
def test_calls_parameter_unfrozen_or_replaced_later_raise(call, change):
    model, batch = mlp(), users(3)
    model[2].requires_grad_(change != "unfreeze")
    adapter = Adapter(model)
    if change == "unfreeze":
        model[2].requires_grad_(True)
    elif change == "assign":
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    else:
        model[2] = nn.Linear(16, 1).requires_grad_(change == "replace")
    before = copy.deepcopy(model.state_dict())
    name = "0.weight" if change == "assign" else "2.weight"
    text = f"^Adapter.{call}: {name} was unfrozen or replaced after this Adapter was made: make a new Adapter$"
    with pytest.raises(ValueError, match=text):
        if call == "adapt_stream":
            next(adapter.adapt_stream(F.mse_loss, [of_user(batch, 0)]))
        else:
            getattr(adapter, call)(F.mse_loss, of_user(batch, 0) if call == "adapt" else batch)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_adapt_parameter_outside_the_choice_may_change():
    model, batch = mlp(), of_user(users(3), 0)
    model[0].requires_grad_(False)
    adapter = Adapter(model, parameters="2")
    model[0].requires_grad_(True)
    adapter.adapt(F.mse_loss, batch)
    model[0] = nn.Linear(4, 16)
    before = copy.deepcopy(model)
    adapter.adapt(F.mse_loss, batch)
    assert torch.equal(model[0].weight, before[0].weight) and not torch.equal(model[2].weight, before[2].weight)


def test_adapt_all_parameters_frozen_raises():
    model = mlp()
    adapter = Adapter(model, parameters="2")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^Adapter.adapt: all adapted parameters are frozen, 2.weight, 2.bias$"):
        adapter.adapt(F.mse_loss, of_user(users(3), 0))


@pytest.mark.parametrize("use", ["ema_model", "reset", "snapshot"])
@pytest.mark.parametrize("width", [1, 3])
def test_state_methods_replaced_layer_raise(use, width):
    model = mlp()
    adapter = Adapter(model)
    model[2] = nn.Linear(16, width)
    before = vector(model)
    text = "2.weight was unfrozen or replaced after this Adapter was made: make a new Adapter"
    with pytest.raises(ValueError, match=f"^Adapter.{use}: {text}$"):
        getattr(adapter, use)()
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("use", ["ema_model", "reset", "snapshot"])
def test_state_methods_frozen_parameters_are_accepted(use):
    model = mlp()
    adapter = Adapter(model)
    model.requires_grad_(False)
    getattr(adapter, use)()
