"""knn is exact and reproducible with every kernel, differentiable in every mode, and rejects invalid arguments."""

import doctest
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from knn_checks import assert_same
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import eaml_ext.ops  # noqa: F401
from eaml_ext.ops.knn import METRICS, Neighbors, knn, knn_reference

module = sys.modules["eaml_ext.ops.knn._functional"]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sample_inputs(
    dtype: torch.dtype, device: str = "cpu"
) -> Iterator[tuple[str, tuple[Tensor, Tensor, int], dict[str, Any]]]:
    """Yield small cases ``(name, (queries, keys, k), options)`` with every option on and off."""
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64).to(device, dtype)

    def coin(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=make) > 0.3).to(device)

    for metric, masked, biased in itertools.product(METRICS, (False, True), (False, True)):
        name = metric + masked * "-valid" + biased * "-bias"

        def options(*shape: int, metric=metric, masked=masked, biased=biased) -> dict[str, Any]:
            return {
                "metric": metric,
                "valid": coin(*shape) if masked else None,
                "bias": randn(*shape) if biased else None,
            }

        yield name, (randn(3, 5), randn(9, 5), 4), options(9)
        yield f"{name}-memories", (randn(2, 3, 5), randn(2, 9, 5), 3), options(2, 9)
        yield f"{name}-shared", (randn(2, 3, 5), randn(9, 5), 3), options(2, 9)
        yield f"{name}-k_above_size", (randn(2, 3), randn(4, 3), 6), options(4)


CASES = [pytest.param(args, options, id=name) for name, args, options in sample_inputs(torch.float64)]


