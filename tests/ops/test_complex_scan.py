"""selective_scan and selective_scan_step with a complex A (S4D): conformance, a plain loop, packed matrices, errors.

The conformance tests receive real and imaginary parts as real tensors with a last dimension of two, which they can
draw, compare and perturb like other tensors. gradcheck receives the complex tensors.
"""

import cmath
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import scan_cases as real
import test_scan_numerics as numerics
import torch
from op_calls import (
    DTYPES,
    LAYOUTS,
    Build,
    Call,
    close,
    derivatives,
    leaves,
    noise,
    outputs,
    parameters,
    to_float64,
)
from op_conformance import Op, OpConformance
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from eaml_ext import build_info
from eaml_ext.ops import selective_scan, selective_scan_reference, selective_scan_step

OPTIONAL, build = real.OPTIONAL, real.build
COMPLEX = ("A", "B", "C", "initial_state")


def with_components(scan: Build) -> Build:
    """Give A, B, C and the initial state imaginary parts, in a last dimension of two."""

    def make(dtype: torch.dtype, device: str) -> Call:
        call = scan(dtype, device)
        draw = torch.Generator().manual_seed(1)

        def paired(x: Tensor) -> Tensor:
            return torch.stack((x, torch.randn(x.shape, generator=draw).to(x)), -1)

        return call._replace(tensors={n: paired(x) if n in COMPLEX else x for n, x in call.tensors.items()})

    return make


def joined(tensors: dict[str, Any]) -> dict[str, Any]:
    return {n: torch.complex(x[..., 0], x[..., 1]) if n in COMPLEX else x for n, x in tensors.items()}


