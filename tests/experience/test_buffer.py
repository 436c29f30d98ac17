import copy
import math
import pickle
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eaml_ext.experience import ExperienceBuffer, Experiences


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def items(n, time=None, dim=3):
    lead = (n,) if time is None else (n, time)
    return {
        "state": torch.randn(*lead, 4),
        "action": torch.randn(*lead, 2),
        "reward": torch.randn(*lead),
        "context_embedding": torch.randn(n, dim),
        "next_state": torch.randn(*lead, 4),
        "task": torch.randint(0, 5, (n,)),
    }


def filled(n=20, capacity=100, **options):
    buffer = ExperienceBuffer(capacity, state_dim=4, action_dim=2, seed=0, **options)
    data = items(n)
    buffer.add(**data)
    return buffer, data


def snapshot(buffer):
    return copy.deepcopy(buffer.state_dict())


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


# ------------------------------------------------------------------------------------------------------- adding


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(0, 17), min_size=1, max_size=8))
def test_batches_equal_single_adds_on_any_ring(capacity, sizes):
    batched, single = ExperienceBuffer(capacity, seed=0), ExperienceBuffer(capacity, seed=0)
    value = 0.0
    for size in sizes:
        x = value + torch.arange(size, dtype=torch.float32).unsqueeze(1)
        value += size
        batched.add(state=x)
        for row in x:
            single.add(state=row)
    expected = torch.arange(value)[-capacity:]
    assert len(batched) == len(expected) == len(single)
    if len(expected):
        everything = torch.arange(len(batched))
        got, other = batched.get(everything), single.get(everything)
        assert torch.equal(got.state, other.state) and torch.equal(got.generations, other.generations)
        assert torch.equal(got.state.flatten().sort().values, expected)
        # Item s stands in slot s % capacity with generation s // capacity.
        assert torch.equal(got.generations * capacity + got.indices, got.state.flatten().long())


def test_one_item_or_many_is_decided_by_the_dimensions():
    buffer = ExperienceBuffer(100, state_dim=4, action_dim=2)
    one = {name: value[0] for name, value in items(1).items()}
    buffer.add(**one)
    assert len(buffer) == 1
    buffer.add(**items(7))
    assert len(buffer) == 8
    buffer.add(**{**items(3), "task": 9, "reward": 0.5})
    assert buffer.of_task(9).reward.tolist() == [0.5] * 3


def test_a_state_may_be_a_sequence_with_one_embedding():
    buffer = ExperienceBuffer(10, state_dim=4, action_dim=2)
    one = {name: value[0] for name, value in items(1, time=6).items()}
    buffer.add(**one)
    buffer.add(**items(3, time=6))
    assert len(buffer) == 4
    assert buffer.retrieve(one["context_embedding"], 1).state.shape == (1, 6, 4)
    with pytest.raises(ValueError, match=r"action has shape \(5, 2\), wanted \(6, 2\)$"):
        buffer.add(**{**one, "action": torch.zeros(5, 2)})
    with pytest.raises(ValueError, match=r"action has shape \(5, 2\) per item, wanted one per step of state"):
        ExperienceBuffer(10, 4, 2).add(**{**one, "action": torch.zeros(5, 2)})
    with pytest.raises(ValueError, match=r"reward has shape \(\) per item, wanted one per step of state"):
        ExperienceBuffer(10, 4, 2).add(**{**one, "reward": 0.0})


def test_pairs():
    buffer = ExperienceBuffer(10)
    x, y = torch.randn(6, 4), torch.randn(6, 1)
    buffer.add(x, y)
    buffer.add(torch.randn(4), torch.randn(1))
    assert len(buffer) == 7
    batch = buffer.get(torch.arange(6)).batch()
    assert torch.equal(batch["states"], x) and torch.equal(batch["targets"], y)
    with pytest.raises(TypeError, match="an observation and its target are added together"):
        buffer.add(x)
    with pytest.raises(TypeError, match="given twice"):
        buffer.add(x, y, target=y)


