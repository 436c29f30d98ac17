"""Adapters over the models of practice: shared, frozen, replaced, recurrent, keeping tensors, in inference mode."""

import copy
import json
import math
import warnings
from contextlib import nullcontext

import numpy as np
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
    """Each user's result is that of an Adapter on a copy of the model."""
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


def test_adapt_many_batch_norm_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(6), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"^Adapter.adapt_many: 1 \(BatchNorm1d\) must be in eval mode, got training"):
        Adapter(model).adapt_many(F.mse_loss, users())
    model.eval()
    params, losses = Adapter(model).adapt_many(F.mse_loss, users())
    assert losses.shape == (3,) and params["0.weight"].shape == (3, 4, 3)


def test_experience_weights_loss_that_vmap_cannot_run_gives_its_mean_of_losses():
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


def test_ema_model_and_copies_of_a_model_that_keeps_tensors():
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


# --------------------------------------------------------------------------------- parameters frozen or replaced


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
def test_adapt_parameter_frozen_later_stays_and_unfrozen_again_adapts(optimizer):
    model, batch = mlp(), of(users(), 0)
    adapter = Adapter(model, AdaptationConfig(lr=0.1, trust_region_eps=0.05), optimizer=optimizer)
    adapter.adapt(F.mse_loss, batch)
    model[0].requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with torch.no_grad():
        model[0].weight.add_(1.0)  # its owner may still set it
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
    model, batch = mlp(), users()
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
def test_calls_parameter_unfrozen_or_replaced_later_is_refused(call, change):
    model, batch = mlp(), users()
    model[2].requires_grad_(change != "unfreeze")
    adapter = Adapter(model)
    if change == "unfreeze":
        model[2].requires_grad_(True)
    elif change == "assign":
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    else:
        model[2] = nn.Linear(4, 1).requires_grad_(change == "replace")
    before = copy.deepcopy(model.state_dict())
    name = "0.weight" if change == "assign" else "2.weight"
    text = f"^Adapter.{call}: {name} was unfrozen or replaced after this Adapter was made: make a new Adapter$"
    with pytest.raises(ValueError, match=text):
        if call == "adapt_stream":
            next(adapter.adapt_stream(F.mse_loss, [of(batch, 0)]))
        else:
            getattr(adapter, call)(F.mse_loss, of(batch, 0) if call == "adapt" else batch)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_adapt_parameter_outside_the_choice_may_change():
    model, batch = mlp(), of(users(), 0)
    model[0].requires_grad_(False)
    adapter = Adapter(model, parameters="2")
    model[0].requires_grad_(True)
    adapter.adapt(F.mse_loss, batch)
    model[0] = nn.Linear(3, 4)
    before = copy.deepcopy(model)
    adapter.adapt(F.mse_loss, batch)
    assert torch.equal(model[0].weight, before[0].weight) and not torch.equal(model[2].weight, before[2].weight)


def test_adapt_all_parameters_frozen_is_refused():
    model = mlp()
    adapter = Adapter(model, parameters="2")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^Adapter.adapt: all adapted parameters are frozen, 2.weight, 2.bias$"):
        adapter.adapt(F.mse_loss, of(users(), 0))


# ------------------------------------------------------------------------------------------------------ inference mode


def everything(mode, batch):
    """The numbers of all calls made in a mode, with an adapter of their own each, and of one call outside after it."""
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


def test_calls_in_inference_mode_are_those_outside():
    batch = users()
    with torch.inference_mode():
        inside = {name: value.clone() for name, value in batch.items()}
    wanted = everything(torch.enable_grad, batch)
    assert everything(torch.inference_mode, batch) == wanted
    assert everything(torch.enable_grad, inside) == wanted
    assert everything(torch.inference_mode, inside) == wanted


def test_constructor_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(
        ValueError, match=r"^Adapter: model must be made outside torch.inference_mode, got 0.weight made"
    ):
        Adapter(model)


