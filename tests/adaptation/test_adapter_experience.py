"""Retrieval for one user and for many: the default, the strategies, the parts of a batch, wrong results."""

import copy
import re

import numpy as np
import pytest
import torch
from adapter_data import batch, mlp, users
from torch import nn
from torch.nn import functional as F

from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.experience import ExperienceBuffer, retrieval


def memory_of_two_tasks():
    """Return a buffer where task 0 is y = sum(x), embedding 0, and task 1 is y = -sum(x), embedding 1."""
    buffer = ExperienceBuffer(1000, seed=0)
    for task, sign in enumerate((1.0, -1.0)):
        x = torch.randn(100, 4)
        buffer.add(x, sign * x.sum(1, keepdim=True), context_embedding=torch.full((100, 2), float(task)), task=task)
    return buffer


def test_adapt_retrieved_experience_of_the_task_lowers_the_error():
    errors = {}
    x = torch.randn(100, 4)
    for name, extra in {
        "none": {},
        "right": {"context_embedding": torch.full((2,), 0.1)},
        "left out": {"context_embedding": torch.full((2,), 0.1), "task": 0},
    }.items():
        torch.manual_seed(1)
        model = nn.Linear(4, 1)
        weight = 0.0 if name == "none" else 1.0
        retriever = retrieval.nearest(50)
        adapter = Adapter(model, AdaptationConfig(lr=0.1), memory_of_two_tasks(), weight, retriever=retriever)
        states = torch.randn(2, 4)
        for _ in range(60):
            adapter.adapt(F.mse_loss, {"states": states, "targets": states.sum(1, keepdim=True), **extra})
        errors[name] = float(F.mse_loss(model(x), x.sum(1, keepdim=True)).detach())
    assert errors["right"] < 0.2 * errors["none"] < errors["left out"]


def test_adapt_default_retriever_uses_embedding_and_task():
    asked = []

    class Spy(ExperienceBuffer):
        def retrieve(self, query_embedding, k, exclude_task=None):
            asked.append(("retrieve", k, exclude_task))
            return super().retrieve(query_embedding, k, exclude_task)

        def get_batch(self, n, **options):
            asked.append(("get_batch", n))
            return super().get_batch(n, **options)

    buffer = Spy(100)
    model = nn.Linear(4, 1)
    adapter = Adapter(model, AdaptationConfig(), buffer)
    data = batch()
    adapter.adapt(F.mse_loss, data)
    assert asked == [], "an empty buffer is not asked"
    buffer.add(torch.randn(20, 4), torch.randn(20, 1), context_embedding=torch.randn(20, 2), task=3)
    adapter.adapt(F.mse_loss, data)
    adapter.adapt(F.mse_loss, {**data, "context_embedding": torch.zeros(2)})
    adapter.adapt(F.mse_loss, {**data, "context_embedding": torch.zeros(2), "task": 3})
    assert asked == [("get_batch", 16), ("retrieve", 16, None), ("retrieve", 16, 3)]
    Adapter(model, AdaptationConfig(), buffer, 0.0).adapt(F.mse_loss, data)
    assert len(asked) == 3, "with weight 0 it is not asked either"


FOUND = {"states": torch.zeros(2, 4), "targets": torch.zeros(2, 1)}


@pytest.mark.parametrize(
    ("found", "error", "text"),
    [
        ([1], TypeError, "the retriever must return a dict with states and targets, or None, got list"),
        ({"states": torch.zeros(2, 4)}, TypeError, "the retriever must return a dict with states and targets"),
        ({"states": 1, "targets": 1}, TypeError, "the retriever's states must be a torch.Tensor, got int"),
        ({"states": torch.zeros(2, 4), "targets": torch.zeros(3, 1)}, ValueError, "the retriever's targets have shape"),
        ({**FOUND, "weights": [1.0, 1.0]}, TypeError, "the retriever's weights must be a torch.Tensor, got list"),
        (
            {**FOUND, "weights": torch.ones(2).double()},
            TypeError,
            "the retriever's weights must be float32, got float64",
        ),
        ({**FOUND, "weights": torch.ones(3)}, ValueError, "the retriever's weights must have shape (2,), got (3,)"),
        (
            {**FOUND, "weights": torch.ones(2, device="meta")},
            ValueError,
            "the retriever's weights is on meta, the model",
        ),
        (
            {**FOUND, "weights": torch.zeros(2)},
            ValueError,
            "the retriever's weights must be finite, >= 0 and not all 0",
        ),
        (
            {**FOUND, "weights": torch.tensor([2.0, -1.0])},
            ValueError,
            "the retriever's weights must be finite, >= 0 and",
        ),
        (
            {**FOUND, "weights": torch.tensor([torch.nan, 1.0])},
            ValueError,
            "the retriever's weights must be finite, >=",
        ),
        (
            {**FOUND, "weights": torch.tensor([torch.inf, 1.0])},
            ValueError,
            "the retriever's weights must be finite, >=",
        ),
        (
            {"states": torch.zeros(2, 4).double(), "targets": torch.zeros(2, 1)},
            TypeError,
            "the retriever's states must be float32, got float64",
        ),
        (
            {"states": torch.zeros(2, 4), "targets": torch.zeros(2, 1, device="meta")},
            ValueError,
            "the retriever's targets is on meta, the model is on cpu",
        ),
    ],
)
def test_adapt_wrong_result_of_the_retriever_raises(found, error, text):
    adapter = Adapter(mlp(), AdaptationConfig(), retriever=lambda *_: found)
    with pytest.raises(error, match="^Adapter.adapt: " + re.escape(text)):
        adapter.adapt(F.mse_loss, batch())