def test_numbers_lists_and_arrays_take_the_fields_dtype():
    buffer = ExperienceBuffer(10)
    buffer.add(state=np.zeros((2, 3)), action=[0, 1], reward=1, done=False)
    got = buffer.get(torch.arange(2))
    assert [v.dtype for v in got.fields.values()] == [torch.float32, torch.int64, torch.float32, torch.bool]
    assert got.reward.tolist() == [1.0, 1.0]
    with pytest.raises(TypeError, match=r"^ExperienceBuffer.add: action has dtype float32, wanted int64$"):
        buffer.add(state=np.zeros(3), action=0.5, reward=1, done=False)


def test_data_are_detached_copies():
    buffer = ExperienceBuffer(10)
    x = torch.randn(3, 2, requires_grad=True)
    buffer.add(state=x * 1, context_embedding=x * 2)
    kept = buffer.get_batch(4)
    assert not kept.state.requires_grad
    before = kept.state.clone()
    buffer.add(state=torch.zeros(10, 2), context_embedding=torch.zeros(10, 2))
    assert torch.equal(kept.state, before)


def test_added_under_inference_mode_then_outside():
    buffer = ExperienceBuffer(10)
    with torch.inference_mode():
        buffer.add(torch.ones(2, 3), torch.ones(2, 1))
    buffer.add(torch.ones(2, 3), torch.ones(2, 1))
    assert len(buffer) == 4


GOOD = {name: value[0] for name, value in items(1).items()}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"state": torch.zeros(3)}, ValueError, "state has shape (3,), wanted (4,)"),
        ({"state": torch.zeros(1, 1, 4)}, ValueError, "state has shape (1, 1, 4), wanted (4,)"),
        ({"action": torch.zeros(3)}, ValueError, "action has shape (3,), wanted (2,)"),
        ({"reward": torch.zeros(1)}, ValueError, "reward has shape (1,), wanted ()"),
        ({"task": torch.zeros(2, dtype=torch.int64)}, ValueError, "task has shape (2,), wanted ()"),
        (
            {"context_embedding": torch.zeros(2, 2, 3)},
            ValueError,
            "context_embedding has shape (2, 2, 3), wanted (3,) or (n, 3)",
        ),
        ({"context_embedding": torch.zeros(4)}, ValueError, "context_embedding has shape (4,), wanted (3,)"),
        ({"context_embedding": torch.tensor([0.0, torch.nan, 0.0])}, ValueError, "context_embedding must be finite"),
        ({"state": torch.zeros(4, dtype=torch.float64)}, TypeError, "state has dtype float64, wanted float32"),
        ({"task": torch.tensor(1.0)}, TypeError, "task has dtype float32, wanted int64"),
        ({"state": torch.zeros(4, device="meta")}, ValueError, "state is on meta, the buffer is on cpu"),
        ({"state": "left"}, TypeError, "state must be a tensor, an array or a number, got str"),
        ({"state": torch.zeros(4).to_sparse()}, TypeError, "state must be a dense tensor, got layout torch.sparse_coo"),
        ({"reward": None}, TypeError, "reward must be a tensor, an array or a number, got NoneType"),
        ({"extra": 1.0}, ValueError, "extra is not a field, the buffer stores state, action"),
    ],
)
def test_a_wrong_field_is_refused_by_name_and_nothing_is_modified(change, error, text):
    buffer, _ = filled()
    before = snapshot(buffer)
    with pytest.raises(error, match="^ExperienceBuffer.add: " + re.escape(text)):
        buffer.add(**{**GOOD, **change})
    assert same(before, snapshot(buffer))