# -------------------------------------------------------------------------------------------- what belongs to each user


def spy(seen):
    def retriever(_, batch):
        seen.append(batch)
        return None

    return retriever


def test_adapt_many_entries_of_each_user_are_split_and_others_are_whole():
    seen, batch = [], users(3)
    given = {
        **batch,
        "mask": torch.ones(3, 2, dtype=torch.bool),
        "context_embedding": torch.randn(3, 5),
        "task": torch.tensor([4, 7, 9]),
        "prototypes": torch.randn(3, 8),  # as many as users, by chance
        "nested": {"table": torch.randn(3), "name": "x"},
        "temperature": torch.tensor(0.5),
    }
    Adapter(mlp(), retriever=spy(seen)).adapt_many(F.mse_loss, given)
    assert len(seen) == 3
    for i, part in enumerate(seen):
        assert part.keys() == given.keys()
        for name in ("states", "targets", "mask", "context_embedding", "task"):
            assert torch.equal(part[name], given[name][i]), name
        for name in ("prototypes", "nested", "temperature"):
            assert part[name] is given[name], name


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        (5, [5, 5, 5]),
        (torch.tensor(5), [5, 5, 5]),
        ([4, 7, 9], [4, 7, 9]),
        (torch.tensor([[4, 5], [7, 5], [9, 5]]), [[4, 5], [7, 5], [9, 5]]),
    ],
)
def test_adapt_many_task_is_one_for_all_or_one_for_each(task, wanted):
    seen = []
    Adapter(mlp(), retriever=spy(seen)).adapt_many(F.mse_loss, {**users(3), "task": task})
    assert [torch.as_tensor(part["task"]).tolist() for part in seen] == wanted


def test_adapt_many_per_user_names_further_entries():
    seen, batch = [], {**users(3), "goal": torch.randn(3, 2), "pair": (torch.randn(3), "x")}
    Adapter(mlp(), retriever=spy(seen)).adapt_many(F.mse_loss, batch, per_user=["goal", "pair"])
    for i, part in enumerate(seen):
        assert torch.equal(part["goal"], batch["goal"][i])
        assert torch.equal(part["pair"][0], batch["pair"][0][i]) and part["pair"][1] == "x"


@pytest.mark.parametrize(
    ("change", "per_user", "text"),
    [
        (
            {"context_embedding": torch.randn(4, 5)},
            (),
            "context_embedding must have shape (users, ...), users = 3, got (4",
        ),
        ({"task": torch.tensor([1, 2])}, (), "task must have shape (users, ...), users = 3, got (2,)"),
        ({"task": [1, 2]}, (), "task must have shape (users, ...), users = 3, got (2,)"),
        ({"task": range(4)}, (), "task must have shape (users, ...), users = 3, got (4,)"),
        ({"task": np.arange(4)}, (), "task must have shape (users, ...), users = 3, got (4,)"),
        ({"goal": ["a", "b"]}, "goal", "goal must have shape (users, ...), users = 3, got (2,)"),
        ({"goal": torch.randn(2)}, ["goal"], "goal must have shape (users, ...), users = 3, got (2,)"),
        ({}, ["goal"], "per_user has goal, batch_dict has only states, targets"),
        (
            {"hidden_state": (torch.randn(2, 1),)},
            (),
            "hidden_state must have shape (users, ...), users = 3, got (2, 1)",
        ),
    ],
)
def test_adapt_many_entry_of_each_user_with_another_size_is_refused(change, per_user, text):
    with pytest.raises(ValueError) as info:
        Adapter(mlp(), retriever=spy([])).adapt_many(F.mse_loss, {**users(3), **change}, per_user=per_user)
    assert str(info.value).startswith(f"Adapter.adapt_many: {text}")


