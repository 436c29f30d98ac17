"""The exact search of ExperienceBuffer.retrieve, over stored and over packed keys."""

import math
import re

import pytest
import torch
from buffer_helpers import filled, memory

from eaml_ext.experience import ExperienceBuffer, Experiences


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_retrieve_any_metric_and_exclusion_is_exact(metric):
    buffer, data = filled(50, metric=metric)
    query = torch.randn(3)
    keys = data["context_embedding"].double()
    if metric == "cosine":
        distances = 1 - torch.cosine_similarity(keys, query.double().expand_as(keys))
    else:
        distances = (keys - query.double()).square().sum(1)
    for exclude in (None, 2, [0, 3], torch.tensor([4]), []):
        excluded = torch.as_tensor([] if exclude is None else exclude).flatten().long()
        allowed = distances.masked_fill(torch.isin(data["task"], excluded), torch.inf)
        got = buffer.retrieve(query_embedding=query, k=5, exclude_task=exclude)
        expected = allowed.argsort()[:5]
        assert torch.equal(got.indices, expected)
        assert torch.equal(got.state, data["state"][expected]) and torch.equal(got.task, data["task"][expected])
        torch.testing.assert_close(got.distances.double(), allowed[expected], rtol=1e-5, atol=1e-6)


def test_retrieve_after_overwriting_finds_live_items_only():
    buffer = ExperienceBuffer(4)
    buffer.add(state=torch.arange(6.0), context_embedding=torch.arange(6.0).unsqueeze(1))
    got = buffer.retrieve(torch.zeros(1), k=10)
    assert got.state.tolist() == [2, 3, 4, 5]
    assert got.indices.tolist() == [2, 3, 0, 1] and got.generations.tolist() == [0, 0, 1, 1]


def test_retrieve_several_queries_equals_one_by_one():
    buffer, _ = filled(50)
    queries = torch.randn(6, 3)
    together = buffer.retrieve(queries, 4, exclude_task=1)
    assert together.state.shape == (6, 4, 4) and together.batch()["targets"].shape == (6, 4, 4)
    for i, one in enumerate(together):
        alone = buffer.retrieve(queries[i], 4, exclude_task=1)
        assert torch.equal(one.indices, alone.indices) and torch.equal(one.distances, alone.distances)


def test_retrieve_fewer_candidates_than_k_returns_all_or_none():
    buffer, data = filled(20)
    assert len(buffer.retrieve(torch.zeros(3), 99)) == 20
    rest = buffer.retrieve(torch.zeros(3), 99, exclude_task=0)
    assert len(rest) == int((data["task"] != 0).sum()) and 0 not in rest.task.tolist()
    nothing = buffer.retrieve(torch.zeros(3), 5, exclude_task=range(5))
    assert len(nothing) == 0 and nothing.batch()["states"].shape == (0, 4) and list(nothing) == []
    assert len(buffer.retrieve(torch.zeros(2, 3), 5, exclude_task=range(5))[0]) == 0


