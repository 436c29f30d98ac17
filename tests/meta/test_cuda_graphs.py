"""Capture and replay of functions, on a graph of recorded operations in place of a CUDA graph."""

import contextlib
import copy
import pickle
import threading
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recorded_graph import RecordingCapturer
from torch import nn

from eaml_ext.meta._cuda_graphs import GraphCache
from eaml_ext.meta._python_state import PythonState
from eaml_ext.ops import split_invariant

FAILED = "^Test: no CUDA graph can be captured, kernels are launched one by one: "


def cache(**options):
    return GraphCache("Test", RecordingCapturer, **options)


def affine(x):
    return [2 * x + 1, x.sum()]


def test_graph_cache_second_call_replays_with_new_inputs():
    graphs, calls = cache(), []

    def function(x):
        calls.append(None)
        return affine(x)

    for i in range(6):
        x = torch.randn(3, 4)
        torch.testing.assert_close(graphs.run(function, "key", [x]), affine(x), rtol=0, atol=0)
        assert (len(graphs), graphs.replays) == ((0, 0) if i == 0 else (1, i))
    assert len(calls) == 3  # as usual, the check, the capture


def test_graph_cache_results_outlive_later_replays():
    graphs, x = cache(), torch.ones(3)
    results = [graphs.run(affine, None, [i * x])[0] for i in range(5)]
    assert [float(r[0]) for r in results] == [1, 3, 5, 7, 9]


def test_graph_cache_inputs_may_change_after_call():
    graphs, x = cache(), torch.ones(3)
    for _ in range(3):
        graphs.run(affine, None, [x])
    x.fill_(7.0)
    assert graphs.run(affine, None, [torch.zeros(3)])[0].tolist() == [1, 1, 1] and x.tolist() == [7, 7, 7]


def test_graph_cache_many_shapes_keeps_the_latest():
    graphs = cache(max_graphs=2)
    for size in (1, 2, 1, 2, 3, 3, 1, 2, 3, 2, 3):
        x = torch.randn(size)
        assert torch.equal(graphs.run(affine, None, [x])[0], 2 * x + 1)
        assert len(graphs) <= 2
    assert graphs.replays > 3


def test_graph_cache_too_many_shapes_drops_the_least_recently_used():
    graphs = cache(max_graphs=2)
    for size in (1, 1, 2, 2, 1, 3):
        graphs.run(affine, None, [torch.ones(size)])
    before = graphs.replays
    for size, kept in ((1, True), (2, False)):
        graphs.run(affine, None, [torch.ones(size)])
        assert graphs.replays == before + 1, f"{size} was {'dropped' if kept else 'kept'}"


@pytest.mark.parametrize(
    "setting", [lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad, torch.inference_mode]
)
def test_graph_cache_other_settings_have_graphs_of_their_own(setting):
    graphs, x = cache(), torch.randn(3, 3)
    for _ in range(3):
        for context in (nullcontext, setting):
            with context():
                got = graphs.run(lambda x: [x @ x], None, [x])[0]
                assert torch.equal(got, x @ x) and got.dtype == (x @ x).dtype
    assert len(graphs) == 2


def test_graph_cache_nests_of_other_structure_have_graphs_of_their_own():
    graphs, x = cache(), torch.ones(2)

    def function(nest):
        return [nest["a"] * 2 if nest["b"] is None else nest["b"] * nest["c"][0]]

    for _ in range(3):
        for nest, want in (
            ({"a": x, "b": None, "c": [3]}, 2 * x),
            ({"a": None, "b": x, "c": [3]}, 3 * x),
            ({"a": None, "b": x, "c": [5]}, 5 * x),
        ):
            assert torch.equal(graphs.run_nested(function, None, nest)[0], want)
    assert len(graphs) == 3


def test_graph_cache_shapes_that_occur_once_are_not_captured():
    graphs = cache()
    for size in range(1, 9):
        graphs.run(affine, None, [torch.ones(size)])
    assert len(graphs) == 0


