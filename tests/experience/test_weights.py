"""Priority and age: a log-weight in every search, the odds of weighted draws."""

import copy
import math
import re

import pytest
import torch

from eaml_ext.experience import ExperienceBuffer


def log_weights(buffer, priority):
    """Return the log-weights of a full ring in memory by their definition: float64, by slot."""
    slots = torch.arange(len(buffer))
    numbers = buffer.get(slots).generations * buffer.capacity + slots
    age = numbers.max() - numbers
    weights = torch.zeros(len(buffer), dtype=torch.float64)
    if priority is not None:
        weights += priority.double().log()
    if buffer.age_half_life is not None:
        weights -= math.log(2) * age / buffer.age_half_life
    return weights


def filled(n, capacity=50, priority=True, **options):
    buffer = ExperienceBuffer(capacity, seed=0, **options)
    for start in range(0, n, 7):
        count = min(7, n - start)
        fields = {"state": torch.arange(float(start), start + count), "context_embedding": torch.randn(count, 3)}
        if priority:
            fields["priority"] = torch.rand(count) + 0.01
        buffer.add(**fields)
    return buffer


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("half_life", [None, 20.0, 0.5])
@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("n", [30, 50, 91, 260])  # with 260 items the origin of age has moved
def test_retrieve_weighted_subtracts_the_log_weight(metric, half_life, priority, n):
    buffer = filled(n, priority=priority, metric=metric, age_half_life=half_life)
    everything = buffer.get(torch.arange(len(buffer)))
    keys, query = everything.context_embedding.double(), torch.randn(3)
    if metric == "cosine":
        distances = 1 - torch.cosine_similarity(keys, query.double().expand_as(keys))
    else:
        distances = (keys - query.double()).square().sum(1)
    distances = distances - log_weights(buffer, everything.priority if priority else None)
    found = buffer.retrieve(query, 8)
    assert torch.equal(found.indices, distances.argsort()[:8])
    torch.testing.assert_close(found.distances.double(), distances[found.indices], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("half_life", "priority"), [(None, True), (9.0, False), (9.0, True)])
def test_get_batch_weighted_follows_the_weights(half_life, priority):
    buffer = filled(91, age_half_life=half_life, priority=priority)
    weights = log_weights(buffer, buffer.get(torch.arange(50)).priority if priority else None).exp()
    wanted = weights / weights.sum()
    n = 200_000
    counts = torch.bincount(buffer.get_batch(n, weighted=True).indices, minlength=50).double()
    deviation = (counts - n * wanted) / (n * wanted * (1 - wanted)).sqrt()
    assert deviation.abs().max() < 5
    uniform = torch.bincount(buffer.get_batch(n).indices, minlength=50).double()
    assert ((uniform - n / 50) / math.sqrt(n / 50)).abs().max() < 5


def test_get_batch_extreme_weights_draws_in_proportion():
    buffer = ExperienceBuffer(3, seed=0)
    buffer.add(state=torch.arange(3.0).unsqueeze(1), priority=torch.tensor([1e-300, 1e300, 1e300], dtype=torch.float64))
    counts = torch.bincount(buffer.get_batch(10_000, weighted=True).indices, minlength=3)
    assert counts[0] == 0 and abs(int(counts[1]) - 5000) < 300
    ancient = filled(50, age_half_life=1e-3, priority=False)
    assert ancient.get_batch(100, weighted=True).indices.unique().tolist() == [49]
    assert ancient.retrieve(torch.zeros(3), 3).indices.tolist() == [49, 48, 47]


