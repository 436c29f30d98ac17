"""accelerate(): transformers' Mamba on the fused scan has the outputs of transformers' slow path."""

import copy
import functools
import importlib
import inspect
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'eaml_ext[transformers]'")

from transformers import DynamicCache, MambaConfig, MambaForCausalLM, MambaModel
from transformers.cache_utils import Cache
from transformers.models.mamba.modeling_mamba import MambaMixer

import eaml_ext.integrations.transformers as integration
from eaml_ext.integrations.transformers import FusedMambaMixer, accelerate
from eaml_ext.nn import Mamba
from eaml_ext.ops import mamba_step, row_invariant_linear

# transformers 5.24 renamed the argument and the output.
CACHE = "cache" if "cache" in inspect.signature(MambaForCausalLM.forward).parameters else "cache_params"


def models(cls=MambaForCausalLM, **options):
    """Return transformers' model and ours with equal random weights, large enough for logits of order one."""
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
def test_accelerate_logits_equal_the_slow_path(options):
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


def test_accelerate_gradients_equal_the_slow_path():
    theirs, ours = (m.train() for m in models())
    x = tokens()
    losses = [m(x, labels=x).loss for m in (theirs, ours)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for (name, want), got in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert (got.grad - want.grad).abs().max() <= 1e-4 * want.grad.abs().max(), name


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_accelerate_generation_equals_the_slow_path(options):
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


def test_accelerate_tokens_in_parts_equal_the_whole():
    _, ours = models()
    x = tokens(12)
    whole = ours(x).logits
    for parts in ([12], [1] * 12, [2, 5, 1, 4]):
        cache, logits = None, []
        for part in x.split(parts, dim=1):
            out = ours(part, **{CACHE: cache}, use_cache=True)
            cache = out[CACHE]
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-4)
    cache.reset()
    torch.testing.assert_close(ours(x, **{CACHE: cache}, use_cache=True).logits, whole, rtol=0, atol=1e-4)


def test_accelerate_recording_cache_equals_the_slow_path():
    theirs, ours = models()
    x, logits = tokens(9), []
    for m in (theirs, ours):
        cache = DynamicCache(config=m.config)
        for layer in cache.layers:
            layer.activate_past_recording()
        m(x[:, :5], **{CACHE: cache}, use_cache=True)
        logits.append(m(x[:, 5:6], **{CACHE: cache}, use_cache=True).logits)
    torch.testing.assert_close(*logits)


# --- the mixer's own arguments ---------------------------------------------------------------------------------------


def mixers():
    """Return the first layers of :func:`models`, and an input."""
    return *(m.backbone.layers[0].mixer for m in models()), torch.randn(2, 6, 32)


def last_step(mixer, x, *args, **kwargs):
    """Return the output of the last step, which depends on earlier steps through the cache alone."""
    cache = DynamicCache(config=mixer.config)
    mixer(x[:, :-1], *(cache if value is CACHE else value for value in args), **dict.fromkeys(kwargs, cache))
    return mixer(x[:, -1:], *(cache if value is CACHE else value for value in args), **dict.fromkeys(kwargs, cache))


