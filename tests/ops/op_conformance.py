"""The conformance tests of every op, for its kernels and its reference, on every device present.

A test file describes its op once and inherits the tests::

    class TestKnn(OpConformance):
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
        )

An op returns a tensor or a tuple of them. Integer outputs (indices) must equal the reference's and have no gradient;
floating ones are differentiated. A function whose outputs may be infinite for finite inputs needs a wrapper that
replaces infinities by a number, because no tolerance or finite difference is defined for infinities.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from op_calls import (
    DTYPES,
    LAYOUTS,
    Build,
    Call,
    Function,
    channel_last,
    close,
    derivatives,
    drawn_subsets,
    expanded,
    floating,
    gradients,
    leaves,
    loss_of,
    mapped,
    noise,
    outputs,
    parameters,
    sample,
    sliced,
    subsets,
    tangents,
    to_float64,
    transposed,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck


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
    compiled: Sequence[str] = field(default=())  # the cases that torch.compile runs; none: the first
    representative: Sequence[str] = field(default=())  # cases that cover every option together; none: all

    def names(self, call: Call) -> list[str]:
        """Return the differentiable arguments that are present."""
        return [name for name in self.differentiable if name in call.tensors]


# ---- the conformance tests ----------------------------------------------------------------------------------------


class OpConformance:
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

    def test_op_every_case_close_to_float64(self, case: Build, dtype: torch.dtype, device: str) -> None:
        call, op = case(dtype, device), self.op
        exact, names = to_float64(call), op.names(call)
        close(outputs(op.function, call), outputs(op.reference, exact), op.factor)
        close(tangents(op.function, call, names), tangents(op.reference, exact, names), op.factor)
        close(derivatives(op.function, call, names), derivatives(op.reference, exact, names), op.factor)

    def test_gradients_every_case_are_numerical_ones(self, small: Build, device: str) -> None:
        call = small(torch.float64, device)
        names = self.op.names(call)

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            return floating(outputs(self.op.function, call, **dict(zip(names, values, strict=True))))

        x = tuple(leaves(call, names).values())
        modes = {"check_batched_grad": True, "fast_mode": True}
        assert gradcheck(function, x, check_forward_ad=True, check_batched_forward_grad=True, **modes)
        assert gradgradcheck(function, x, check_fwd_over_rev=True, check_rev_over_rev=True, **modes)

    @pytest.mark.kernels
    def test_gradients_every_entry_is_numerical_one(self, device: str) -> None:
        """Check the last case without gradcheck's random projections."""
        call = [*self.op.cases.values()][-1](torch.float64, device)
        names = self.op.names(call)

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            return floating(outputs(self.op.function, call, **dict(zip(names, values, strict=True))))

        assert gradcheck(function, tuple(leaves(call, names).values()), check_forward_ad=True)

    def test_gradients_any_subset_of_inputs_match_reference(self, small: Build, device: str) -> None:
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

    def test_op_without_requires_grad_records_no_graph(self, small: Build, device: str) -> None:
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

    def test_func_transforms_match_reference(self, small: Build, device: str) -> None:
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
        # J v is linear in v, so its gradient in v is J^T.
        close(torch.func.grad(lambda v: torch.func.jvp(f, x, v)[1])(v), want, op.factor)
        hessian = sum(torch.func.hessian(want_f, everyone)(*x), ())
        for outer, inner in ((torch.func.jacfwd, torch.func.jacrev), (torch.func.jacrev, torch.func.jacfwd)):
            close(sum(outer(inner(f, everyone), everyone)(*x), ()), hessian, op.factor, floor=1)

    def test_vmap_any_arguments_matches_reference(self, case: Build, device: str) -> None:
        call, op = case(torch.float64, device), self.op
        draw = random.Random(0)
        for chosen in drawn_subsets(list(call.tensors), 6, draw):
            tensors, dims = mapped(call, chosen, 3, draw)
            got = torch.vmap(lambda tensors: outputs(op.function, call, **tensors), (dims,))(tensors)
            for i in range(3):
                want = outputs(op.reference, call, **sample(tensors, dims, i))
                close([out[i] for out in got], want, op.factor)

    def test_vmap_of_gradients_any_arguments_matches_reference(self, small: Build, device: str) -> None:
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

    def test_maml_functional_call_matches_reference(self, small: Build, device: str) -> None:
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

    @pytest.mark.filterwarnings("ignore:.* no kernel computes derivatives:RuntimeWarning")
    def test_derivatives_every_order_and_mode_match_reference(self, device: str) -> None:
        """r is reverse, f forward mode, innermost first; no order returns a wrong zero gradient."""
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
            close([nested(op.function, modes)], [nested(op.reference, modes)], 8 * op.factor)

    def test_opcheck_every_raw_op_passes(self, few: Build, device: str) -> None:
        for op, args in self.op.raw(few(torch.float32, device)):
            torch.library.opcheck(op, args)
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor) and x.numel()}
            outs = op(*args)
            for out in (outs,) if isinstance(outs, Tensor) else outs:  # an op may not return its input
                assert not out.numel() or out.untyped_storage().data_ptr() not in given

    def test_compile_aot_eager_matches_eager(self, compiled: Build, device: str) -> None:
        self.compiles(compiled(torch.float64, device), "aot_eager")

    def test_compile_inductor_matches_eager(self, device: str) -> None:
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
    def test_strides_any_layout_same_result(self, case: Build, layout: Callable[[Tensor], Tensor], device: str) -> None:
        call, op = case(torch.float64, device), self.op
        names = op.names(call)
        choices = [list(call.tensors), *([name] for name in call.tensors)]
        for chosen in choices:
            strided = {n: layout(x) if n in chosen else x for n, x in call.tensors.items()}
            plain = call._replace(tensors={n: x.contiguous() for n, x in strided.items()})
            strided_call = call._replace(tensors=strided)
            close(outputs(op.function, strided_call), outputs(op.function, plain), op.factor)
            if chosen is choices[0]:
                got = derivatives(op.function, strided_call, names, layout=layout)
                same = (lambda x: expanded(x).contiguous()) if layout is expanded else lambda x: x
                close(got, derivatives(op.function, plain, names, layout=same), op.factor)

    def test_threads_any_number_gives_same_bits(self, dtype: torch.dtype, device: str) -> None:
        call, names = self.op.parallel(dtype, device), self.op.differentiable
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(
                (*outputs(self.op.function, call), *derivatives(self.op.function, call, self.op.names(call)))
            )
        assert names and all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_non_finite_input_gives_non_finite(
        self, small: Build, value: float, dtype: torch.dtype, device: str
    ) -> None:
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
    def test_drawn_shapes_and_options_match_float64(self, data: Any, device: str) -> None:
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
