"""Capture and replay of functions, on a graph of recorded operations in place of a CUDA graph."""

import copy
import functools
import pickle
import random
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from recorded_graph import RecordingCapturer
from torch import nn

from eaml_ext.meta._cuda_graphs import GraphCache, refuse_host_randomness
from eaml_ext.meta._python_state import PythonState

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


def test_graph_cache_shapes_that_do_not_return_are_not_captured():
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


def test_graph_cache_capture_fails_names_first_error(monkeypatch):
    def capture(self, function):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("capture invalidated")

    monkeypatch.setattr(RecordingCapturer, "capture", capture)
    graphs, x = cache(), torch.ones(3)
    graphs.run(affine, None, [x])
    with pytest.warns(RuntimeWarning, match=FAILED + "operation not permitted when stream is capturing$"):
        assert torch.equal(graphs.run(affine, None, [x])[0], 2 * x + 1)


def test_graph_cache_error_of_function_is_raised_and_forgotten():
    graphs, x = cache(), torch.ones(3)

    def broken(x):
        raise ValueError("no loss")

    for _ in range(3):
        with pytest.raises(ValueError, match=r"^no loss$"):
            graphs.run(broken, None, [x])
    assert graphs.serves(x.device)


def test_graph_cache_not_ready_or_under_transform_runs_as_usual():
    graphs, x = cache(), torch.ones(3)
    for _ in range(3):
        graphs.run(affine, None, [x])
    assert graphs.replays == 2
    torch.func.vmap(lambda x: graphs.run(affine, None, [x])[0])(torch.ones(2, 3))
    graphs._capturers[x.device].is_ready = False
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


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(1)])
def test_refuse_host_randomness_drawn_numbers_are_refused_and_returned(draw):
    random.seed(1)
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match="it draws random numbers on the host"):
        refuse_host_randomness(draw)
    got = draw()
    random.seed(1)
    torch.manual_seed(1)
    assert got == draw()
    refuse_host_randomness(lambda: torch.ones(1))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(2, 2), nn.Dropout(0.1)
        self.scale, self.shift, self.act = 2.0, torch.ones(2), torch.tanh
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        return self.act(self.drop(self.layer(x))) * self.scale + self.shift


CHANGES = {
    "attribute": lambda m: setattr(m, "scale", 3.0),
    "function": lambda m: setattr(m, "act", torch.relu),
    "submodule": lambda m: setattr(m.drop, "p", 0.2),
    "mode": lambda m: m.eval(),
    "hook": lambda m: m.layer.register_forward_hook(lambda *_: None),
    "layer": lambda m: setattr(m, "drop", nn.Dropout(0.1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_python_state_changed_module_has_another_key(change):
    module = Scaled()
    before = PythonState(module)
    assert PythonState(module).key == before.key and hash(before.key) is not None
    assert {id(t) for t in before.tensors} == {id(t) for t in (*module.parameters(), module.mean, module.shift)}
    change(module)
    assert PythonState(module).key != before.key


def test_python_state_changed_closure_has_another_key():
    weight, scale = torch.ones(2), 1.0

    def loss(prediction, target, *, power=2):
        return scale * (weight * (prediction - target).abs() ** power).mean()

    before = PythonState(loss)
    assert [id(t) for t in before.tensors] == [id(weight)]
    scale = 2.0
    assert PythonState(loss).key != before.key
    scale = 1.0
    assert PythonState(loss).key == before.key
    powers = [PythonState(functools.partial(loss, power=power)).key for power in (3, 3, 4)]
    assert powers[0] == powers[1] != powers[2]


def test_python_state_variable_without_value_is_left_out():
    def loss(prediction, target):
        return later * prediction

    empty = PythonState(loss)
    later = 2.0
    assert not empty.tensors and PythonState(loss).key != empty.key


def test_python_state_bound_method_includes_its_module():
    module = Scaled()
    before = PythonState(module.forward)
    assert {id(t) for t in before.tensors} >= {id(p) for p in module.parameters()}
    assert PythonState(module.forward).key == before.key
    module.scale = 3.0
    assert PythonState(module.forward).key != before.key
