"""The calls of ExperienceBuffer: adds of one item or many, and arguments that raise."""

import re

import numpy as np
import pytest
import torch
from buffer_helpers import filled, items, same, snapshot

from eaml_ext.experience import ExperienceBuffer


def test_add_leading_dimension_means_many_items():
    buffer = ExperienceBuffer(100, state_dim=4, action_dim=2)
    one = {name: value[0] for name, value in items(1).items()}
    buffer.add(**one)
    assert len(buffer) == 1
    buffer.add(**items(7))
    assert len(buffer) == 8
    buffer.add(**{**items(3), "task": 9, "reward": 0.5})
    assert buffer.of_task(9).reward.tolist() == [0.5] * 3


def test_add_state_sequence_has_one_embedding_and_matching_steps():
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


def test_add_pairs_by_position_stores_observation_and_target():
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


def test_add_numbers_lists_and_arrays_take_the_dtype_of_the_field():
    buffer = ExperienceBuffer(10)
    buffer.add(state=np.zeros((2, 3)), action=[0, 1], reward=1, done=False)
    got = buffer.get(torch.arange(2))
    assert [v.dtype for v in got.fields.values()] == [torch.float32, torch.int64, torch.float32, torch.bool]
    assert got.reward.tolist() == [1.0, 1.0]
    with pytest.raises(TypeError, match=r"^ExperienceBuffer.add: action has dtype float32, wanted int64$"):
        buffer.add(state=np.zeros(3), action=0.5, reward=1, done=False)


def test_add_tensors_with_graph_stores_detached_copies():
    buffer = ExperienceBuffer(10)
    x = torch.randn(3, 2, requires_grad=True)
    buffer.add(state=x * 1, context_embedding=x * 2)
    kept = buffer.get_batch(4)
    assert not kept.state.requires_grad
    before = kept.state.clone()
    buffer.add(state=torch.zeros(10, 2), context_embedding=torch.zeros(10, 2))
    assert torch.equal(kept.state, before)


def test_add_outside_inference_mode_after_first_add_inside_works():
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
def test_add_wrong_field_raises_and_modifies_nothing(change, error, text):
    buffer, _ = filled()
    before = snapshot(buffer)
    with pytest.raises(error, match="^ExperienceBuffer.add: " + re.escape(text)):
        buffer.add(**{**GOOD, **change})
    assert same(before, snapshot(buffer))


def test_add_missing_field_raises_and_modifies_nothing():
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
def test_add_wrong_first_values_raise_and_fix_no_schema(fields, error, text):
    buffer = ExperienceBuffer(10, state_dim=4, action_dim=2)
    with pytest.raises(error, match="^ExperienceBuffer.add: " + re.escape(text)):
        buffer.add(**fields)
    buffer.add(something_else=torch.zeros(3))
    assert len(buffer) == 1


def test_add_discrete_action_accepts_one_index_per_item():
    buffer = ExperienceBuffer(10, state_dim=4, action_dim=2)
    buffer.add(state=torch.zeros(3, 4), action=torch.tensor([0, 1, 1]))
    assert buffer.get_batch(2).batch(("state", "action"), "state")["states"].shape == (2, 5)


def test_reads_of_empty_buffer_or_missing_field_raise():
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
def test_init_wrong_argument_raises(arguments, error, text):
    with pytest.raises(error, match="^ExperienceBuffer: " + re.escape(text)):
        ExperienceBuffer(**{"capacity": 10, **arguments})