@torch.no_grad()
def test_mixer_cache_positional_or_named_continues_the_sequence():
    theirs, ours, x = mixers()
    want = theirs(x)[:, -1:]
    torch.testing.assert_close(last_step(ours, x, CACHE), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(last_step(ours, x, **{CACHE: None}), want, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`cache_params` is deprecated:FutureWarning")
@pytest.mark.skipif(CACHE != "cache", reason="transformers before 5.24 has the name cache_params alone")
def test_mixer_deprecated_cache_name_continues_the_sequence():
    _, ours, x = mixers()
    torch.testing.assert_close(last_step(ours, x, cache_params=None), ours(x)[:, -1:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_mixer_unknown_argument_runs_transformers_forward(monkeypatch):
    theirs, ours, x = mixers()
    want, original = theirs(x), MambaMixer.forward

    def forward(self, hidden_states, *args, scale=1.0, **kwargs):
        return scale * original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(MambaMixer, "forward", forward)
    torch.testing.assert_close(ours(x, scale=3.0), 3 * want)
    torch.testing.assert_close(ours(hidden_states=x, scale=3.0), 3 * want)


@torch.no_grad()
def test_mixer_unknown_argument_none_runs_the_fused_scan(monkeypatch):
    theirs, ours, x = mixers()
    want = theirs(x)
    monkeypatch.setattr(MambaMixer, "forward", None)
    torch.testing.assert_close(ours(x, seq_idx=None), want, rtol=0, atol=1e-5)


def test_mixer_wrong_arguments_raise_type_error():
    _, ours, x = mixers()
    for args, kwargs in (((x, None, None, None), {}), ((x,), {"hidden_states": x}), ((), {})):
        with pytest.raises(TypeError):
            ours(*args, **kwargs)


@pytest.fixture
def own_forward_calls(monkeypatch):
    """Record the caches with which transformers' own forward runs."""
    caches, original = [], MambaMixer.forward

    @functools.wraps(original)
    def forward(self, hidden_states, *args, **kwargs):
        caches.append(kwargs.get(CACHE))
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(MambaMixer, "forward", forward)
    return caches


@torch.no_grad()
def test_mixer_cache_of_another_class_runs_transformers_forward(own_forward_calls):
    class Wrapped:
        def __init__(self, cache):
            self.cache = cache

        def __getattr__(self, name):
            return getattr(self.cache, name)

    theirs, ours, x = mixers()
    want = theirs(x)[:, -1:]
    cache = Wrapped(DynamicCache(config=ours.config))
    got = [ours(part, **{CACHE: cache}) for part in x.split((5, 1), dim=1)]
    torch.testing.assert_close(got[-1], want, rtol=0, atol=1e-5)
    assert own_forward_calls[1:] == [cache, cache]


@torch.no_grad()
@pytest.mark.parametrize("method", ["get_conv_state", "update_recurrent_state", "is_recording_past"])
def test_mixer_cache_with_other_methods_runs_transformers_forward(method, monkeypatch, own_forward_calls):
    assert integration._cache_is_supported()
    original = getattr(Cache, method)

    def renamed(self, *args, layer=None, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Cache, method, renamed)
    assert integration._cache_is_supported()  # the calls are still valid
    monkeypatch.setattr(Cache, method, lambda self, *, layer: original(self, layer))
    assert not integration._cache_is_supported()
    monkeypatch.setattr(Cache, method, original)
    monkeypatch.setattr(integration, "_CACHE_IS_SUPPORTED", False)
    _, ours, x = mixers()
    last_step(ours, x, **{CACHE: None})
    assert len(own_forward_calls) == 2


@torch.no_grad()
def test_mixer_renamed_cache_argument_continues_the_sequence(monkeypatch):
    theirs, _, x = mixers()
    want, original = theirs(x)[:, -1:], MambaMixer.forward

    def forward(self, hidden_states, memory=None, attention_mask=None):
        return original(self, hidden_states, memory, attention_mask)

    monkeypatch.setattr(MambaMixer, "forward", forward)
    monkeypatch.delitem(sys.modules, "eaml_ext.integrations.transformers")
    ours = importlib.import_module("eaml_ext.integrations.transformers").accelerate(copy.deepcopy(theirs))
    torch.testing.assert_close(last_step(ours, x, memory=None), want, rtol=0, atol=1e-5)


# --- adapters and hooks of a mixer's layers -------------------------------------------------------------------------


class Scaled(nn.Module):
    """An adapter without a ``weight``."""

    def __init__(self, base):
        super().__init__()
        self.base, self.factor = base, nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.factor * self.base(x)


@pytest.mark.parametrize("name", ["conv1d", "dt_proj"])
def test_mixer_adapter_around_a_layer_takes_effect_in_sequences_and_steps(name):
    """transformers' slow path reads ``weight``, so the expected values are computed with multiplied weights."""
    theirs, ours, x = mixers()
    setattr(ours, name, Scaled(getattr(ours, name)))
    with torch.no_grad():
        for p in getattr(theirs, name).parameters():
            p.mul_(1.5)
        want = theirs(x)
        torch.testing.assert_close(ours(x), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(last_step(ours, x, **{CACHE: None}), want[:, -1:], rtol=0, atol=1e-5)
    (g,) = torch.autograd.grad(ours(x).square().sum(), getattr(ours, name).factor)
    assert g.abs() > 1e-6


@pytest.mark.parametrize("name", ["conv1d", "dt_proj"])
def test_mixer_pruned_layer_trains_with_its_mask(name):
    _, ours, x = mixers()
    prune.random_unstructured(getattr(ours, name), "weight", 0.5)
    for _ in range(2):
        ours(x).square().sum().backward()
    layer = getattr(ours, name)
    assert ((layer.weight_orig.grad == 0) == (layer.weight_mask == 0)).all()


@pytest.mark.parametrize("name", ["dt_proj", "x_proj", "in_proj"])
def test_mixer_lora_of_peft_trains(name):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    _, ours = models()
    lora = peft.get_peft_model(ours, peft.LoraConfig(target_modules=[name], r=2, init_lora_weights=False))
    x = tokens()
    with lora.disable_adapter():
        plain = lora(x).logits
    changed = lora(x, labels=x)
    assert not torch.allclose(changed.logits, plain, atol=1e-5)
    changed.loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in lora.named_parameters() if "lora" in n)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(merged(x).logits, changed.logits, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_model_quantised_outputs_are_close_to_float():
    theirs, ours = models(MambaModel)
    small = torch.ao.quantization.quantize_dynamic(ours, {nn.Linear})
    assert not isinstance(small.layers[0].mixer.dt_proj, nn.Linear)
    x = tokens()
    want = theirs(x).last_hidden_state
    assert 0 < (small(x).last_hidden_state - want).std() < 0.1 * want.std()


def test_accelerate_bfloat16_and_the_model_without_head_equal_the_slow_path():
    theirs, ours = models(MambaModel)
    x = tokens()
    torch.testing.assert_close(ours(x).last_hidden_state, theirs(x).last_hidden_state, rtol=0, atol=1e-4)
    exact = theirs(x).last_hidden_state
    want, got = (m.bfloat16()(x).last_hidden_state.float() for m in (theirs, ours))
    assert (got - exact).square().mean() <= 1.5 * (want - exact).square().mean()  # as close to float32


def test_accelerate_weights_names_and_copies_are_kept(tmp_path):
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


@pytest.mark.kernels
@torch.no_grad()
def test_accelerate_a_step_of_generation_is_one_kernel_a_layer_and_one_for_the_logits(monkeypatch):
    _, model = models()
    calls, step, product = [], mamba_step._op, row_invariant_linear._op
    monkeypatch.setattr(mamba_step, "_op", lambda *args: calls.append("step") or step(*args))
    monkeypatch.setattr(row_invariant_linear, "_op", lambda *args: calls.append("product") or product(*args))
    for ours in (copy.deepcopy(model), model, accelerate(nn.Sequential(models()[0]))[0]):
        cache = getattr(ours(tokens(), use_cache=True), CACHE)
        calls.clear()
        ours(tokens(1), **{CACHE: cache}, use_cache=True)
        assert calls == ["step"] * len(model.backbone.layers) + ["product"]
        ours.lm_head.weight.data.zero_()  # of a copy, not of the original
        assert not ours(tokens(1)).logits.any()


def test_accelerate_gradient_checkpointing_keeps_the_gradients():
    _, ours = models()
    x, ours = tokens(), ours.train()
    want = torch.autograd.grad(ours(x, labels=x).loss, list(ours.parameters()))
    enable = getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)
    enable()
    got = torch.autograd.grad(ours(x, labels=x).loss, list(ours.parameters()))
    torch.testing.assert_close(got, want)


def test_mixer_weights_load_into_nn_mamba():
    theirs, _ = models(state_size=16)
    block = Mamba(32)
    mixer = theirs.backbone.layers[0].mixer
    block.load_state_dict(mixer.state_dict(), strict=True)
    x = torch.randn(2, 11, 32)
    torch.testing.assert_close(block(x), mixer(x), rtol=1e-4, atol=1e-5)


def test_accelerate_without_mamba_layers_raises():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        accelerate("state-spaces/mamba-130m")
    with pytest.raises(
        ValueError, match=r"model must hold a layer of transformers of type MambaMixer, .*, got Linear$"
    ):
        accelerate(nn.Linear(2, 2))


def test_import_without_transformers_raises_with_the_package_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "eaml_ext.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers.models.mamba.modeling_mamba", None)
    with pytest.raises(ImportError, match=r"pip install 'eaml_ext\[transformers\]'"):
        importlib.import_module("eaml_ext.integrations.transformers")