def test_set_priority_higher_value_brings_the_item_nearer():
    buffer = ExperienceBuffer(10)
    buffer.add(state=torch.arange(3.0), context_embedding=torch.tensor([[0.0], [1.0], [2.0]]), priority=[1.0, 1.0, 1.0])
    assert buffer.retrieve(torch.zeros(1), 3).state.tolist() == [0, 1, 2]
    changed = buffer.set_priority(torch.tensor([2]), torch.tensor([math.exp(4.5)]))
    assert changed.tolist() == [True]
    found = buffer.retrieve(torch.zeros(1), 3)
    assert found.state.tolist() == [2, 0, 1]
    torch.testing.assert_close(found.distances, torch.tensor([-0.5, 0.0, 1.0]), rtol=0, atol=1e-6)
    assert buffer.get(torch.tensor([2])).priority.tolist() == pytest.approx([math.exp(4.5)])
    buffer.set_priority(torch.tensor([[0, 1], [1, 2]]), 1.0)
    assert buffer.retrieve(torch.zeros(1), 3).state.tolist() == [0, 1, 2]


def test_set_priority_overwritten_items_are_left_unchanged():
    buffer = filled(50)
    seen = buffer.get(torch.arange(50))
    buffer.add(state=torch.zeros(20), context_embedding=torch.zeros(20, 3), priority=torch.ones(20))
    changed = buffer.set_priority(seen.indices, torch.full((50,), 5.0), seen.generations)
    assert changed.tolist() == [False] * 20 + [True] * 30
    assert buffer.get(torch.arange(50)).priority.tolist() == [1.0] * 20 + [5.0] * 30
    again = copy.deepcopy(buffer)  # its index is made from the stored items
    query = torch.randn(3)
    assert torch.equal(buffer.retrieve(query, 50).indices, again.retrieve(query, 50).indices)


def test_retrieve_after_overwriting_equals_a_fresh_copy_bit_by_bit():
    buffer = filled(50, age_half_life=10.0)
    query = torch.randn(3)
    for _ in range(30):
        buffer.add(state=torch.zeros(9), context_embedding=torch.randn(9, 3), priority=torch.rand(9) + 0.1)
        fresh = copy.deepcopy(buffer)
        ours, theirs = buffer.retrieve(query, 20), fresh.retrieve(query, 20)
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.distances, theirs.distances)


def test_retrieve_weighted_query_gradient_ignores_the_bias():
    buffer = filled(50, age_half_life=10.0)
    query = torch.randn(3, requires_grad=True)
    found = buffer.retrieve(query, 4)
    found.distances.sum().backward()
    torch.testing.assert_close(query.grad, 2 * (query.detach() - found.context_embedding).sum(0))


STORED = {"state": torch.zeros(2), "context_embedding": torch.zeros(2, 3), "priority": torch.ones(2)}


@pytest.mark.parametrize(
    ("priority", "error", "text"),
    [
        (torch.tensor([1.0, 0.0]), ValueError, "priority must be > 0, got 0.0"),
        (torch.tensor([1.0, -1.0]), ValueError, "priority must be > 0, got -1.0"),
        (torch.tensor([1.0, torch.nan]), ValueError, "priority must be finite, a weight"),
        (torch.tensor([torch.inf, 1.0]), ValueError, "priority must be finite, a weight"),
        (torch.ones(2, 1), ValueError, "priority has shape (2, 1), wanted (2,)"),
        (torch.ones(2, dtype=torch.float64), TypeError, "priority has dtype float64, wanted float32"),
        ("high", TypeError, "priority must be a tensor, an array or a number, got str"),
    ],
)
def test_add_wrong_priority_raises_and_modifies_nothing(priority, error, text):
    buffer = filled(20)
    before = copy.deepcopy(buffer.state_dict())
    with pytest.raises(error, match="^ExperienceBuffer.add: " + re.escape(text)):
        buffer.add(**{**STORED, "priority": priority})
    after = buffer.state_dict()
    assert all(torch.equal(before["fields"][name], value) for name, value in after["fields"].items())
    assert before["written"] == after["written"]


