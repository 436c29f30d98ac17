"""Every way through knn's CUDA kernels, on the stand-in: with ``pytest --cuda-emulator LIBRARY`` alone."""

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from eaml_ext.ops import Neighbors, PackedKeys, knn, knn_reference
from eaml_ext.ops.knn import METRICS


@pytest.fixture(scope="module")
def library(request) -> ctypes.CDLL:
    path = request.config.getoption("--cuda-emulator")
    if path is None:
        pytest.skip("needs --cuda-emulator: make cuda-emulator")
    return ctypes.CDLL(path)


def assert_same(got: Neighbors, want: Neighbors) -> None:
    """Equal bit for bit, up to the sign of zero and NaN payloads."""
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.values, want.values, rtol=0, atol=0, equal_nan=True)


def check(queries: Tensor, keys: Tensor, k: int, **options: Any) -> None:
    assert_same(knn(queries, keys, k, **options), knn_reference(queries, keys, k, **options))


@pytest.mark.parametrize(
    "shape, k",
    [
        ((1, 1, 700, 20), 3),  # one query: rows, in parts that are merged
        ((1, 1, 700, 21), 300),  # more of a part's best than one round brings; rows that are not aligned
        ((140, 1, 9, 8), 4),  # a part each
        ((3, 5, 600, 33), 9),  # tiles of 16 queries; memories
        ((1, 70, 300, 10), 1),  # tiles of 64 queries, one of them nearly empty
        ((1, 18, 900, 330), 8),  # six chunks of features: queries stay
        ((1, 3, 500, 450), 8),  # eight: queries come along with the keys
        ((1, 17, 1300, 6), 1024),  # a list of all keys
    ],
    ids=str,
)
@pytest.mark.parametrize("metric", METRICS)
def test_exact_results(library, shape, k, metric):
    memories, count, size, features = shape
    queries, keys = 3 + torch.randn(memories, count, features), 3 + torch.randn(memories, size, features)
    check(queries, keys, k, metric=metric)
    valid, bias = torch.rand(memories, size) < 0.7, torch.randn(memories, size)
    check(queries, keys, k, metric=metric, valid=valid, bias=bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_exact_other_dtypes(library, dtype):
    for count in (1, 6):
        keys, bias = torch.randn(400, 9).to(dtype), torch.randn(400).to(dtype)
        check(torch.randn(count, 9).to(dtype), keys, 5, bias=bias)


def test_exact_with_keys_of_all_memories(library):
    """Keys are packed once, their bounds for each memory's bias."""
    queries, keys = torch.randn(4, 3, 12), torch.randn(500, 12)
    check(queries, keys, 5)
    check(queries, keys, 5, bias=torch.randn(4, 500), valid=torch.rand(4, 500) < 0.5)
    check(queries, keys, 5, bias=torch.randn(500), valid=torch.rand(4, 500) < 0.5)


def screen(
    library: ctypes.CDLL, queries: Tensor, keys: Tensor, k: int, metric: str, tiles: int = 1 << 30
) -> tuple[int, Tensor, Neighbors]:
    """How many queries the screen gives up, how many candidates it finds for each, and the results."""
    values, indices = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    counts = torch.zeros(len(queries), dtype=torch.int32)
    library.eaml_screen.restype = ctypes.c_int64
    sizes = [ctypes.c_int64(n) for n in (len(queries), len(keys), keys.shape[1], k)]
    failed = library.eaml_screen(
        *(ctypes.c_void_p(x.data_ptr()) for x in (queries, keys)),
        None,
        *sizes,
        METRICS.index(metric),
        ctypes.c_int64(tiles),
        *(ctypes.c_void_p(x.data_ptr()) for x in (values, indices, counts)),
    )
    return failed, counts, Neighbors(values, indices)


@pytest.mark.parametrize("metric", METRICS)
def test_exact_on_short_lists(library, metric):
    """Of keys that differ, all but a few are left out by their bounds; none of the queries is given up."""
    queries, keys = torch.randn(20, 40) + 30, torch.randn(3000, 40) + 30  # centring takes the 30 away
    failed, counts, found = screen(library, queries, keys, 4, metric)
    assert_same(found, knn_reference(queries, keys, 4, metric=metric))
    assert failed == 0
    if metric != "cosine":  # whose queries are not centred
        assert counts.min() >= 4 and counts.float().mean() < 300, counts


def test_exact_in_several_passes(library):
    """As where the lists of all queries would take too much memory."""
    queries, keys = torch.randn(150, 6), torch.randn(400, 6)
    queries[[3, 70, 149]] = 1e30  # given up, one in each pass
    failed, _, found = screen(library, queries, keys, 3, "sqeuclidean", tiles=1)
    assert failed == 1
    assert_same(found, knn_reference(queries, keys, 3))


def test_exact_where_lists_overflow(library):
    queries, keys = torch.randn(5, 3), torch.randn(40, 3).repeat(100, 1)
    failed, counts, found = screen(library, queries, keys, 2, "sqeuclidean")
    assert failed == 0 and counts.max() < 4000
    assert_same(found, knn_reference(queries, keys, 2))
    keys = torch.zeros(4000, 3)
    failed, counts, found = screen(library, queries, keys, 2, "sqeuclidean")
    assert failed == 5 and counts.min() == 4000
    assert_same(found, knn_reference(queries, keys, 2))
    queries[3] = 1e30  # no bound holds
    failed, _, found = screen(library, queries, torch.randn(4000, 3), 2, "sqeuclidean")
    assert failed == 1


@pytest.mark.parametrize("metric", METRICS)
def test_exact_in_packed_keys(library, metric):
    """Writes over writes, erasures, and a centre that has to move; some memories are empty."""
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


def test_slots_that_do_not_exist_are_left_out(library):
    """As a captured graph may ask for."""
    memory = PackedKeys(40, 3)
    memory._change(torch.tensor([-1, 3, 40, 1 << 40]), torch.ones(4, 3), None)
    assert len(memory) == 1 and memory.search(torch.zeros(1, 3), 2).indices.tolist() == [[3, -1]]


def test_more_neighbors_than_the_kernels_find(library):
    with pytest.raises(ValueError, match="knn: k is 1025, the CUDA kernels find up to 1024"):
        knn(torch.randn(1, 2), torch.randn(2000, 2), 1025)
