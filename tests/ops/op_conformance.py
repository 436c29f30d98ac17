"""The one op_conformance that every op passes, native and reference alike, on every device present.

A test file describes its op once and inherits the tests::

    class TestKnn(Battery):
        op = Op(
            function=knn,                            # called as function(**call.tensors, **call.options)
            reference=knn_reference,                 # the specification, called the same way
            differentiable=("queries", "keys", "bias"),
            cases={"cosine": build, ...},            # build(dtype, device) -> Call; tiny: numerical Jacobians
            shapes={"empty": build, ...},            # the same; larger, empty and odd ones
            parallel=build,                          # enough work for two threads
            drawn=strategy,                          # a hypothesis strategy of builds
            raw=raw_calls,                           # call -> [(torch.ops.eaml_ext.knn.default, arguments), ...]
            factor=16,                               # tolerance in units of rounding, see `close`
            highest_order=None,                      # derivatives of any order; 2: more of them raise
        )

An op returns a tensor or a tuple of them. Integer outputs (indices) must equal the reference's and have no gradient;
floating ones are differentiated. A function whose outputs may be infinite where inputs are finite is given to Op
behind a wrapper that replaces infinities by a number, as no tolerance or finite difference is defined for them.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

DTYPES = (torch.float32, torch.float64)


class Call(NamedTuple):
    """One call: its tensors by argument name, only those that are present, and its other arguments."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]


Build = Callable[[torch.dtype, str], Call]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    function: Function
    reference: Function
    differentiable: Sequence[str]
    cases: Mapping[str, Build]
    shapes: Mapping[str, Build]
    parallel: Build
    drawn: SearchStrategy[Build]
    raw: Callable[[Call], Iterable[tuple[Any, tuple[Any, ...]]]]
    factor: float
    highest_order: int | None = 2
    compiled: Sequence[str] = field(default=())  # the cases that torch.compile is tried on; none: the first
    representative: Sequence[str] = field(default=())  # cases that have every option between them; none: all

    def names(self, call: Call) -> list[str]:
        """The differentiable arguments that are present."""
        return [name for name in self.differentiable if name in call.tensors]


# ---- comparing ---------------------------------------------------------------------------------------------------


def outputs(function: Function, call: Call, **changes: Any) -> tuple[Tensor, ...]:
    out = function(**{**call.tensors, **changes}, **call.options)
    return (out,) if isinstance(out, Tensor) else tuple(out)


def floating(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x for x in tensors if x.is_floating_point())


