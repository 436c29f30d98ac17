"""Every path through knn's CUDA kernels, on the emulator: needs ``pytest --cuda-emulator LIBRARY``."""

import ctypes
from typing import Any

import pytest
import torch
from knn_checks import assert_same
from torch import Tensor

from eaml_ext.ops import Neighbors, PackedKeys, knn, knn_reference
from eaml_ext.ops.knn import METRICS


@pytest.fixture(scope="module")
def library(request) -> ctypes.CDLL:
    return ctypes.CDLL(request.config.getoption("--cuda-emulator"))


def check(queries: Tensor, keys: Tensor, k: int, **options: Any) -> None:
    assert_same(knn(queries, keys, k, **options), knn_reference(queries, keys, k, **options))


@pytest.mark.parametrize(
    "shape, k",
    [
        ((1, 1, 700, 20), 3),  # one query: direct search, in parts that are merged
        ((1, 1, 700, 21), 300),  # longer lists than one round of pushes; rows that are not aligned
        ((140, 1, 9, 8), 4),  # one part per query
        ((3, 5, 600, 33), 9),  # tiles of 16 queries; memories
        ((1, 70, 300, 10), 1),  # tiles of 64 queries, one of them nearly empty
        ((1, 18, 900, 330), 8),  # six chunks of features: queries stay in shared memory
        ((1, 3, 500, 450), 8),  # eight chunks: queries are loaded again for each tile of keys
        ((1, 17, 1300, 6), 1024),  # lists of all keys
    ],
    ids=str,
)
@pytest.mark.parametrize("metric", METRICS)
def test_exact_search_of_every_shape_matches_reference(library, shape, k, metric):
    memories, count, size, features = shape
    queries, keys = 3 + torch.randn(memories, count, features), 3 + torch.randn(memories, size, features)
    check(queries, keys, k, metric=metric)
    valid, bias = torch.rand(memories, size) < 0.7, torch.randn(memories, size)
    check(queries, keys, k, metric=metric, valid=valid, bias=bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_exact_search_of_other_dtypes_matches_reference(library, dtype):
    for count in (1, 6):
        keys, bias = torch.randn(400, 9).to(dtype), torch.randn(400).to(dtype)
        check(torch.randn(count, 9).to(dtype), keys, 5, bias=bias)


def test_exact_search_of_shared_keys_matches_reference(library):
    """Keys are packed once, and their bounds once per bias."""
    queries, keys = torch.randn(4, 3, 12), torch.randn(500, 12)
    check(queries, keys, 5)
    check(queries, keys, 5, bias=torch.randn(4, 500), valid=torch.rand(4, 500) < 0.5)
    check(queries, keys, 5, bias=torch.randn(500), valid=torch.rand(4, 500) < 0.5)


def filter_search(
    library: ctypes.CDLL, queries: Tensor, keys: Tensor, k: int, metric: str, tiles: int = 1 << 30
) -> tuple[int, Tensor, Neighbors]:
    """Run the filtered search alone.

    Args:
        queries: ``(count, features)``.
        keys: ``(size, features)``.
        tiles: the most tiles of a pass.

    Returns:
        The number of queries of the last pass that needed the direct search; the number of candidates of each query,
        ``(count,)``; and the results.
    """
    values, indices = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    counts = torch.zeros(len(queries), dtype=torch.int32)
    library.eaml_filter.restype = ctypes.c_int64
    sizes = [ctypes.c_int64(n) for n in (len(queries), len(keys), keys.shape[1], k)]
    failed = library.eaml_filter(
        *(ctypes.c_void_p(x.data_ptr()) for x in (queries, keys)),
        None,
        *sizes,
        METRICS.index(metric),
        ctypes.c_int64(tiles),
        *(ctypes.c_void_p(x.data_ptr()) for x in (values, indices, counts)),
    )
    return failed, counts, Neighbors(values, indices)


@pytest.mark.parametrize("metric", METRICS)
def test_exact_filter_of_different_keys_selects_few_candidates(library, metric):
    """The bounds exclude all but a few keys, and no query needs the direct search."""
    queries, keys = torch.randn(20, 40) + 30, torch.randn(3000, 40) + 30  # centring subtracts the 30
    failed, counts, found = filter_search(library, queries, keys, 4, metric)
    assert_same(found, knn_reference(queries, keys, 4, metric=metric))
    assert failed == 0
    if metric != "cosine":  # cosine does not centre queries
        assert counts.min() >= 4 and counts.float().mean() < 300, counts


def test_exact_filter_of_failed_query_merges_parts_of_many_keys(library):
    queries, keys = torch.randn(1, 2), torch.zeros(33_000, 2)
    keys[[9, 20_000, 32_999]] = queries[0]
    failed, _, found = filter_search(library, queries, keys, 5, "sqeuclidean")
    assert failed == 1 and found.indices.tolist() == [[9, 20_000, 32_999, 0, 1]]
    assert_same(found, knn_reference(queries, keys, 5))


@pytest.mark.parametrize("features", [8, 40, 33], ids=["one_vector", "aligned", "unaligned"])
@pytest.mark.parametrize("metric", METRICS)
def test_exact_filter_packs_keys_of_every_magnitude(library, metric, features):
    """Keys without a bound are candidates of every query; subnormal features keep the results exact."""
    queries, keys = torch.randn(20, features), torch.randn(1003, features)
    keys[5], keys[6, 1], keys[1002, features - 1] = torch.nan, torch.inf, -torch.inf
    keys[7], keys[40:60] = 0, keys[40:60] * 1e-40
    keys[100] *= 1e30
    failed, counts, found = filter_search(library, queries, keys, 4, metric)
    assert_same(found, knn_reference(queries, keys, 4, metric=metric))
    assert failed == 0 and counts.min() >= 4 and counts.float().mean() < 500, counts
    check(queries, keys.bfloat16().float(), 4, metric=metric)
    check(queries.bfloat16(), keys.bfloat16(), 4, metric=metric)


def test_exact_filter_in_several_passes_matches_reference(library):
    """A call runs in passes if the lists of all queries exceed the workspace."""
    queries, keys = torch.randn(150, 6), torch.randn(400, 6)
    queries[[3, 70, 149]] = 1e30  # one query in each pass exceeds the bounds
    failed, _, found = filter_search(library, queries, keys, 3, "sqeuclidean", tiles=1)
    assert failed == 1
    assert_same(found, knn_reference(queries, keys, 3))


def test_exact_filter_with_too_many_candidates_searches_directly(library):
    queries, keys = torch.randn(5, 3), torch.randn(40, 3).repeat(100, 1)
    failed, counts, found = filter_search(library, queries, keys, 2, "sqeuclidean")
    assert failed == 0 and counts.max() < 4000
    assert_same(found, knn_reference(queries, keys, 2))
    keys = torch.zeros(4000, 3)
    failed, counts, found = filter_search(library, queries, keys, 2, "sqeuclidean")
    assert failed == 5 and counts.min() == 4000
    assert_same(found, knn_reference(queries, keys, 2))
    queries[3] = 1e30  # exceeds the bounds
    failed, _, found = filter_search(library, queries, torch.randn(4000, 3), 2, "sqeuclidean")
    assert failed == 1


@pytest.mark.parametrize("metric", METRICS)
def test_exact_packed_keys_after_writes_and_erasures_match_reference(library, metric):
    """Slots are written repeatedly and erased, and the centre must move; some memories are empty."""
    memory = PackedKeys(200, 7, memories=3, metric=metric)
    assert memory._panels is not None
    keys, bias, live = torch.zeros(3, 200, 7), torch.zeros(3, 200), torch.zeros(3, 200, dtype=torch.bool)
    for i in range(4):
        slots, new = torch.randint(0, 200, (3, 90)), torch.randn(3, 90, 7) + 40 * i
        weights = torch.randn(3, 90)
        memory.write(slots, new, weights)
        for m in range(3):
            for j, slot in enumerate(slots[m].tolist()):
                keys[m, slot], bias[m, slot], live[m, slot] = new[m, j], weights[m, j], True
        gone = slots[:, :20]
        memory.erase(gone)
        live.scatter_(1, gone, False)
        queries = torch.randn(3, 5, 7) + 40 * i
        want = knn_reference(queries, keys, 6, metric=metric, valid=live, bias=bias)
        assert_same(memory.search(queries, 6), want)
    scaled = (torch.nn.functional.normalize(keys, dim=-1) if metric == "cosine" else keys).double()
    assert memory._state is not None
    for state, rows in ((s, x[v]) for s, x, v in zip(memory._state, scaled, live, strict=True)):
        offsets = rows - state[:7]
        torch.testing.assert_close(state[7:14], offsets.sum(0), rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(state[14], offsets.square().sum(), rtol=1e-3, atol=1e-2)
        assert state[15] == len(rows)
    memory.load_state_dict(memory.state_dict())
    assert_same(memory.search(queries, 6), want)
    for state, rows in ((s, x[v]) for s, x, v in zip(memory._state, scaled, live, strict=True)):
        torch.testing.assert_close(state[:7], rows.mean(0), rtol=1e-4, atol=1e-4)


def test_slots_that_do_not_exist_are_skipped(library):
    """A captured graph does not check slots."""
    memory = PackedKeys(40, 3)
    memory._update(torch.tensor([-1, 3, 40, 1 << 40]), torch.ones(4, 3), None)
    assert len(memory) == 1 and memory.search(torch.zeros(1, 3), 2).indices.tolist() == [[3, -1]]


def test_more_neighbors_than_the_kernels_find_raises(library):
    with pytest.raises(ValueError, match="knn: k is 1025, the CUDA kernels find up to 1024"):
        knn(torch.randn(1, 2), torch.randn(2000, 2), 1025)