def components(values: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Split complex tensors. Both components are NaN where one is not finite, as products decide which of them is."""

    def of(x: Tensor) -> Tensor:
        both = torch.stack((x.real, x.imag), -1)
        return torch.where(both.isfinite().all(-1, keepdim=True), both, math.nan)

    return tuple(of(x) if x.is_complex() else x for x in values)


def on_components(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """Turn a function of complex tensors into one of their components."""

    def of(**arguments: Any) -> tuple[Tensor, ...]:
        return components(outputs(function, Call(joined(arguments), {})))

    return of


def complex_call(*present: str, **sizes: Any) -> Call:
    call = with_components(build(*present, **sizes))(torch.float64, "cpu")
    return call._replace(tensors=joined(call.tensors))


# A complex state counts twice towards the CUDA kernels' limit of 256 states.
WIDEST = {"state128": build(*OPTIONAL, state=128, dim=5, length=6)}
REPRESENTATIVE = ("per_task", "invariant", "step")
SHAPES = {name: with_components(shape) for name, shape in (real.SHAPES | WIDEST).items() if name != "state256"}


class TestComplexScan(OpConformance):
    op = Op(
        function=on_components(selective_scan),
        reference=on_components(selective_scan_reference),
        differentiable=real.ARGUMENTS,
        cases={name: with_components(case) for name, case in real.CASES.items()},
        shapes=SHAPES,
        parallel=with_components(build(*OPTIONAL, batch=4, dim=130, length=20, state=16, softplus=True)),
        drawn=real.drawn().map(with_components),
        raw=lambda call: real.raw_calls(call._replace(tensors=joined(call.tensors))),
        factor=real.FACTOR,
        compiled=("per_task", "all"),
        representative=REPRESENTATIVE,
    )


@pytest.mark.parametrize("chosen", [REPRESENTATIVE, real.REPRESENTATIVE], ids=["complex", "real"])
def test_representative_cases_together_have_every_argument_and_layout(chosen):
    calls = [real.CASES[name](torch.float32, "cpu") for name in chosen]
    assert {name for call in calls for name in call.tensors} == {*real.ARGUMENTS, "reset"}
    assert {call.options["delta_softplus"] for call in calls} == {True, False}
    for name in ("A", "B"):  # shared and per task; invariant and variable
        assert {2, 3} <= {call.tensors[name].dim() for call in calls}


# ---- values ------------------------------------------------------------------------------------------------------


def plain_loop(delta_softplus: bool, return_last_state: bool, **x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the recurrence in Python's complex numbers."""
    u, groups = x["u"], x["B"].shape[1] if x["B"].dim() == 4 else 1
    (batch, dim, length), state = u.shape, x["A"].shape[-1]
    y = torch.zeros(batch, dim, length, dtype=torch.float64)
    last = torch.zeros(batch, dim, state, dtype=torch.complex128)

    def parameter(name: str, b: int, *index: int) -> Any:
        value = x[name]
        shared = value.dim() == len(index)
        return (value if shared else value[b // (batch // value.shape[0])])[index].item()

    def matrix(name: str, b: int, d: int, n: int, t: int) -> Any:
        value = x[name]
        index = {2: (d, n), 3: (b, n, t), 4: (b, d // (dim // groups), n, t)}[value.dim()]
        return value[index].item()

    for b in range(batch):
        for d in range(dim):
            h = [x["initial_state"][b, d, n].item() if "initial_state" in x else 0j for n in range(state)]
            for t in range(length):
                dt = x["delta"][b, d, t].item() + (parameter("delta_bias", b, d) if "delta_bias" in x else 0)
                dt = math.log1p(math.exp(dt)) if delta_softplus else dt
                if "reset" in x and x["reset"][b, t]:
                    h = [0j] * state
                for n in range(state):
                    h[n] = cmath.exp(dt * parameter("A", b, d, n)) * h[n]
                    h[n] += dt * matrix("B", b, d, n, t) * u[b, d, t].item()
                # the sum of C h and its conjugate
                out = sum(2 * (matrix("C", b, d, n, t) * h[n]).real for n in range(state))
                out += parameter("D", b, d) * u[b, d, t].item() if "D" in x else 0
                z = x["z"][b, d, t].item() if "z" in x else None
                y[b, d, t] = out if z is None else out * z / (1 + math.exp(-z))
            last[b, d] = torch.tensor(h, dtype=last.dtype)
    return y, last


@pytest.mark.parametrize("function", [selective_scan, selective_scan_reference])
@pytest.mark.parametrize("name", [*(name for name in real.CASES if name != "packed"), "chunk_and_one", "length0"])
def test_complex_scan_every_case_equals_loop_over_python_numbers(name, function):
    call = {**TestComplexScan.op.cases, **SHAPES}[name](torch.float64, "cpu")
    tensors = joined(call.tensors)
    y, last = function(**tensors, delta_softplus=call.options["delta_softplus"], return_last_state=True)
    want_y, want_last = plain_loop(delta_softplus=call.options["delta_softplus"], return_last_state=True, **tensors)
    assert y.dtype == torch.float64 and last.dtype == torch.complex128
    close(components((y, last)), components((want_y, want_last)), real.FACTOR)


def test_complex_scan_of_real_system_is_twice_real_scan():
    """With imaginary parts of zero, y is twice that of the real scan."""
    call = build("z", "reset", "initial_state")(torch.float64, "cpu")
    paired = {n: x + 0j if n in COMPLEX else x for n, x in call.tensors.items()}
    got, (y, last) = outputs(selective_scan, call._replace(tensors=paired)), outputs(selective_scan, call)
    close(components(got), components((2 * y, last + 0j)), real.FACTOR)


def conjugated(x: Tensor) -> Tensor:
    """Return the same numbers, conjugated in memory."""
    return x.conj().resolve_conj().conj()


@pytest.mark.parametrize("layout", [*LAYOUTS, conjugated])
@pytest.mark.parametrize("name", ["per_task", "groups", "invariant", "mixed", "lanes_and_one", "state16"])
def test_strides_of_complex_tensors_same_result(name, layout):
    """The conformance tests lay out components; here the complex tensors have the layouts."""

    def drawn(like: Iterable[Tensor]) -> list[Tensor]:
        return [layout(torch.complex(*noise((x.real, x.imag)))) if x.is_complex() else noise((x,))[0] for x in like]

    call = {**TestComplexScan.op.cases, **SHAPES}[name](torch.float64, "cpu")
    call = call._replace(tensors=joined(call.tensors))
    strided = {n: layout(x) if n in COMPLEX else x for n, x in call.tensors.items()}
    results = []
    for tensors in (strided, {n: x.resolve_conj().contiguous() for n, x in strided.items()}):
        x = leaves(call._replace(tensors=tensors), real.differentiable(call))
        outs = outputs(selective_scan, call, **{**tensors, **x})
        first = torch.autograd.grad(outs, list(x.values()), drawn(outs), create_graph=True)
        results.append(components((*outs, *first, *torch.autograd.grad(first, list(x.values()), drawn(x.values())))))
    close(*results, real.FACTOR)


# ---- gradients in PyTorch's convention ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", parameters({name: name for name in real.CASES}, REPRESENTATIVE))
def test_gradients_of_complex_tensors_are_numerical_ones(name):
    call = with_components(real.CASES[name])(torch.float64, "cpu")
    call = call._replace(tensors=joined(call.tensors))
    names = real.differentiable(call)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return outputs(selective_scan, call, **dict(zip(names, values, strict=True)))

    x = tuple(leaves(call, names).values())
    modes = {"check_batched_grad": True, "fast_mode": name != "plain"}
    assert gradcheck(function, x, check_forward_ad=True, check_batched_forward_grad=True, **modes)
    assert gradgradcheck(function, x, check_fwd_over_rev=True, check_rev_over_rev=True, **modes)


# ---- rounding ----------------------------------------------------------------------------------------------------


def spinning(length: int) -> Build:
    """Build S4D-Lin, A = -(1..dstate) + i pi (0..dstate - 1), with the other arguments of the real scan's bounds."""

    def make(dtype: torch.dtype, device: str) -> Call:
        call = with_components(lambda dtype, device: numerics.make(dtype, length))(dtype, device)
        A = call.tensors["A"]
        A[..., 1] = math.pi * torch.arange(A.shape[-2])
        return call

    return make


@pytest.mark.parametrize("length", [64, pytest.param(1024, marks=pytest.mark.kernels)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_complex_scan_is_within_bounds(dtype, length):
    """Errors are within twice the real scan's bounds, because a component of a complex product has two products."""
    torch.set_num_threads(1)
    call = spinning(length)(torch.float32, "cpu")
    want = numerics.results(on_components(numerics.loop), to_float64(call), torch.float32)
    call = call._replace(tensors={n: x.to(dtype) for n, x in call.tensors.items()})
    for name, got in numerics.results(on_components(selective_scan), call, torch.float32).items():
        error = (got.double() - want[name]).abs().max() / want[name].abs().max() / torch.finfo(dtype).eps
        assert error <= 2 * numerics.BOUNDS[dtype][numerics.group(name)], f"{name}: {error:.1f} roundings"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turns", [1, 1e2, 1e4])
def test_decay_of_one_complex_step_is_within_roundings(turns, dtype, reference_only):
    """Check exp(delta A): rounding delta A costs |delta A| eps / 2, the rest four roundings.

    Kernels with fused multiply-adds do not round the angle.
    """
    eps, draw = torch.finfo(dtype).eps, torch.Generator().manual_seed(0)
    drawn = torch.rand(2, 1, 20000, 1, generator=draw).to(dtype)
    A = torch.complex(-10 * drawn[0, 0], (2 * drawn[1, 0] - 1) * 2 * math.pi * turns)
    delta = torch.ones(1, 20000, 1, dtype=dtype)
    if dtype == torch.float32:  # float64 represents its products
        delta += torch.rand(delta.shape, generator=draw)
    one = torch.ones(1, 20000, 1, dtype=A.dtype)
    B = torch.ones(1, 1, 1, dtype=A.dtype)
    _, last = selective_scan(0 * delta, delta, A, B, B, return_last_state=True, initial_state=one)
    exponent = delta[0].double() * A.to(torch.complex128)
    want = exponent.exp()
    fused = not reference_only and "AVX" in build_info()["simd"]
    size = exponent.real.abs() if fused else exponent.abs()
    assert ((last[0].to(want) - want).abs() <= (size + 4) * eps * want.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("angle", [1e7, 1e18, 1e30, -1e37])
def test_decay_any_angle_keeps_magnitude(angle, dtype):
    """An angle so large that its digits are unknown does not make a state grow."""
    A = torch.full((3, 2), complex(0, angle), dtype=dtype.to_complex())
    u = torch.rand(2, 3, 40, dtype=dtype)
    B = torch.ones(2, 2, 40, dtype=A.dtype)
    one = torch.ones(2, 3, 2, dtype=A.dtype)
    _, last = selective_scan(0 * u, u, A, B, B, return_last_state=True, initial_state=one)
    assert (last.abs() - 1).abs().max() < 0.1


# ---- packed matrices ---------------------------------------------------------------------------------------------


def packed(x: Tensor) -> Tensor:
    """Interleave along time, as mamba_ssm's selective_scan_ref unpacks."""
    return torch.view_as_real(x).flatten(-2)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("names", [("B",), ("C",), ("B", "C")], ids="".join)
def test_packed_matrices_same_result_as_complex_ones(names, groups):
    call = complex_call(*OPTIONAL, groups=groups, dim=4, softplus=True)
    interleaved = {**call.tensors, **{n: packed(call.tensors[n]) for n in names}}
    results = []
    for tensors in (interleaved, call.tensors):
        x = leaves(call._replace(tensors=tensors), real.differentiable(call))
        y, last = outputs(selective_scan, call, **x)
        grads = torch.autograd.grad(y.square().sum() + last.abs().square().sum(), list(x.values()))
        grads = [packed(g) if n in names and g.is_complex() else g for n, g in zip(x, grads, strict=True)]
        results.append(components((y, last, *grads)))
    close(*results, real.FACTOR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_with_packed_matrices_are_computed_in_float32(dtype):
    call = complex_call(*OPTIONAL, softplus=True)
    narrow = {n: x.to(dtype) for n, x in call.tensors.items() if n in ("u", "delta", "z", "D")}
    narrow |= {n: packed(call.tensors[n]).to(dtype) for n in ("B", "C")}
    rest = {n: x.to(torch.complex64) for n, x in call.tensors.items() if n in ("A", "initial_state")}
    rest |= {"delta_bias": call.tensors["delta_bias"].float(), "reset": call.tensors["reset"]}
    y, last = outputs(selective_scan, call._replace(tensors={**narrow, **rest}))
    full = {n: x.float() for n, x in narrow.items()}
    want_y, want_last = outputs(selective_scan, call._replace(tensors={**full, **rest}))
    assert y.dtype == dtype and last.dtype == torch.complex64
    assert torch.equal(y, want_y.to(dtype)) and torch.equal(last, want_last)


def test_autocast_complex_matrices_unchanged():
    tensors = {n: x.to(torch.complex64 if x.is_complex() else torch.float32) for n, x in complex_call().tensors.items()}
    tensors["u"] = tensors["u"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan(**tensors)
    assert torch.equal(y, selective_scan(**{**tensors, "u": tensors["u"].float()}))


# ---- properties --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [real.in_segments(1, 6), real.in_steps, real.in_episodes])
def test_complex_scan_equals_segments_steps_and_episodes(other):
    call = with_components(build(*OPTIONAL, length=9, dim=3, state=2, softplus=True))(torch.float64, "cpu")
    names = real.differentiable(call)
    close(outputs(on_components(other), call), outputs(on_components(selective_scan), call), real.FACTOR)
    close(
        derivatives(on_components(other), call, names),
        derivatives(on_components(selective_scan), call, names),
        real.FACTOR,
    )


def test_complex_reset_after_non_finite_state_restarts():
    call = complex_call("initial_state", "reset", length=6)
    call.tensors["reset"].zero_()[:, 3] = True
    y, last = outputs(selective_scan, call)
    u = call.tensors["u"].clone()
    u[..., :3] = torch.nan
    spoilt, same = outputs(selective_scan, call, u=u, initial_state=call.tensors["initial_state"] * torch.inf)
    assert torch.equal(spoilt[..., 3:], y[..., 3:]) and torch.equal(same, last)
    assert not spoilt[..., :3].isfinite().any()


@pytest.mark.parametrize("names", [("A",), ("B",), ("A", "B", "C", "D")], ids="".join)
def test_vmap_complex_parameters_per_task_match_loop(names):
    """Check gradients of complex parameters that vmap hides, where all sizes are equal."""
    call = complex_call("D", "initial_state", invariant=("B", "C"), batch=3, dim=3, length=3, state=3)
    many = {n: torch.stack([call.tensors[n] * (1 + 0.3 * i) for i in range(3)]) for n in names}

    def gradient(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            y, last = outputs(selective_scan, call, **parameters)
            return y.square().sum() + last.abs().square().sum()

        return torch.func.grad(loss)(parameters)

    got = torch.vmap(gradient)(many)
    for i in range(3):
        want = gradient({n: x[i] for n, x in many.items()})
        close(components(got[n][i] for n in names), components(want[n] for n in names), real.FACTOR)


# ---- errors ------------------------------------------------------------------------------------------------------

SIZES = {"batch": 4, "dim": 6, "length": 5, "state": 3}
REAL = build(*OPTIONAL, **SIZES)(torch.float64, "cpu").tensors
GOOD = complex_call(*OPTIONAL, **SIZES).tensors
FIXED = complex_call(*OPTIONAL, invariant=("B", "C"), **SIZES).tensors


def last_step(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the arguments of selective_scan_step for the last step."""
    step = {n: x[..., -1] if n in ("u", "delta", "z", "B", "C") else x for n, x in tensors.items() if n != "reset"}
    return {"state": step.pop("initial_state"), **step}


def mistakes() -> Any:
    for function, good, real_good, state in (
        (selective_scan, GOOD, REAL, "initial_state"),
        (selective_scan_reference, GOOD, REAL, "initial_state"),
        (selective_scan_step, last_step(GOOD), last_step(REAL), "state"),
    ):
        wrong = [(good, n, TypeError, good[n].to(torch.complex64), "complex128") for n in ("A", "B", "C", state)]
        wrong += [(good, n, TypeError, good[n].to(torch.complex32), "complex128") for n in ("A", "B", "C", state)]
        wrong += [(good, n, TypeError, good[n].real, "complex A") for n in ("B", "C", state)]
        wrong += [(real_good, n, TypeError, good[n], "real A") for n in ("B", "C", state)]
        wrong += [(good, n, TypeError, good[n] + 0j, "float64") for n in ("delta", "z", "D", "delta_bias")]
        wrong += [(good, "u", TypeError, good["u"] + 0j, "float64")]
        if function is selective_scan_step:
            wrong += [(good, "B", ValueError, torch.view_as_real(good["B"]), "states")]
        else:
            wrong += [(good, n, ValueError, packed(good[n])[..., :-1], "length") for n in ("B", "C")]
            wrong += [(good, n, TypeError, packed(good[n]).float(), "float64") for n in ("B", "C")]
            wrong += [(real_good, n, ValueError, packed(good[n]), "length") for n in ("B", "C")]
            wrong += [(FIXED, n, TypeError, FIXED[n].real, "complex A") for n in ("B", "C")]
            wrong += [(FIXED, n, ValueError, torch.view_as_real(FIXED[n]).flatten(-2), "shape") for n in ("B", "C")]
        for base, name, error, value, words in wrong:
            identifier = f"{function.__name__}-{name}-{str(value.dtype)[6:]}-{words}"
            yield pytest.param(function, {**base, name: value}, name, error, words, id=identifier)


@pytest.mark.parametrize("function, arguments, name, error, words", list(mistakes()))
def test_bad_complex_argument_raises_one_sentence_that_names_it(function, arguments, name, error, words):
    real.check_error(function, arguments, name, error)
    with pytest.raises(error, match=words):
        function(**arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_valid_arguments_are_accepted(dtype):
    """The arguments that the cases above change are valid."""

    def cast(x: Tensor) -> Tensor:
        return x if x.dtype == torch.bool else x.to(dtype.to_complex() if x.is_complex() else dtype)

    for good in (GOOD, REAL, FIXED):
        tensors = {n: cast(x) for n, x in good.items()}
        assert selective_scan(**tensors).dtype == dtype
        if good is not FIXED:
            assert selective_scan_step(**last_step(tensors))[0].dtype == dtype
