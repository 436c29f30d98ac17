"""Adapters of models from practice: shared layers, recurrent layers, stored tensors; and inference mode."""

import copy
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from user_models import UNBATCHABLE, Attention, Shared, Tied, TiedParametrized, Transformer, sequences

from eaml_ext import SSM
from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.experience import ExperienceBuffer, retrieval
from eaml_ext.meta.functional import functional_call


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def users(count=3, dtype=torch.float32):
    tasks = [sequences(dtype=dtype)[:2] for _ in range(count)]
    return {"states": torch.stack([x for x, _ in tasks]), "targets": torch.stack([y for _, y in tasks])}


def of(batch, user):
    return {name: value[user] for name, value in batch.items()}


def assert_users_equal_adapters(model, cfg, batch, params, losses):
    """Assert that each user's result equals that of an Adapter of a copy of the model."""
    for i in range(len(losses)):
        own = Adapter(copy.deepcopy(model), cfg)
        assert own.adapt(F.mse_loss, of(batch, i)) == pytest.approx(float(losses[i]), rel=1e-9)
        for name, p in own.model.named_parameters():
            torch.testing.assert_close(params[name][i], p.detach(), rtol=1e-7, atol=1e-10)
            assert not torch.equal(params[name][i], dict(model.named_parameters())[name]), name


@pytest.mark.parametrize("kind", UNBATCHABLE)
def test_adapt_many_vmap_fails_users_equal_adapters_after_one_warning(kind):
    model = UNBATCHABLE[kind]().double()
    cfg, batch = AdaptationConfig(lr=0.1, max_steps_per_call=3), users(dtype=torch.float64)
    adapter = Adapter(model, cfg)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(
        RuntimeWarning, match="^Adapter: vmap cannot run the model, so users run one at a time"
    ) as caught:
        params, losses = adapter.adapt_many(F.mse_loss, batch)
    assert len([w for w in caught if "vmap cannot run" in str(w.message)]) == 1
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert_users_equal_adapters(model, cfg, batch, params, losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.adapt_many(F.mse_loss, batch, params)


@pytest.mark.parametrize("kind", UNBATCHABLE)
def test_adapt_model_that_vmap_cannot_run_adapts_without_a_warning(kind):
    model, batch = UNBATCHABLE[kind](), of(users(), 0)
    adapter = Adapter(model, AdaptationConfig(lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [adapter.adapt(F.mse_loss, batch) for _ in range(5)]
    assert adapter.last_steps == 5 and len(set(losses)) == 5


def test_adapt_many_attention_in_eval_mode_users_equal_adapters_without_a_warning():
    model, cfg = Transformer(training=False).double(), AdaptationConfig(lr=0.1, max_steps_per_call=3)
    batch = users(dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        params, losses = Adapter(model, cfg).adapt_many(F.mse_loss, batch)
    assert_users_equal_adapters(model, cfg, batch, params, losses)


@pytest.mark.parametrize("kind", [Shared, Tied, TiedParametrized])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_adapt_many_shared_names_users_equal_adapters_and_model_stays(kind):
    model, batch = kind().double(), users(dtype=torch.float64)
    cfg = AdaptationConfig(lr=0.1, max_steps_per_call=3)
    tensors = [*model.parameters(), *model.buffers()]
    before = [t.detach().clone() for t in tensors]
    params, losses = Adapter(model, cfg).adapt_many(F.mse_loss, batch)
    now = [*model.parameters(), *model.buffers()]
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(now, tensors, before, strict=True))
    assert_users_equal_adapters(model, cfg, batch, params, losses)


def test_parameters_any_name_of_a_shared_submodule_selects_it():
    model, batch = Shared(), of(users(), 0)
    before = copy.deepcopy(model)
    Adapter(model, AdaptationConfig(lr=0.1), parameters="b").adapt(F.mse_loss, batch)
    assert not torch.equal(model.a.weight, before.a.weight) and torch.equal(model.head.weight, before.head.weight)


@pytest.mark.parametrize("batchable", [False, True])
def test_adapt_many_updates_of_buffers_reach_neither_users_nor_model(batchable):
    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 1)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x):
            self.scale.mul_(2)
            return self.head(x) * (self.scale if batchable or x.sum() > -math.inf else 1)

    model, batch = Drifting(), users()
    same = {name: value[:1].expand(3, *value.shape[1:]) for name, value in batch.items()}
    with nullcontext() if batchable else pytest.warns(RuntimeWarning, match="vmap cannot run"):
        params, losses = Adapter(model).adapt_many(F.mse_loss, same)
    assert float(model.scale) == 1 and len(set(losses.tolist())) == 1
    assert torch.equal(params["head.weight"][0], params["head.weight"][2])


def test_adapt_many_batch_norm_in_training_mode_raises():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(6), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"^Adapter.adapt_many: 1 \(BatchNorm1d\) must be in eval mode, got training"):
        Adapter(model).adapt_many(F.mse_loss, users())
    model.eval()
    params, losses = Adapter(model).adapt_many(F.mse_loss, users())
    assert losses.shape == (3,) and params["0.weight"].shape == (3, 4, 3)


