"""pytorch3d's and torch_cluster's options of nearest neighbours, on oracles in float64 and integers."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from parametrisations import FLAG, FLOATS, _one_thread, assert_near, covering, label, opmath_dtype, product  # noqa: F401
from torch import Tensor

from eaml_ext.ops import PackedKeys, knn

METRICS = ("sqeuclidean", "cosine", "inner_product")


# ---- pytorch3d: knn_points ---------------------------------------------------------------------------------------


class Clouds(NamedTuple):
    """``points`` is "random", "repeated" (each key about three times) or "lattice": integer coordinates with ties."""

    batch: int | None
    P1: int
    P2: int
    D: int
    K: int
    dtype: torch.dtype
    metric: str
    points: str
    ragged: bool


CLOUDS: dict[str, Sequence[Any]] = {
    "batch": (None, 1, 5),
    "P1": (1, 9, 40),
    "P2": (1, 12, 70),
    "D": (1, 2, 3, 8, 19),
    "K": (1, 4, 11, 80),
    "dtype": FLOATS,
    "metric": METRICS,
    "points": ("random", "repeated", "lattice"),
    "ragged": FLAG,
}


def knn_formula(query: Tensor, key: Tensor, metric: str) -> Tensor:
    """Return the values of broadcast pairs."""
    if metric == "sqeuclidean":
        return (query - key).square().sum(-1)
    value = (query * key).sum(-1)
    return value if metric == "inner_product" else value / (query.norm(dim=-1) * key.norm(dim=-1))


def knn_slopes(query: Tensor, key: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Return the summed absolute terms of the derivatives with respect to query and key."""
    if metric == "sqeuclidean":
        return 2 * (query - key).abs(), 2 * (query - key).abs()
    if metric == "inner_product":
        return key.abs().expand(torch.broadcast_shapes(query.shape, key.shape)), query.abs().expand_as(key)
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
    cosine = (a * b).sum(-1, keepdim=True).abs()
    by_query, by_key = b.abs() + cosine * a.abs(), a.abs() + cosine * b.abs()
    return by_query / query.norm(dim=-1, keepdim=True), by_key / key.norm(dim=-1, keepdim=True)


def nearest(values: Tensor, k: int, metric: str, valid: Tensor | None) -> Tensor:
    """Return indices ``(*, k)`` of values ``(*, M)``, best first, ties by index; -1 after the last valid one."""
    worse = values if metric == "sqeuclidean" else -values
    live = torch.ones_like(values, dtype=torch.bool) if valid is None else valid.expand_as(values)
    found = []
    for row, allowed in zip(worse.flatten(0, -2).tolist(), live.flatten(0, -2).tolist(), strict=True):
        best = sorted((j for j, is_live in enumerate(allowed) if is_live), key=row.__getitem__)[:k]
        found.append(best + [-1] * (k - len(best)))
    return torch.tensor(found).reshape(*values.shape[:-1], k)