def brute_force(
    queries: Tensor, keys: Tensor, k: int, metric: str, valid: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Compute the values from a matrix of all pairs and topk, differentiably."""
    if metric == "sqeuclidean":
        value = (queries[..., :, None, :] - keys[..., None, :, :]).square().sum(-1)
    else:
        if metric == "cosine":
            queries, keys = torch.nn.functional.normalize(queries, dim=-1), torch.nn.functional.normalize(keys, dim=-1)
        value = queries @ keys.mT
    sign = 1 if metric == "sqeuclidean" else -1
    if bias is not None:
        value = value - sign * bias[..., None, :]
    if valid is not None:
        value = torch.where(valid[..., None, :], value, sign * torch.inf)
    size = min(k, keys.shape[-2])
    best = value.topk(size, largest=sign < 0).values
    return torch.nn.functional.pad(best, (0, k - size), value=sign * torch.inf)


def finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0)


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_knn_every_option_equals_reference_bit_for_bit(dtype):
    for _, args, options in sample_inputs(dtype):
        assert_same(knn(*args, **options), knn_reference(*args, **options))


@pytest.mark.parametrize("args, options", CASES)
def test_knn_values_match_brute_force(args, options):
    torch.testing.assert_close(knn(*args, **options).values, brute_force(*args, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", [0, 10, 118, 346])
def test_knn_offset_clusters_match_reference(metric, dtype, norm):
    torch.manual_seed(norm)
    centre = torch.nn.functional.normalize(torch.randn(64), dim=0) * norm
    keys, queries = (centre + 0.05 * torch.randn(n, 64) for n in (1500, 14))
    keys, queries = keys.to(dtype), queries.to(dtype)
    assert_same(knn(queries, keys, 8, metric=metric), knn_reference(queries, keys, 8, metric=metric))
    twice = torch.cat([keys, keys])
    found = knn(queries, twice, 8, metric=metric)
    assert_same(found, knn_reference(queries, twice, 8, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_knn_extreme_magnitudes_match_reference(metric, dtype):
    torch.manual_seed(0)
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    scales = [0, tiny / 64, tiny, tiny**0.5, 1, huge**0.5 / 8, huge**0.5, huge / 8]
    base, base_queries = torch.randn(200, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
    for scale, query_scale in itertools.product(scales, scales):
        some = base.clone()
        some[::7] *= scale
        for keys in (base * scale, some):
            queries = base_queries * query_scale
            want = knn_reference(queries, keys, 4, metric=metric)
            assert_same(knn(queries, keys, 4, metric=metric), want)  # few and many queries take different paths
            assert_same(knn(queries[:2], keys, 4, metric=metric), Neighbors(want.values[:2], want.indices[:2]))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_knn_non_finite_inputs_match_reference(metric, bad):
    torch.manual_seed(0)
    queries, keys, bias = torch.randn(6, 6), torch.randn(90, 6), torch.randn(90)
    bad_queries, bad_keys, bad_bias, masking = queries.clone(), keys.clone(), bias.clone(), bias.clone()
    bad_queries[1, 2] = bad_keys[5, 0] = bad_bias[7] = bad
    bad_keys[11] = bad
    masking[3:80] = bad
    for q, x, b in [
        (bad_queries, keys, bias),
        (queries, bad_keys, None),
        (queries, keys, bad_bias),
        (queries, keys, masking),
    ]:
        for k in (3, 90, 95):
            want = knn_reference(q, x, k, metric=metric, bias=b)
            assert_same(knn(q, x, k, metric=metric, bias=b), want)
            assert_same(knn(q[:2], x, k, metric=metric, bias=b), Neighbors(want.values[:2], want.indices[:2]))
    assert not knn(bad_queries, keys, 3, metric="sqeuclidean").values[1].isfinite().any()


def test_knn_large_negative_bias_masks_like_valid():
    torch.manual_seed(0)
    queries, keys = torch.randn(6, 16), torch.randn(6000, 16)
    for least in (-1e9, torch.finfo(torch.float32).min, -torch.inf):
        bias = torch.where(torch.rand(6000) < 0.5, 0.0, least)
        for some in (queries, queries[:2]):
            assert_same(knn(some, keys, 5, bias=bias), knn(some, keys, 5, valid=bias == 0))


@pytest.mark.parametrize("metric", METRICS)
def test_knn_ties_return_lowest_index(metric):
    keys = torch.zeros(9000, 4)
    assert knn(torch.zeros(2, 4), keys, 3, metric=metric).indices.tolist() == [[0, 1, 2]] * 2
    torch.manual_seed(0)
    queries, keys = (torch.randint(0, 2, (n, 4)).float() for n in (7, 3000))
    assert_same(knn(queries, keys, 20, metric=metric), knn_reference(queries, keys, 20, metric=metric))


@pytest.mark.kernels
@pytest.mark.parametrize("metric", METRICS)
def test_knn_any_partition_gives_same_bits(metric):
    torch.manual_seed(0)
    queries, keys = torch.randn(3, 40, 19), torch.randn(3, 5000, 19)
    valid, bias = torch.rand(3, 5000) < 0.8, torch.randn(3, 5000)
    whole = knn(queries, keys, 7, metric=metric, valid=valid, bias=bias)
    for b in range(3):
        options = {"metric": metric, "valid": valid[b], "bias": bias[b]}
        for q in (0, 13, 39):
            one = knn(queries[b, q : q + 1], keys[b], 7, **options)
            assert_same(one, Neighbors(whole.values[b, q : q + 1], whole.indices[b, q : q + 1]))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            assert_same(knn(queries, keys, 7, metric=metric, valid=valid, bias=bias), whole)
            one = knn(queries[0, :1], keys[0], 7, metric=metric, valid=valid[0], bias=bias[0])
            assert_same(one, Neighbors(whole.values[0, :1], whole.indices[0, :1]))
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 200), st.integers(0, 20)),
    k=st.integers(1, 40),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shared=st.booleans(),
    per_memory=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_knn_any_shape_matches_reference(shape, k, metric, dtype, shared, per_memory, seed):
    batch, count, size, features = shape
    make = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=make).to(dtype)

    queries, keys = randn(batch, count, features), randn(*(() if shared else (batch,)), size, features)
    lead = (batch,) if per_memory else ()
    options = {"metric": metric, "valid": randn(*lead, size) > -1, "bias": randn(*lead, size)}
    found = knn(queries, keys, k, **options)
    assert found.values.shape == found.indices.shape == (batch, count, k) and found.indices.dtype == torch.int64
    assert_same(found, knn_reference(queries, keys, k, **options))


def test_knn_strides_give_same_bits():
    torch.manual_seed(0)
    queries, keys, bias = torch.randn(4, 3, 6), torch.randn(4, 50, 6), torch.randn(4, 50)
    valid = torch.rand(4, 50) > 0.5
    want = knn(queries, keys, 5, valid=valid, bias=bias)
    odd = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (queries, keys, valid, bias)]
    assert_same(knn(odd[0], odd[1], 5, valid=odd[2], bias=odd[3]), want)
    assert_same(knn(queries, keys[:1].expand(4, 50, 6), 5), knn(queries, keys[0], 5))


def test_knn_nan_in_dead_slots_is_ignored():
    torch.manual_seed(0)
    queries, keys = torch.randn(3, 4, requires_grad=True), torch.randn(8, 4)
    keys[4:] = torch.nan
    found = knn(queries, keys, 6, valid=torch.arange(8) < 4)
    assert (found.indices[:, 4:] == -1).all() and (found.values[:, 4:] == torch.inf).all()
    (grad,) = torch.autograd.grad(found.values.sum(), queries)
    assert grad.isfinite().all()


# ---- derivatives -------------------------------------------------------------------------------------------------


def values_of(args: tuple, options: dict[str, Any]) -> tuple[Any, tuple[Tensor, ...]]:
    """Return the values as a function of the differentiable arguments, and these arguments."""
    queries, keys, k = args
    rest = {name: x for name, x in options.items() if name != "bias"}
    if options["bias"] is None:
        return lambda q, x: finite(knn(q, x, k, **rest).values), (queries, keys)
    return lambda q, x, b: finite(knn(q, x, k, bias=b, **rest).values), (queries, keys, options["bias"])


@pytest.mark.kernels
@pytest.mark.parametrize("args, options", CASES)
def test_knn_gradients_of_every_order_and_mode_pass_gradcheck(args, options):
    f, inputs = values_of(args, options)
    for tracked in itertools.product((False, True), repeat=len(inputs)):
        if any(tracked):
            xs = tuple(x.clone().requires_grad_(t) for x, t in zip(inputs, tracked, strict=True))
            assert gradcheck(f, xs, check_forward_ad=True, fast_mode=True)
    assert gradcheck(f, xs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, xs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("args, options", CASES)
def test_knn_gradients_match_brute_force(args, options):
    f, inputs = values_of(args, options)
    xs = tuple(x.clone().requires_grad_() for x in inputs)
    weight = torch.randn_like(f(*xs))
    plain = brute_force(xs[0], xs[1], args[2], options["metric"], options["valid"], xs[2] if len(xs) > 2 else None)
    got = torch.autograd.grad((f(*xs) * weight).sum(), xs)
    want = torch.autograd.grad((finite(plain) * weight).sum(), xs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.kernels
@pytest.mark.parametrize("args, options", [c for c in CASES if "memories" in c.id or "shared" in c.id])
def test_knn_function_transforms_match_autograd(args, options):
    f, inputs = values_of(args, options)

    def loss(*xs: Tensor) -> Tensor:
        return f(*xs).sin().sum()

    gradient = torch.func.grad(loss, argnums=tuple(range(len(inputs))))
    xs = tuple(x.clone().requires_grad_() for x in inputs)
    torch.testing.assert_close(gradient(*inputs), torch.autograd.grad(loss(*xs), xs))
    tangents = tuple(torch.randn_like(x) for x in inputs)
    _, tangent = torch.func.jvp(loss, inputs, tangents)
    want = sum((g * t).sum() for g, t in zip(gradient(*inputs), tangents, strict=True))
    torch.testing.assert_close(tangent, want)
    hessian = torch.func.hessian(loss)(*inputs)
    torch.testing.assert_close(hessian, torch.func.jacrev(torch.func.grad(loss))(*inputs))
    for dims in [*itertools.product((None, 0), repeat=len(inputs)), (1,) * len(inputs)]:
        if any(d is not None for d in dims):
            mapped = [x if d is None else torch.stack([x, x + 1, -x], d) for x, d in zip(inputs, dims, strict=True)]
            for g in (lambda *xs: (f(*xs),), gradient):
                outs = torch.vmap(g, in_dims=dims)(*mapped)
                for i in range(3):
                    one = g(*(x if d is None else x.select(d, i) for x, d in zip(mapped, dims, strict=True)))
                    torch.testing.assert_close(tuple(out[i] for out in outs), one)


def test_knn_nested_vmap_over_valid_matches_loop():
    torch.manual_seed(0)
    queries, keys, valid = torch.randn(2, 3, 4), torch.randn(5, 7, 4), torch.rand(6, 2, 7) > 0.4

    def search(q, x, v):
        return tuple(knn(q, x, 3, valid=v))

    over_valid = torch.vmap(search, in_dims=(None, None, 0))
    values, indices = torch.vmap(over_valid, in_dims=(None, 0, None))(queries, keys, valid)
    for i, j in itertools.product(range(5), range(6)):
        assert_same(Neighbors(values[i, j], indices[i, j]), knn(queries, keys[i], 3, valid=valid[j]))


@pytest.mark.parametrize("metric", METRICS)
def test_knn_values_under_grad_keep_their_bits(metric):
    torch.manual_seed(0)
    queries, keys = 100 + torch.randn(20, 33), 100 + torch.randn(500, 33)
    assert_same(knn(queries.requires_grad_(), keys, 5, metric=metric), knn(queries.detach(), keys, 5, metric=metric))


def test_knn_gradients_of_zero_vectors_and_empty_sets_are_zero():
    for metric in METRICS:
        queries = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        keys = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
        grads = torch.autograd.grad(knn(queries, keys, 2, metric=metric).values.sum(), (queries, keys))
        assert all((g == 0).all() for g in grads)
    for shape in ((0, 3), (2, 0)):
        queries, keys = torch.randn(2, shape[1], requires_grad=True), torch.randn(shape, requires_grad=True)
        torch.autograd.grad(finite(knn(queries, keys, 2).values).sum(), (queries, keys))


def test_knn_repeated_gradients_are_identical():
    torch.manual_seed(0)
    queries, keys = torch.randn(500, 16), torch.randn(50, 16, requires_grad=True)
    first, *others = (torch.autograd.grad(knn(queries, keys, 8).values.sin().sum(), keys)[0] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.kernels
@pytest.mark.parametrize("metric", METRICS)
def test_knn_compiled_matches_eager(metric):
    torch.manual_seed(0)
    queries, keys, bias = torch.randn(2, 3, 4), torch.randn(2, 9, 4), torch.randn(2, 9)

    def loss(q, x, b):
        found = knn(q, x, 3, metric=metric, bias=b)
        return found.values.sin().sum() + found.indices.sum()

    xs = tuple(x.requires_grad_() for x in (queries, keys, bias))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*xs), xs), torch.autograd.grad(loss(*xs), xs))
    mapped = torch.vmap(torch.func.grad(lambda q: loss(q, keys.detach(), bias.detach())))
    many = torch.randn(4, 2, 3, 4)
    torch.testing.assert_close(torch.compile(mapped, fullgraph=True, backend="aot_eager")(many), mapped(many))


@pytest.mark.kernels
def test_knn_op_passes_opcheck():
    for _, (queries, keys, k), options in sample_inputs(torch.float32):
        metric = METRICS.index(options["metric"])
        torch.library.opcheck(
            torch.ops.eaml_ext.knn.default, (queries, keys, k, metric, options["valid"], options["bias"])
        )


# ---- errors and documentation ------------------------------------------------------------------------------------

Q, K, V, B = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"queries": [1.0]}, TypeError, "knn: queries must be a torch.Tensor, got list"),
        ({"queries": Q[0, 0]}, ValueError, r"knn: queries must have shape \(\*, Q, d\), got \(4,\)"),
        ({"queries": Q.int()}, TypeError, "knn: queries must be float32 or float64 or bfloat16 or float16, got int32"),
        ({"queries": Q.to("meta")}, ValueError, "knn: keys is on cpu, queries is on meta"),
        ({"queries": Q[:1]}, ValueError, r"knn: keys has batch shape \(2,\), queries has \(1,\)"),
        ({"keys": None}, TypeError, "knn: keys must be a torch.Tensor, got NoneType"),
        ({"keys": K[0, 0]}, ValueError, r"knn: keys must have shape \(\*, M, d\) or \(M, d\), got \(4,\)"),
        ({"keys": torch.zeros(2, 5, 5)}, ValueError, "knn: keys has 5 features, queries has 4"),
        ({"keys": K.double()}, TypeError, "knn: keys must be float32 as queries, got float64"),
        ({"keys": K.to("meta")}, ValueError, "knn: keys is on meta, queries is on cpu"),
        ({"k": 0}, ValueError, "knn: k must be > 0, got 0"),
        ({"k": -(2**40)}, ValueError, f"knn: k must be > 0, got -{2**40}"),
        ({"k": 2**31}, ValueError, f"knn: k must be < {2**31}, got {2**31}"),
        ({"k": 2**40}, ValueError, f"knn: k must be < {2**31}, got {2**40}"),
        ({"k": np.int64(2**40)}, ValueError, f"knn: k must be < {2**31}, got {2**40}"),
        ({"k": 2**63}, ValueError, f"knn: k must be < {2**31}, got {2**63}"),
        ({"k": 2**70}, ValueError, f"knn: k must be < {2**31}, got {2**70}"),
        ({"k": True}, TypeError, "knn: k must be an integer, got True"),
        ({"k": np.bool_(True)}, TypeError, r"knn: k must be an integer, got (np\.)?True_?"),
        ({"k": 1.0}, TypeError, "knn: k must be an integer, got 1.0"),
        ({"k": np.float64(1)}, TypeError, r"knn: k must be an integer, got (np\.float64\()?1\.0\)?"),
        ({"metric": "l1"}, ValueError, "knn: metric must be one of sqeuclidean, cosine, inner_product, got 'l1'"),
        ({"valid": [True]}, TypeError, "knn: valid must be a torch.Tensor, got list"),
        ({"valid": V[:, :4]}, ValueError, r"knn: valid must have shape \(5,\) or \(2, 5\), got \(2, 4\)"),
        ({"valid": V.int()}, TypeError, "knn: valid must be bool, got int32"),
        ({"valid": V.to("meta")}, ValueError, "knn: valid is on meta, queries is on cpu"),
        ({"bias": 1.0}, TypeError, "knn: bias must be a torch.Tensor, got float"),
        ({"bias": B[:1]}, ValueError, r"knn: bias must have shape \(5,\) or \(2, 5\), got \(1, 5\)"),
        ({"bias": B.double()}, TypeError, "knn: bias must be float32, got float64"),
        ({"bias": B.to("meta")}, ValueError, "knn: bias is on meta, queries is on cpu"),
    ],
)
@pytest.mark.parametrize("function", [knn, knn_reference])
def test_knn_invalid_argument_raises_one_sentence(function, changes, error, message):
    arguments = {"queries": Q, "keys": K, "k": 2, "metric": "cosine", "valid": V, "bias": B} | changes
    with pytest.raises(error, match=f"^{message}$"):
        function(**arguments)


@pytest.mark.parametrize("function", [knn, knn_reference])
@pytest.mark.parametrize("k", [np.int64(2), np.uint8(2), torch.tensor(2)], ids=repr)
def test_knn_integral_k_equals_python_k(function, k):
    queries, keys = torch.randn(3, 4).requires_grad_(), torch.randn(5, 4)
    assert_same(function(queries, keys, k), function(queries, keys, 2))
    with torch.no_grad():
        assert_same(function(queries, keys, k), function(queries, keys, 2))


def test_knn_result_too_large_raises_torch_message(reference_only):
    if reference_only:
        pytest.skip("torch allocates the result of the reference")
    with pytest.raises(RuntimeError) as caught:
        knn(torch.zeros(1 << 15, 1), torch.zeros(3, 1), 2**31 - 1)  # half a pebibyte of indices
    assert "allocate" in str(caught.value) and "torch_call_dispatcher" not in str(caught.value)


def test_knn_examples_run():
    failures, examples = doctest.testmod(module)
    assert examples and not failures
