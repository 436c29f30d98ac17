"""accelerate() on every family of Mamba models: the outputs are those of transformers' slow path."""

import copy
import inspect
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'eaml_ext[transformers]'")

sys.path.append(str(Path(__file__).parents[2]))  # last, so as not to hide an installed eaml_ext

from transformers import DynamicCache, ZambaConfig
from transformers.models.zamba.modeling_zamba import ZambaMambaMixer

import eaml_ext.integrations.transformers as integration
from benchmarks.transformers_families import FAMILIES, SMALL, gradients, in_parts, padding, pair, relative_error, tokens
from eaml_ext.integrations.transformers import accelerate

MAMBA2 = ["Mamba2", "Bamba", "GraniteMoeHybrid", "NemotronH", "Zamba2", "FalconH1"]
OPTIONS = [
    ("FalconMamba", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "mixer_rms_eps": 0.1}),
    ("Jamba", {"mamba_proj_bias": True, "mamba_conv_bias": False, "rms_norm_eps": 0.1}),
    ("Mamba2", {"use_bias": True, "use_conv_bias": False, "n_groups": 1, "layer_norm_epsilon": 0.1}),
    ("Mamba2", {"time_step_limit": (0.5, 0.8)}),
    ("Bamba", {"time_step_limit": (0.5, 0.8), "mamba_proj_bias": True, "mamba_conv_bias": False}),
    ("Zamba2", {"time_step_min": 0.5, "add_bias_linear": True}),
    ("NemotronH", {"time_step_limit": (0.5, 0.8), "use_bias": True, "use_conv_bias": False}),
    ("FalconH1", {"mamba_rms_norm": False}),
    ("FalconH1", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}),
    ("FalconH1", {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "ssm_in_multiplier": 1.7}),
    ("FalconH1", {"mamba_d_ssm": 96, "mamba_n_heads": 12, "ssm_multipliers": [0.5, 1.5, 2.0, 0.7, 1.3]}),
]
CASES = [*((family, {}) for family in FAMILIES), *OPTIONS]


@pytest.fixture
def without_own_forward(monkeypatch):
    """Return a function after whose call transformers' own mixers cannot run."""

    def remove():
        for cls in integration._FUSED:
            monkeypatch.setattr(cls, "forward", None)

    return remove


def mixer_of(model):
    return next(module for module in model.modules() if hasattr(module, "A_log"))


def mixers(family, **options):
    """Return the first mixers of both models, which have the class of ``family``, and an input."""
    return *(mixer_of(m) for m in pair(family, **options)), torch.randn(2, 9, SMALL.hidden)


