"""nn.Mamba2 with the weights of transformers' Mamba2Mixer has its outputs and gradients, those without mamba_ssm."""

import inspect
import math

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'eaml_ext[transformers]'")

from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from eaml_ext.nn import Mamba2


def pair(**options):
    """Return a random Mamba2Mixer of transformers, 64 channels wide inside, and our layer with its weights."""
    options = {"n_groups": 1, "use_bias": False, "use_conv_bias": True, "time_step_limit": (0.0, math.inf), **options}
    config = Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, state_size=6, num_hidden_layers=1, chunk_size=5, **options
    )
    theirs = Mamba2Mixer(config, 0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = Mamba2(
        32,
        d_state=6,
        headdim=8,
        ngroups=options["n_groups"],
        bias=options["use_bias"],
        conv_bias=options["use_conv_bias"],
        dt_limit=options["time_step_limit"],
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours, config


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize(
    "options",
    [{}, {"n_groups": 2, "use_bias": True, "use_conv_bias": False}, {"time_step_limit": (0.02, 0.05)}],
    ids=str,
)
def test_mamba2_outputs_and_gradients_equal_those_of_transformers(options):
    """transformers computes scan and norm in float32, so float64 weights give a second, rounded comparison."""
    theirs, ours, _ = pair(**options)
    for dtype in (torch.float32, torch.float64):
        theirs, ours, x = theirs.to(dtype), ours.to(dtype), torch.randn(2, 23, 32, dtype=dtype)
        weight = torch.randn_like(x)
        outs, grads = [], []
        for m in (theirs, ours):
            m.zero_grad()
            outs.append(m(x))
            (outs[-1] * weight).sum().backward()
            grads.append({name: p.grad for name, p in m.named_parameters()})
        assert outs[0].std() > 0.1 and relative_error(outs[1], outs[0]) < 3e-6
        for name, want in grads[0].items():
            assert relative_error(grads[1][name], want) < 3e-5, name


def test_mamba2_prefill_and_steps_equal_those_of_transformers():
    theirs, ours, config = pair(n_groups=2)
    argument = "cache" if "cache" in inspect.signature(theirs.forward).parameters else "cache_params"
    cache, x = DynamicCache(config=config), torch.randn(2, 12, 32)
    with torch.no_grad():
        want = theirs(x[:, :7], **{argument: cache})
        y, states = ours.scan(x[:, :7])
        assert relative_error(y, want) < 3e-6
        for t in range(7, 12):
            want = theirs(x[:, t : t + 1], **{argument: cache})
            y, *states = ours.step(x[:, t : t + 1], *states)
            assert relative_error(y, want) < 3e-6
    assert relative_error(states[1], cache.get_recurrent_state(0, state_idx=0)) < 3e-6