def by_the_best_fit(buffer, tasks, batch):
    """Return the loss on the batch of each past task's least-squares model."""
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
    """Return a buffer and the weights of its tasks: task i is y = w_i x, its embedding is near 10 i."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(tasks, 4, 1, generator=generator)
    buffer = ExperienceBuffer(1000, seed=0)
    for task in range(tasks):
        x = torch.randn(items, 4, generator=generator)
        embedding = 10.0 * task + torch.randn(items, 2, generator=generator)
        buffer.add(x, x @ weights[task], context_embedding=embedding, task=task)
    return buffer, weights


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapt_each_strategy_gives_its_hybrid_loss_and_lowers_the_error(strategy):
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
    if strategy == "uniform":  # the control variant: mostly other tasks' experience
        assert hybrid_error > 0.2 * plain_error
    else:
        assert hybrid_error < 0.05 * plain_error


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "uniform"])
def test_adapt_many_each_strategy_equals_adapters(strategy):
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


def spy(seen):
    def retriever(_, batch):
        seen.append(batch)
        return None

    return retriever


def test_adapt_many_entries_of_each_user_are_split_and_others_are_whole():
    seen, batch = [], users(3, 2)
    given = {
        **batch,
        "mask": torch.ones(3, 2, dtype=torch.bool),
        "context_embedding": torch.randn(3, 5),
        "task": torch.tensor([4, 7, 9]),
        "prototypes": torch.randn(3, 8),  # the same size as the number of users, by chance
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
    Adapter(mlp(), retriever=spy(seen)).adapt_many(F.mse_loss, {**users(3, 2), "task": task})
    assert [torch.as_tensor(part["task"]).tolist() for part in seen] == wanted


def test_adapt_many_per_user_names_further_entries():
    seen, batch = [], {**users(3, 2), "goal": torch.randn(3, 2), "pair": (torch.randn(3), "x")}
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
def test_adapt_many_entry_of_each_user_of_another_size_raises(change, per_user, text):
    with pytest.raises(ValueError) as info:
        Adapter(mlp(), retriever=spy([])).adapt_many(F.mse_loss, {**users(3, 2), **change}, per_user=per_user)
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
def test_adapt_many_entry_of_each_user_of_another_type_raises(change, per_user, text):
    with pytest.raises(TypeError) as info:
        Adapter(mlp(), retriever=spy([])).adapt_many(F.mse_loss, {**users(3, 2), **change}, per_user=per_user)
    assert str(info.value) == f"Adapter.adapt_many: {text}"


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda ids: range(7, 10)])
@pytest.mark.parametrize("entry", ["task", "tag"])
def test_adapt_many_sequence_of_values_gives_each_user_its_own(make, entry):
    seen = []
    batch = {**users(3, 2), entry: make([7, 8, 9])}
    Adapter(mlp(), retriever=spy(seen)).adapt_many(F.mse_loss, batch, per_user="tag" if entry == "tag" else ())
    assert [int(part[entry]) for part in seen] == [7, 8, 9]


@pytest.mark.parametrize("task", [2, np.int64(2), np.array(2), torch.tensor(2), "two"])
def test_adapt_many_single_task_goes_whole_to_every_user(task):
    seen = []
    Adapter(mlp(), retriever=spy(seen)).adapt_many(F.mse_loss, {**users(3, 2), "task": task})
    assert len(seen) == 3 and all(part["task"] is task for part in seen)