@pytest.mark.parametrize(
    "change",
    [lambda x: x.double(), lambda x: x[:2], lambda x: x.requires_grad_(), None],
    ids=["dtype", "shape", "grad", "key"],
)
def test_graph_cache_other_calls_have_graphs_of_their_own(change):
    graphs, x = cache(), torch.randn(3)
    other = x if change is None else change(x.clone())
    for _ in range(3):
        for y, key in ((x, "a"), (other, "b" if change is None else "a")):
            results = graphs.run(affine, key, [y])
            assert torch.equal(results[0], 2 * y + 1) and results[0].dtype == y.dtype
    assert len(graphs) == (1 if x.shape == other.shape and x.dtype == other.dtype and change else 2)


@pytest.mark.parametrize("move", ["data", "cast", "assign"])
def test_graph_cache_moved_parameter_is_captured_again(move):
    graphs, layer = cache(), nn.Linear(2, 2)

    def function(x):
        return [layer(x.to(layer.weight.dtype)).detach()]

    def check():
        x = torch.randn(3, 2)
        with torch.no_grad():
            want = layer(x.to(layer.weight.dtype))
        assert torch.equal(graphs.run(function, None, [x], list(layer.parameters()))[0], want)

    for _ in range(4):
        check()
    with torch.no_grad():
        layer.weight.add_(1.0)
    layer.load_state_dict({name: 2 * t for name, t in layer.state_dict().items()})
    check()
    assert graphs.replays == 4  # in place: the same graph
    if move == "data":
        layer.weight.data = torch.randn(2, 2)
    elif move == "cast":
        layer.double()
    else:
        layer.load_state_dict({name: t.clone() for name, t in layer.state_dict().items()}, assign=True)
    for _ in range(3):
        check()
    assert graphs.replays == 6 and len(graphs) == 1


def test_graph_cache_buffers_are_updated_once_per_call():
    graphs, norms = cache(), [nn.BatchNorm1d(2) for _ in range(2)]
    norms[1].load_state_dict(norms[0].state_dict())
    for _ in range(5):
        x = torch.randn(8, 2)
        got = graphs.run(lambda x: [norms[0](x).detach()], None, [x], PythonState(norms[0]).tensors)
        assert torch.equal(got[0], norms[1](x))
        for a, b in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
            assert torch.equal(a, b)
    assert graphs.replays == 4


def test_graph_cache_random_numbers_are_those_of_usual_calls():
    graphs = cache()

    def function(x):
        return [nn.functional.dropout(x, 0.5)]

    x = torch.ones(100)
    torch.manual_seed(3)
    got = [graphs.run(function, None, [x])[0] for _ in range(5)]
    torch.manual_seed(3)
    assert all(torch.equal(y, function(x)[0]) for y in got) and graphs.replays == 4


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x * x.sum().item()],
        lambda x: [x[x > 0]],
        lambda x: [x + 1 if x.sum() > 0 else x],
        lambda x: [x.nonzero()],
        lambda x: [torch.zeros_like(x).index_put_((x > 0,), torch.ones(()))],
    ],
    ids=["item", "mask", "branch", "nonzero", "write"],
)
def test_graph_cache_function_that_reads_numbers_runs_as_usual_after_one_warning(function):
    graphs, x = cache(), torch.ones(3)
    graphs.run(function, None, [x])
    with pytest.warns(RuntimeWarning, match=FAILED + ".*waits for the GPU"):
        assert torch.equal(graphs.run(function, None, [x])[0], function(x)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert torch.equal(graphs.run(function, "other", [-x])[0], function(-x)[0])
    assert len(graphs) == 0 and not graphs.serves(x.device)


def test_graph_cache_error_of_function_is_raised_and_forgotten():
    graphs, x = cache(), torch.ones(3)

    def broken(x):
        raise ValueError("no loss")

    for _ in range(3):
        with pytest.raises(ValueError, match=r"^no loss$"):
            graphs.run(broken, None, [x])
    assert graphs.serves(x.device)


def test_graph_cache_not_ready_or_under_transform_runs_as_usual(monkeypatch):
    graphs, x = cache(), torch.ones(3)
    for _ in range(3):
        graphs.run(affine, None, [x])
    assert graphs.replays == 2
    torch.func.vmap(lambda x: graphs.run(affine, None, [x])[0])(torch.ones(2, 3))
    monkeypatch.setattr(RecordingCapturer, "stream", None)
    assert torch.equal(graphs.run(affine, None, [x])[0], 2 * x + 1)
    assert graphs.replays == 2


def test_graph_cache_two_threads_at_once_run_one_as_usual():
    graphs, entered, leave = cache(), threading.Event(), threading.Event()

    def slow(x):
        entered.set()
        leave.wait(10)
        return affine(x)

    thread = threading.Thread(target=graphs.run, args=(slow, None, [torch.ones(3)]))
    thread.start()
    assert entered.wait(10)
    assert torch.equal(graphs.run(affine, None, [torch.zeros(3)])[0], torch.ones(3))
    leave.set()
    thread.join()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda graphs: pickle.loads(pickle.dumps(graphs))])