@pytest.mark.parametrize(
    ("priority", "error", "text"),
    [
        (torch.ones(2, 1), ValueError, "priority has shape (1,) per item, wanted () (one number)"),
        (torch.ones(2, dtype=torch.int64), TypeError, "priority has dtype int64, wanted a floating one"),
        (torch.tensor([0.0, 1.0]), ValueError, "priority must be > 0, got 0.0"),
    ],
)
def test_first_add_wrong_priority_raises(priority, error, text):
    buffer = ExperienceBuffer(10)
    with pytest.raises(error, match="^ExperienceBuffer.add: " + re.escape(text)):
        buffer.add(**{**STORED, "priority": priority})
    assert len(buffer) == 0 and repr(buffer).startswith("ExperienceBuffer(0 of 10, metric")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"indices": [0]}, TypeError, "indices must be a torch.Tensor, got list"),
        ({"indices": torch.tensor([0, 20])}, ValueError, "1 of 2 indices are stale or out of range"),
        ({"indices": torch.tensor([0, -1])}, ValueError, "1 of 2 indices are stale or out of range"),
        ({"indices": torch.zeros(2, dtype=torch.int32)}, TypeError, "indices must be int64, got int32"),
        ({"priority": torch.ones(3)}, ValueError, "priority has shape (3,), wanted (2,) or one number"),
        ({"priority": torch.tensor([1.0, 0.0])}, ValueError, "priority must be > 0, got 0.0"),
        ({"priority": torch.nan}, ValueError, "priority must be finite"),
        ({"priority": torch.ones(2).double()}, TypeError, "priority has dtype float64, wanted float32"),
        ({"priority": None}, TypeError, "priority must be a tensor, an array or a number, got NoneType"),
        ({"generations": torch.zeros(3).long()}, ValueError, "generations has shape (3,), wanted (2,)"),
        ({"generations": 0}, TypeError, "generations must be a torch.Tensor, got int"),
    ],
)
def test_set_priority_wrong_argument_raises_and_modifies_nothing(arguments, error, text):
    buffer = filled(20)
    before = buffer.get(torch.arange(20)).priority
    with pytest.raises(error, match="^ExperienceBuffer.set_priority: " + re.escape(text)):
        buffer.set_priority(**{"indices": torch.tensor([0, 1]), "priority": 1.0, **arguments})
    assert torch.equal(before, buffer.get(torch.arange(20)).priority)


def test_weighted_calls_without_weights_raise():
    buffer = filled(20, priority=False)
    with pytest.raises(
        ValueError, match=r"^ExperienceBuffer.get_batch: weighted draws need a field priority or an age"
    ):
        buffer.get_batch(3, weighted=True)
    with pytest.raises(TypeError, match=r"^ExperienceBuffer.get_batch: weighted must be True or False, got int"):
        buffer.get_batch(3, weighted=1)
    with pytest.raises(ValueError, match=r"^ExperienceBuffer.set_priority: the buffer stores no priority, only state"):
        buffer.set_priority(torch.tensor([0]), 1.0)
    with pytest.raises(ValueError, match=r"^ExperienceBuffer.set_priority: the buffer is empty$"):
        ExperienceBuffer(3).set_priority(torch.tensor([0]), 1.0)


@pytest.mark.parametrize(
    ("half_life", "error", "text"),
    [
        (0, ValueError, "age_half_life must be > 0, got 0"),
        (math.nan, ValueError, "age_half_life must be > 0, got nan"),
        (math.inf, ValueError, "age_half_life must be finite, or None for no ageing, got inf"),
        ("1", TypeError, "age_half_life must be a number, got '1'"),
    ],
)
def test_init_wrong_age_half_life_raises(half_life, error, text):
    with pytest.raises(error, match="^ExperienceBuffer: " + re.escape(text)):
        ExperienceBuffer(10, age_half_life=half_life)


def test_add_float64_priorities_are_stored_exactly():
    buffer = ExperienceBuffer(8)
    for value in (4.0, 0.25):
        one = {"context_embedding": torch.zeros(3, 2), "priority": torch.full((3,), value, dtype=torch.float64)}
        buffer.add(state=torch.zeros(3, 2), **one)
    assert buffer.get(torch.arange(6)).priority.tolist() == [4.0] * 3 + [0.25] * 3
