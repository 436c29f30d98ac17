"""knn's search of few queries in one pass over the keys, on the emulator: needs ``pytest --cuda-emulator LIBRARY``."""

import ctypes
import math
from typing import Any

import pytest
import torch
from knn_checks import assert_same, filled
from torch import Tensor

from eaml_ext.ops import Neighbors, knn, knn_reference
from eaml_ext.ops.knn import METRICS


@pytest.fixture(scope="module")
def library(request) -> ctypes.CDLL:
    return ctypes.CDLL(request.config.getoption("--cuda-emulator"))


def is_one_pass(library: ctypes.CDLL, queries: int, size: int, features: int, k: int) -> bool:
    library.eaml_is_one_pass.restype = ctypes.c_bool
    return library.eaml_is_one_pass(*map(ctypes.c_int64, (queries, size, features, k)))


def check(library: ctypes.CDLL, queries: Tensor, keys: Tensor, k: int, **options: Any) -> Neighbors:
    """Assert that a search takes one pass and returns the bits of the reference."""
    assert is_one_pass(library, queries.shape[-2], *keys.shape[-2:], k)
    got = knn(queries, keys, k, **options)
    assert_same(got, knn_reference(queries, keys, k, **options))
    return got


def one_pass(
    library: ctypes.CDLL,
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str = "sqeuclidean",
    blocks: int = 264,
    memories: int = 1 << 30,
) -> tuple[int, Tensor, Neighbors]:
    """Run the one-pass search alone, of any size.

    Args:
        queries: ``(memories, count, features)``.
        keys: ``(memories, size, features)``.
        blocks: the most parts of all memories.
        memories: the most memories of a pass.

    Returns:
        The number of queries of the last pass that needed the direct search; the number of candidates of each query,
        ``(memories, count)``; and the results.
    """
    lead = queries.shape[:2]
    values, indices = torch.empty(*lead, k), torch.empty(*lead, k, dtype=torch.int64)
    counts = torch.zeros(lead, dtype=torch.int64)
    library.eaml_one_pass.restype = ctypes.c_int64
    failed = library.eaml_one_pass(
        *(ctypes.c_void_p(x.data_ptr()) for x in (queries, keys)),
        *map(ctypes.c_int64, (*lead, *keys.shape[-2:], k)),
        METRICS.index(metric),
        *map(ctypes.c_int64, (blocks, memories)),
        *(ctypes.c_void_p(x.data_ptr()) for x in (values, indices, counts)),
    )
    return failed, counts, Neighbors(values, indices)


# ---- shapes and sources of keys ------------------------------------------------------------------------------------

SHAPES = [
    ((1, 1, 1500, 16), 3),  # one query; the last of the parts has few keys
    ((1, 8, 1024, 128), 8),  # aligned rows of four fragments, one tile of queries
    ((2, 16, 1031, 72), 64),  # two tiles of queries, the most neighbours
    ((3, 9, 1040, 33), 5),  # rows that are not aligned
    ((1, 3, 1100, 1), 4),
    ((1, 12, 1300, 450), 8),  # several batches of reads for each row
]


