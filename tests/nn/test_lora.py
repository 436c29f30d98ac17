"""Low-rank factors: no change at the start, adaptation of the factors alone, merged weights."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from eaml_ext import SSM, AdaptationConfig, Adapter, StreamMAML
from eaml_ext.nn import LORA_FACTORS, add_lora, merge_lora


@pytest.mark.parametrize("core", ["s6", "mamba", "s5"])
def test_add_lora_outputs_are_unchanged_until_the_factors_move(core):
    torch.manual_seed(0)
    model, x = SSM(3, 8, 2, core=core), torch.randn(2, 9, 3)
    before = model(x).detach()
    names = add_lora(model, ["cores", "head"], rank=2)
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    assert set(names) == {n for n, _ in model.named_parameters() if LORA_FACTORS.search(n)}
    adapter = Adapter(model, AdaptationConfig(lr=0.5), parameters=LORA_FACTORS)
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = [adapter.adapt(mse_loss, {"states": x, "targets": torch.ones(2, 9, 2)}) for _ in range(10)]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, original[n])}
    assert losses[-1] < losses[0] and moved and moved <= set(names)


def test_merge_lora_keeps_outputs_and_restores_names():
    torch.manual_seed(0)
    model = SSM(3, 8, 2)
    names, x = list(model.state_dict()), torch.randn(2, 9, 3)
    for name in add_lora(model, "head", rank=1, scale=0.5):
        nn.init.normal_(model.get_parameter(name))
    wanted = model(x).detach()
    merge_lora(model)
    assert set(model.state_dict()) == set(names)
    torch.testing.assert_close(model(x).detach(), wanted)


def test_stream_maml_factors_are_the_fast_weights():
    torch.manual_seed(0)
    model = SSM(3, 8, 3).double()
    names = add_lora(model, ["head", "cores"], rank=1)
    for name in names:
        nn.init.normal_(model.get_parameter(name), std=0.3)
    x = torch.randn(2, 13, 3, dtype=torch.float64)
    other = copy.deepcopy(model)
    losses = []
    for m, memory in ((model, "recompute"), (other, "reverse_over_reverse")):
        maml = StreamMAML(m, 0.1, 1e-2, chunk_size=4, parameters=LORA_FACTORS, memory=memory)
        assert maml.fast_names == [n for n, _ in m.named_parameters() if n in names]
        losses.append([maml.meta_update(x[:, :-1], x[:, 1:], mse_loss) for _ in range(2)])
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    assert losses[0][1] < losses[0][0]


def test_merge_lora_tied_weight_keeps_outputs():
    """The sum must not reach the embedding, nor another layer of the same weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    model[1].weight = model[2].weight = model[0].weight
    for name in add_lora(model, ["1", "2"], rank=1):
        nn.init.normal_(model.get_parameter(name))
    x = torch.arange(5)
    wanted, embedding = model(x).detach(), model[0].weight.clone()
    merge_lora(model)
    torch.testing.assert_close(model(x).detach(), wanted)
    assert torch.equal(model[0].weight, embedding)


def test_add_lora_names_of_a_lone_layer_and_of_a_shared_one_exist():
    shared = nn.Linear(3, 3)
    for model, layer in ((nn.Linear(3, 3), ""), (nn.Sequential(shared, shared), "1")):
        names = add_lora(model, layer, rank=1)
        assert names == [n for n, _ in model.named_parameters() if n.endswith(("lora_A", "lora_B"))]


@pytest.mark.parametrize(
    ("layers", "scale", "error", "text"),
    [
        (3, 1.0, TypeError, "add_lora: layers must be a name of a layer or several, got 3"),
        ([], 1.0, TypeError, "add_lora: layers must be a name of a layer or several, got []"),
        ("head", float("nan"), ValueError, "add_lora: scale must be finite, got nan"),
    ],
)
def test_add_lora_wrong_kinds_raise(layers, scale, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        add_lora(SSM(3, 8, 2), layers, 1, scale)


@pytest.mark.parametrize(
    ("layers", "rank", "text"),
    [
        ("absent", 1, "add_lora: layers must name linear layers of the model, got 'absent', which is none"),
        ("norm", 1, "add_lora: layers must name linear layers of the model, got 'norm', which is RMSNorm"),
        ("head", 0, "add_lora: rank must be"),
    ],
)
def test_add_lora_wrong_arguments_raise(layers, rank, text):
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        add_lora(SSM(3, 8, 2), layers, rank)


def test_add_lora_twice_raises_and_changes_nothing():
    model = SSM(3, 8, 2)
    add_lora(model, "head", 1)
    with pytest.raises(ValueError, match=r"^add_lora: head has a parametrization already"):
        add_lora(model, ["embed", "head"], 1)
    assert not hasattr(model.embed, "parametrizations")