def test_graph_cache_copies_are_empty(copied):
    graphs = cache(max_graphs=5)
    for _ in range(3):
        graphs.run(affine, None, [torch.ones(3)])
    other = copied(graphs)
    assert len(other) == other.replays == 0 and other._max_graphs == 5 and len(graphs) == 1
    assert torch.equal(other.run(affine, None, [torch.ones(3)])[0], torch.full((3,), 3.0))


def test_graph_cache_error_of_function_while_it_is_checked_is_raised_and_does_not_end_captures():
    graphs, x, calls = cache(), torch.ones(3), []

    def flaky(x):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("no loss")
        return affine(x)

    graphs.run(flaky, None, [x])
    with pytest.raises(RuntimeError, match=r"^no loss$"):
        graphs.run(flaky, None, [x])
    assert len(calls) == 2 and graphs.serves(x.device)
    for _ in range(3):
        assert torch.equal(graphs.run(flaky, None, [x])[0], 2 * x + 1)
    assert graphs.replays == 2


def test_graph_cache_out_of_memory_ends_one_capture_alone(monkeypatch):
    graphs, x, capture = cache(), torch.ones(3), RecordingCapturer.capture

    def too_large(self, function):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RecordingCapturer, "capture", too_large)
    for _ in range(2):
        assert torch.equal(graphs.run(affine, None, [x])[0], 2 * x + 1)
    monkeypatch.setattr(RecordingCapturer, "capture", capture)
    for _ in range(3):
        assert torch.equal(graphs.run(affine, None, [x])[0], 2 * x + 1)
    assert graphs.replays == 2


def test_graph_cache_reason_is_not_an_error_that_the_caller_handles():
    graphs, x = cache(), torch.ones(3)
    graphs.run(lambda x: [x[x > 0]], None, [x])
    try:
        raise KeyError("unrelated")
    except KeyError:
        with pytest.warns(RuntimeWarning, match=FAILED + ".*waits for the GPU$"):
            graphs.run(lambda x: [x[x > 0]], None, [x])


OTHER_DEVICE = "no CUDA graph can be captured, tensors are on cpu and on meta"


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda: torch.ones(3, device="meta"), OTHER_DEVICE),
        (lambda: torch.eye(3).to_sparse(), "no CUDA graph can be captured, a tensor is sparse"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "no CUDA graph can be captured, a tensor"),
        (lambda: nn.LazyLinear(2).weight, "no CUDA graph can be captured, a parameter is not initialised"),
    ],
    ids=["device", "sparse", "nested", "lazy"],
)
@pytest.mark.parametrize("given", ["input", "in place"])
def test_graph_cache_tensor_that_no_graph_can_read_runs_as_usual_after_one_warning(other, text, given):
    graphs, x, tensor = cache(), torch.ones(3), other()
    inputs, in_place = ([x, tensor], []) if given == "input" else ([x], [tensor])
    with pytest.warns(RuntimeWarning, match=f"^Test: {text}"):
        graphs.run(lambda *given: affine(given[0]), None, inputs, in_place)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert torch.equal(graphs.run(lambda *given: affine(given[0]), None, inputs, in_place)[0], 2 * x + 1)
        for _ in range(3):
            graphs.run(affine, None, [x])
    assert graphs.replays == 2


