"""The arguments of the constructor."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from adapter_data import mlp, of_user, users
from torch import nn
from torch.nn import functional as F

from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.experience import ExperienceBuffer


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"model": F.relu}, TypeError, "model must be a torch.nn.Module, got"),
        ({"cfg": {"lr": 1}}, TypeError, "cfg must be an AdaptationConfig, got dict"),
        ({"experience_buffer": []}, TypeError, "experience_buffer must be an ExperienceBuffer, got list"),
        ({"experience_weight": -0.1}, ValueError, "experience_weight must be >= 0, got -0.1"),
        ({"experience_weight": math.inf}, ValueError, "experience_weight must be finite, got inf"),
        ({"experience_weight": "1"}, TypeError, "experience_weight must be a number, got '1'"),
        ({"retriever": 1}, TypeError, "retriever must be callable, got int"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be callable, got str"),
        ({"parameters": [1]}, TypeError, "parameters must be prefixes, a pattern or a function, got [1]"),
        ({"parameters": "nowhere"}, ValueError, "parameters selects nothing from the model, which has 0.weight"),
        ({"model": nn.Tanh()}, ValueError, "parameters selects nothing from the model, which has none that require"),
    ],
)
def test_constructor_wrong_argument_raises_its_name(arguments, error, text):
    with pytest.raises(error, match="^Adapter: " + re.escape(text)):
        Adapter(**{"model": mlp(), **arguments})


def test_constructor_parameter_not_finite_raises():
    model = mlp()
    nn.init.constant_(model[2].bias, math.nan)
    with pytest.raises(ValueError, match=r"^Adapter: the parameter 2.bias is not finite$"):
        Adapter(model)


def test_adapter_numpy_numbers_adapt_as_python_numbers():
    batch, model = users(3), mlp()
    buffer = ExperienceBuffer(10, seed=0)
    buffer.add(torch.randn(10, 4), torch.randn(10, 1))
    one = Adapter(copy.deepcopy(model), AdaptationConfig(lr=np.float32(0.125)), experience_weight=np.float32(0.5))
    other = Adapter(model, AdaptationConfig(lr=0.125), experience_weight=0.5)
    assert type(one.experience_weight) is float
    assert one.adapt(F.mse_loss, of_user(batch, 0)) == other.adapt(F.mse_loss, of_user(batch, 0))
    results = [a.adapt_many(F.mse_loss, batch, None, a.history(n))[1] for a, n in ((one, np.int64(3)), (other, 3))]
    assert torch.equal(*results)
