"""functional_call substitutes every tensor once and restores the model; copies and clones that autograd accepts."""

import copy

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from user_models import Attention, Checkpointed, Recurrent, Shared, Tied, TiedParametrized

from eaml_ext.meta.functional import detached_copy, functional_call, outside_inference_mode, recordable


def slots(model):
    """Every name of every parameter and buffer, with the object it holds."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def assert_unchanged(model, before, values):
    after = slots(model)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor is before[name], name
        assert torch.equal(tensor, values[name]), name


@pytest.mark.parametrize("kind", [Shared, Tied, TiedParametrized])
@pytest.mark.parametrize("transform", [False, True], ids=["plain", "grad"])
def test_functional_call_shared_names_gives_value_of_a_model_with_these_parameters(kind, transform):
    model = kind().double()
    before, values = slots(model), {n: t.detach().clone() for n, t in slots(model).items()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p))
    x = torch.randn(5, 3, dtype=torch.float64)
    params = {n: p.detach() for n, p in other.named_parameters()}
    if transform:
        got = grad(lambda p: functional_call(model, p, x).square().sum())(params)
        wanted = torch.autograd.grad(other(x).square().sum(), list(other.parameters()))
        for name, g in zip(params, wanted, strict=True):
            torch.testing.assert_close(got[name], g, msg=name)
    else:
        torch.testing.assert_close(functional_call(model, params, (x,)), other(x))
    assert_unchanged(model, before, values)


def test_functional_call_alias_and_buffer_names_substitute_all_places():
    model, x = Shared().double(), torch.randn(5, 3, dtype=torch.float64)
    weight, scale = torch.randn(3, 3, dtype=torch.float64), torch.full((1,), 3.0, dtype=torch.float64)
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        wanted.a.weight.copy_(weight)
        wanted.scale.copy_(scale)
    got = functional_call(model, {"layers.0.weight": weight, "layers.same_scale": scale}, x)
    torch.testing.assert_close(got, wanted(x))
    both = {"a.weight": weight, "b.weight": weight, "scale": scale}
    torch.testing.assert_close(functional_call(model, both, x), wanted(x))


def test_functional_call_forward_raises_restores_model():
    class Failing(Shared):
        def forward(self, x):
            self.last = super().forward(x)
            raise KeyError("no")

    model = Failing()
    before, values = slots(model), {n: t.detach().clone() for n, t in slots(model).items()}
    with pytest.raises(KeyError, match="no"):
        functional_call(model, {n: p + 1 for n, p in model.named_parameters()}, torch.ones(2, 3))
    assert_unchanged(model, before, values)
    assert not hasattr(model, "last")


@pytest.mark.parametrize("batched", [False, True])
def test_functional_call_tensors_kept_by_forward_are_removed(batched):
    model = Attention()
    model(torch.randn(2, 4, 3))
    kept, maps = model.map, list(model.maps)
    params = {n: p.detach() for n, p in model.named_parameters()}
    if batched:
        many = {n: p.expand(2, *p.shape) for n, p in params.items()}
        vmap(lambda p, x: functional_call(model, p, x))(many, torch.randn(2, 2, 4, 3))
    else:
        functional_call(model, params, torch.randn(2, 4, 3))
    assert model.map is kept and len(model.maps) == 1 and model.maps[0] is maps[0]
    assert model.kept["last"][0] is kept


def test_functional_call_counters_without_tensors_stay():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counting(3, 1)
    functional_call(model, {"weight": model.weight * 2}, torch.ones(1, 3))
    assert model.calls == 1


def test_functional_call_gru_twice_uses_the_given_weights_each_time():
    model = Recurrent(nn.GRU)
    x = torch.randn(2, 6, 3)
    own = model(x)
    params = {n: p.detach() * 2 for n, p in model.named_parameters()}
    wanted = copy.deepcopy(model)
    wanted.load_state_dict(params)
    for _ in range(2):
        torch.testing.assert_close(functional_call(model, params, x), wanted(x))
    assert all(a is b for a, b in zip(model.core._flat_weights, model.core.parameters(), strict=True))
    torch.testing.assert_close(model(x), own)


def test_functional_call_checkpoint_recomputes_with_the_given_values():
    model, x = Checkpointed().double(), torch.randn(4, 3, dtype=torch.float64)
    plain = copy.deepcopy(model)
    plain.enabled = False
    params = {n: (p.detach() * 3 + 0.1).requires_grad_() for n, p in model.named_parameters()}
    wanted = torch.autograd.grad(torch.func.functional_call(plain, params, x).square().sum(), list(params.values()))
    got = torch.autograd.grad(functional_call(model, params, x).square().sum(), list(params.values()))
    for name, a, b in zip(params, got, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_functional_call_runtime_error_of_forward_is_raised():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        functional_call(nn.Linear(3, 1), {}, torch.ones(2, 4))


@pytest.mark.parametrize(
    ("model", "params", "error", "text"),
    [
        (nn.Linear(3, 1), {"wight": torch.ones(1, 3)}, ValueError, "params_and_buffers has wight, the model has no"),
        (nn.Linear(3, 1, bias=False), {"bias": torch.ones(1)}, ValueError, "params_and_buffers has bias, the model"),
        (
            Shared(),
            {"a.weight": torch.ones(3, 3), "b.weight": torch.zeros(3, 3)},
            ValueError,
            "params_and_buffers has two values for the tied tensor b.weight",
        ),
        (nn.DataParallel(nn.Linear(3, 1)), {}, TypeError, "model must be a module of Python, got DataParallel"),
    ],
)
def test_functional_call_wrong_argument_gets_one_sentence(model, params, error, text):
    with pytest.raises(error, match=f"^functional_call: {text}"):
        functional_call(model, params, torch.ones(1, 3))


# ------------------------------------------------------------------------------------------------------- copies


def test_detached_copy_tensors_with_history_keep_values_and_sharing():
    model = Attention()
    model(torch.randn(2, 4, 3))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    twin = detached_copy(model)
    assert torch.equal(twin.map, model.map) and twin.map.grad_fn is None and model.map.grad_fn is not None
    assert twin.maps[0] is twin.map and twin.kept["last"][1]["also"] is twin.map and twin.map is not model.map
    assert twin.query.weight is not model.query.weight and twin.query.weight.requires_grad


def test_detached_copy_without_history_is_deepcopy():
    model = Shared()
    twin = detached_copy(model)
    assert twin.b is twin.a and twin.layers[0] is twin.a and twin.layers.same_scale is twin.scale
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) and p is not q and q.requires_grad


# ------------------------------------------------------------------------------------------------ inference mode


def test_outside_inference_mode_acts_as_no_grad_and_keeps_other_modes():
    with torch.inference_mode():
        with outside_inference_mode():
            assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
            assert not torch.ones(1).is_inference()
        assert torch.is_inference_mode_enabled()
    with outside_inference_mode():
        assert torch.is_grad_enabled()
    with torch.no_grad(), outside_inference_mode():
        assert not torch.is_grad_enabled()


def test_recordable_clones_inference_tensors_only():
    with torch.inference_mode():
        inside = torch.ones(2)
    outside = torch.ones(2)
    first, (second, number) = recordable((inside, [outside, 3]))
    assert not first.is_inference() and torch.equal(first, inside) and second is outside and number == 3