def test_graph_cache_tensors_that_move_in_every_call_warn_once():
    graphs, x = cache(max_graphs=3), torch.ones(3)
    kept = [torch.ones(3) for _ in range(12)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in kept:
            assert torch.equal(graphs.run(lambda x, t=t: [x + t], None, [x], [t])[0], x + 1)
    text = "Test: no CUDA graph was used in 6 calls, shapes, values or tensors on which the function depends change"
    assert [str(each.message) for each in caught] == [f"{text} in every call"] and graphs.replays == 0


def test_graph_cache_inputs_with_history_leave_none_behind():
    graphs, x = cache(), torch.ones(3, requires_grad=True)
    for _ in range(4):
        graphs.run(affine, None, [2 * x])
    (graph,) = graphs._graphs.values()
    assert graphs.replays == 3 and [t.grad_fn for t in graph.inputs] == [None]


def test_graph_cache_other_stream_has_graphs_of_its_own(monkeypatch):
    graphs, x, made = cache(), torch.ones(3), []
    monkeypatch.setattr(RecordingCapturer, "__init__", lambda self, device: made.append(device))
    for stream in ("default", "other", "default", "other", "default", "other"):
        monkeypatch.setattr(RecordingCapturer, "stream", stream)
        assert torch.equal(graphs.run(affine, None, [x])[0], 2 * x + 1)
    assert len(graphs) == 2 and graphs.replays == 4 and made == [x.device] * 2


def test_graph_cache_capture_in_another_thread_runs_as_usual():
    graphs, x, entered, leave = [cache(), cache()], torch.ones(3), threading.Event(), threading.Event()

    def slow(x):
        if torch.utils._python_dispatch.is_in_torch_dispatch_mode():
            entered.set()
            leave.wait(10)
        return affine(x)

    for each in graphs:
        each.run(slow, None, [x])
    thread = threading.Thread(target=graphs[0].run, args=(slow, None, [x]))
    thread.start()
    assert entered.wait(10)
    assert torch.equal(graphs[1].run(affine, None, [x])[0], 2 * x + 1) and len(graphs[1]) == 0
    leave.set()
    thread.join()
    assert len(graphs[0]) == 1 and all(each.serves(x.device) for each in graphs)


def _set(owner, name, value):
    @contextlib.contextmanager
    def setting():
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, before)

    return setting


@contextlib.contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def tf32_of_products():
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        MATMUL.fp32_precision = "none"


MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
SETTINGS = {
    "split invariant": split_invariant,
    "default dtype": double_by_default,
    "fp16 reduction": _set(MATMUL, "allow_fp16_reduced_precision_reduction", False),
    "bf16 reduction": _set(MATMUL, "allow_bf16_reduced_precision_reduction", False),
    "cudnn": _set(CUDNN, "enabled", False),
    "benchmark": _set(CUDNN, "benchmark", True),
    "deterministic": _set(CUDNN, "deterministic", True),
    "tf32": _set(CUDNN, "allow_tf32", False),
    "tf32 of convolutions": _set(CUDNN.conv, "fp32_precision", "ieee"),
    "tf32 of products": _set(MATMUL, "fp32_precision", "tf32"),
    "tf32 of products, older name": tf32_of_products,
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_graph_cache_setting_that_chooses_kernels_has_a_graph_of_its_own(setting):
    graphs, x = cache(), torch.ones(3)
    for _ in range(2):
        graphs.run(affine, None, [x])
        with setting():
            graphs.run(affine, None, [x])
    assert len(graphs) == 2 and graphs.replays == 2


def test_graph_cache_nest_with_changed_array_is_captured_again():
    graphs = cache()

    def function(nest):
        return [nest["x"] * float(nest["numbers"][1000]) + nest["more"].shift]

    for value in (1.0, 1.0, 7.0, 7.0, 7.0):
        numbers, shift = np.zeros(3000), torch.full((1,), value)
        numbers[1000] = value
        nest = {"x": torch.ones(1), "numbers": numbers, "more": SimpleNamespace(shift=shift)}
        assert graphs.run_nested(function, None, nest)[0].tolist() == [2 * value]
