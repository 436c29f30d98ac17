"""Snapshots, saved states and copies of an Adapter, and a state that version 0.1 wrote."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from adapter_data import Stream, batch, mlp, vector
from torch import nn
from torch.nn import functional as F

from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.checkpoint import load_state
from eaml_ext.experience import ExperienceBuffer


def test_reset_after_calls_returns_to_the_snapshot():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    adapter = Adapter(model, AdaptationConfig(), optimizer=torch.optim.Adam)
    start = copy.deepcopy(model.state_dict())
    data = [batch() for _ in range(5)]
    first = [adapter.adapt(F.mse_loss, d) for d in data]
    adapter.reset()
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    assert [adapter.adapt(F.mse_loss, d) for d in data] == first
    adapter.snapshot()
    here = vector(model)
    adapter.adapt(F.mse_loss, batch())
    adapter.reset()
    assert torch.equal(vector(model), here) and torch.equal(vector(adapter.ema_model()), here)
    assert (adapter.last_steps, adapter.rollbacks) == (0, 0)


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
def test_load_state_dict_saved_state_continues_exactly(optimizer):
    stream = Stream()
    model = mlp()
    adapter = Adapter(model, AdaptationConfig(), optimizer=optimizer)
    for _ in range(15):
        adapter.adapt(F.mse_loss, stream.batch())
    other_model = mlp()
    other = Adapter(other_model, AdaptationConfig(), optimizer=optimizer)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(adapter.state_dict()))
    for scale in (1.0, 1.0, -1e4, 1.0):
        data = stream.batch(scale)
        assert adapter.adapt(F.mse_loss, data) == other.adapt(F.mse_loss, data)
    assert adapter.rollbacks == other.rollbacks == 1
    assert torch.equal(vector(model), vector(other_model))
    for a in (adapter, other):
        a.reset()
    assert torch.equal(vector(model), vector(other_model))


def test_load_state_dict_wrong_state_raises():
    adapter = Adapter(mlp())
    state = adapter.state_dict()
    cases = [
        ({}, "state must be a dict with the entries average"),
        ({**state, "average": {}}, "average has , wanted 0.weight"),
        (
            {**state, "snapshot": Adapter(mlp(5)).state_dict()["snapshot"]},
            "snapshot of 0.weight must have shape (16, 4)",
        ),
        (Adapter(mlp(), optimizer=torch.optim.Adam).state_dict(), "one of the state and the adapter has an optimizer"),
        (
            {**state, "snapshot_buffers": [torch.ones(2)]},
            "snapshot_buffers has the shapes [(2,)], the model's buffers []",
        ),
        (
            {**state, "statistics": {"mean": 1.0}},
            "statistics must be a dict with the entries consecutive_spikes, count, ema_sq_dev",
        ),
    ]
    for bad, text in cases:
        with pytest.raises(ValueError, match="^Adapter.load_state_dict: " + re.escape(text)):
            adapter.load_state_dict(bad)


def test_deepcopy_adapter_leaves_the_original_unchanged():
    model = mlp()
    adapter = Adapter(model, AdaptationConfig(), ExperienceBuffer(10), optimizer=torch.optim.Adam)
    other = copy.deepcopy(adapter)
    before = vector(model)
    other.adapt(F.mse_loss, batch())
    assert torch.equal(vector(model), before) and not torch.equal(vector(other.model), before)


def _saved(adapter):
    file = io.BytesIO()
    torch.save(adapter, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [lambda a: pickle.loads(pickle.dumps(a)), copy.deepcopy, _saved])
@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
def test_copies_of_an_adapter_take_the_same_steps(copied, optimizer):
    adapter, data = Adapter(mlp(), AdaptationConfig(lr=0.1), optimizer=optimizer), batch()
    adapter.adapt(F.mse_loss, data)
    twin = copied(adapter)
    values = [adapter.adapt(F.mse_loss, data) for _ in range(3)]
    assert [twin.adapt(F.mse_loss, data) for _ in range(3)] == values and len(set(values)) == 3
    assert torch.equal(vector(twin.model), vector(adapter.model)) and twin.model is not adapter.model


def test_load_state_dict_file_of_0_1_continues_exactly():
    """The file holds an Adapter with Adam after 18 calls, the last of which began with a spike, and four more calls."""
    file = load_state(Path(__file__).parent / "files_of_0_1" / "adapter.safetensors", kind="adapter")
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    adapter = Adapter(model, AdaptationConfig(lr=0.01, ema_decay=0.9), optimizer=torch.optim.Adam)
    model.load_state_dict(file["model"])
    assert set(file["adapter"]["statistics"]) == {"count", "mean", "scatter", "strange", "early"}
    adapter.load_state_dict(file["adapter"])
    assert adapter.rollbacks == 2 and adapter.state_dict()["statistics"]["consecutive_spikes"] == 1
    # The second of these calls begins with the third spike in a row, so it is accepted.
    losses = [adapter.adapt(F.mse_loss, data) for data in file["batches"]]
    assert losses == pytest.approx(file["losses"], rel=1e-4)
    assert (adapter.last_steps, adapter.rollbacks) == (file["last_steps"], file["rollbacks"]) == (5, 3)
    adapter.load_state_dict(adapter.state_dict())
