"""PyTorch's tools around an op: dynamic shapes, export, checkpointing, autocast, operation counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from eaml_ext.ops import knn, selective_scan, selective_scan_step, split_invariant

ops = torch.ops.eaml_ext


def scan_arguments(batch: int = 2, length: int = 5, dim: int = 3, state: int = 4, dtype=torch.float64) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias, initial_state."""
    sequence, matrix = (batch, dim, length), (batch, state, length)
    shapes = [sequence, sequence, (dim, state), matrix, matrix, (dim,), sequence, (dim,), (batch, dim, state)]
    x = [torch.randn(shape, dtype=dtype) for shape in shapes]
    x[2] = -x[2].abs()
    return x


def scan(*x: Tensor) -> tuple[Tensor, ...]:
    return selective_scan(*x[:8], True, True, initial_state=x[8])


SCAN_DYNAMIC = [{0: "batch", 2: "length"}, {0: "batch", 2: "length"}, {}, *[{0: "batch", 2: "length"}] * 2]
SCAN_DYNAMIC += [{}, {0: "batch", 2: "length"}, {}, {0: "batch"}]


def knn_arguments(batch: int = 2, queries: int = 5, size: int = 9) -> list[Tensor]:
    shapes = [(batch, queries, 4), (batch, size, 4), (batch, size)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def nearest(queries: Tensor, keys: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return tuple(knn(queries, keys, 3, bias=bias))


KNN_DYNAMIC = [{0: "batch", 1: "queries"}, {0: "batch", 1: "size"}, {0: "batch", 1: "size"}]

Arguments = Callable[..., list[Tensor]]
FUNCTIONS = [
    # sizes below and above the kernels' chunks
    pytest.param(scan, scan_arguments, SCAN_DYNAMIC, [(2, 5), (4, 70), (3, 32), (5, 2)], id="scan"),
    pytest.param(nearest, knn_arguments, KNN_DYNAMIC, [(2, 5, 9), (4, 13, 80), (3, 2, 12)], id="knn"),
]


def with_gradients(function: Callable[..., tuple[Tensor, ...]], x: list[Tensor]) -> list[Tensor]:
    outs = function(*(v.requires_grad_() for v in x))
    loss = sum(out.square().sum() for out in outs if out.is_floating_point())
    return [*outs, *torch.autograd.grad(loss, x)]


# ---- the compiler ------------------------------------------------------------------------------------------------


def test_compile_scan_itself_or_within_a_context_runs():
    """Frames that Dynamo does not trace call the op with nothing between."""
    u, delta = torch.randn(1, 4, 10), torch.rand(1, 4, 10)
    A, B, C = -torch.rand(4, 3), torch.randn(1, 3, 10), torch.randn(1, 3, 10)

    def within(*args: Tensor) -> Tensor:
        with split_invariant():
            return selective_scan(*args)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="outside of the compiled function"):
        torch.compile(within, fullgraph=True, backend="aot_eager")(u, delta, A, B, C)
    torch._dynamo.reset()
    want = selective_scan(u, delta, A, B, C)
    for function in (selective_scan, within):
        assert torch.equal(torch.compile(function, backend="aot_eager")(u, delta, A, B, C), want)


@pytest.mark.parametrize("function, arguments, dynamic, sizes", FUNCTIONS)
@pytest.mark.parametrize("gradients", [False, True])
def test_compile_dynamic_sizes_compiles_once(function, arguments, dynamic, sizes, gradients):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: function(*x), fullgraph=True, backend="aot_eager")
    run = with_gradients if gradients else lambda f, x: f(*x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for some in sizes:
            x = arguments(*some)
            want = run(function, x)
            for v, dims in zip(x, dynamic, strict=True):
                for dim in dims:
                    torch._dynamo.mark_dynamic(v, dim)
            torch.testing.assert_close(list(run(compiled, x)), list(want))


class Module(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Any:
        return self.function(*x)


@pytest.mark.parametrize("function, arguments, dynamic, sizes", FUNCTIONS)
def test_export_dynamic_sizes_matches_eager(function, arguments, dynamic, sizes):
    dims = {name: torch.export.Dim(name, min=2, max=4096) for shape in dynamic for name in shape.values()}
    shapes = tuple({i: dims[name] for i, name in shape.items()} for shape in dynamic)
    program = torch.export.export(Module(function), tuple(arguments()), dynamic_shapes={"x": shapes})
    used = {str(node.target) for node in program.graph.nodes}
    assert used & {"eaml_ext.selective_scan.default", "eaml_ext.knn.default"}
    for some in sizes:
        x = arguments(*some)
        torch.testing.assert_close(tuple(program.module()(*x)), tuple(function(*x)))


# ---- checkpointing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function, arguments", [p.values[:2] for p in FUNCTIONS], ids=["scan", "knn"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_gives_same_bits(function, arguments, reentrant):
    calls = 0

    def counted(*x: Tensor) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return function(*x)

    x = [v.requires_grad_() for v in arguments()]
    first, second = [], []
    for run in (function, lambda *x: checkpoint(counted, *x, use_reentrant=reentrant)):
        loss = sum(out.square().sum() for out in run(*x) if out.is_floating_point())
        if reentrant:  # reentrant checkpoints support neither torch.autograd.grad nor second order
            loss.backward()
            first.append([v.grad for v in x])
            for v in x:
                v.grad = None
            continue
        first.append(torch.autograd.grad(loss, x, create_graph=True))
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first[-1]), x))
    assert calls > 1  # backward recomputes forward
    for plain, again in (first, *([] if reentrant else [second])):
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# ---- autocast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widest", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_mixed_sequences_promoted_to_widest_dtype(widest):
    x = scan_arguments(dtype=torch.float32)
    for i in (0, 3, 4, 6):
        x[i] = x[i].bfloat16()
    x[1] = x[1].to(widest)
    with pytest.raises(TypeError) if widest is torch.float32 else torch.enable_grad():
        scan(*x)
    leaves = [v.requires_grad_() for v in x]
    with torch.autocast("cpu", torch.bfloat16):
        y, last = scan(*leaves)
        compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")(*leaves)
    assert y.dtype == widest and last.dtype == torch.float32
    want = scan(*(v.to(widest) if i in (0, 1, 3, 4, 6) else v for i, v in enumerate(x)))
    assert torch.equal(y, want[0]) and torch.equal(last, want[1])
    assert torch.equal(y, compiled[0]) and torch.equal(last, compiled[1])
    for v, grad in zip(leaves, torch.autograd.grad(y.float().square().sum() + last.sum(), leaves), strict=True):
        assert grad.dtype == v.dtype and grad.isfinite().all()


