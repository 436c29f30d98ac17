"""PackedKeys finds what the reference finds over the live keys, bit for bit, whatever was written in any order."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from eaml_ext.ops import Neighbors, PackedKeys, knn, knn_reference
from eaml_ext.ops.knn import METRICS

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Model:
    """The expected contents of a memory, in plain tensors."""

    def __init__(self, capacity: int, dim: int, memories: int | None = None, **options: Any):
        self.memory = PackedKeys(capacity, dim, memories=memories, **options)
        lead = () if memories is None else (memories,)
        self.keys = torch.zeros(*lead, capacity, dim, dtype=self.memory.dtype)
        self.bias = torch.zeros(*lead, capacity, dtype=self.memory.dtype)
        self.live = torch.zeros(*lead, capacity, dtype=torch.bool)

    def write(self, slots: Tensor, keys: Tensor, bias: Tensor | None = None) -> "Model":
        self.memory.write(slots, keys, bias)
        rows = [...] if slots.dim() == 1 else range(len(slots))
        for b in rows:
            of = (lambda x: x) if b is ... else (lambda x, b=b: x[b])
            for i, slot in enumerate(of(slots).tolist()):
                of(self.keys)[slot] = of(keys)[i]
                of(self.bias)[slot] = 0 if bias is None else of(bias)[i]
                of(self.live)[slot] = True
        return self

    def erase(self, slots: Tensor) -> None:
        self.memory.erase(slots)
        self.live.scatter_(-1, slots, False)

    def check(self, queries: Tensor, k: int, valid: Tensor | None = None) -> Neighbors:
        live = self.live if valid is None else self.live & valid
        want = knn_reference(queries, self.keys, k, metric=self.memory.metric, valid=live, bias=self.bias)
        found = self.memory.search(queries, k, valid)
        assert_same(found, want)
        assert len(self.memory) == int(self.live.sum())
        return found


def assert_same(got: Neighbors, want: Neighbors) -> None:
    """Equal bit for bit, up to the sign of zero and NaN payloads."""
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.values, want.values, rtol=0, atol=0, equal_nan=True)


def filled(keys: Tensor, **options: Any) -> Model:
    memories = keys.shape[0] if keys.dim() == 3 else None
    model = Model(*keys.shape[-2:], memories, dtype=keys.dtype, **options)
    return model.write(torch.arange(keys.shape[-2]).expand(keys.shape[:-1]), keys)


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("memories", [pytest.param(None, marks=pytest.mark.exhaustive), 3])
def test_finds_what_the_reference_finds(dtype, metric, memories):
    lead = () if memories is None else (memories,)
    for capacity, dim in ((1, 1), (31, 3), (32, 8), (100, 17), (333, 64)):
        model = Model(capacity, dim, memories, metric=metric, dtype=dtype)
        queries = torch.randn(*lead, 13, dim).to(dtype)
        model.check(queries, 3)  # nothing is there
        for _ in range(3):
            count = int(torch.randint(1, capacity + 1, ()))
            slots = torch.rand(*lead, capacity).argsort(-1)[..., :count]
            model.write(slots, torch.randn(*lead, count, dim).to(dtype), torch.randn(*lead, count).to(dtype))
            model.check(queries, 5)
            model.erase(slots[..., : count // 3])
            model.check(queries[..., :1, :], 5)
            model.check(queries, 5, torch.rand(*lead, capacity) < 0.5)
            model.check(queries, 5, torch.rand(capacity) < 0.5)


@settings(max_examples=60)
@given(
    capacity=st.integers(1, 120),
    dim=st.integers(1, 12),
    queries=st.integers(0, 14),
    k=st.integers(1, 20),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from(FLOATS),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 140), st.booleans()), max_size=6),
    seed=st.integers(0, 2**31),
)
def test_any_history(capacity, dim, queries, k, metric, dtype, steps, seed):
    """Writes to repeated, contiguous and scattered slots, at places and scales that move, between erasures."""
    torch.manual_seed(seed)
    model = Model(capacity, dim, metric=metric, dtype=dtype)
    for i, (writing, count, contiguous) in enumerate(steps):
        slots = torch.arange(min(count, capacity)) if contiguous else torch.randint(0, capacity, (count,))
        if writing:
            model.write(
                slots, (torch.randn(len(slots), dim) + 100 * (i % 3)).to(dtype), torch.randn(len(slots)).to(dtype)
            )
        else:
            model.erase(slots)
        model.check(torch.randn(queries, dim).to(dtype), k)


def test_the_last_of_those_to_one_slot_stays():
    model = Model(4, 2).write(torch.tensor([1, 1, 3, 1]), torch.arange(8.0).view(4, 2), torch.arange(4.0))
    found = model.check(torch.zeros(1, 2), 4)
    assert found.indices.tolist() == [[3, 1, -1, -1]] and found.values[0, 1] == 36 + 49 - 3


@pytest.mark.kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", [0, *(pytest.param(x, marks=pytest.mark.exhaustive) for x in (10, 118)), 346])
def test_offset_clusters_are_exact(metric, dtype, norm):
    centre = torch.nn.functional.normalize(torch.randn(64), dim=0) * norm
    keys, queries = ((centre + 0.05 * torch.randn(n, 64)).to(dtype) for n in (1500, 14))
    model = filled(keys, metric=metric)
    model.check(queries, 8)
    model.write(torch.arange(700, 1000), keys[:300])  # ties
    model.check(queries, 8)
    model.write(torch.arange(1500), -keys)  # the centre has to move
    model.check(-queries, 8)
    model.write(torch.arange(0, 1500, 2), keys[::2])  # two clusters: no one centre is good
    model.check(torch.cat([queries, -queries]), 8)
    model.check(queries[:1], 8)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_magnitudes_are_exact(metric, dtype):
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    scales = [0, tiny / 64, tiny, tiny**0.5, 1, huge**0.5 / 8, huge**0.5, huge / 8]
    base, queries = torch.randn(70, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
    for scale in scales:
        some = base.clone()
        some[::7] *= scale
        for keys in (base * scale, some):
            model = filled(keys, metric=metric)
            for query_scale in scales:
                model.check(queries * query_scale, 4)
                model.check(queries[:1] * query_scale, 4)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_keys_bias_and_queries(metric, bad):
    keys, bias, queries = torch.randn(90, 6), torch.randn(90), torch.randn(6, 6)
    keys[5, 0] = keys[11] = bad
    bias[7] = bias[8] = bad
    model = Model(90, 6, metric=metric).write(torch.arange(90), keys, bias)
    for k in (3, 90, 95):
        model.check(queries, k)
        model.check(torch.where(torch.rand(6, 6) < 0.2, bad, queries), k)
    model.write(torch.tensor([5, 11]), torch.randn(2, 6))  # what was there does not linger in the mean
    model.erase(torch.tensor([7]))
    model.check(queries, 9)


def test_near_duplicates_are_told_apart():
    """Distances of 1e-3 around a centre of norm 346 come out within 1e-5 of themselves."""
    queries = torch.nn.functional.normalize(torch.randn(4, 128), dim=-1) * 346
    keys = (queries[:, None] + 1e-3 * torch.randn(4, 100, 128)).reshape(400, 128)
    exact = (queries.double()[:, None] - keys.double()).square().sum(-1)
    found = filled(keys).check(queries, 8)
    torch.testing.assert_close(found.values.double(), exact.topk(8, largest=False).values, rtol=1e-5, atol=0)
    assert torch.equal(found.indices, exact.topk(8, largest=False).indices)


@pytest.mark.kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("features", [64, 65])
def test_rounding_to_bfloat16_at_its_worst(metric, features):
    """Every component is half a step from the next bfloat16, all errors have one sign, and only they order the keys."""
    half = 2.0**-8 * (1 - 2.0**-6)
    steps = torch.linspace(-half, half, 700)[torch.randperm(700)]
    near = (1 + steps)[:, None] * torch.ones(features) + 2.0**-16 * torch.randn(700, features)
    model = filled(torch.cat([near, -near]), metric=metric)  # around 0: centring takes nothing away
    queries = torch.stack(
        [torch.full((features,), 1 + sign * half * size) for sign in (-1, 1) for size in (0.5, 0.9, 1)]
    )
    for scale in (1, 2.0**-60, 2.0**40):
        model.check(queries * scale, 8)
        model.check(-queries * scale, 700)
        model.check(queries[:1] * scale, 8)


def test_more_ties_than_a_short_list_holds():
    model = filled(torch.zeros(6000, 4))
    assert model.check(torch.randn(7, 4), 3).indices.tolist() == [[0, 1, 2]] * 7
    model.erase(torch.arange(2))
    model.write(torch.tensor([5000]), torch.full((1, 4), -1e-30))
    model.check(torch.full((7, 4), -1.0), 3)


@pytest.mark.kernels
@pytest.mark.parametrize("metric", METRICS)
def test_same_bits_however_the_call_is_cut(metric):
    keys, queries, bias = torch.randn(2, 5000, 19), torch.randn(2, 40, 19), torch.randn(2, 5000)
    valid = torch.rand(2, 5000) < 0.8
    memory = PackedKeys(5000, 19, memories=2, metric=metric)
    memory.write(torch.arange(5000).expand(2, 5000), keys, bias)
    whole = memory.search(queries, 7, valid)
    assert_same(knn(queries, keys, 7, metric=metric, valid=valid, bias=bias), whole)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            assert_same(memory.search(queries, 7, valid), whole)
            for q in (0, 13, 39):
                one = Neighbors(whole.values[:, q : q + 1], whole.indices[:, q : q + 1])
                assert_same(memory.search(queries[:, q : q + 1], 7, valid), one)
            alone = PackedKeys(5000, 19, metric=metric)
            alone.write(torch.arange(5000), keys[1], bias[1])
            assert_same(alone.search(queries[1], 7, valid[1]), Neighbors(whole.values[1], whole.indices[1]))
    finally:
        torch.set_num_threads(threads)


def test_batches_of_queries_and_strides():
    keys, queries = torch.randn(300, 6), torch.randn(2, 3, 4, 6)
    model = filled(keys.T.contiguous().T)
    found = model.memory.search(queries.transpose(0, 1), 5)
    assert found.values.shape == (3, 2, 4, 5)
    assert_same(found, knn_reference(queries.transpose(0, 1), keys, 5))
    valid = torch.rand(2, 3, 300) < 0.5
    assert_same(
        model.memory.search(queries, 5, valid), knn_reference(queries, keys.expand(2, 3, 300, 6), 5, valid=valid)
    )
    assert model.memory.search(queries[:0], 5).values.shape == (0, 3, 4, 5)


def test_a_large_memory():
    """In huge pages, where there are any."""
    keys, queries = torch.randn(20_000, 64), torch.randn(13, 64)
    model = PackedKeys(20_000, 64)
    model.write(torch.arange(20_000), keys)
    assert_same(model.search(queries, 8), knn(queries, keys, 8))
    assert_same(model.search(queries[:1], 8), knn(queries[:1], keys, 8))


# ---- writing -----------------------------------------------------------------------------------------------------


def test_overwriting_touches_one_column(reference_only):
    if reference_only:
        pytest.skip("the reference has no panels, and those of a GPU have another layout")
    memory = filled(torch.randn(1000, 8)).memory
    before = memory._panels.clone()
    memory.write(torch.tensor([77]), torch.randn(1, 8))
    changed = (memory._panels != before).any(-2).nonzero().tolist()
    assert changed == [[77 // 32, 77 % 32]]


def test_the_centre_follows_the_keys(reference_only, on_cuda_emulator):
    """Kept sums give the mean of what is live; it is taken as the centre when keys have moved away from it."""
    if reference_only and not on_cuda_emulator:
        pytest.skip("the reference has no centre")
    model = filled(torch.randn(500, 8) + 50)
    for start in range(0, 500, 50):
        model.write(torch.arange(start, start + 50), torch.randn(50, 8) - 70)
        centre, total, (square, count, _) = model.memory._state.split((8, 8, 3))
        mean = model.keys[model.live].double().mean(0)
        torch.testing.assert_close(centre + total / count, mean, rtol=1e-5, atol=1e-4)
        spread = (model.keys.double() - centre).square().sum(-1).mean()
        torch.testing.assert_close(square / count, spread, rtol=1e-4, atol=1e-4)
        assert count == 500
    assert (centre - mean).norm() < 50  # of 339 between old and new


def test_what_is_written_is_copied():
    keys = torch.randn(5, 3, requires_grad=True)
    memory = PackedKeys(5, 3)
    memory.write(torch.arange(5), keys)
    before = memory.search(torch.zeros(1, 3), 5)
    assert not before.values.requires_grad
    with torch.no_grad():
        keys.add_(1)
    assert_same(memory.search(torch.zeros(1, 3), 5), before)


def test_inside_and_outside_of_inference_mode():
    queries = torch.randn(2, 3, requires_grad=True)
    with torch.inference_mode():
        memory = PackedKeys(40, 3)
        memory.write(torch.arange(40), torch.randn(40, 3))
        memory.search(queries, 2)
    memory.write(torch.tensor([1]), torch.randn(1, 3))
    assert torch.autograd.grad(memory.search(queries, 2).values.sum(), queries)[0].isfinite().all()


# ---- keeping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memories", [None, 2])
@pytest.mark.parametrize("keep", ["state_dict", "pickle", "deepcopy"])
def test_a_copy_finds_the_same_and_goes_its_own_way(memories, keep):
    lead = () if memories is None else (memories,)
    model = Model(90, 7, memories, metric="cosine", dtype=torch.float64)
    slots = torch.rand(*lead, 90).argsort(-1)[..., :60]
    model.write(slots, torch.randn(*lead, 60, 7).double(), torch.randn(*lead, 60).double())
    model.erase(slots[..., 5:9])
    queries = torch.randn(*lead, 6, 7).double()
    want = model.check(queries, 9)
    if keep == "state_dict":
        other = PackedKeys(90, 7, memories=memories, metric="cosine", dtype=torch.float64)
        other.load_state_dict(model.memory.state_dict())
    else:
        other = copy.deepcopy(model.memory) if keep == "deepcopy" else pickle.loads(pickle.dumps(model.memory))
    assert repr(other) == repr(model.memory) and len(other) == len(model.memory)
    assert_same(other.search(queries, 9), want)
    other.erase(slots)
    assert len(other) == 0
    assert_same(model.check(queries, 9), want)


def test_to():
    model = filled(torch.randn(50, 4))
    queries = torch.randn(3, 4)
    assert model.memory.to("cpu") is model.memory and model.memory.to(torch.device("cpu")).dtype is torch.float32
    model.check(queries, 5)
    assert model.memory.to(torch.bfloat16).dtype is torch.bfloat16
    model.keys, model.bias = model.keys.bfloat16(), model.bias.bfloat16()
    model.check(queries.bfloat16(), 5)


# ---- derivatives -------------------------------------------------------------------------------------------------


def differentiated(metric: str, memories: int | None = None) -> tuple[Any, Tensor, Any]:
    """A search as a function of the queries, queries, and the same by knn."""
    lead = () if memories is None else (memories,)
    model = Model(40, 4, memories, metric=metric, dtype=torch.float64)
    slots = torch.rand(*lead, 40).argsort(-1)[..., :33]
    model.write(slots, torch.randn(*lead, 33, 4).double(), torch.randn(*lead, 33).double())
    options = {"metric": metric, "valid": model.live, "bias": model.bias}
    queries = torch.randn(*lead, 3, 4).double()
    return lambda q: model.memory.search(q, 3).values, queries, lambda q: knn(q, model.keys, 3, **options).values


@pytest.mark.parametrize("memories", [None, 2])
@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_queries(metric, memories):
    f, queries, plain = differentiated(metric, memories)
    x = queries.requires_grad_()
    assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, x, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)

    def loss(function):
        return lambda q: function(q).sin().sum()

    for derivative in (torch.func.grad, torch.func.hessian):
        got, want = (derivative(loss(g))(queries.detach()) for g in (f, plain))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    tangent = torch.randn_like(queries)
    got, want = (torch.func.jvp(g, (queries.detach(),), (tangent,)) for g in (f, plain))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("memories", [None, 2])
def test_vmap_over_queries_and_valid(memories):
    f, queries, _ = differentiated("sqeuclidean", memories)
    many = torch.stack([queries, queries + 1, -queries])
    for g in (f, torch.func.grad(lambda q: f(q).sin().sum())):
        torch.testing.assert_close(torch.vmap(g)(many), torch.stack([g(q) for q in many]))
        torch.testing.assert_close(torch.vmap(g, 1)(many.movedim(0, 1)), torch.stack([g(q) for q in many]))
    model = filled(torch.randn(*queries.shape[:-2], 40, 4).double())
    valid = torch.rand(5, 40) < 0.5
    for dims in ((None, 0), (0, 0), (0, None)):
        q = many if dims[0] == 0 else queries
        q = torch.cat([many, many])[:5] if dims == (0, 0) else q
        v = valid if dims[1] == 0 else valid[0]
        got = torch.vmap(lambda q, v: tuple(model.memory.search(q, 3, v)), in_dims=dims)(q, v)
        for i in range(len(got[0])):
            one = q[i] if dims[0] == 0 else q, v[i] if dims[1] == 0 else v
            assert_same(Neighbors(got[0][i], got[1][i]), model.memory.search(one[0], 3, one[1]))


def test_gradients_outlive_overwriting():
    memory = filled(torch.randn(30, 4)).memory
    queries = torch.randn(3, 4, requires_grad=True)
    values = memory.search(queries, 2).values
    (want,) = torch.autograd.grad(values.sum(), queries, retain_graph=True)
    memory.write(torch.arange(30), torch.randn(30, 4))
    assert torch.equal(torch.autograd.grad(values.sum(), queries)[0], want)


@pytest.mark.parametrize("masked", [False, True])
def test_compiles(masked):
    model = filled(torch.randn(2, 40, 4))
    valid = torch.rand(2, 40) < 0.7 if masked else None
    queries = torch.randn(2, 3, 4, requires_grad=True)

    def loss(q: Tensor) -> Tensor:
        found = model.memory.search(q, 3, valid)
        return found.values.sin().sum() + found.indices.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(queries), loss(queries))
        got, want = (torch.autograd.grad(f(queries), queries) for f in (compiled, loss))
        torch.testing.assert_close(got, want)
        model.write(torch.tensor([[3], [4]]), torch.randn(2, 1, 4))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck(dtype):
    memory = filled(torch.randn(2, 40, 4).to(dtype)).memory
    state = [x for x in (memory._panels, memory._state) if x is not None] or [torch.zeros(0)] * 2
    slots, keys, bias = torch.tensor([[1, 2], [39, 0]]), torch.randn(2, 2, 4).to(dtype), torch.randn(2, 2).to(dtype)
    contents = memory._keys, memory._bias, memory._live, *state, 0
    for given_ in ((slots, keys, bias), (slots, keys, None), (slots, None, None), (None, None, None)):
        torch.library.opcheck(torch.ops.eaml_ext.knn_write.default, (*contents, *given_))
    if memory._panels is not None:
        queries = torch.randn(2, 3, 4).to(dtype)
        arguments = queries, memory._keys, 3, 0, memory._live, memory._bias, memory._panels, memory._state
        torch.library.opcheck(torch.ops.eaml_ext.knn.default, arguments)


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"capacity": 0}, ValueError, "PackedKeys: capacity must be > 0, got 0"),
        ({"capacity": 2.0}, TypeError, "PackedKeys: capacity must be an integer, got 2.0"),
        ({"capacity": True}, TypeError, "PackedKeys: capacity must be an integer, got True"),
        ({"capacity": None}, TypeError, "PackedKeys: capacity must be an integer, got None"),
        ({"capacity": 2**40}, ValueError, f"PackedKeys: capacity must be < {2**31}, got {2**40}"),
        ({"dim": 2**70}, ValueError, f"PackedKeys: dim must be < {2**31}, got {2**70}"),
        ({"memories": np.int64(2**62)}, ValueError, f"PackedKeys: memories must be < {2**31}, got {2**62}"),
        ({"dim": -1}, ValueError, "PackedKeys: dim must be > 0, got -1"),
        ({"memories": 0}, ValueError, "PackedKeys: memories must be > 0, got 0"),
        (
            {"metric": "l1"},
            ValueError,
            "PackedKeys: metric must be one of sqeuclidean, cosine, inner_product, got 'l1'",
        ),
        (
            {"dtype": torch.int32},
            TypeError,
            "PackedKeys: dtype must be float32 or float64 or bfloat16 or float16, got int32",
        ),
        ({"device": 1.5}, TypeError, "PackedKeys: device must be a torch.device or a str, got float"),
    ],
)
def test_construction_refuses(changes, error, message):
    arguments = {"capacity": 4, "dim": 2, **changes}
    with pytest.raises(error, match=f"^{message}$"):
        PackedKeys(arguments.pop("capacity"), arguments.pop("dim"), **arguments)


I, X, B = torch.tensor([[0, 3], [1, 2]]), torch.zeros(2, 2, 3), torch.zeros(2, 2)


@pytest.mark.parametrize(
    "method, arguments, error, message",
    [
        ("write", ([0], X), TypeError, "write: slots must be a torch.Tensor, got list"),
        ("write", (I.int(), X), TypeError, "write: slots must be int64, got int32"),
        ("write", (I[0], X), ValueError, r"write: slots must have shape \(2, n\), got \(2,\)"),
        ("write", (I.to("meta"), X), ValueError, "write: slots is on meta, the memory is on cpu"),
        ("write", (I + 2, X), ValueError, r"write: slots must lie in 0 ... 3, got 5"),
        ("write", (I - 1, X), ValueError, r"write: slots must lie in 0 ... 3, got -1"),
        ("write", (I, None), TypeError, "write: keys must be a torch.Tensor, got NoneType"),
        ("write", (I, X[0]), ValueError, r"write: keys must have shape \(2, 2, 3\), got \(2, 3\)"),
        ("write", (I, X.double()), TypeError, "write: keys must be float32, got float64"),
        ("write", (I, X.to("meta")), ValueError, "write: keys is on meta, the memory is on cpu"),
        ("write", (I, X, 1.0), TypeError, "write: bias must be a torch.Tensor, got float"),
        ("write", (I, X, B[0]), ValueError, r"write: bias must have shape \(2, 2\), got \(2,\)"),
        ("write", (I, X, B.double()), TypeError, "write: bias must be float32, got float64"),
        ("write", (I, X, B.to("meta")), ValueError, "write: bias is on meta, the memory is on cpu"),
        ("erase", (None,), TypeError, "erase: slots must be a torch.Tensor, got NoneType"),
        ("erase", (I + 1,), ValueError, r"erase: slots must lie in 0 ... 3, got 4"),
        ("search", (1, 2), TypeError, "search: queries must be a torch.Tensor, got int"),
        ("search", (X[0], 2), ValueError, r"search: queries must have shape \(2, Q, 3\), got \(2, 3\)"),
        ("search", (X[:, :, :2], 2), ValueError, r"search: queries must have shape \(2, Q, 3\), got \(2, 2, 2\)"),
        ("search", (X.double(), 2), TypeError, "search: queries must be float32, got float64"),
        ("search", (X.to("meta"), 2), ValueError, "search: queries is on meta, the memory is on cpu"),
        (
            "search",
            (X.to_sparse(), 2),
            TypeError,
            "search: queries must be a dense tensor, got layout torch.sparse_coo",
        ),
        ("search", (X, 0), ValueError, "search: k must be > 0, got 0"),
        ("search", (X, 2**40), ValueError, f"search: k must be < {2**31}, got {2**40}"),
        ("search", (X, 2**70), ValueError, f"search: k must be < {2**31}, got {2**70}"),
        ("search", (X, np.int64(-1)), ValueError, "search: k must be > 0, got -1"),
        ("search", (X, 2.0), TypeError, "search: k must be an integer, got 2.0"),
        ("search", (X, True), TypeError, "search: k must be an integer, got True"),
        ("search", (X, 1, [True]), TypeError, "search: valid must be a torch.Tensor, got list"),
        ("search", (X, 1, B), TypeError, "search: valid must be bool, got float32"),
        ("search", (X, 1, B.bool()), ValueError, r"search: valid must have shape \(4,\) or \(2, 4\), got \(2, 2\)"),
        ("search", (X, 1, B.bool().to("meta")), ValueError, "search: valid is on meta, the memory is on cpu"),
        ("load_state_dict", (1,), TypeError, "load_state_dict: state must be a mapping, got int"),
        (
            "load_state_dict",
            ({"keys": X},),
            ValueError,
            "load_state_dict: state must have the entries bias, keys, live, got keys",
        ),
        (
            "load_state_dict",
            ({"keys": X, "bias": B, "live": B.bool()},),
            ValueError,
            r"load_state_dict: keys must have shape \(2, 4, 3\), got \(2, 2, 3\)",
        ),
        (
            "load_state_dict",
            ({"keys": X.double(), "bias": B, "live": B},),
            TypeError,
            "load_state_dict: keys must be float32, got float64",
        ),
        ("to", (torch.int64,), TypeError, "to: dtype must be float32 or float64 or bfloat16 or float16, got int64"),
        ("to", (3,), TypeError, "to: device must be a torch.device or a str, got int"),
    ],
)
def test_refuses_in_one_sentence_and_changes_nothing(method, arguments, error, message):
    model = filled(torch.randn(2, 4, 3))
    queries = torch.randn(2, 3, 3)
    before = model.memory.search(queries, 4)
    with pytest.raises(error, match=rf"^PackedKeys\.{message}$"):
        getattr(model.memory, method)(*arguments)
    assert_same(model.memory.search(queries, 4), before)


def test_packed_keys_numpy_sizes_equal_python_sizes():
    memory = PackedKeys(np.int64(4), np.uint8(3), memories=np.int32(2))
    memory.write(torch.arange(4).expand(2, 4), torch.randn(2, 4, 3))
    queries = torch.randn(2, 5, 3)
    assert_same(memory.search(queries, np.int64(2)), memory.search(queries, 2))
    assert [type(size) for size in (memory.capacity, memory.dim, memory.memories)] == [int] * 3
    assert repr(memory).startswith("PackedKeys(4, 3, memories=2,")
    assert_same(pickle.loads(pickle.dumps(memory)).search(queries, 2), memory.search(queries, 2))


def test_raw_ops_refuse_what_does_not_fit(reference_only, on_cuda_emulator):
    if reference_only and not on_cuda_emulator:
        pytest.skip("the reference reads nothing beyond an end: it fails where torch does")
    memory = filled(torch.randn(40, 4)).memory
    contents = [memory._keys, memory._bias, memory._live, memory._panels, memory._state]
    slots, keys = torch.tensor([1]), torch.randn(1, 4)
    wrongs = [*((i, contents[i][:-1]) for i in range(5)), (6, keys[:, :3])]
    if not on_cuda_emulator:  # CUDA drops a slot that does not exist on the device: telling would take a synchronisation
        wrongs.append((5, torch.tensor([40])))
    for wrong in wrongs:
        arguments = [*contents, slots, keys]
        arguments[wrong[0]] = wrong[1]
        with pytest.raises(ValueError, match="knn_write: arguments do not fit each other"):
            torch.ops.eaml_ext.knn_write.default(*arguments[:5], 0, *arguments[5:], None)
    with pytest.raises(ValueError, match="knn: arguments do not fit each other"):
        rest = None, None, memory._panels[:-1], memory._state
        torch.ops.eaml_ext.knn.default(keys, memory._keys, 1, 0, *rest)


def search_in_process(memory, queries, answers):
    found = memory.search(queries, 2)
    answers.put((found.values.tolist(), found.indices.tolist()))


def test_packed_keys_in_a_spawned_process_finds_the_same():
    memory, queries = PackedKeys(64, 8), torch.randn(3, 8)
    memory.write(torch.arange(40), torch.randn(40, 8))
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=search_in_process, args=(memory, queries, answers))
    process.start()
    values, indices = answers.get()
    process.join()
    expected = memory.search(queries, 2)
    assert values == expected.values.tolist() and indices == expected.indices.tolist()
