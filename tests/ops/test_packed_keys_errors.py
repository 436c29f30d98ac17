"""PackedKeys rejects invalid arguments in one sentence that names the argument, and changes nothing."""

import pickle

import numpy as np
import pytest
import torch
from knn_checks import assert_same, filled

from eaml_ext.ops import PackedKeys


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
def test_packed_keys_invalid_argument_raises(changes, error, message):
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
def test_packed_keys_invalid_call_raises_and_changes_nothing(method, arguments, error, message):
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


def test_knn_write_mismatched_arguments_raise(reference_only, on_cuda_emulator):
    if reference_only and not on_cuda_emulator:
        pytest.skip("the reference never reads out of bounds: it fails where torch does")
    memory = filled(torch.randn(40, 4)).memory
    contents = [memory._keys, memory._bias, memory._live, memory._panels, memory._state]
    slots, keys = torch.tensor([1]), torch.randn(1, 4)
    wrongs = [*((i, contents[i][:-1]) for i in range(5)), (6, keys[:, :3])]
    if not on_cuda_emulator:  # CUDA kernels skip such slots, because a check would synchronise
        wrongs.append((5, torch.tensor([40])))
    for wrong in wrongs:
        arguments = [*contents, slots, keys]
        arguments[wrong[0]] = wrong[1]
        with pytest.raises((ValueError, RuntimeError), match="knn_write: arguments do not fit each other"):
            torch.ops.eaml_ext.knn_write.default(*arguments[:5], 0, *arguments[5:], None)
    with pytest.raises((ValueError, RuntimeError), match="knn: arguments do not fit each other"):
        rest = None, None, memory._panels[:-1], memory._state
        torch.ops.eaml_ext.knn.default(keys, memory._keys, 1, 0, *rest)