def noise(like: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Scattered numbers that float32 holds, so that every precision gets the same; no generator: vmap forbids it."""

    def scattered(x: Tensor, start: int) -> Tensor:
        angle = torch.arange(x.numel(), device=x.device, dtype=torch.float64) * 2.4 + start
        return (1.4 * angle.sin()).float().to(x.dtype).reshape(x.shape)

    return [scattered(x, seed + i) for i, x in enumerate(like)]


def close(got: Sequence[Tensor], want: Sequence[Tensor], factor: float, floor: float = 0.0) -> None:
    """|got - want| <= factor * eps * max|want| in each tensor, eps that of ``got``; integers are equal.

    The largest entry is the scale because sums of mixed sign lose relative precision in their small entries; ``floor``
    is the least scale, for drawn inputs whose only entry may cancel. ``factor`` stands for the roundings in a row that
    one output sees; it is the op's to state.
    """
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, f"result {i} has shape {tuple(a.shape)}, wanted {tuple(b.shape)}"
        if not a.is_floating_point():
            assert torch.equal(a, b), f"result {i} is not the same"
            continue
        a64, b64 = a.detach().double(), b.detach().double()
        finite = b64.isfinite()
        assert torch.equal(a64.isfinite(), finite), f"result {i} is finite elsewhere"
        a64, b64 = a64[finite], b64[finite]
        if a64.numel():
            error, scale = (a64 - b64).abs().max().item(), max(b64.abs().max().item(), floor)
            eps = torch.finfo(a.dtype).eps
            assert error <= factor * eps * scale, f"result {i}: {error / eps / max(scale, 1e-300):.1f} roundings off"


def gradients(
    outs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """torch.autograd.grad, zero where nothing connects, as in a sum over no steps."""
    pairs = [(out, c) for out, c in zip(outs, cotangents, strict=True) if out.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in inputs)
    outs, cotangents = zip(*pairs, strict=True)
    options = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(outs, inputs, cotangents, **options)


def leaves(call: Call, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: call.tensors[name].detach().requires_grad_() for name in names}


def derivatives(
    function: Function,
    call: Call,
    inner: Sequence[str],
    outer: Sequence[str] | None = None,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, ...]:
    """Gradients for random cotangents with respect to ``inner``; and those of a random functional of these gradients
    with respect to ``outer`` (``inner`` if None) and to the cotangents.
    """
    outer = inner if outer is None else outer
    x = leaves(call, {**dict.fromkeys(inner), **dict.fromkeys(outer)})
    outs = floating(outputs(function, call, **x))
    cotangents = [layout(c).requires_grad_() for c in noise(outs)]
    first = gradients(outs, [x[name] for name in inner], cotangents, create_graph=True)
    second = gradients(first, [*(x[name] for name in outer), *cotangents], [layout(v) for v in noise(first, 1)])
    return *(g.detach() for g in first), *second


def tangents(function: Function, call: Call, names: Sequence[str]) -> tuple[Tensor, ...]:
    primals = tuple(call.tensors[name] for name in names)

    def of(*values: Tensor) -> tuple[Tensor, ...]:
        return floating(outputs(function, call, **dict(zip(names, values, strict=True))))

    return torch.func.jvp(of, primals, tuple(noise(primals, 2)))[1]


def to_float64(call: Call) -> Call:
    tensors = {n: x.double() if x.is_floating_point() else x for n, x in call.tensors.items()}
    return call._replace(tensors=tensors)


def loss_of(function: Function, call: Call, names: Sequence[str]) -> Callable[..., Tensor]:
    """A curved scalar function of the named arguments; squares keep relative errors, sines of large outputs do not."""

    def loss(*values: Tensor) -> Tensor:
        outs = floating(outputs(function, call, **dict(zip(names, values, strict=True))))
        return sum((out.square() * w).sum() for out, w in zip(outs, noise(outs, 3), strict=True))

    return loss


# ---- inputs ------------------------------------------------------------------------------------------------------


def subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Singles, pairs, all but one, all; each once."""
    sizes = dict.fromkeys((1, 2, len(names) - 1, len(names)))
    return itertools.chain.from_iterable(itertools.combinations(names, n) for n in sizes if 0 < n <= len(names))


def varied(x: Tensor, size: int, dim: int) -> Tensor:
    """``size`` neighbours of ``x`` along a new dimension."""
    if x.is_floating_point():
        copies = [x * (1 + 0.1 * torch.randn_like(x)) for _ in range(size)]
    else:
        copies = [x ^ (torch.rand(x.shape, device=x.device) < 0.3) for _ in range(size)]
    return torch.stack(copies, dim)


def mapped(
    call: Call, names: Iterable[str], size: int, draw: random.Random
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors with the named ones stacked, and the dimension each is mapped over."""
    dims = {name: draw.randint(-x.dim() - 1, x.dim()) if name in names else None for name, x in call.tensors.items()}
    tensors = {n: x if dims[n] is None else varied(x, size, dims[n]) for n, x in call.tensors.items()}
    return tensors, dims


def parameters(choices: Mapping[str, Any], representative: Sequence[str], mark: Any = pytest.mark.kernels) -> list[Any]:
    """A test parameter per choice; ``mark`` is on all but the representative ones, if any are named."""
    rest = choices.keys() - (representative or choices)
    return [pytest.param(x, id=name, marks=[mark] * (name in rest)) for name, x in choices.items()]


def drawn_subsets(names: Sequence[str], count: int, draw: random.Random) -> list[list[str]]:
    """All of them, then random non-empty choices."""
    return [list(names), *(draw.sample(names, draw.randint(1, len(names))) for _ in range(count - 1))]


def sample(tensors: Mapping[str, Tensor], dims: Mapping[str, Any], i: int) -> dict[str, Tensor]:
    return {n: x if dims[n] is None else x.select(dims[n], i) for n, x in tensors.items()}


def transposed(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def channel_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else transposed(x)


def sliced(x: Tensor) -> Tensor:
    """Every second entry of a larger tensor, not from its start."""
    wide = x.new_zeros([2 * size + 1 for size in x.shape])
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def expanded(x: Tensor) -> Tensor:
    """All entries along the first dimension the same one, in memory too."""
    return x[:1].expand_as(x)


LAYOUTS = (torch.Tensor.contiguous, transposed, channel_last, sliced, expanded)


# ---- the conformance tests ----------------------------------------------------------------------------------------


class Battery:
    op: Op

    def pytest_generate_tests(self, metafunc: Any) -> None:
        everything = {**self.op.cases, **self.op.shapes}
        chosen = self.op.compiled or list(self.op.cases)[:1]
        values = {
            "small": self.op.cases,
            "few": self.op.cases,
            "case": everything,
            "compiled": {name: everything[name] for name in chosen},
            "dtype": {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES},
        }
        for name, choices in values.items():
            if name in metafunc.fixturenames:
                representative = self.op.representative if name in ("small", "few") else ()
                mark = pytest.mark.exhaustive if name == "few" else pytest.mark.kernels
                metafunc.parametrize(name, parameters(choices, representative, mark))

    def test_close_to_float64(self, case: Build, dtype: torch.dtype, device: str) -> None:
        call, op = case(dtype, device), self.op
        exact, names = to_float64(call), op.names(call)
        close(outputs(op.function, call), outputs(op.reference, exact), op.factor)
        close(tangents(op.function, call, names), tangents(op.reference, exact, names), op.factor)
        close(derivatives(op.function, call, names), derivatives(op.reference, exact, names), op.factor)

    def test_gradients_are_numerical_ones(self, small: Build, device: str) -> None:
        call = small(torch.float64, device)
        names = self.op.names(call)

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            return floating(outputs(self.op.function, call, **dict(zip(names, values, strict=True))))

        x = tuple(leaves(call, names).values())
        modes = {"check_batched_grad": True, "fast_mode": True}
        assert gradcheck(function, x, check_forward_ad=True, check_batched_forward_grad=True, **modes)
        assert gradgradcheck(function, x, check_fwd_over_rev=True, check_rev_over_rev=True, **modes)

    @pytest.mark.kernels
    def test_slow_numerical_check_of_every_entry(self, device: str) -> None:
        """Without gradcheck's random projections, for the last case."""
        call = [*self.op.cases.values()][-1](torch.float64, device)
        names = self.op.names(call)

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            return floating(outputs(self.op.function, call, **dict(zip(names, values, strict=True))))

        assert gradcheck(function, tuple(leaves(call, names).values()), check_forward_ad=True)

    def test_any_of_the_inputs_may_require_grad(self, small: Build, device: str) -> None:
        call, op = small(torch.float64, device), self.op
        for chosen in subsets(op.names(call)):
            got, want = (derivatives(f, call, chosen) for f in (op.function, op.reference))
            close(got, want, op.factor)
            if len(chosen) == 2:
                got, want = (derivatives(f, call, chosen[:1], chosen[1:]) for f in (op.function, op.reference))
                close(got, want, op.factor)
            x = leaves(call, chosen)
            others = {n: v.detach() for n, v in call.tensors.items() if n not in chosen}
            sum(out.sum() for out in floating(outputs(op.function, call, **x, **others))).backward()
            assert all(v.grad is not None and v.grad.shape == v.shape for v in x.values())
            assert all(v.grad is None and not v.requires_grad for v in others.values())

    def test_no_gradient_is_recorded_where_none_is_asked(self, small: Build, device: str) -> None:
        call, op = small(torch.float64, device), self.op
        want = outputs(op.reference, call)
        assert not any(out.requires_grad for out in outputs(op.function, call))
        x = leaves(call, op.names(call))
        with torch.no_grad():
            outs = outputs(op.function, call, **x)
        assert not any(out.requires_grad for out in outs)
        close(outs, want, op.factor)
        with torch.inference_mode():
            close(outputs(op.function, call), want, op.factor)

    def test_function_transforms(self, small: Build, device: str) -> None:
        call, op = small(torch.float64, device), self.op
        names = op.names(call)
        x = tuple(call.tensors[name] for name in names)
        everyone = tuple(range(len(x)))
        f, want_f = loss_of(op.function, call, names), loss_of(op.reference, call, names)
        want = torch.func.grad(want_f, everyone)(*x)
        close(torch.func.grad(f, everyone)(*x), want, op.factor)
        value, pull = torch.func.vjp(f, *x)
        close(pull(torch.ones_like(value)), want, op.factor)
        v = tuple(noise(x))
        close(torch.func.jvp(f, x, v)[1:], torch.func.jvp(want_f, x, v)[1:], op.factor)
        # J v is linear in v: its gradient in v is J^T again.
        close(torch.func.grad(lambda v: torch.func.jvp(f, x, v)[1])(v), want, op.factor)
        hessian = sum(torch.func.hessian(want_f, everyone)(*x), ())
        for outer, inner in ((torch.func.jacfwd, torch.func.jacrev), (torch.func.jacrev, torch.func.jacfwd)):
            close(sum(outer(inner(f, everyone), everyone)(*x), ()), hessian, op.factor, floor=1)

    def test_vmap(self, case: Build, device: str) -> None:
        call, op = case(torch.float64, device), self.op
        draw = random.Random(0)
        for chosen in drawn_subsets(list(call.tensors), 6, draw):
            tensors, dims = mapped(call, chosen, 3, draw)
            got = torch.vmap(lambda tensors: outputs(op.function, call, **tensors), (dims,))(tensors)
            for i in range(3):
                want = outputs(op.reference, call, **sample(tensors, dims, i))
                close([out[i] for out in got], want, op.factor)

    def test_vmap_of_gradients(self, small: Build, device: str) -> None:
        call, op = small(torch.float64, device), self.op
        names, draw = op.names(call), random.Random(0)

        def gradient(function: Function) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
            def of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                rest = {n: x for n, x in tensors.items() if n not in names}
                changed = call._replace(tensors={**call.tensors, **rest})
                loss = loss_of(function, changed, names)
                grads = torch.func.grad(loss, tuple(range(len(names))))(*(tensors[n] for n in names))
                return dict(zip(names, grads, strict=True))

            return of

        def norm_gradient(function: Function) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
            def norm(floats: dict[str, Tensor], rest: dict[str, Tensor]) -> Tensor:
                return sum(g.square().sum() for g in gradient(function)({**floats, **rest}).values())

            return lambda tensors: torch.func.grad(norm)(
                {n: x for n, x in tensors.items() if n in names}, {n: x for n, x in tensors.items() if n not in names}
            )

        for chosen in drawn_subsets(list(call.tensors), 3, draw):
            tensors, dims = mapped(call, chosen, 2, draw)
            for derivative in (gradient, norm_gradient):
                got = torch.vmap(derivative(op.function), (dims,))(tensors)
                for i in range(2):
                    want = derivative(op.reference)(sample(tensors, dims, i))
                    close([got[n][i] for n in names], [want[n] for n in names], 4 * op.factor)

    def test_maml_through_functional_call(self, small: Build, device: str) -> None:
        call, op = small(torch.float64, device), self.op

        class Model(torch.nn.Module):
            def __init__(self, function: Function):
                super().__init__()
                self.function = function
                for name in op.names(call):
                    self.register_parameter(name, torch.nn.Parameter(call.tensors[name].clone()))

            def forward(self, target: float) -> Tensor:
                changes = dict(self.named_parameters())
                outs = floating(outputs(self.function, call, **changes))
                return sum((out - target).square().sum() for out in outs)

        def meta_gradient(function: Function) -> dict[str, Tensor]:
            model = Model(function)

            def outer(parameters: dict[str, Tensor]) -> Tensor:
                def inner(parameters: dict[str, Tensor]) -> Tensor:
                    return torch.func.functional_call(model, parameters, (0.5,))

                grads = torch.func.grad(inner)(parameters)
                moved = {name: p - 0.01 * grads[name] for name, p in parameters.items()}
                return torch.func.functional_call(model, moved, (-0.25,))

            return torch.func.grad(outer)({n: p.detach() for n, p in model.named_parameters()})

        got, want = meta_gradient(op.function), meta_gradient(op.reference)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9 * want[name].abs().max().item())

    def test_every_order_is_right_or_raises(self, device: str) -> None:
        """r: reverse, f: forward mode, innermost first; nothing disconnects in silence."""
        call, op = [*self.op.cases.values()][-1](torch.float64, device), self.op
        names = op.names(call)
        x = tuple(call.tensors[name] for name in names)
        direction = tuple(noise(x, 4))

        def nested(function: Function, modes: str) -> Tensor:
            f = loss_of(function, call, names)
            for mode in modes:
                f = along(f, mode)
            return f(*x)

        def along(f: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
            if mode == "f":
                return lambda *x: torch.func.jvp(f, x, direction)[1]
            reverse = torch.func.grad(f, tuple(range(len(x))))
            return lambda *x: sum((g * v).sum() for g, v in zip(reverse(*x), direction, strict=True))

        for modes in ("".join(m) for n in (1, 2, 3) for m in itertools.product("rf", repeat=n)):
            if op.highest_order is None or (len(modes) <= op.highest_order and modes != "ff"):
                close([nested(op.function, modes)], [nested(op.reference, modes)], 8 * op.factor)
            else:
                with pytest.raises(RuntimeError, match="not implemented"):
                    nested(op.function, modes)

    def test_opcheck(self, few: Build, device: str) -> None:
        for op, args in self.op.raw(few(torch.float32, device)):
            torch.library.opcheck(op, args)
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor) and x.numel()}
            outs = op(*args)
            for out in (outs,) if isinstance(outs, Tensor) else outs:  # an op may not return its input
                assert not out.numel() or out.untyped_storage().data_ptr() not in given

    def test_compiles(self, compiled: Build, device: str) -> None:
        self.compiles(compiled(torch.float64, device), "aot_eager")

    def test_compiles_with_inductor(self, device: str) -> None:
        self.compiles([*self.op.cases.values()][-1](torch.float32, device), "inductor")

    def compiles(self, call: Call, backend: str) -> None:
        op, names = self.op, self.op.names(call)

        def function(**tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(out * 2 for out in outputs(op.function, call, **tensors))

        def with_gradients(function: Function) -> list[Tensor]:
            x = leaves(call, names)
            outs = function(**{**call.tensors, **x})
            return [*outs, *gradients(floating(outs), list(x.values()), noise(floating(outs)))]

        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        close(compiled(**call.tensors), function(**call.tensors), op.factor)
        close(with_gradients(compiled), with_gradients(function), op.factor)

    @pytest.mark.parametrize("layout", [transposed, channel_last, sliced, expanded])
    def test_strides_do_not_matter(self, case: Build, layout: Callable[[Tensor], Tensor], device: str) -> None:
        call, op = case(torch.float64, device), self.op
        names = op.names(call)
        choices = [list(call.tensors), *([name] for name in call.tensors)]
        for chosen in choices:
            odd = {n: layout(x) if n in chosen else x for n, x in call.tensors.items()}
            plain = call._replace(tensors={n: x.contiguous() for n, x in odd.items()})
            given_ = call._replace(tensors=odd)
            close(outputs(op.function, given_), outputs(op.function, plain), op.factor)
            if chosen is choices[0]:
                got = derivatives(op.function, given_, names, layout=layout)
                same = (lambda x: expanded(x).contiguous()) if layout is expanded else lambda x: x
                close(got, derivatives(op.function, plain, names, layout=same), op.factor)

    def test_deterministic_whatever_the_threads(self, dtype: torch.dtype, device: str) -> None:
        call, names = self.op.parallel(dtype, device), self.op.differentiable
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(
                (*outputs(self.op.function, call), *derivatives(self.op.function, call, self.op.names(call)))
            )
        assert names and all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_non_finite_stays_non_finite(self, small: Build, value: float, dtype: torch.dtype, device: str) -> None:
        call, op = small(dtype, device), self.op
        names = op.names(call)
        for name in names:
            for place in (0, -1):
                bad = call.tensors[name].clone()
                if bad.numel() == 0:
                    continue
                bad.view(-1)[place] = value
                changed = call._replace(tensors={**call.tensors, name: bad})
                got, want = (floating(outputs(f, changed)) for f in (op.function, op.reference))
                for a, b in zip(got, want, strict=True):
                    assert torch.equal(a.isfinite(), b.isfinite()), f"{name}: finite elsewhere than the reference"
                derivatives(op.function, changed, names)

    @settings(suppress_health_check=[HealthCheck.differing_executors])
    @given(data=st.data())
    def test_drawn_shapes_and_options(self, data: Any, device: str) -> None:
        op = self.op
        build = data.draw(op.drawn)
        dtype = data.draw(st.sampled_from(DTYPES))
        call = build(dtype, device)
        layouts = {
            n: data.draw(st.sampled_from(LAYOUTS), label=f"layout of {n}") for n in (*call.tensors, "cotangents")
        }
        call = call._replace(tensors={n: layouts[n](x) for n, x in call.tensors.items()})
        note(f"{ {n: tuple(x.shape) for n, x in call.tensors.items()} } {call.options}")
        exact = to_float64(call)
        names = [n for n in op.names(call) if data.draw(st.booleans(), label=n)]
        close(outputs(op.function, call), outputs(op.reference, exact), op.factor, floor=1)
        if names:
            layout = layouts["cotangents"]
            got, want = (
                derivatives(f, x, names, layout=layout) for f, x in ((op.function, call), (op.reference, exact))
            )
            close(got, want, op.factor, floor=1)