def test_a_missing_field_is_refused_by_name():
    buffer, _ = filled()
    before = snapshot(buffer)
    with pytest.raises(ValueError, match=r"^ExperienceBuffer.add: reward is missing, the buffer stores state, action"):
        buffer.add(**{name: value for name, value in GOOD.items() if name != "reward"})
    assert same(before, snapshot(buffer))


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({}, TypeError, "there is nothing to add"),
        ({"state": torch.zeros(3)}, ValueError, "state has shape (3,) per item, wanted (4,) or (time, 4)"),
        ({"observation": torch.zeros(3)}, ValueError, "observation has shape (3,) per item, wanted (4,)"),
        (
            {"state": torch.zeros(4), "action": torch.zeros(3)},
            ValueError,
            "action has shape (3,) per item, wanted (2,)",
        ),
        ({"state": torch.zeros(4), "action": torch.tensor(0.5)}, ValueError, "action has shape () per item, wanted"),
        ({"state": torch.zeros(2, 4), "reward": torch.zeros(3)}, ValueError, "reward has shape (3,), wanted (2,)"),
        ({"context_embedding": torch.zeros(1, 2, 3)}, ValueError, "context_embedding has shape (2, 3) per item"),
        (
            {"context_embedding": torch.tensor([1, 2])},
            TypeError,
            "context_embedding has dtype int64, wanted a floating",
        ),
        ({"state": torch.zeros(4), "task": 0.5}, TypeError, "task must be int64, got float32"),
        (
            {"state": torch.zeros(4), "task": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "task has shape (3,) per it",
        ),
        ({"state": torch.zeros(4), "indices": 1}, ValueError, "a field cannot be called 'indices'"),
    ],
)
def test_a_wrong_first_add_leaves_the_buffer_without_a_schema(fields, error, text):
    buffer = ExperienceBuffer(10, state_dim=4, action_dim=2)
    with pytest.raises(error, match="^ExperienceBuffer.add: " + re.escape(text)):
        buffer.add(**fields)
    buffer.add(something_else=torch.zeros(3))
    assert len(buffer) == 1


def test_a_discrete_action_may_be_one_index():
    buffer = ExperienceBuffer(10, state_dim=4, action_dim=2)
    buffer.add(state=torch.zeros(3, 4), action=torch.tensor([0, 1, 1]))
    assert buffer.get_batch(2).batch(("state", "action"), "state")["states"].shape == (2, 5)


# ------------------------------------------------------------------------------------------------------ looking


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_retrieve_is_exact(metric):
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


def test_retrieve_after_the_ring_has_turned_finds_only_what_is_live():
    buffer = ExperienceBuffer(4)
    buffer.add(state=torch.arange(6.0), context_embedding=torch.arange(6.0).unsqueeze(1))
    got = buffer.retrieve(torch.zeros(1), k=10)
    assert got.state.tolist() == [2, 3, 4, 5]
    assert got.indices.tolist() == [2, 3, 0, 1] and got.generations.tolist() == [0, 0, 1, 1]


def test_several_queries_at_once_equal_one_by_one():
    buffer, _ = filled(50)
    queries = torch.randn(6, 3)
    together = buffer.retrieve(queries, 4, exclude_task=1)
    assert together.state.shape == (6, 4, 4) and together.batch()["targets"].shape == (6, 4, 4)
    for i, one in enumerate(together):
        alone = buffer.retrieve(queries[i], 4, exclude_task=1)
        assert torch.equal(one.indices, alone.indices) and torch.equal(one.distances, alone.distances)


def test_fewer_candidates_than_k_and_none_at_all():
    buffer, data = filled(20)
    assert len(buffer.retrieve(torch.zeros(3), 99)) == 20
    rest = buffer.retrieve(torch.zeros(3), 99, exclude_task=0)
    assert len(rest) == int((data["task"] != 0).sum()) and 0 not in rest.task.tolist()
    nothing = buffer.retrieve(torch.zeros(3), 5, exclude_task=range(5))
    assert len(nothing) == 0 and nothing.batch()["states"].shape == (0, 4) and list(nothing) == []
    assert len(buffer.retrieve(torch.zeros(2, 3), 5, exclude_task=range(5))[0]) == 0