def test_autocast_parameters_and_float64_keep_dtype():
    x = scan_arguments(dtype=torch.float32)
    halves = [v.bfloat16() if i in (0, 1, 6) else v for i, v in enumerate(x)]
    halves[3] = halves[4] = -x[2]  # B and C without time are parameters
    with torch.autocast("cpu", torch.bfloat16):
        assert scan(*halves)[0].dtype == torch.bfloat16
        assert scan(*x)[0].dtype == torch.float32
        assert scan(*(v.double() for v in x))[0].dtype == torch.float64
        with pytest.raises(TypeError, match="delta must be float64"):
            scan(x[0].double(), *x[1:])
        u, delta, A, B, C = (v[..., 0] if v.dim() == 3 else v for v in x[:5])
        y, _ = selective_scan_step(x[8], u, delta.bfloat16(), A, B.bfloat16(), C)
        assert y.dtype == torch.float32


# ---- operation counts --------------------------------------------------------------------------------------------


def counted(run: Callable[[], Any]) -> dict[Any, int]:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts()["Global"]


@pytest.mark.parametrize("states", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_flop_counter_scan_counts_per_state_and_step(states):
    def each(batch: int, length: int, dim: int, state: int) -> dict[Any, float]:
        x = scan_arguments(batch, length, dim, state)
        x = [(v.to(states) if i in (2, 3, 4, 8) else v).requires_grad_() for i, v in enumerate(x)]

        def run() -> None:
            first = torch.autograd.grad(scan(*x)[0].sum(), x[:8], create_graph=True)
            torch.autograd.grad(first[0].sum(), x[0])
            torch.func.jvp(lambda u: scan(u, *x[1:])[0], (x[0].detach(),), (x[0].detach(),))

        return {op: n / (batch * length * dim * state) for op, n in counted(run).items()}

    packets = (ops.selective_scan, ops.selective_scan_backward, ops.selective_scan_backward_jvp, ops.selective_scan_jvp)
    cost = each(2, 5, 3, 4)
    assert set(packets) <= set(cost) and all(cost[op] > 0 for op in packets)
    assert each(4, 70, 5, 1) == cost
    assert cost[ops.selective_scan] == 2 * (7 if states is torch.float64 else 21)  # the scan runs alone and in the jvp
    assert cost[ops.selective_scan] < cost[ops.selective_scan_backward] < cost[ops.selective_scan_backward_jvp]


def test_flop_counter_knn_counts_products():
    assert counted(lambda: nearest(*knn_arguments(2, 5, 9)))[ops.knn] == 2 * 2 * 5 * 9 * 4