def drawn_points(case: Clouds, count: int) -> Tensor:
    shape = (case.batch or 1, count, case.D)
    if case.points == "lattice":  # for cosines the corners of a cube, whose equal norms make ties exact
        points = 2 * torch.randint(2, shape) - 1 if case.metric == "cosine" else torch.randint(-2, 3, shape)
    elif case.points == "repeated":
        points = torch.randn(shape)[:, torch.randint(-(-count // 3), (count,))]
    else:
        points = torch.randn(shape)
    return points.to(case.dtype)


def check_clouds(case: Clouds, device: str) -> None:
    queries, keys = drawn_points(case, case.P1), drawn_points(case, case.P2)
    if case.points == "repeated":
        queries[:, ::2] = keys[:, :1]
    valid, used = torch.ones(keys.shape[:2], dtype=torch.bool), torch.ones(queries.shape[:2], dtype=torch.bool)
    if case.ragged:  # a cloud of keys may be empty; padding is NaN
        valid = torch.arange(case.P2) < torch.randint(case.P2 + 1, (len(keys), 1))
        used = torch.arange(case.P1) < torch.randint(1, case.P1 + 1, (len(keys), 1))
        queries[~used] = 1e3

    q, key = (x.double().requires_grad_() for x in (queries, keys))
    opmath = opmath_dtype(case.dtype)
    everything = knn_formula(q[:, :, None], key[:, None], case.metric)
    indices = nearest(everything.to(opmath), case.K, case.metric, valid[:, None])
    near, pairs = key[torch.arange(len(key))[:, None, None], indices.clamp(min=0)], q[:, :, None]
    values, live = knn_formula(pairs, near, case.metric), indices >= 0
    real = live & used[..., None]
    cotangent = torch.where(used[..., None], torch.randn(values.shape), 0).to(case.dtype)
    exact = torch.where(real, cotangent.double(), 0)  # absent neighbours have no gradient
    want = torch.autograd.grad(values, (q, key), exact, retain_graph=True)
    by_query, by_key = (slope.detach() for slope in knn_slopes(pairs, near, case.metric))
    magnitudes = torch.autograd.grad(by_query * pairs + by_key * near, (q, key), exact.abs()[..., None].expand_as(near))

    def given(x: Tensor) -> Tensor:
        return (x[0] if case.batch is None else x).to(device)

    leaves = [given(x).requires_grad_() for x in (queries, keys.masked_fill(~valid[..., None], torch.nan))]
    found = knn(*leaves, case.K, metric=case.metric, valid=given(valid) if case.ragged else None)
    got = torch.autograd.grad(found.values, leaves, given(cotangent))
    assert found.values.dtype == case.dtype and torch.equal(found.indices, given(indices))
    found_values = found.values.cpu().reshape(values.shape)
    assert (found_values[~live] == (torch.inf if case.metric == "sqeuclidean" else -torch.inf)).all()
    terms = values.abs() if case.metric == "sqeuclidean" else knn_formula(pairs.abs(), near.abs(), case.metric)
    # Values are summed in float64 and rounded once; half types are rounded to float32 first.
    rounding = (case.D + 4, torch.float64) if opmath == case.dtype else (0.5, opmath)
    assert_near("values", found_values[real], values[real], terms[real], *rounding)
    terms_of = {"d queries": case.K, "d keys": case.P1}
    for (name, count), gradient, expected, summed in zip(terms_of.items(), got, want, magnitudes, strict=True):
        assert_near(name, gradient.reshape(expected.shape), expected, summed, count + case.D + 8, opmath)


@pytest.mark.parametrize("case", [Clouds(*row) for row in covering(CLOUDS)], ids=label)
def test_knn_pytorch3d_options_match_float64_formula(case: Clouds, device: str) -> None:
    check_clouds(case, device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_knn_every_combination_of_pytorch3d_options_matches_float64_formula(
    dtype: torch.dtype, metric: str, device: str
) -> None:
    for case in product(Clouds, CLOUDS, dtype=[dtype], metric=[metric], P1=[9]):
        check_clouds(case, device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_knn_key_of_many_queries_gradient_is_rounded_once(dtype: torch.dtype, device: str) -> None:
    queries, cotangent = torch.randn(900, 3).to(dtype), (1 + torch.rand(900, 1)).to(dtype)
    keys = torch.tensor([[0.25, -0.5, 0.125], [80.0, 80.0, 80.0]], dtype=dtype)
    x = [value.to(device).requires_grad_() for value in (queries, keys, torch.zeros(2, dtype=dtype))]
    found = knn(x[0], x[1], 1, bias=x[2])
    assert (found.indices == 0).all()
    _, by_keys, by_bias = torch.autograd.grad(found.values, x, cotangent.to(device))
    terms = 2 * (keys[0].double() - queries.double()) * cotangent.double()
    sums = (terms.sum(0), terms.abs().sum(0)), (-cotangent.double().sum(), cotangent.double().sum())
    for name, gradient, (want, magnitude) in zip(("d keys", "d bias"), (by_keys, by_bias), sums, strict=True):
        assert_near(name, gradient[0], want, magnitude, roundings=900, accumulated=opmath_dtype(dtype))
        assert not gradient[1].any()


# ---- torch_cluster: knn, knn_graph, nearest ----------------------------------------------------------------------


class Graph(NamedTuple):
    """``batches`` is a key of BATCHES."""

    dtype: torch.dtype
    metric: str
    D: int
    k: int
    batches: str


BATCHES = {  # the example of each key, the example of each query
    "one": ([0] * 15, [0] * 7),
    "sorted": ([0] * 4 + [1] * 9 + [2] * 2, [0] * 3 + [1] + [2] * 3),
    "skipping": ([0] * 6 + [3] * 8 + [7], [0, 3, 3, 5, 7]),
    "interleaved": ([2, 0, 1] * 5, [1, 0, 0, 2, 1, 2]),
}
GRAPH: dict[str, Sequence[Any]] = {
    "dtype": FLOATS,
    "metric": METRICS,
    "D": (1, 2, 3, 9),
    "k": (1, 3, 12),
    "batches": tuple(BATCHES),
}
Edge = tuple[int, int, float]


def integer_points(count: int, D: int, metric: str) -> list[list[int]]:
    """Draw small integers, some points twice; for cosines the corners of a cube."""
    points = 2 * torch.randint(2, (count, D)) - 1 if metric == "cosine" else torch.randint(-2, 3, (count, D))
    return points.tolist()


def integer_edges(
    x: list[list[int]],
    y: list[list[int]],
    k: int,
    metric: str,
    batch_x: list[int],
    batch_y: list[int],
    loop: bool = True,
) -> list[Edge]:
    """Return edges (i, j, value) from y_i to the ``k`` nearest x_j of its example, in integers; ties by index."""
    edges = []
    for i, center in enumerate(y):
        if metric == "sqeuclidean":
            score = [sum((a - b) ** 2 for a, b in zip(center, point, strict=True)) for point in x]
        else:
            score = [-sum(a * b for a, b in zip(center, point, strict=True)) for point in x]
        same = [j for j in range(len(x)) if batch_x[j] == batch_y[i] and (loop or j != i)]
        for j in sorted(same, key=score.__getitem__)[:k]:
            value = score[j] if metric == "sqeuclidean" else -score[j]
            edges.append((i, j, value / len(center) if metric == "cosine" else value))
    return edges


def assert_edges(got: Iterable[Edge], want: list[Edge], metric: str, dtype: torch.dtype) -> None:
    got = list(got)
    assert [edge[:2] for edge in got] == [edge[:2] for edge in want]
    rtol = torch.finfo(dtype).eps if metric == "cosine" else 0  # integers and their sums are exact in every dtype
    values = (torch.tensor([edge[2] for edge in edges], dtype=torch.float64) for edges in (got, want))
    torch.testing.assert_close(*values, rtol=rtol, atol=0)


def edges_of(values: Tensor, indices: Tensor) -> Iterable[Edge]:
    """Yield the edges of the neighbours ``(Q, k)`` that exist."""
    for i, (row, found) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        yield from ((i, j, value) for value, j in zip(row, found, strict=True) if j >= 0)


@pytest.mark.parametrize("case", [Graph(*row) for row in covering(GRAPH)], ids=label)
def test_knn_batch_vector_as_mask_matches_integer_search(case: Graph, device: str) -> None:
    batch_x, batch_y = BATCHES[case.batches]
    x, y = (integer_points(len(batch), case.D, case.metric) for batch in (batch_x, batch_y))
    keys, queries = (torch.tensor(points, dtype=case.dtype, device=device) for points in (x, y))
    valid = torch.tensor(batch_y)[:, None] == torch.tensor(batch_x)
    found = knn(queries[:, None], keys, case.k, metric=case.metric, valid=valid.to(device))
    want = integer_edges(x, y, case.k, case.metric, batch_x, batch_y)
    assert want
    assert_edges(edges_of(*(out[:, 0] for out in found)), want, case.metric, case.dtype)


@pytest.mark.parametrize("case", [Graph(*row) for row in covering(GRAPH)], ids=label)
def test_knn_batch_vector_as_memories_matches_integer_search(case: Graph, device: str) -> None:
    batch_x, batch_y = BATCHES[case.batches]
    x, y = (integer_points(len(batch), case.D, case.metric) for batch in (batch_x, batch_y))
    examples = sorted({*batch_x, *batch_y})
    members_x, members_y = (
        [[i for i, b in enumerate(batch) if b == example] for example in examples] for batch in (batch_x, batch_y)
    )

    def padded(points: list[list[int]], members: list[list[int]]) -> Tensor:
        width = max(map(len, members))
        rows = [[points[i] for i in row] + [[5] * case.D] * (width - len(row)) for row in members]
        return torch.tensor(rows, dtype=case.dtype, device=device)

    keys, queries = padded(x, members_x), padded(y, members_y)
    slots = torch.arange(keys.shape[1], device=device)
    valid = slots < torch.tensor([[len(row)] for row in members_x], device=device)
    memory = PackedKeys(
        keys.shape[1] + 1, case.D, memories=len(examples), metric=case.metric, dtype=case.dtype, device=device
    )
    memory.write(slots.where(valid, keys.shape[1]), keys)  # padding goes to the last slot
    memory.erase(torch.full((len(examples), 1), keys.shape[1], device=device))
    assert len(memory) == len(x)

    want = integer_edges(x, y, case.k, case.metric, batch_x, batch_y)
    for found in (knn(queries, keys, case.k, metric=case.metric, valid=valid), memory.search(queries, case.k)):
        got = []
        for members, centers, values, indices in zip(members_x, members_y, *found, strict=True):
            edges = edges_of(values[: len(centers)], indices[: len(centers)])
            got += [(centers[i], members[j], value) for i, j, value in edges]
        assert_edges(sorted(got, key=lambda edge: edge[0]), want, case.metric, case.dtype)


@pytest.mark.parametrize("loop", FLAG)
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("metric", METRICS)
def test_knn_graph_loops_masked_matches_integer_search(metric: str, batches: str, loop: bool, device: str) -> None:
    batch, _ = BATCHES[batches]
    points = integer_points(len(batch), 2, metric)
    x = torch.tensor(points, dtype=torch.float32, device=device)
    valid = torch.tensor(batch)[:, None] == torch.tensor(batch)
    if not loop:
        valid.fill_diagonal_(False)
    found = knn(x[:, None], x, 5, metric=metric, valid=valid.to(device))
    want = integer_edges(points, points, 5, metric, batch, batch, loop)
    assert_edges(edges_of(*(out[:, 0] for out in found)), want, metric, x.dtype)
    assert loop or all(i != j for i, j, _ in want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_knn_nearest_of_tied_points_returns_first(dtype: torch.dtype, device: str) -> None:
    x = torch.tensor([[3, 0], [0, 3], [0, -3], [-3, 0], [3, 0], [1, 1]], dtype=dtype, device=device)
    y = torch.tensor([[0, 0], [2, 2], [0, -2], [4, 0], [0, 0]], dtype=dtype, device=device)
    batch_x, batch_y = torch.tensor([0, 0, 0, 1, 1, 1], device=device), torch.tensor([0, 0, 0, 1, 2], device=device)
    found = knn(y[:, None], x, 1, valid=batch_y[:, None] == batch_x)
    assert found.indices.flatten().tolist() == [0, 0, 2, 4, -1]
    assert found.values.flatten().tolist() == [9, 5, 1, 1, torch.inf]


def test_knn_graph_of_many_points_matches_float64_search(device: str) -> None:
    x = torch.randn(700, 3, device=device)
    found = knn(x, x, 6)
    exact = x.cpu().double()
    values = knn_formula(exact[:, None], exact, "sqeuclidean")
    assert torch.equal(found.indices.cpu(), nearest(values.float(), 6, "sqeuclidean", None))
    assert torch.equal(found.indices[:, 0].cpu(), torch.arange(700)) and not found.values[:, 0].any()