def test_retrieve_query_with_gradient_differentiates_distances():
    buffer, data = filled()
    query = torch.randn(3, requires_grad=True)
    got = buffer.retrieve(query, 2)
    got.distances.sum().backward()
    expected = 2 * (query.detach() - data["context_embedding"][got.indices]).sum(0)
    torch.testing.assert_close(query.grad, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"query_embedding": torch.zeros(4)},
            ValueError,
            "query_embedding has shape (4,), wanted (3,) or (queries, 3)",
        ),
        ({"query_embedding": torch.zeros(1, 1, 3)}, ValueError, "query_embedding has shape (1, 1, 3), wanted (3,)"),
        ({"query_embedding": torch.zeros(3).double()}, TypeError, "query_embedding must be float32, got float64"),
        ({"query_embedding": torch.zeros(3, device="meta")}, ValueError, "query_embedding is on meta, the buffer is"),
        ({"query_embedding": torch.tensor([0.0, torch.inf, 0.0])}, ValueError, "query_embedding must be finite"),
        ({"query_embedding": [0.0, 0.0, 0.0]}, TypeError, "query_embedding must be a torch.Tensor, got list"),
        ({"k": 0}, ValueError, "k must be > 0, got 0"),
        ({"k": 2.0}, TypeError, "k must be an integer, got 2.0"),
        ({"exclude_task": 0.5}, TypeError, "exclude_task must be an integer or a list or tensor of them, got 0.5"),
        ({"exclude_task": "a"}, TypeError, "exclude_task must be an integer or a list or tensor of them, got 'a'"),
        (
            {"exclude_task": torch.tensor([1], device="meta")},
            ValueError,
            "exclude_task is on meta, the buffer is on cpu",
        ),
    ],
)
def test_retrieve_wrong_argument_raises(arguments, error, text):
    buffer, _ = filled()
    with pytest.raises(error, match="^ExperienceBuffer.retrieve: " + re.escape(text)):
        buffer.retrieve(**{"query_embedding": torch.zeros(3), "k": 2, **arguments})


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("weighted", [False, True])
def test_search_packed_keys_equals_stored_keys(metric, weighted, monkeypatch):
    """The buffers are filled, overwritten and cleared, priorities change, and tasks are excluded."""
    dim, capacity = 16, 4096  # large enough to be packed
    draw = torch.Generator().manual_seed(0)

    def history(buffer: ExperienceBuffer) -> list[Experiences]:
        found, items = [], torch.Generator().manual_seed(1)
        for round_ in range(9):
            count = (700, 1, 3000, 2500, 64, 5000, 10, 0, 900)[round_]
            if round_ == 7:
                buffer.clear()
            fields = {"priority": torch.rand(count, generator=items) + 0.1} if weighted else {}
            if count:
                embedding = torch.randn(count, dim, generator=items)
                buffer.add(state=embedding[:, :2], context_embedding=embedding, task=torch.arange(count) % 5, **fields)
            if weighted and round_ == 4:
                batch = buffer.get_batch(50)
                buffer.set_priority(batch.indices, torch.rand(50, generator=items) + 0.1, batch.generations)
            if len(buffer):
                found.append(buffer.retrieve(queries, k=7, exclude_task=None if round_ % 2 else 3))
        return found

    queries = torch.randn(5, dim, generator=draw)
    packed = ExperienceBuffer(capacity, metric=metric, seed=0)
    results = history(packed)
    assert packed._index._packed is not None
    monkeypatch.setattr("eaml_ext.experience._index._MIN_PACKED", math.inf)
    stored = ExperienceBuffer(capacity, metric=metric, seed=0)
    for got, want in zip(results, history(stored), strict=True):
        assert torch.equal(got.indices, want.indices) and torch.equal(got.generations, want.generations)
        assert torch.equal(got.distances, want.distances)
    assert stored._index._packed is None


def test_retrieve_packed_memory_after_clear_finds_new_items_only():
    buffer = ExperienceBuffer(4096, seed=0)  # large enough to be packed
    old = torch.randn(700, 16)
    buffer.add(state=old, context_embedding=old)
    buffer.retrieve(torch.zeros(16), 3)
    buffer.clear()
    new = 10 + torch.randn(5, 16)
    buffer.add(state=new, context_embedding=new)
    found = buffer.retrieve(torch.zeros(16), 9)
    assert sorted(found.indices.tolist()) == list(range(5))
    assert torch.equal(found.state, new[found.indices])


def test_retrieve_among_slots_searches_only_these():
    buffer = memory()
    query = torch.tensor([1.9, 0.0])
    among = torch.tensor([3, 17, 7, 99, -1, 12])  # of tasks 0, 3, 1, none, none, 2
    found = buffer.retrieve(query, 10, among=among)
    assert found.indices.tolist() == [12, 7, 17, 3] and found.task.tolist() == [2, 1, 3, 0]
    assert buffer.retrieve(query, 10, 2, among=among).indices.tolist() == [7, 17, 3]
    assert len(buffer.retrieve(query, 10, among=among[:0])) == 0
    for bad, error, text in (
        ([1], TypeError, "among must be a torch.Tensor, got list"),
        (torch.zeros(2), TypeError, "among must be int64, got float32"),
        (torch.zeros(2, 2).long(), ValueError, r"among must have shape \(n,\), got \(2, 2\)"),
        (torch.zeros(2, device="meta").long(), ValueError, "among is on meta, the buffer is on cpu"),
    ):
        with pytest.raises(error, match=f"^ExperienceBuffer.retrieve: {text}"):
            buffer.retrieve(query, 10, among=bad)
