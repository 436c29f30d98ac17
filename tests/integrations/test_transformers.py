"""accelerate(): transformers' Mamba on the fused scan gives what its own slow path gives."""

import copy
import importlib
import pickle
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'eaml_ext[transformers]'")

from transformers import DynamicCache, MambaConfig, MambaForCausalLM, MambaModel

from eaml_ext.integrations.transformers import FusedMambaMixer, accelerate
from eaml_ext.nn import Mamba


def models(cls=MambaForCausalLM, **options):
    """Theirs and ours, of the same random weights, large enough for logits of order one."""
    options = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 5, **options}
    theirs = cls(MambaConfig(**options, pad_token_id=60, eos_token_id=59)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return theirs, accelerate(copy.deepcopy(theirs))


def tokens(length=40, batch=3):
    return torch.randint(59, (batch, length))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "expand": 3}, {"hidden_act": "gelu"}],
    ids=str,
)
def test_logits_are_those_of_the_slow_path(options):
    theirs, ours = models(**options)
    x = tokens()
    mask = torch.ones_like(x)
    mask[0, :7], mask[1, 30:] = 0, 0
    for kind in ({}, {"attention_mask": mask}):
        want = theirs(x, **kind).logits
        assert want.std() > 0.5
        torch.testing.assert_close(ours(x, **kind).logits, want, rtol=0, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(ours(x, **kind).logits, want, rtol=0, atol=1e-4)


def test_gradients_are_those_of_the_slow_path():
    theirs, ours = (m.train() for m in models())
    x = tokens()
    losses = [m(x, labels=x).loss for m in (theirs, ours)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for (name, want), got in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert (got.grad - want.grad).abs().max() <= 1e-4 * want.grad.abs().max(), name


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_generation_writes_the_same_tokens(options):
    theirs, ours = models()
    x = tokens(6)
    mask = torch.ones_like(x)
    mask[1, :2] = 0
    x[1, :2] = 60
    written = []
    for m in (theirs, ours):
        torch.manual_seed(5)
        written.append(m.generate(x, attention_mask=mask, max_new_tokens=20, **{"do_sample": False, **options}))
    assert torch.equal(*written) and written[0].shape[1] > 6


def test_one_token_at_a_time_and_prompts_in_parts_equal_the_whole():
    _, ours = models()
    x = tokens(12)
    whole = ours(x).logits
    for parts in ([12], [1] * 12, [2, 5, 1, 4]):
        cache, logits = None, []
        for part in x.split(parts, dim=1):
            out = ours(part, cache_params=cache, use_cache=True)
            cache = out.cache_params
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-4)
    cache.reset()
    torch.testing.assert_close(ours(x, cache_params=cache, use_cache=True).logits, whole, rtol=0, atol=1e-4)


def test_a_cache_that_keeps_its_past_is_left_to_transformers():
    theirs, ours = models()
    x, logits = tokens(9), []
    for m in (theirs, ours):
        cache = DynamicCache(config=m.config)
        for layer in cache.layers:
            layer.activate_past_recording()
        m(x[:, :5], cache_params=cache, use_cache=True)
        logits.append(m(x[:, 5:6], cache_params=cache, use_cache=True).logits)
    torch.testing.assert_close(*logits)


def test_bfloat16_and_the_model_without_head():
    theirs, ours = models(MambaModel)
    x = tokens()
    torch.testing.assert_close(ours(x).last_hidden_state, theirs(x).last_hidden_state, rtol=0, atol=1e-4)
    exact = theirs(x).last_hidden_state
    want, got = (m.bfloat16()(x).last_hidden_state.float() for m in (theirs, ours))
    assert (got - exact).square().mean() <= 1.5 * (want - exact).square().mean()  # as near to float32


def test_weights_names_and_copies_stay(tmp_path):
    theirs, ours = models()
    assert accelerate(ours) is ours  # a second time changes nothing
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = tokens()
    ours.save_pretrained(tmp_path)
    again = MambaForCausalLM.from_pretrained(tmp_path)
    assert type(again.backbone.layers[0].mixer) is not FusedMambaMixer
    for other in (accelerate(again), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x).logits, ours(x).logits)
        assert all(type(block.mixer) is FusedMambaMixer for block in other.backbone.layers)


def test_gradient_checkpointing_gives_the_same_gradients():
    _, ours = models()
    x, ours = tokens(), ours.train()
    want = torch.autograd.grad(ours(x, labels=x).loss, list(ours.parameters()))
    enable = getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)
    enable()
    got = torch.autograd.grad(ours(x, labels=x).loss, list(ours.parameters()))
    torch.testing.assert_close(got, want)


def test_a_layer_s_weights_load_into_nn_mamba():
    theirs, _ = models(state_size=16)
    block = Mamba(32)
    mixer = theirs.backbone.layers[0].mixer
    block.load_state_dict(mixer.state_dict(), strict=True)
    x = torch.randn(2, 11, 32)
    torch.testing.assert_close(block(x), mixer(x), rtol=1e-4, atol=1e-5)


def test_refuses_what_holds_no_mamba():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        accelerate("state-spaces/mamba-130m")
    with pytest.raises(ValueError, match="model must hold MambaMixer layers of transformers, got Linear"):
        accelerate(nn.Linear(2, 2))


def test_without_transformers_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "eaml_ext.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers.models.mamba.modeling_mamba", None)
    with pytest.raises(ImportError, match=r"pip install 'eaml_ext\[transformers\]'"):
        importlib.import_module("eaml_ext.integrations.transformers")
