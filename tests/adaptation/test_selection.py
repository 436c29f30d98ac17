import re

import pytest
import torch
from adapter_data import batch, mlp
from torch import nn
from torch.nn import functional as F

from eaml_ext import SSM, StreamMAML
from eaml_ext.adaptation import (
    AdaptationConfig,
    Adapter,
    last_block_parameters,
    norm_parameters,
    output_parameters,
)
from eaml_ext.nn import add_lora


def test_norm_parameters_all_kinds_of_norms_are_found_alone():
    model = nn.Sequential(
        nn.Conv1d(4, 4, 1),
        nn.BatchNorm1d(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.RMSNorm(3)),
        nn.LayerNorm(3, elementwise_affine=False),
    )
    wanted = {f"{name}.{p}" for name in ("1", "2", "3", "4.0") for p in ("weight", "bias")} | {"4.2.weight"}
    assert set(norm_parameters(model)) == wanted


def test_output_parameters_last_layer_with_parameters_is_found():
    assert output_parameters(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1, bias=False), nn.Tanh())) == [
        "2.weight"
    ]
    assert output_parameters(nn.Linear(2, 3)) == ["weight", "bias"]


@pytest.mark.parametrize("choose", [norm_parameters, output_parameters])
def test_choices_of_an_ssm_adapt_alone_and_learn(choose):
    model = SSM(3, 16, 2)
    chosen = choose(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = Adapter(model, AdaptationConfig(lr=0.1), parameters=chosen)
    batch = {"states": torch.randn(4, 9, 3), "targets": torch.randn(4, 9, 2)}
    losses = [adapter.adapt(F.mse_loss, batch) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert [name for name, p in model.named_parameters() if not torch.equal(p, before[name])] == chosen


@pytest.mark.parametrize("choose", [norm_parameters, output_parameters])
def test_choices_no_module_or_no_parameters_raise(choose):
    name = choose.__name__
    with pytest.raises(TypeError, match=re.escape(f"{name}: model must be a torch.nn.Module, got str")):
        choose("model")
    with pytest.raises(ValueError, match=f"^{name}: model has no .*, Tanh$"):
        choose(nn.Tanh())


def test_output_parameters_tied_layer_is_found_by_its_first_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert output_parameters(model) == ["0.weight", "2.bias"]
    Adapter(model, AdaptationConfig(), parameters=output_parameters(model))


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("2", {"2.weight", "2.bias"}),
        (["0.bias", "2."], {"0.bias", "2.weight", "2.bias"}),
        (re.compile("weight$"), {"0.weight", "2.weight"}),
        (lambda name, p: p.dim() == 1, {"0.bias", "2.bias"}),
    ],
)
def test_parameters_prefix_pattern_or_function_adapts_those_alone(choice, wanted):
    model = mlp()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Adapter(model, AdaptationConfig(), parameters=choice).adapt(F.mse_loss, batch())
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == wanted


def test_parameters_prefix_inside_a_name_selects_nothing():
    with pytest.raises(ValueError, match=r"^Adapter: parameters selects nothing from the model, which has head.weight"):
        Adapter(nn.ModuleDict({"head": nn.Linear(1, 1)}), parameters="hea")


def test_choices_after_add_lora_have_the_other_parameters_of_the_layers():
    model = SSM(3, 8, 2)
    before = last_block_parameters(model)
    factors = add_lora(model, "head", rank=1)
    head = ["head.bias", "head.parametrizations.weight.original", *factors]
    assert output_parameters(model) == head
    assert last_block_parameters(model) == [name for name in before if name != "head.weight"][:-1] + head
    assert StreamMAML(model, 0.1, 1e-3, chunk_size=4).fast_names == ["norm.weight", *head]
    lone = nn.Linear(3, 2)
    factors = add_lora(lone, "", rank=1)
    assert output_parameters(lone) == ["bias", "parametrizations.weight.original", *factors]