def test_adapt_experience_weights_loss_that_vmap_cannot_run_gives_the_weighted_mean():
    def branching(prediction, target):
        error = (prediction - target).abs().mean()
        return error.square() if error < 1 else 2 * error - 1

    model, batch = mlp(), {"states": torch.randn(4, 3), "targets": torch.randn(4, 1)}
    x, y, w = torch.randn(5, 3), 3 * torch.randn(5, 1), torch.rand(5)
    found = {"states": x, "targets": y, "weights": w}
    with torch.no_grad():
        each = torch.stack([branching(model(x[i : i + 1]), y[i : i + 1]) for i in range(5)])
        wanted = branching(model(batch["states"]), batch["targets"]) + 0.5 * (w * each).sum() / w.sum()
    adapter = Adapter(model, AdaptationConfig(max_steps_per_call=1), None, 0.5, retriever=lambda *_: found)
    with pytest.warns(RuntimeWarning, match="vmap cannot run the model, so experience items run one at a time"):
        assert adapter.adapt(branching, batch) == pytest.approx(float(wanted))
    (value,) = (total for _, total in adapter.adapt_stream(branching, [batch]))
    assert math.isfinite(value)


# -------------------------------------------------------------------------------------------- models that keep tensors


def test_ema_model_and_copies_of_a_model_that_keeps_tensors_have_no_graph():
    model, batch = Attention(), of(users(), 0)
    adapter = Adapter(model)
    adapter.adapt(F.mse_loss, batch)
    assert model.map.grad_fn is not None
    averaged, copied = adapter.ema_model(), copy.deepcopy(adapter)
    assert torch.equal(averaged.map, model.map) and averaged.map.grad_fn is None
    assert copied.model.map.grad_fn is None and copied.model is not model
    assert copied.adapt(F.mse_loss, batch) == adapter.adapt(F.mse_loss, batch)
    assert all(torch.equal(p, q) for p, q in zip(copied.model.parameters(), model.parameters(), strict=True))
    kept = model.map
    adapter.adapt_many(F.mse_loss, users())
    assert model.map is kept


# ------------------------------------------------------------------------------------------------------ inference mode


def everything(mode, batch):
    """Return the results of all calls in a mode, by separate adapters, and of one call of each outside after it."""
    torch.manual_seed(0)
    models = [mlp() for _ in range(4)]
    ssm, buffer = SSM(3, 8, 1), ExperienceBuffer(50)
    fields = {"context_embedding": torch.randn(20, 2), "task": torch.arange(20)}
    buffer.add(torch.randn(20, 3), torch.randn(20, 1), **fields)
    cfg = AdaptationConfig(lr=0.05, ema_decay=0.5)
    with mode():
        found = retrieval.attention(4)
        one = Adapter(models[0], cfg, buffer, 0.5, retriever=found)
        adam = Adapter(models[1], cfg, optimizer=torch.optim.Adam)
        many, stream = Adapter(models[2], cfg), Adapter(ssm, cfg)
        history = many.history(3)
        single = {**of(batch, 0), "context_embedding": torch.randn(2)}
        flat = {**single, "states": single["states"][:, 0], "targets": single["targets"][:, 0]}
        results = [one.adapt(F.mse_loss, flat) for _ in range(3)] + [adam.adapt(F.mse_loss, single) for _ in range(3)]
        results += [value for _, value in stream.adapt_stream(F.mse_loss, [single] * 3)]
        predictions = [p for p, _ in stream.adapt_stream(F.mse_loss, [{**single, "hidden_state": None}] * 2)]
        params, losses = many.adapt_many(F.mse_loss, batch, None, history)
        params, losses = many.adapt_many(F.mse_loss, batch, params, history)
        tensors = [*params.values(), losses, *many.ema_params(history).values(), *predictions]
        tensors += list(one.ema_model().parameters())
        one.snapshot()
        one.reset()
        one.load_state_dict(one.state_dict())
    results += [one.adapt(F.mse_loss, flat), adam.adapt(F.mse_loss, single)]
    results += [value for _, value in stream.adapt_stream(F.mse_loss, [single])]
    tensors += [many.adapt_many(F.mse_loss, batch, params, history)[1]]
    assert len(set(results[:6])) == 6, "each call has moved the parameters"
    return results, [t.tolist() for t in tensors]


def test_calls_in_inference_mode_equal_those_outside():
    batch = users()
    with torch.inference_mode():
        inside = {name: value.clone() for name, value in batch.items()}
    wanted = everything(torch.enable_grad, batch)
    assert everything(torch.inference_mode, batch) == wanted
    assert everything(torch.enable_grad, inside) == wanted
    assert everything(torch.inference_mode, inside) == wanted


def test_constructor_model_made_in_inference_mode_raises():
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(
        ValueError, match=r"^Adapter: model must be made outside torch.inference_mode, got 0.weight made"
    ):
        Adapter(model)


def test_adapt_many_params_of_a_shared_model_run_in_functional_call():
    model, batch = Shared(), users()
    params, _ = Adapter(model).adapt_many(F.mse_loss, batch)
    own = copy.deepcopy(model)
    Adapter(own).adapt(F.mse_loss, of(batch, 1))
    mine = {name: value[1] for name, value in params.items()}
    torch.testing.assert_close(functional_call(model, mine, batch["states"][1]), own(batch["states"][1]))
