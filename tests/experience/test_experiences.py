"""Batches, attention and reads of the items that a search returned."""

import copy

import pytest
import torch
from buffer_helpers import filled, memory

from eaml_ext.experience import ExperienceBuffer, Experiences


def test_batch_names_and_functions_select_and_concatenate():
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


def test_experiences_of_a_search_are_a_sequence_of_items():
    buffer, _ = filled()
    found = buffer.retrieve(torch.zeros(3), 5)
    listed = list(found)
    assert len(found) == len(listed) == 5 and isinstance(listed[0], Experiences)
    assert torch.equal(torch.stack([e.state for e in listed]), found.state)
    assert torch.equal(found[1:3].distances, found.distances[1:3])
    assert torch.equal(copy.deepcopy(found).state, found.state)
    assert repr(found[:2]).startswith("Experiences(state (2, 4), action (2, 2)")


def test_read_attention_is_twice_differentiable():
    buffer = ExperienceBuffer(20)
    keys = torch.randn(12, 3, dtype=torch.float64)
    buffer.add(context_embedding=keys, value=torch.randn(12, 2, dtype=torch.float64))
    queries = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def read(q):
        return buffer.retrieve(q, 5).read("value", 0.8)

    assert read(queries).shape == (4, 2)
    assert torch.autograd.gradcheck(read, queries) and torch.autograd.gradgradcheck(read, queries)


def test_read_no_items_is_zero_and_wrong_values_raise():
    buffer = memory()
    nothing = buffer.retrieve(torch.zeros(2), 3, exclude_task=[0, 1, 2, 3])
    assert nothing.read("target").tolist() == [0.0]
    found = buffer.retrieve(torch.zeros(2), 3)
    assert torch.equal(found.read(lambda e: e.target * 2), 2 * found.read("target"))
    with pytest.raises(TypeError, match=r"^Experiences.read: values must be floating, got int64$"):
        found.read("task")
    with pytest.raises(ValueError, match=r"^Experiences.read: values names 'nothing', the stored fields are"):
        found.read("nothing")
    with pytest.raises(ValueError, match=r"^Experiences.attention: there are no distances, the items do not come from"):
        buffer.get_batch(3).attention()
    for temperature, error, text in (
        (0.0, ValueError, "> 0"),
        (float("inf"), ValueError, "finite"),
        ("1", TypeError, "a"),
    ):
        with pytest.raises(error, match=rf"^Experiences.attention: temperature must be {text}"):
            found.attention(temperature)
