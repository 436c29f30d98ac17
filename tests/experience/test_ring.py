"""Slots and generations of a ring, clear, and reads by task."""

import pytest
import torch
from buffer_helpers import filled, items
from hypothesis import given, settings
from hypothesis import strategies as st

from eaml_ext.experience import ExperienceBuffer


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(0, 17), min_size=1, max_size=8))
def test_add_batches_of_any_size_equal_single_adds(capacity, sizes):
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


def test_get_stale_or_wrong_indices_raises():
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


def test_tasks_and_of_task_return_ids_items_and_means():
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


def test_clear_filled_buffer_keeps_the_schema():
    buffer, data = filled()
    buffer.clear()
    assert len(buffer) == 0
    with pytest.raises(ValueError, match="state has shape"):
        buffer.add(**{**items(1), "state": torch.zeros(1, 5)})
    buffer.add(**data)
    assert len(buffer) == 20


def test_task_embeddings_float16_mean_does_not_overflow():
    buffer = ExperienceBuffer(1000, state_dim=1, action_dim=1)
    embeddings = torch.full((1000, 4), 100.0, dtype=torch.float16)
    buffer.add(state=torch.zeros(1000, 1), action=torch.zeros(1000, 1), context_embedding=embeddings, task=3)
    assert torch.equal(buffer.task_embeddings(), torch.full((1, 4), 100.0, dtype=torch.float16))