@pytest.mark.parametrize("shape, k", SHAPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_exact_one_pass_of_every_shape_matches_reference(library, shape, k, metric):
    memories, count, size, features = shape
    queries, keys = 3 + torch.randn(memories, count, features), 3 + torch.randn(memories, size, features)
    check(library, queries, keys, k, metric=metric)
    valid, bias = torch.rand(memories, size) < 0.7, torch.randn(memories, size)
    check(library, queries, keys, k, metric=metric, valid=valid, bias=bias)
    check(library, queries, keys[0], k, metric=metric, valid=valid, bias=bias[0])  # memories share keys and bias


@pytest.mark.parametrize("shape, k", SHAPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_exact_one_pass_of_packed_keys_matches_reference(library, shape, k, metric):
    memories, count, size, features = shape
    queries, keys = 3 + torch.randn(memories, count, features), 3 + torch.randn(memories, size, features)
    assert is_one_pass(library, count, size, features, k)
    model = filled(keys, metric=metric)
    assert model.memory._panels is not None
    model.check(queries, k)
    slots = torch.randint(0, size, (memories, 90))
    model.write(slots, 5 + torch.randn(memories, 90, features), torch.randn(memories, 90))
    model.erase(slots[:, :30])
    model.check(queries, k)
    model.check(queries, k, torch.rand(memories, size) < 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_exact_one_pass_of_half_types_matches_reference(library, dtype):
    queries, keys, bias = (torch.randn(*shape).to(dtype) for shape in ((5, 24), (1200, 24), (1200,)))
    check(library, queries, keys, 6, bias=bias)
    filled(keys).check(queries, 6)


def test_exact_one_pass_of_unaligned_keys_matches_reference(library):
    queries, storage = torch.randn(5, 16), torch.randn(1200 * 16 + 1)
    keys = storage[1:].view(1200, 16)
    assert keys.data_ptr() % 16 != 0
    check(library, queries, keys, 6)
    check(library, queries, torch.randn(16, 1200).mT, 6)


def test_one_pass_serves_few_queries_and_neighbors_of_many_keys(library):
    assert is_one_pass(library, 16, 1024, 128, 64)
    assert not is_one_pass(library, 17, 1024, 128, 64)
    assert not is_one_pass(library, 16, 1023, 128, 64)
    assert not is_one_pass(library, 16, 1024, 128, 65)
    assert not is_one_pass(library, 16, 1024, 1 << 14, 64)  # shared memory


# ---- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_exact_one_pass_of_different_keys_selects_few_candidates(library, metric):
    """The bounds exclude all but a few keys of each part, and no query needs the direct search."""
    queries, keys = torch.randn(2, 9, 40) + 30, torch.randn(2, 4000, 40) + 30  # centring subtracts the 30
    for blocks in (2, 16):  # parts of several selections, and of one
        failed, counts, found = one_pass(library, queries, keys, 4, metric, blocks)
        assert_same(found, knn_reference(queries, keys, 4, metric=metric))
        if metric != "cosine":  # cosine does not centre queries
            assert failed == 0
            assert counts.min() >= 4 and counts.float().mean() < 40 * blocks, counts


def test_exact_one_pass_in_several_passes_matches_reference(library):
    queries, keys = torch.randn(5, 3, 6), torch.randn(5, 700, 6)
    queries[[1, 4], 2] = 1e30  # exceeds the bounds
    failed, _, found = one_pass(library, queries, keys, 3, memories=2)
    assert failed == 1
    assert_same(found, knn_reference(queries, keys, 3))


def test_exact_one_pass_with_too_many_candidates_searches_directly(library):
    queries = torch.randn(1, 5, 3)
    for keys, some_fail in ((torch.zeros(1, 2000, 3), True), (torch.randn(1, 20, 3).repeat(1, 100, 1), False)):
        failed, counts, found = one_pass(library, queries, keys, 2, blocks=2)
        assert failed == (5 if some_fail else 0)
        assert (counts == 2000).all() if some_fail else counts.max() < 500, counts
        assert_same(found, knn_reference(queries, keys, 2))


def test_exact_one_pass_of_failed_query_merges_parts_of_many_keys(library):
    queries, keys = torch.randn(1, 1, 2), torch.zeros(1, 33_000, 2)
    keys[0, [9, 20_000, 32_999]] = queries[0]
    failed, _, found = one_pass(library, queries, keys, 5, blocks=4)
    assert failed == 1 and found.indices.tolist() == [[[9, 20_000, 32_999, 0, 1]]]
    assert_same(found, knn_reference(queries, keys, 5))


def test_exact_one_pass_evaluates_more_candidates_than_shared_memory_holds(library):
    """Every key of every part is a candidate: 2000 slots, of which 512 are evaluated at a time."""
    queries, keys = torch.randn(1, 3, 3), torch.zeros(1, 2000, 3)
    failed, counts, found = one_pass(library, queries, keys, 40, blocks=8)
    assert failed == 0 and (counts == 2000).all()
    assert_same(found, knn_reference(queries, keys, 40))


@pytest.mark.parametrize("metric", METRICS)
def test_exact_one_pass_ties_return_lowest_index(library, metric):
    keys = torch.randint(0, 2, (1500, 4)).float()
    check(library, torch.randint(0, 2, (7, 4)).float(), keys, 20, metric=metric)
    found = check(library, torch.zeros(2, 4), torch.zeros(1500, 4), 3, metric=metric)
    assert found.indices.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("live", [0, 1, 5, 40])
def test_exact_one_pass_with_few_valid_keys_matches_reference(library, live):
    valid = torch.zeros(1200, dtype=torch.bool)
    valid[torch.randperm(1200)[:live]] = True
    queries, keys = torch.randn(3, 8), torch.randn(1200, 8)
    keys[~valid] = torch.nan
    found = check(library, queries, keys, 9, valid=valid)
    assert (found.indices >= 0).sum() == 3 * min(live, 9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("features", [16, 13])
@pytest.mark.parametrize("metric", METRICS)
def test_exact_one_pass_of_non_finite_numbers_matches_reference(library, metric, features, bad):
    queries, keys, bias = torch.randn(6, features), torch.randn(1100, features), torch.randn(1100)
    bad_queries, bad_keys, bad_bias, masking = queries.clone(), keys.clone(), bias.clone(), bias.clone()
    bad_queries[1, 2] = bad_keys[0, 0] = bad_keys[50, 3] = bad_bias[7] = bad
    bad_keys[[11, 1099]] = bad
    masking[3:1000] = bad
    for q, x, b in ((bad_queries, keys, bias), (queries, bad_keys, bias), (queries, keys, bad_bias)):
        check(library, q, x, 5, metric=metric, bias=b)
        filled_with(x, b, metric).check(q, 5)
    check(library, queries, keys, 20, metric=metric, bias=masking)


def filled_with(keys: Tensor, bias: Tensor, metric: str) -> Any:
    return filled(keys, metric=metric).write(torch.arange(len(keys)), keys, bias)


@pytest.mark.parametrize("scale", [0, 1e-44, 1e-39, 1e-30, 1e-19, 1e17, 1e25, 1e38])
@pytest.mark.parametrize("metric", METRICS)
def test_exact_one_pass_of_extreme_magnitudes_matches_reference(library, metric, scale):
    queries, keys = torch.randn(3, 8), torch.randn(1100, 8)
    some = torch.where(torch.rand(1100, 1) < 0.1, scale, 1.0) * keys
    for q, x in ((queries, keys * scale), (queries, some), (queries * scale, some), (queries * scale, keys * scale)):
        check(library, q, x, 4, metric=metric)


@pytest.mark.parametrize("norm", [10, 346])
@pytest.mark.parametrize("metric", METRICS)
def test_exact_one_pass_of_offset_clusters_matches_reference(library, metric, norm):
    centre = torch.nn.functional.normalize(torch.randn(64), dim=0) * norm
    queries, keys = (centre + 0.05 * torch.randn(n, 64) for n in (6, 1500))
    check(library, queries, keys, 8, metric=metric)
    check(library, queries, torch.cat([keys, -keys]), 8, metric=metric)
    filled(keys, metric=metric).check(queries, 8)
    failed, counts, _ = one_pass(library, queries[None], keys[None], 8, metric, blocks=4)
    if metric == "sqeuclidean":
        assert failed == 0 and counts.float().mean() < 32 * math.log2(1500)


def unit_keys(mantissas: Tensor, sums: Tensor, features: int) -> Tensor:
    """Return keys of norm 1 whose first 62 features are ``mantissas / 8`` and whose first 64 have the sum ``sums / 8``.

    Args:
        mantissas: ``(size,)``, in [1, 1 + 1/64].
        sums: ``(size,)``, near 63.
    """
    keys = torch.zeros(len(sums), features, dtype=torch.float64)
    keys[:, :62] = mantissas[:, None] / 8
    keys[:, 62] = (sums - 62 * mantissas) / 8
    keys[:, 64] = (1 - keys.square().sum(1)).sqrt()
    return keys.float()


@pytest.mark.parametrize("features", [72, 67], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("metric", METRICS)
def test_exact_one_pass_of_keys_halfway_between_bfloat16_numbers_returns_nearest(library, metric, features):
    """The relative rounding errors are 2^-8, the unit roundoff of bfloat16, and all of one sign."""
    queries, keys = torch.zeros(1, features), torch.zeros(1024, features)  # the keys of the sample are 0
    queries[:, :64] = 1
    down, up = 1 + 2**-8 - 2**-16, 1 + 3 * 2**-8 + 2**-16  # rounded to 1 and to 1 + 2^-6
    sums = torch.tensor([63.02, 63.0], dtype=torch.float64)
    keys[1:3] = unit_keys(torch.tensor([down, up], dtype=torch.float64), sums, features)
    found = check(library, queries, keys, 1, metric=metric)
    assert found.indices.item() == 1
    filled(keys, metric=metric).check(queries, 1)


@pytest.mark.parametrize("features", [72, 67], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("metric", METRICS)
def test_exact_one_pass_of_keys_near_bfloat16_midpoints_matches_reference(library, metric, features):
    """The rounding errors of a key have one sign and exceed the differences between keys."""
    queries = torch.zeros(2, features)
    queries[:, :64] = torch.tensor([[1.0], [-1.0]])
    midpoints, offsets = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8]), torch.tensor([-1, 0, 1]) * 2**-20
    for _ in range(3):
        mantissas = midpoints[torch.randint(2, (1100,))].double() + offsets[torch.randint(3, (1100,))]
        keys = unit_keys(mantissas, 63 + 0.05 * torch.rand(1100, dtype=torch.float64), features)
        keys[:: 1100 // 32] = 0  # the keys of the sample: the centre is 0
        check(library, queries, keys, 6, metric=metric)
        filled(keys, metric=metric).check(queries, 6)


def test_exact_one_pass_of_products_that_tensor_cores_cut_returns_nearest(library):
    """A sum near 1 has the unit 2^-23: a tensor core may round smaller products to zero, or to a whole unit."""
    queries, keys = torch.full((2, 1024), 2**-12), torch.zeros(1024, 1024)
    queries[:, 0], keys[1:3, 0] = 1, 1
    keys[1, 2:] = 255 / 256 * 2**-11  # 1018 units in all
    keys[2, 1], keys[2, 2:] = 1000 * 2**-11, 1 / 256 * 2**-11  # 1004 units in all
    found = check(library, queries, keys, 1, metric="inner_product")
    assert found.indices.tolist() == [[1], [1]]


def test_exact_one_pass_gives_same_bits_for_every_number_of_queries(library):
    queries, keys = torch.randn(16, 24), torch.randn(1300, 24)
    whole = check(library, queries, keys, 7)
    for count in (1, 8, 9):
        assert_same(knn(queries[:count], keys, 7), Neighbors(whole.values[:count], whole.indices[:count]))
