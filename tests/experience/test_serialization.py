"""Buffers restored from a state dict, a file, a pickle or a deep copy."""

import copy
import pickle

import pytest
import torch
from buffer_helpers import filled, items, same, snapshot

from eaml_ext.experience import ExperienceBuffer


@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_restored_buffer_answers_as_the_original(way, tmp_path):
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


def test_load_empty_or_cleared_buffer_is_empty(tmp_path):
    for buffer in (ExperienceBuffer(5), filled()[0]):
        buffer.clear()
        buffer.save(tmp_path / "buffer.safetensors")
        other = ExperienceBuffer.load(tmp_path / "buffer.safetensors")
        assert len(other) == 0 and repr(other) == repr(buffer)


def test_load_state_dict_wrong_state_raises_and_modifies_nothing():
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


def test_pickle_holds_no_tensor_and_keeps_every_dtype():
    """A tensor in a pickle for a spawned process would share memory by a file that must stay open until the start."""
    buffer = ExperienceBuffer(4, seed=0)
    dtypes = (torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.complex128)
    fields = {str(dtype).split(".")[1]: torch.arange(6).view(3, 2).to(dtype) for dtype in dtypes}
    buffer.add(**fields, generator=torch.arange(3), nothing=torch.zeros(3, 0), number=torch.arange(3))

    def leaves(value):
        if isinstance(value, dict):
            value = list(value.values())
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else [value]

    assert not [leaf for leaf in leaves(buffer.__getstate__()) if isinstance(leaf, torch.Tensor)]
    other = pickle.loads(pickle.dumps(buffer))
    wanted, got = (b.get(torch.arange(3)).fields for b in (buffer, other))
    assert got.keys() == wanted.keys()
    assert all(got[n].dtype == value.dtype and torch.equal(got[n], value) for n, value in wanted.items())
    other.add(**{name: value[0] for name, value in wanted.items()})
    assert len(other) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"])
def test_copy_of_cleared_buffer_or_field_without_numbers_keeps_the_schema(copied):
    for item, clear in (
        ({"state": torch.ones(3, 4)}, True),
        ({"state": torch.ones(3, 4), "none": torch.ones(3, 0)}, False),
    ):
        buffer = ExperienceBuffer(10)
        buffer.add(**item)
        if clear:
            buffer.clear()
        other = copied(buffer)
        assert len(other) == len(buffer)
        with pytest.raises(ValueError, match="state"):
            other.add(state=torch.ones(3, 5), **{name: item[name] for name in item if name != "state"})
        other.add(**item)
        assert len(other) == len(buffer) + 3 and torch.equal(other.get_batch(2).state, torch.ones(2, 4))
