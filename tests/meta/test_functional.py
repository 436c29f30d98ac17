"""functional_call substitutes every tensor once and restores the model; copies and clones that autograd accepts."""

import copy
import time
from collections import OrderedDict, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from user_models import Attention, Checkpointed, Recurrent, Shared, Tied, TiedParametrized

from eaml_ext.meta import MetaMAML
from eaml_ext.meta._inner_loop import twice_differentiable_attention
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


# ------------------------------------------------------------------------------------------------------ threads


def _in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=20)


def _settings():
    cuda = torch.backends.cuda
    return torch.backends.mha.get_fastpath_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()


def test_twice_differentiable_attention_overlapping_threads_last_one_restores_settings():
    assert _settings() == (True, True, True)
    first, second = twice_differentiable_attention(), twice_differentiable_attention()
    first.__enter__()
    _in_thread(second.__enter__)
    first.__exit__(None, None, None)
    assert _settings() == (False, False, False)
    _in_thread(lambda: second.__exit__(None, None, None))
    assert _settings() == (True, True, True)


def test_twice_differentiable_attention_error_restores_settings():
    with pytest.raises(KeyError), twice_differentiable_attention(), twice_differentiable_attention():
        raise KeyError
    assert _settings() == (True, True, True)


class Slow(nn.Module):
    """Reads its parameter before and after another thread had time to run."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        before = x * self.w
        time.sleep(0.02)
        return before + x * self.w


@pytest.mark.parametrize("transform", [False, True], ids=["plain", "vmap"])
def test_functional_call_concurrent_calls_keep_their_values_and_the_model(transform):
    model = Slow()
    own = model.w

    def call(value):
        if transform:
            weights = torch.full((2,), value)
            return vmap(lambda w: functional_call(model, {"w": w}, torch.ones(())))(weights).tolist()
        return [float(functional_call(model, {"w": torch.tensor(value)}, torch.ones(())))] * 2

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(call, [1.0, 2.0, 3.0, 4.0]))
    assert results == [[2 * v] * 2 for v in (1.0, 2.0, 3.0, 4.0)]
    assert model.w is own and float(own.detach()) == 0


def test_meta_maml_concurrent_call_reads_the_models_own_tensors():
    model = Slow()
    maml = MetaMAML(model, 0.1, 0.1)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(maml.call, {"w": torch.ones(())}, torch.ones(()))
        time.sleep(0.005)
        found, names = maml.parameters()["w"], maml.inner_names
        twin = detached_copy(model)
        running.result()
    assert found is model.w and names == ["w"] and float(twin.w.detach()) == 0


# ---------------------------------------------------------------------------------------------------- containers


@dataclass
class Cache:
    last: object = None


class Named(list):
    pass


STORES = {
    "dict of lists": (lambda: {"maps": []}, lambda store, h: store["maps"].append(h)),
    "dict of dicts": (lambda: {"m": {}}, lambda store, h: store["m"].update(h=h)),
    "list in a tuple": (lambda: (1, []), lambda store, h: store[1].append(h)),
    "list subclass": (Named, lambda store, h: store.append(h)),
    "deque": (lambda: deque([0], maxlen=3), lambda store, h: store.append(h)),
    "defaultdict": (lambda: defaultdict(list), lambda store, h: store["maps"].append(h)),
    "OrderedDict": (OrderedDict, lambda store, h: store.update(h=h)),
    "set": (set, lambda store, h: store.add(h)),
    "namespace": (lambda: SimpleNamespace(h=None), lambda store, h: setattr(store, "h", h)),
    "dataclass": (Cache, lambda store, h: setattr(store, "last", h)),
    "dataclass in a list": (lambda: [Cache()], lambda store, h: setattr(store[0], "last", {"deep": (h,)})),
}


class Storing(nn.Linear):
    def __init__(self, kind):
        super().__init__(3, 1)
        make, self.put = STORES[kind]
        self.store = self.same = make()

    def forward(self, x):
        y = super().forward(x)
        self.put(self.store, y)
        return y


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("batched", [False, True])
def test_functional_call_tensors_kept_in_containers_are_removed(kind, batched):
    model, fresh = Storing(kind), STORES[kind][0]()
    store, x = model.store, torch.randn(2, 4, 3)
    params = {n: p.detach() for n, p in model.named_parameters()}
    for _ in range(2):
        if batched:
            vmap(lambda x: functional_call(model, params, x))(x)
        else:
            functional_call(model, params, x)
    assert model.store is store and model.same is store and store == fresh and type(store) is type(fresh)
    if isinstance(store, deque):
        assert store.maxlen == 3


def test_functional_call_container_that_holds_itself_is_restored():
    model = Storing("dict of lists")
    model.store["self"] = model.store
    functional_call(model, {}, torch.ones(1, 3))
    assert model.store["maps"] == [] and model.store["self"] is model.store


@pytest.mark.parametrize("compile", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2, 3))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_functional_call_scripted_submodule_uses_the_given_values(compile):
    model, x = nn.Sequential(compile(nn.Linear(3, 3)), nn.Linear(3, 1)), torch.randn(2, 3)
    params = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wanted = x @ params["0.weight"].T + params["0.bias"]
    wanted = wanted @ params["1.weight"].T + params["1.bias"]
    torch.testing.assert_close(functional_call(model, params, x), wanted)
    many = {n: torch.stack([p, 2 * p]) for n, p in params.items()}
    torch.testing.assert_close(vmap(lambda p: functional_call(model, p, x))(many)[0], wanted)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