def cache_name(mixer):
    return "cache" if "cache" in inspect.signature(type(mixer).__bases__[-1].forward).parameters else "cache_params"


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_family_logits_equal_the_slow_path(family, options, without_own_forward):
    theirs, ours = pair(family, **options)
    x = tokens(SMALL)
    calls = [{}, {"attention_mask": padding(x, 7, 10)}, {"output_hidden_states": True, "use_cache": False}]
    with torch.no_grad():
        want = [theirs(x, **call).logits for call in calls]
        assert want[0].std() > 0.2
        without_own_forward()
        for call, logits in zip(calls, want, strict=True):
            torch.testing.assert_close(ours(x, **call).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_family_gradients_equal_the_slow_path(family, options, without_own_forward):
    theirs, ours = pair(family, **options)
    x = tokens(SMALL)
    want = gradients(theirs, x)
    without_own_forward()
    got = gradients(ours, x)
    assert got.keys() == want.keys() and any("A_log" in name for name in want)
    for name, grad in want.items():
        assert relative_error(got[name], grad) < 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_family_second_order_gradients_equal_the_slow_path(family):
    theirs, ours, x = mixers(family)
    grads = []
    for m in (theirs.double(), ours.double()):
        leaves = [m.A_log, m.D, m.in_proj.weight, m.conv1d.weight]
        first = torch.autograd.grad(m(x.double()).square().sum(), leaves, create_graph=True)
        grads.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, want in zip(*reversed(grads), strict=True):
        assert relative_error(got, want) < 1e-5  # transformers computes in float32


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_generation_equals_the_slow_path(family, options, without_own_forward):
    theirs, ours = pair(family)
    x = tokens(SMALL, length=SMALL.prompt)
    mask = padding(x, 2)
    x[mask == 0] = theirs.config.pad_token_id
    written = []
    for m in (theirs, ours):
        torch.manual_seed(5)
        call = {"do_sample": False, "max_new_tokens": 20, **options}
        written.append(m.generate(x, attention_mask=mask, **call))
        without_own_forward()
    assert torch.equal(*written) and written[0].shape[1] == x.shape[1] + 20


@torch.no_grad()
@pytest.mark.parametrize("parts", [[12], [1] * 12, [2, 5, 1, 4]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_tokens_in_parts_equal_the_whole(family, parts, without_own_forward):
    theirs, ours = pair(family)
    x = tokens(SMALL, length=12)
    whole = theirs(x).logits
    without_own_forward()
    # Zamba2 and Nemotron-H clamp step sizes to at least 0.001, in sequences alone.
    tolerance = 1e-4 if family in ("Zamba2", "NemotronH") else 1e-5
    torch.testing.assert_close(in_parts(ours, x, parts), whole, rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize(("family", "options"), [case for case in CASES if case[0] in MAMBA2], ids=str)
def test_family_tokens_in_parts_equal_the_slow_path_in_parts(family, options, without_own_forward):
    """The clamping of step sizes differs between sequences and steps, in transformers and here."""
    theirs, ours = pair(family, **options)
    x = tokens(SMALL, length=12)
    want = in_parts(theirs, x, [2, 5, 1, 1, 3])
    without_own_forward()
    torch.testing.assert_close(in_parts(ours, x, [2, 5, 1, 1, 3]), want, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_mixer_masked_single_step_equals_the_slow_path(family):
    theirs, ours, x = mixers(family, **({"time_step_limit": (0.5, 0.8)} if family in ("Mamba2", "Bamba") else {}))
    mask = torch.tensor([[1], [0]])
    outs = []
    for m in (theirs, ours):
        cache = DynamicCache(config=pair(family)[0].config)
        calls = {cache_name(ours): cache}
        m(x[:, :8], **calls)
        outs.append((m(x[:, 8:], attention_mask=mask, **calls), cache.get_recurrent_state(m.layer_idx, state_idx=0)))
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_family_in_bfloat16_is_as_close_to_float32_as_the_slow_path(family, without_own_forward):
    theirs, ours = pair(family)
    x = tokens(SMALL)
    exact = theirs(x).logits
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    want = [theirs(x).logits, in_parts(theirs, x, [1] * x.shape[1])]
    without_own_forward()
    got = [ours(x).logits, in_parts(ours, x, [1] * x.shape[1])]
    for ours_off, theirs_off in zip(*([(y - exact).square().mean() for y in ys] for ys in (got, want)), strict=True):
        assert 0 < ours_off <= 1.5 * theirs_off


@pytest.mark.parametrize("family", FAMILIES)
def test_family_weights_names_and_copies_are_kept(family, tmp_path):
    theirs, ours = pair(family)
    assert accelerate(ours) is ours  # a second time changes nothing
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = tokens(SMALL)
    ours.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    assert type(mixer_of(again)) in integration._FUSED
    for other in (accelerate(again), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(mixer_of(other)) is type(mixer_of(ours))
        torch.testing.assert_close(other(x).logits, ours(x).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cls", integration._FUSED, ids=lambda cls: cls.__name__)
def test_mixer_ignored_arguments_are_parameters_of_no_function_of_transformers(cls):
    """A release in which a mixer or its kernels read one of these arguments fails here."""
    module = sys.modules[cls.__module__]
    read = set(inspect.signature(cls.forward).parameters)
    for name, function in vars(module).items():
        if name.startswith(("causal_conv1d", "mamba")) and callable(function):
            read |= set(inspect.signature(function).parameters)
    assert {"hidden_states", "attention_mask", "delta_softplus", "dt_softplus"} & read
    assert not integration._WITHOUT_EFFECT & read


@pytest.mark.parametrize("family", MAMBA2)
def test_mixer_packed_sequences_run_transformers_forward(family):
    """transformers refuses them without mamba_ssm."""
    _, ours, x = mixers(family)
    with pytest.raises(ValueError, match="packed sequences"):
        ours(x, seq_idx=torch.zeros(2, 9, dtype=torch.int32))


def test_accelerate_unsupported_mixer_raises_with_its_name():
    config = ZambaConfig(hidden_size=16, mamba_dt_rank=2, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"of type MambaMixer, .*FalconH1Mixer, got Sequential with ZambaMambaMixer$"):
        accelerate(nn.Sequential(ZambaMambaMixer(config, 0)))
