import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from eaml_ext.adaptation import AdaptationConfig, Adapter


def test_config_fields_are_six_with_these_defaults():
    names = [field.name for field in dataclasses.fields(AdaptationConfig)]
    assert names == [
        "lr",
        "grad_clip_norm",
        "trust_region_eps",
        "ema_decay",
        "entropy_weight",
        "max_steps_per_call",
    ]
    assert dataclasses.astuple(AdaptationConfig()) == (0.01, 1.0, 0.1, 0.99, 0.0, 5)
    assert AdaptationConfig(0.01, 1.0, 0.01, 0.99, 0.01, 5).entropy_weight == 0.01


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_config_guard_none_or_zero_is_accepted(off):
    AdaptationConfig(grad_clip_norm=off, trust_region_eps=off, ema_decay=off, entropy_weight=off)


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("lr", 0, ValueError, "lr must be > 0 and finite, got 0"),
        ("lr", float("inf"), ValueError, "lr must be > 0 and finite, got inf"),
        ("lr", None, TypeError, "lr must be a number, got None"),
        ("lr", "0.1", TypeError, "lr must be a number, got '0.1'"),
        ("grad_clip_norm", -1.0, ValueError, "grad_clip_norm must be >= 0 and finite, got -1.0"),
        ("trust_region_eps", float("nan"), ValueError, "trust_region_eps must be >= 0 and finite, got nan"),
        ("ema_decay", 1.0, ValueError, "ema_decay must be >= 0 and < 1, got 1.0"),
        ("ema_decay", True, TypeError, "ema_decay must be a number, got True"),
        ("entropy_weight", -0.1, ValueError, "entropy_weight must be >= 0 and finite, got -0.1"),
        ("max_steps_per_call", 0, ValueError, "max_steps_per_call must be > 0, got 0"),
        ("max_steps_per_call", 2.0, TypeError, "max_steps_per_call must be an integer, got 2.0"),
    ],
)
def test_config_wrong_value_raises_its_name(name, value, error, text):
    with pytest.raises(error, match="^AdaptationConfig: " + re.escape(text)):
        AdaptationConfig(**{name: value})
    with pytest.raises(error, match="^AdaptationConfig: " + re.escape(text)):
        dataclasses.replace(AdaptationConfig(), **{name: value})


def test_config_numpy_numbers_become_python_numbers():
    values = {"lr": np.float32(0.25), "grad_clip_norm": np.float64(0.5), "trust_region_eps": np.int64(1)}
    values |= {"ema_decay": np.float16(0.5), "entropy_weight": np.float32(0.125), "max_steps_per_call": np.int32(3)}
    cfg = AdaptationConfig(**values)
    plain = AdaptationConfig(0.25, 0.5, 1, 0.5, 0.125, 3)
    assert cfg == plain and json.dumps(vars(cfg)) == json.dumps(vars(plain))
    for name, value in vars(cfg).items():
        assert type(value) is type(getattr(plain, name)), name
    for name in values:
        for bad in (np.bool_(True), "1", np.array([0.1, 0.2])):
            with pytest.raises(TypeError, match=f"^AdaptationConfig: {name} must be a"):
                AdaptationConfig(**{name: bad})
        with pytest.raises(ValueError, match=f"^AdaptationConfig: {name} must be"):
            AdaptationConfig(**{name: np.float32(-1) if name != "max_steps_per_call" else np.int64(0)})


def test_config_integers_become_floats_and_adapt():
    cfg = AdaptationConfig(lr=1, grad_clip_norm=1, trust_region_eps=1, ema_decay=0, entropy_weight=0)
    assert all(type(value) is float for value in (cfg.lr, cfg.grad_clip_norm, cfg.trust_region_eps, cfg.ema_decay))
    adapter, x = Adapter(nn.Linear(4, 1), cfg), torch.randn(2, 8, 4)
    assert math.isfinite(adapter.adapt(mse_loss, {"states": x[0], "targets": x[0, :, :1]}))
    _, losses = adapter.adapt_many(mse_loss, {"states": x, "targets": x[..., :1]}, history=adapter.history(2))
    assert losses.isfinite().all()