def test_distances_are_differentiable_in_the_query():
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
def test_retrieve_refuses(arguments, error, text):
    buffer, _ = filled()
    with pytest.raises(error, match="^ExperienceBuffer.retrieve: " + re.escape(text)):
        buffer.retrieve(**{"query_embedding": torch.zeros(3), "k": 2, **arguments})


def test_an_empty_buffer_and_a_field_that_is_not_stored_are_said():
    empty = ExperienceBuffer(5)
    for call in (lambda: empty.retrieve(torch.zeros(3), 1), lambda: empty.get_batch(1), empty.tasks):
        with pytest.raises(ValueError, match=r"^ExperienceBuffer.\w+: the buffer is empty$"):
            call()
    empty.add(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"retrieve: the buffer stores no context_embedding, only observation, target"):
        empty.retrieve(torch.zeros(3), 1)
    with pytest.raises(ValueError, match="tasks: the buffer stores no task"):
        empty.tasks()
    with pytest.raises(AttributeError, match="there is no field 'state', the stored fields are observation, target"):
        _ = empty.get_batch(1).state


def test_get_batch_is_uniform_and_seeded():
    buffer = ExperienceBuffer(10, seed=3)
    buffer.add(state=torch.arange(17.0).unsqueeze(1))
    drawn = buffer.get_batch(20_000)
    counts = torch.bincount(drawn.state.flatten().long(), minlength=17)
    assert counts[:7].sum() == 0
    assert (counts[7:] - 2000).abs().max() < 300  # seven standard deviations
    other = ExperienceBuffer(10, seed=3)
    other.add(state=torch.arange(17.0).unsqueeze(1))
    assert torch.equal(other.get_batch(20_000).indices, drawn.indices)
    for n, error in ((0, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^ExperienceBuffer.get_batch: n must be"):
            buffer.get_batch(n)


def test_a_stale_index_is_noticed():
    buffer = ExperienceBuffer(4)
    buffer.add(state=torch.arange(4.0).unsqueeze(1))
    old = buffer.get_batch(8)
    assert buffer.is_current(old.indices, old.generations).all()
    buffer.add(state=torch.tensor([[4.0], [5.0]]))
    fresh = buffer.is_current(old.indices, old.generations)
    assert torch.equal(fresh, old.indices >= 2)
    count = int((~fresh).sum())
    assert count, "the draw must hit an overwritten slot"
    with pytest.raises(ValueError, match=rf"^ExperienceBuffer.get: {count} of 8 indices are stale or out of range$"):
        buffer.get(old.indices, old.generations)
    assert torch.equal(buffer.get(old.indices[fresh], old.generations[fresh]).state, old.state[fresh])
    buffer.clear()
    buffer.add(state=torch.arange(4.0).unsqueeze(1))
    assert not buffer.is_current(old.indices, old.generations).any()
    for bad in (torch.tensor([4]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="1 of 1 indices are stale or out of range"):
            buffer.get(bad)
    with pytest.raises(TypeError, match="indices must be int64, got int32"):
        buffer.get(torch.zeros(1, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"generations must be a torch\.Tensor, got list"):
        buffer.get(torch.tensor([0]), [0])
    with pytest.raises(ValueError, match=r"generations has shape \(2,\), wanted \(1,\)"):
        buffer.is_current(torch.tensor([0]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="indices is on meta"):
        buffer.get(torch.zeros(1, dtype=torch.int64, device="meta"))


def test_tasks():
    buffer, data = filled(40)
    ids = buffer.tasks()
    assert torch.equal(ids, data["task"].unique())
    for row, task in zip(buffer.task_embeddings(), ids.tolist(), strict=True):
        chosen = data["task"] == task
        assert torch.equal(buffer.of_task(task).state, data["state"][chosen])
        torch.testing.assert_close(row, data["context_embedding"][chosen].mean(0))
    with pytest.raises(ValueError, match="of_task: nothing is stored of task 99"):
        buffer.of_task(99)
    with pytest.raises(TypeError, match="of_task: task must be an integer, got '1'"):
        buffer.of_task("1")


def test_clear_keeps_the_schema():
    buffer, data = filled()
    buffer.clear()
    assert len(buffer) == 0
    with pytest.raises(ValueError, match="state has shape"):
        buffer.add(**{**GOOD, "state": torch.zeros(5)})
    buffer.add(**data)
    assert len(buffer) == 20


# -------------------------------------------------------------------------------------------------- experiences


def test_batch_selects_concatenates_and_calls():
    buffer, data = filled()
    everything = buffer.get(torch.arange(20))
    batch = everything.batch(states=("state", "action", "reward"), targets=lambda e: e.next_state - e.state)
    assert torch.equal(batch["states"], torch.cat([data["state"], data["action"], data["reward"].unsqueeze(1)], 1))
    assert torch.equal(batch["targets"], data["next_state"] - data["state"])
    assert torch.equal(everything.batch("state", "next_state")["targets"], everything.batch()["targets"])
    with pytest.raises(ValueError, match="batch: targets names 'goal', the stored fields are state, action"):
        everything.batch(targets="goal")
    with pytest.raises(TypeError, match=r"batch: states must return a torch.Tensor, got int"):
        everything.batch(states=lambda _: 1)
    with pytest.raises(ValueError, match=r"batch: states returned shape \(1, 4\) for \(20,\) items"):
        everything.batch(states=lambda e: e.state[:1])
    buffer = ExperienceBuffer(5)
    buffer.add(state=torch.zeros(2, 3), goal=torch.zeros(2, 3), sequence=torch.zeros(2, 6, 1))
    with pytest.raises(ValueError, match="batch: states cannot be concatenated along the last dimension: state"):
        buffer.get_batch(1).batch(("state", "sequence"), "goal")
    with pytest.raises(ValueError, match="batch: targets names 'next_state'"):
        buffer.get_batch(1).batch()


def test_experiences_are_a_sequence_of_items():
    buffer, _ = filled()
    found = buffer.retrieve(torch.zeros(3), 5)
    listed = list(found)
    assert len(found) == len(listed) == 5 and isinstance(listed[0], Experiences)
    assert torch.equal(torch.stack([e.state for e in listed]), found.state)
    assert torch.equal(found[1:3].distances, found.distances[1:3])
    assert torch.equal(copy.deepcopy(found).state, found.state)
    assert repr(found[:2]).startswith("Experiences(state (2, 4), action (2, 2)")


# ----------------------------------------------------------------------------------------------------- keeping


@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_a_kept_buffer_answers_as_the_original(way, tmp_path):
    buffer, _ = filled(130, capacity=100, metric="cosine")
    buffer.get_batch(3)
    if way == "state_dict":
        other = ExperienceBuffer(100, state_dim=4, action_dim=2, seed=5, metric="cosine")
        other.load_state_dict(buffer.state_dict())
    elif way == "file":
        buffer.save(tmp_path / "buffer.safetensors")
        other = ExperienceBuffer.load(tmp_path / "buffer.safetensors")
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(buffer))
    else:
        other = copy.deepcopy(buffer)
    assert repr(other) == repr(buffer)
    more = items(9)
    for b in (buffer, other):
        b.add(**more)
    query = torch.randn(3)
    assert torch.equal(buffer.retrieve(query, 7).indices, other.retrieve(query, 7).indices)
    a, b = buffer.get_batch(50), other.get_batch(50)
    assert torch.equal(a.state, b.state) and torch.equal(a.generations, b.generations)
    assert same(snapshot(buffer), snapshot(other))


def test_an_empty_and_a_cleared_buffer_are_kept_too(tmp_path):
    for buffer in (ExperienceBuffer(5), filled()[0]):
        buffer.clear()
        buffer.save(tmp_path / "buffer.safetensors")
        other = ExperienceBuffer.load(tmp_path / "buffer.safetensors")
        assert len(other) == 0 and repr(other) == repr(buffer)


def test_load_state_dict_refuses_and_modifies_nothing():
    buffer, _ = filled()
    before, state = snapshot(buffer), buffer.state_dict()
    cases = [
        ({}, r"state must be a dict with the entries capacity, cleared, fields, generator, written"),
        ({**state, "capacity": 7}, "the state is of capacity 7, the buffer of 100"),
        ({**state, "fields": {"state": torch.zeros(3, 4)}}, r"state has shape \(3, 4\), wanted 20 items"),
        ({**state, "fields": {"state": torch.zeros(20, 5)}}, r"state has shape \(5,\) per item, wanted \(4,\)"),
        ({**state, "generator": torch.zeros(3)}, "generator is not the state of a CPU generator"),
    ]
    for bad, text in cases:
        with pytest.raises(ValueError, match="^ExperienceBuffer.load_state_dict: " + text):
            buffer.load_state_dict(bad)
    assert same(before, snapshot(buffer))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"capacity": 0}, ValueError, "capacity must be > 0, got 0"),
        ({"capacity": 1.5}, TypeError, "capacity must be an integer, got 1.5"),
        ({"state_dim": 0}, ValueError, "state_dim must be > 0, got 0"),
        ({"action_dim": "a"}, TypeError, "action_dim must be an integer, got 'a'"),
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"metric": "l1"}, ValueError, "metric must be sqeuclidean or cosine, got 'l1'"),
        ({"device": "nowhere"}, ValueError, "device 'nowhere' cannot be used"),
    ],
)
def test_the_constructor_refuses(arguments, error, text):
    with pytest.raises(error, match="^ExperienceBuffer: " + re.escape(text)):
        ExperienceBuffer(**{"capacity": 10, **arguments})


