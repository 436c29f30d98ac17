"""PackedKeys finds the neighbours of the reference over the live keys, bit for bit, after any writes and erasures."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from knn_checks import Model, assert_same, filled
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from eaml_ext.ops import Neighbors, PackedKeys, knn, knn_reference
from eaml_ext.ops.knn import METRICS

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("memories", [pytest.param(None, marks=pytest.mark.exhaustive), 3])
def test_packed_keys_after_writes_and_erasures_matches_reference(dtype, metric, memories):
    lead = () if memories is None else (memories,)
    for capacity, dim in ((1, 1), (31, 3), (32, 8), (100, 17), (333, 64)):
        model = Model(capacity, dim, memories, metric=metric, dtype=dtype)
        queries = torch.randn(*lead, 13, dim).to(dtype)
        model.check(queries, 3)  # no slot is live
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
def test_packed_keys_any_history_matches_reference(capacity, dim, queries, k, metric, dtype, steps, seed):
    """Writes go to repeated, contiguous and scattered slots, at means that move, between erasures."""
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


def test_write_repeated_slot_keeps_last():
    model = Model(4, 2).write(torch.tensor([1, 1, 3, 1]), torch.arange(8.0).view(4, 2), torch.arange(4.0))
    found = model.check(torch.zeros(1, 2), 4)
    assert found.indices.tolist() == [[3, 1, -1, -1]] and found.values[0, 1] == 36 + 49 - 3


@pytest.mark.kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", [0, *(pytest.param(x, marks=pytest.mark.exhaustive) for x in (10, 118)), 346])
def test_packed_keys_offset_clusters_match_reference(metric, dtype, norm):
    centre = torch.nn.functional.normalize(torch.randn(64), dim=0) * norm
    keys, queries = ((centre + 0.05 * torch.randn(n, 64)).to(dtype) for n in (1500, 14))
    model = filled(keys, metric=metric)
    model.check(queries, 8)
    model.write(torch.arange(700, 1000), keys[:300])  # ties
    model.check(queries, 8)
    model.write(torch.arange(1500), -keys)  # the centre must move
    model.check(-queries, 8)
    model.write(torch.arange(0, 1500, 2), keys[::2])  # two clusters, for which no single centre is near
    model.check(torch.cat([queries, -queries]), 8)
    model.check(queries[:1], 8)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_packed_keys_extreme_magnitudes_match_reference(metric, dtype):
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
def test_packed_keys_non_finite_inputs_match_reference(metric, bad):
    keys, bias, queries = torch.randn(90, 6), torch.randn(90), torch.randn(6, 6)
    keys[5, 0] = keys[11] = bad
    bias[7] = bias[8] = bad
    model = Model(90, 6, metric=metric).write(torch.arange(90), keys, bias)
    for k in (3, 90, 95):
        model.check(queries, k)
        model.check(torch.where(torch.rand(6, 6) < 0.2, bad, queries), k)
    model.write(torch.tensor([5, 11]), torch.randn(2, 6))  # the old keys no longer contribute to the mean
    model.erase(torch.tensor([7]))
    model.check(queries, 9)


def test_packed_keys_near_duplicates_keep_their_order():
    """Distances of 1e-3 around a centre of norm 346 have a relative error of at most 1e-5."""
    queries = torch.nn.functional.normalize(torch.randn(4, 128), dim=-1) * 346
    keys = (queries[:, None] + 1e-3 * torch.randn(4, 100, 128)).reshape(400, 128)
    exact = (queries.double()[:, None] - keys.double()).square().sum(-1)
    found = filled(keys).check(queries, 8)
    torch.testing.assert_close(found.values.double(), exact.topk(8, largest=False).values, rtol=1e-5, atol=0)
    assert torch.equal(found.indices, exact.topk(8, largest=False).indices)


@pytest.mark.kernels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("features", [64, 65])
def test_packed_keys_worst_bfloat16_rounding_matches_reference(metric, features):
    """Components lie half a step from the next bfloat16, with errors of one sign that alone order the keys."""
    half = 2.0**-8 * (1 - 2.0**-6)
    steps = torch.linspace(-half, half, 700)[torch.randperm(700)]
    near = (1 + steps)[:, None] * torch.ones(features) + 2.0**-16 * torch.randn(700, features)
    model = filled(torch.cat([near, -near]), metric=metric)  # the mean is 0, so centring does not help
    queries = torch.stack(
        [torch.full((features,), 1 + sign * half * size) for sign in (-1, 1) for size in (0.5, 0.9, 1)]
    )
    for scale in (1, 2.0**-60, 2.0**40):
        model.check(queries * scale, 8)
        model.check(-queries * scale, 700)
        model.check(queries[:1] * scale, 8)


def test_packed_keys_more_ties_than_candidates_return_lowest_slots():
    model = filled(torch.zeros(6000, 4))
    assert model.check(torch.randn(7, 4), 3).indices.tolist() == [[0, 1, 2]] * 7
    model.erase(torch.arange(2))
    model.write(torch.tensor([5000]), torch.full((1, 4), -1e-30))
    model.check(torch.full((7, 4), -1.0), 3)


@pytest.mark.kernels
@pytest.mark.parametrize("metric", METRICS)
def test_packed_keys_any_partition_gives_same_bits(metric):
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


def test_packed_keys_batches_and_strides_match_reference():
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


def test_packed_keys_large_memory_matches_knn():
    """A memory of this size is allocated in huge pages."""
    keys, queries = torch.randn(20_000, 64), torch.randn(13, 64)
    model = PackedKeys(20_000, 64)
    model.write(torch.arange(20_000), keys)
    assert_same(model.search(queries, 8), knn(queries, keys, 8))
    assert_same(model.search(queries[:1], 8), knn(queries[:1], keys, 8))


# ---- writing -----------------------------------------------------------------------------------------------------


def test_write_one_slot_changes_one_column(reference_only):
    if reference_only:
        pytest.skip("the reference has no panels, and panels of CUDA have another layout")
    memory = filled(torch.randn(1000, 8)).memory
    before = memory._panels.clone()
    memory.write(torch.tensor([77]), torch.randn(1, 8))
    changed = (memory._panels != before).any(-2).nonzero().tolist()
    assert changed == [[77 // 32, 77 % 32]]


def test_write_distant_keys_moves_centre(reference_only, on_cuda_emulator):
    """The sums of the state give the mean of live keys, which becomes the centre when keys have moved away from it."""
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
    assert (centre - mean).norm() < 50  # the old and the new mean are 339 apart


def test_write_copies_keys():
    keys = torch.randn(5, 3, requires_grad=True)
    memory = PackedKeys(5, 3)
    memory.write(torch.arange(5), keys)
    before = memory.search(torch.zeros(1, 3), 5)
    assert not before.values.requires_grad
    with torch.no_grad():
        keys.add_(1)
    assert_same(memory.search(torch.zeros(1, 3), 5), before)


def test_packed_keys_of_inference_mode_work_outside():
    queries = torch.randn(2, 3, requires_grad=True)
    with torch.inference_mode():
        memory = PackedKeys(40, 3)
        memory.write(torch.arange(40), torch.randn(40, 3))
        memory.search(queries, 2)
    memory.write(torch.tensor([1]), torch.randn(1, 3))
    assert torch.autograd.grad(memory.search(queries, 2).values.sum(), queries)[0].isfinite().all()


# ---- copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memories", [None, 2])
@pytest.mark.parametrize("keep", ["state_dict", "pickle", "deepcopy"])
def test_packed_keys_copy_finds_same_and_is_independent(memories, keep):
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


def test_to_other_dtype_converts_in_place():
    model = filled(torch.randn(50, 4))
    queries = torch.randn(3, 4)
    assert model.memory.to("cpu") is model.memory and model.memory.to(torch.device("cpu")).dtype is torch.float32
    model.check(queries, 5)
    assert model.memory.to(torch.bfloat16).dtype is torch.bfloat16
    model.keys, model.bias = model.keys.bfloat16(), model.bias.bfloat16()
    model.check(queries.bfloat16(), 5)


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


def test_packed_keys_pickle_of_version_0_1_loads():
    memory, queries = filled(torch.randn(30, 4)).memory, torch.randn(3, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedKeys, "__module__", "eaml_ext.ops.packed_keys")  # its module in version 0.1
        saved = pickle.dumps(memory)
    assert b"eaml_ext.ops.packed_keys" in saved
    assert_same(pickle.loads(saved).search(queries, 2), memory.search(queries, 2))


# ---- derivatives -------------------------------------------------------------------------------------------------


def differentiated(metric: str, memories: int | None = None) -> tuple[Any, Tensor, Any]:
    """Return a search as a function of the queries, queries, and the same search by knn."""
    lead = () if memories is None else (memories,)
    model = Model(40, 4, memories, metric=metric, dtype=torch.float64)
    slots = torch.rand(*lead, 40).argsort(-1)[..., :33]
    model.write(slots, torch.randn(*lead, 33, 4).double(), torch.randn(*lead, 33).double())
    options = {"metric": metric, "valid": model.live, "bias": model.bias}
    queries = torch.randn(*lead, 3, 4).double()
    return lambda q: model.memory.search(q, 3).values, queries, lambda q: knn(q, model.keys, 3, **options).values


@pytest.mark.parametrize("memories", [None, 2])
@pytest.mark.parametrize("metric", METRICS)
def test_search_gradients_of_queries_match_knn(metric, memories):
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
def test_search_vmap_over_queries_and_valid_matches_loop(memories):
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


def test_search_gradients_after_overwriting_are_unchanged():
    memory = filled(torch.randn(30, 4)).memory
    queries = torch.randn(3, 4, requires_grad=True)
    values = memory.search(queries, 2).values
    (want,) = torch.autograd.grad(values.sum(), queries, retain_graph=True)
    memory.write(torch.arange(30), torch.randn(30, 4))
    assert torch.equal(torch.autograd.grad(values.sum(), queries)[0], want)


@pytest.mark.parametrize("masked", [False, True])
def test_search_compiled_matches_eager(masked):
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
def test_knn_write_passes_opcheck(dtype):
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
