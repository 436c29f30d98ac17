"""Many users at once are what each would be alone, with all guards and whatever happens to some of them."""

import copy
import math

import pytest
import torch
from torch import nn
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
def test_with_a_history_users_equal_adapters_of_their_own(steps):
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


def test_default_ssm_users_equal_adapters_of_their_own():
    model = SSM(3, output_dim=2)
    cfg = AdaptationConfig(max_steps_per_call=3)
    batch = {"states": torch.randn(USERS, 2, 16, 3), "targets": torch.randn(USERS, 2, 16, 2)}
    params, losses = Adapter(model, cfg).adapt_many(F.mse_loss, batch)
    for i in range(USERS):
        own = Adapter(copy.deepcopy(model), cfg)
        assert own.adapt(F.mse_loss, {name: v[i] for name, v in batch.items()}) == pytest.approx(float(losses[i]))
        for name, p in own.model.named_parameters():
            torch.testing.assert_close(params[name][i], p.detach(), rtol=1e-4, atol=1e-6)


def test_parameters_of_two_dtypes_keep_them():
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


@pytest.mark.parametrize("guarded", [False, True])
def test_the_history_keeps_one_users_spike_from_him_alone(guarded):
    """Without the spike rule the corrupted batch throws the user's model away, with it he keeps what he had."""
    off = {"grad_clip_norm": None, "trust_region_eps": None}
    adapter = Adapter(nn.Linear(4, 1).double(), AdaptationConfig(lr=0.05, ema_decay=0.9, **off))
    params, history = None, adapter.history(USERS) if guarded else None
    for batch in linear_streams(40, [(39, 2, -1e3)]):
        before = params
        params, _ = adapter.adapt_many(F.mse_loss, batch, params, history)
    moved = (params["weight"] - before["weight"]).flatten(1).norm(dim=1)
    assert float(moved[[0, 1, 3, 4]].max()) < 0.5
    assert float(moved[2]) < 0.5 if guarded else float(moved[2]) > 10


def test_refusals_of_histories():
    adapter = Adapter(nn.Linear(4, 1).double())
    (batch,) = linear_streams(1)
    for users, error, text in ((0, ValueError, "users must be > 0, got 0"), ("5", TypeError, "users must be an int")):
        with pytest.raises(error, match=f"^Adapter.history: {text}"):
            adapter.history(users)
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


# ------------------------------------------------------------------------------------------------------- retrieval


def by_the_best_fit(buffer, tasks, batch):
    """The loss of each past task's own least-squares model on the batch."""
    losses = []
    for task in tasks.tolist():
        past = buffer.of_task(task)
        slope = torch.linalg.lstsq(past.observation, past.target).solution
        losses.append(F.mse_loss(batch["states"] @ slope, batch["targets"]))
    return torch.stack(losses)


STRATEGIES = {
    "uniform": lambda: retrieval.uniform(40),
    "nearest": lambda: retrieval.nearest(40),
    "attention": lambda: retrieval.attention(40, 5.0),
    "ivf": lambda: retrieval.ivf(40, nprobe=2, nlist=8),
    "best_fit": lambda: retrieval.best_fit(by_the_best_fit, num_tasks=1),
}


def memory(tasks=8, items=60):
    """Task i is y = w_i x; its embedding lies around 10 i."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(tasks, 4, 1, generator=generator)
    buffer = ExperienceBuffer(1000, seed=0)
    for task in range(tasks):
        x = torch.randn(items, 4, generator=generator)
        embedding = 10.0 * task + torch.randn(items, 2, generator=generator)
        buffer.add(x, x @ weights[task], context_embedding=embedding, task=task)
    return buffer, weights


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_hybrid_loss_is_that_of_the_strategy_and_retrieval_that_recognises_the_task_helps(strategy):
    buffer, weights = memory()
    states = torch.randn(2, 4)  # two items for four unknowns: the rest must come from memory
    batch = {"states": states, "targets": states @ weights[3], "context_embedding": torch.full((2,), 30.0)}
    model, x = nn.Linear(4, 1), torch.randn(200, 4)
    cfg = AdaptationConfig(lr=0.1, max_steps_per_call=1)
    with torch.no_grad():
        current = float(F.mse_loss(model(states), batch["targets"]))
        found = STRATEGIES[strategy]()(memory()[0], batch)
        losses = (model(found["states"]) - found["targets"]).square().mean(1)
        weight = found.get("weights", torch.ones(len(losses)))
        expected = current + 0.7 * float((weight * losses).sum() / weight.sum())
    adapter = Adapter(model, cfg, buffer, 0.7, retriever=STRATEGIES[strategy]())
    assert adapter.adapt(F.mse_loss, batch) == pytest.approx(expected, rel=1e-5)
    plain_model = copy.deepcopy(model)
    plain = Adapter(plain_model, cfg)
    for _ in range(150):
        adapter.adapt(F.mse_loss, batch)
        plain.adapt(F.mse_loss, batch)
    with torch.no_grad():
        hybrid_error, plain_error = (float(F.mse_loss(m(x), x @ weights[3])) for m in (model, plain_model))
    if strategy == "uniform":  # the control arm: mostly other tasks' experience
        assert hybrid_error > 0.2 * plain_error
    else:
        assert hybrid_error < 0.05 * plain_error


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "uniform"])
def test_each_strategy_serves_many_users(strategy):
    buffer, weights = memory()
    states = torch.randn(3, 6, 4)
    batch = {
        "states": states,
        "targets": states @ weights[[1, 4, 6]],
        "context_embedding": 10.0 * torch.tensor([[1.0, 1], [4, 4], [6, 6]]),
    }
    model = nn.Linear(4, 1)
    many = Adapter(model, AdaptationConfig(), buffer, 0.5, retriever=STRATEGIES[strategy]())
    params, losses = many.adapt_many(F.mse_loss, batch)
    for i in range(3):
        own = Adapter(copy.deepcopy(model), many.cfg, buffer, 0.5, retriever=STRATEGIES[strategy]())
        assert own.adapt(F.mse_loss, {name: v[i] for name, v in batch.items()}) == pytest.approx(float(losses[i]))
        for name, p in own.model.named_parameters():
            torch.testing.assert_close(params[name][i], p.detach())


def test_a_history_of_another_model_is_refused_as_it_was():
    batch = {"states": torch.randn(2, 3, 4), "targets": torch.randn(2, 3, 1)}
    small, large = (Adapter(nn.Sequential(nn.Linear(4, n), nn.Linear(n, 1)), AdaptationConfig()) for n in (2, 3))
    history = small.history(2)
    small.adapt_many(F.mse_loss, batch, None, history)
    before = copy.deepcopy(history.__dict__)
    with pytest.raises(ValueError, match="history is of"):
        large.adapt_many(F.mse_loss, batch, None, history)
    assert torch.equal(history.average, before["average"]) and history.last_steps == before["last_steps"]