@pytest.mark.parametrize("first", ["read", "write"])
def test_a_read_and_a_write_do_not_overlap(first):
    buffer = ExperienceBuffer(64)
    buffer.add(state=torch.zeros(64, 1))
    inner = "gather" if first == "read" else "write"
    original = getattr(buffer.storage, inner)
    done = threading.Event()

    def other():
        buffer.add(state=torch.ones(64, 1)) if first == "read" else buffer.get_batch(8)
        done.set()

    thread = threading.Thread(target=other)

    def interrupted(*arguments):
        setattr(buffer.storage, inner, original)
        thread.start()
        assert not done.wait(0.1), "the other operation ran in the middle of this one"
        return original(*arguments)

    setattr(buffer.storage, inner, interrupted)
    buffer.get_batch(8) if first == "read" else buffer.add(state=torch.ones(64, 1))
    assert done.wait(10)
    thread.join()


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("weighted", [False, True])
def test_packed_keys_find_what_stored_keys_find(metric, weighted, monkeypatch):
    """Through filling, overwriting, clearing, new priorities and exclusion."""
    dim, capacity = 16, 4096  # enough to be packed
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


def test_task_embeddings_float16_mean_does_not_overflow():
    buffer = ExperienceBuffer(1000, state_dim=1, action_dim=1)
    embeddings = torch.full((1000, 4), 100.0, dtype=torch.float16)
    buffer.add(state=torch.zeros(1000, 1), action=torch.zeros(1000, 1), context_embedding=embeddings, task=3)
    assert torch.equal(buffer.task_embeddings(), torch.full((1, 4), 100.0, dtype=torch.float16))


def test_retrieve_after_clear_of_a_packed_memory_finds_new_items_only():
    buffer = ExperienceBuffer(4096, seed=0)  # enough to be packed
    old = torch.randn(700, 16)
    buffer.add(state=old, context_embedding=old)
    buffer.retrieve(torch.zeros(16), 3)
    buffer.clear()
    new = 10 + torch.randn(5, 16)
    buffer.add(state=new, context_embedding=new)
    found = buffer.retrieve(torch.zeros(16), 9)
    assert sorted(found.indices.tolist()) == list(range(5))
    assert torch.equal(found.state, new[found.indices])