@pytest.mark.parametrize(
    ("change", "per_user", "text"),
    [
        ({"task": {1, 2, 3}}, (), "task must be a tensor, an array or a sequence, got set"),
        ({"goal": "abc"}, ["goal"], "goal must be a tensor, an array or a sequence, got str"),
        ({"goal": 3}, "goal", "goal must be a tensor, an array or a sequence, got int"),
        ({}, 3, "per_user must be names of entries, got 3"),
    ],
)
def test_adapt_many_entry_of_each_user_of_another_type_is_refused(change, per_user, text):
    with pytest.raises(TypeError) as info:
        Adapter(mlp(), retriever=spy([])).adapt_many(F.mse_loss, {**users(3), **change}, per_user=per_user)
    assert str(info.value) == f"Adapter.adapt_many: {text}"


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda ids: range(7, 10)])
@pytest.mark.parametrize("entry", ["task", "tag"])
def test_adapt_many_sequence_of_values_gives_each_user_its_own(make, entry):
    seen = []
    batch = {**users(3), entry: make([7, 8, 9])}
    Adapter(mlp(), retriever=spy(seen)).adapt_many(F.mse_loss, batch, per_user="tag" if entry == "tag" else ())
    assert [int(part[entry]) for part in seen] == [7, 8, 9]


@pytest.mark.parametrize("task", [2, np.int64(2), np.array(2), torch.tensor(2), "two"])
def test_adapt_many_single_task_goes_whole_to_every_user(task):
    seen = []
    Adapter(mlp(), retriever=spy(seen)).adapt_many(F.mse_loss, {**users(3), "task": task})
    assert len(seen) == 3 and all(part["task"] is task for part in seen)


# -------------------------------------------------------------------------------------------------------------- numbers


def test_config_numpy_numbers_become_python_numbers():
    values = {"lr": np.float32(0.25), "grad_clip_norm": np.float64(0.5), "trust_region_eps": np.int64(1)}
    values |= {"ema_decay": np.float16(0.5), "entropy_weight": np.float32(0.125), "max_steps_per_call": np.int32(3)}
    cfg = AdaptationConfig(**values)
    plain = AdaptationConfig(0.25, 0.5, 1, 0.5, 0.125, 3)
    assert cfg == plain and json.dumps(vars(cfg)) == json.dumps(vars(plain))
    for name, value in vars(cfg).items():
        assert type(value) is type(getattr(plain, name)), name
    for name in values:
        for bad in (np.bool_(True), "1", np.array([0.1, 0.2])):
            with pytest.raises(TypeError, match=f"^AdaptationConfig: {name} must be a"):
                AdaptationConfig(**{name: bad})
        with pytest.raises(ValueError, match=f"^AdaptationConfig: {name} must be"):
            AdaptationConfig(**{name: np.float32(-1) if name != "max_steps_per_call" else np.int64(0)})


def test_adapter_numpy_numbers_adapt_as_python_numbers():
    batch, model = users(), mlp()
    buffer = ExperienceBuffer(10, seed=0)
    buffer.add(torch.randn(10, 2, 6, 3), torch.randn(10, 2, 6, 1))
    one = Adapter(copy.deepcopy(model), AdaptationConfig(lr=np.float32(0.125)), experience_weight=np.float32(0.5))
    other = Adapter(model, AdaptationConfig(lr=0.125), experience_weight=0.5)
    assert type(one.experience_weight) is float
    assert one.adapt(F.mse_loss, of(batch, 0)) == other.adapt(F.mse_loss, of(batch, 0))
    results = [a.adapt_many(F.mse_loss, batch, None, a.history(n))[1] for a, n in ((one, np.int64(3)), (other, 3))]
    assert torch.equal(*results)


def test_adapted_parameters_of_a_shared_model_run_in_functional_call():
    model, batch = Shared(), users()
    params, _ = Adapter(model).adapt_many(F.mse_loss, batch)
    own = copy.deepcopy(model)
    Adapter(own).adapt(F.mse_loss, of(batch, 1))
    mine = {name: value[1] for name, value in params.items()}
    torch.testing.assert_close(functional_call(model, mine, batch["states"][1]), own(batch["states"][1]))
