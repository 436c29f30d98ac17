"""selective_scan and selective_scan_step: the battery, the properties that tie them together, and their errors."""

import doctest
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from op_conformance import DTYPES, Battery, Build, Call, Op, close, derivatives, leaves, outputs
from torch import Tensor

from eaml_ext.ops import selective_scan, selective_scan_reference, selective_scan_step
from eaml_ext.ops.selective_scan import ARGUMENTS

functional = sys.modules["eaml_ext.ops.selective_scan._functional"]
ops = torch.ops.eaml_ext
OPTIONAL = ("D", "z", "delta_bias", "initial_state", "reset")

# Roundings in a row that an output or gradient sees: a dozen in a step and its exp, for the steps that the state
# remembers (about three at the decay drawn here); as many again in each of the two derivatives.
FACTOR = 32


def build(
    *present: str,
    batch: int = 2,
    dim: int = 3,
    length: int = 5,
    state: int = 3,
    tasks: tuple[str, ...] = (),
    groups: int | None = None,
    invariant: tuple[str, ...] = (),
    softplus: bool = False,
    last: bool = True,
    seed: int = 0,
) -> Build:
    """A call with the optional arguments ``present``; ``tasks`` names the parameters given to each of two tasks."""

    def make(dtype: torch.dtype, device: str) -> Call:
        draw = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        def parameter(name: str, *shape: int) -> Tensor:
            return randn(*(2,) * (name in tasks), *shape)

        def matrix(name: str) -> Tensor:
            shape = (dim, state)
            if name not in invariant:
                shape = (batch, state, length) if groups is None else (batch, groups, state, length)
            return randn(*shape) * min(1.0, 4 * state**-0.5)  # beyond 16, sums over states grow no further

        tensors = {
            "u": randn(batch, dim, length),
            "delta": randn(batch, dim, length) if softplus else 0.2 + randn(batch, dim, length).abs(),
            "A": -0.3 - parameter("A", dim, state).abs(),
            "B": matrix("B"),
            "C": matrix("C"),
            "D": parameter("D", dim),
            "z": randn(batch, dim, length),
            "delta_bias": parameter("delta_bias", dim) if softplus else parameter("delta_bias", dim).abs(),  # dt > 0
            "initial_state": randn(batch, dim, state),
            "reset": randn(batch, length) > 0.7,
        }
        kept = {
            name: (x.to(dtype) if x.is_floating_point() else x).to(device)
            for name, x in tensors.items()
            if name not in OPTIONAL or name in present
        }
        return Call(kept, {"delta_softplus": softplus, "return_last_state": last})

    return make


CASES = {
    "plain": build(state=1),
    "y_alone": build("z", last=False),
    "softplus": build("delta_bias", softplus=True),
    "per_task": build("D", "delta_bias", tasks=("A", "D", "delta_bias"), batch=4, dim=2, length=3, softplus=True),
    "groups": build("initial_state", groups=2, dim=4, length=3),
    "invariant": build("reset", invariant=("B", "C")),
    "mixed": build("D", "initial_state", invariant=("B",), groups=1),
    "step": build(*OPTIONAL, length=1, invariant=("C",)),
    "all": build(*OPTIONAL, softplus=True, dim=2, length=4, state=2),
}
REPRESENTATIVE = ("per_task", "groups", "invariant", "step")  # of every optional argument and layout
SHAPES = {
    "batch0": build(*OPTIONAL, batch=0),
    "batch0_tasks": build(*OPTIONAL, batch=0, tasks=("A", "D"), invariant=("B",)),
    "length0": build(*OPTIONAL, length=0, softplus=True),
    "length0_invariant": build("initial_state", length=0, invariant=("B", "C")),
    "state16": build(*OPTIONAL, state=16, length=7, softplus=True),
    "state33": build("z", state=33, dim=5, length=6),
    "state256": build(*OPTIONAL, state=256, dim=5, length=6),
    "one_chunk": build("z", "reset", length=32, dim=2),
    "chunk_and_one": build("initial_state", length=33, dim=2, state=5),
    "three_chunks": build(*OPTIONAL, length=70, dim=2, state=2, softplus=True),
    "lanes_and_one": build("D", "delta_bias", dim=17, length=3, softplus=True),
    "units": build(*OPTIONAL, batch=1, dim=150, length=3, state=5),
    "units_groups": build("z", batch=1, dim=140, groups=2, length=3, state=2),
    "units_invariant": build("z", batch=2, dim=70, length=3, invariant=("B", "C"), tasks=("A",)),
}


def reference(**arguments: Any) -> Any:
    return selective_scan_reference(**arguments)


def raw_calls(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    """The four raw ops with the arguments that this call gives them."""
    x = [call.tensors.get(name) for name in ARGUMENTS]
    reset, softplus = call.tensors.get("reset"), call.options["delta_softplus"]
    options = (reset, softplus, call.tensors["B"].dim() == 2, call.tensors["C"].dim() == 2)
    y, last, saved = ops.selective_scan(*x, *options, True)
    along = [None if v is None else torch.randn_like(v) for v in x]
    along[-1] = None
    grad_y, grad_state = torch.randn_like(y), torch.randn_like(last)
    return [
        (ops.selective_scan.default, (*x, *options, True)),
        (ops.selective_scan.default, (*x, *options, False)),
        (ops.selective_scan_backward.default, (grad_y, grad_state, *x, *options, saved)),
        (ops.selective_scan_backward.default, (grad_y, None, *x, *options, None)),
        (ops.selective_scan_jvp.default, (*x, *along, *options)),
        (ops.selective_scan_backward_jvp.default, (grad_y, grad_state, grad_y, None, *x, *along, *options, True)),
        (ops.selective_scan_backward_jvp.default, (grad_y, None, None, None, *x, *along, *options, False)),
    ]


@st.composite
def drawn(draw: Any) -> Build:
    tasks = draw(st.lists(st.sampled_from(("A", "D", "delta_bias", "B", "C")), unique=True))
    invariant = draw(st.sampled_from(((), ("B",), ("C",), ("B", "C"))))
    groups = draw(st.sampled_from((None, 1, 2, 3)))
    large = draw(st.integers(0, 7)) == 7  # many states, few channels and steps
    return build(
        *draw(st.lists(st.sampled_from(OPTIONAL), unique=True)),
        batch=2 * draw(st.integers(0, 2)) if tasks else draw(st.integers(0, 3)),
        dim=(1 if large else draw(st.integers(1, 40))) * (groups or 1),
        length=draw(st.integers(0, 5) if large else st.integers(0, 40) | st.sampled_from((64, 65, 97))),
        state=draw(st.sampled_from((16, 17, 33, 64)) if large else st.integers(1, 9)),
        tasks=tuple(tasks),
        groups=groups,
        invariant=invariant,
        softplus=draw(st.booleans()),
        last=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


class TestScan(Battery):
    op = Op(
        function=selective_scan,
        reference=selective_scan_reference,
        differentiable=ARGUMENTS,
        cases=CASES,
        shapes=SHAPES,
        parallel=build(*OPTIONAL, batch=4, dim=130, length=20, state=16, softplus=True),
        drawn=drawn(),
        raw=raw_calls,
        factor=FACTOR,
        compiled=("plain", "per_task", "all"),
        representative=REPRESENTATIVE,
    )


# ---- one step ----------------------------------------------------------------------------------------------------


def as_step(scan: Build) -> Build:
    """The call of selective_scan_step that equals a scan of length 1."""

    def make(dtype: torch.dtype, device: str) -> Call:
        tensors, options = scan(dtype, device)
        state = {"state": tensors["initial_state"]}
        rest = {n: x.squeeze(-1) if n in ("u", "delta", "z", "B", "C") else x for n, x in tensors.items()}
        rest.pop("initial_state")
        return Call({**state, **rest}, {"delta_softplus": options["delta_softplus"]})

    return make


def as_scan(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Call:
    tensors = {
        "u": u.unsqueeze(-1),
        "delta": delta.unsqueeze(-1),
        "A": A,
        "B": B.unsqueeze(-1),
        "C": C.unsqueeze(-1),
        "D": D,
        "z": None if z is None else z.unsqueeze(-1),
        "delta_bias": delta_bias,
        "initial_state": state,
    }
    options = {"delta_softplus": delta_softplus, "return_last_state": True}
    return Call({n: x for n, x in tensors.items() if x is not None}, options)


def step_reference(**arguments: Any) -> tuple[Tensor, Tensor]:
    y, last = outputs(selective_scan_reference, as_scan(**arguments))
    return y.squeeze(-1), last


class TestStep(Battery):
    op = Op(
        function=selective_scan_step,
        reference=step_reference,
        differentiable=("state", "u", "delta", "A", "B", "C", "D", "z", "delta_bias"),
        cases={
            "plain": as_step(build("initial_state", length=1, state=1)),
            "per_task": as_step(build("initial_state", "D", tasks=("A", "D"), batch=4, dim=2, length=1)),
            "groups": as_step(build("initial_state", groups=2, dim=4, length=1)),
            "all": as_step(build("initial_state", "D", "z", "delta_bias", length=1, softplus=True)),
        },
        shapes={
            "batch0": as_step(build("initial_state", "D", length=1, batch=0)),
            "state33": as_step(build("initial_state", "z", length=1, state=33)),
            "units": as_step(build("initial_state", "D", "z", batch=3, dim=150, length=1)),
        },
        parallel=as_step(build("initial_state", "D", "z", batch=64, dim=300, state=16, length=1)),
        drawn=st.builds(
            lambda *present, **sizes: as_step(build("initial_state", *present, length=1, **sizes)),
            batch=st.integers(0, 5),
            dim=st.integers(1, 100),
            state=st.integers(1, 20),
            softplus=st.booleans(),
            seed=st.integers(0, 999),
        ),
        raw=lambda call: raw_calls(as_scan(**call.tensors, **call.options)),
        factor=FACTOR,
        compiled=("all",),
    )


# ---- every combination of options --------------------------------------------------------------------------------


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("layout", ["variable", "groups", "B_invariant", "C_invariant", "invariant"])
def test_every_combination_of_options(softplus, layout, device):
    invariant = {"B_invariant": ("B",), "C_invariant": ("C",), "invariant": ("B", "C")}.get(layout, ())
    groups = 2 if layout == "groups" else None
    for n in range(len(OPTIONAL) + 1):
        for present in itertools.combinations(OPTIONAL, n):
            options = {"groups": groups, "invariant": invariant, "softplus": softplus}
            call = build(*present, dim=2, length=3, state=2, **options)(torch.float64, device)
            names = TestScan.op.names(call)
            for last in (False, True):
                call.options["return_last_state"] = last
                close(outputs(selective_scan, call), outputs(selective_scan_reference, call), FACTOR)
            call.options["return_last_state"] = n % 2 == 0
            got, want = (derivatives(f, call, names) for f in (selective_scan, selective_scan_reference))
            close(got, want, FACTOR)


@pytest.mark.parametrize("name", ["B", "C"])
def test_invariant_matrix_per_task_under_vmap(name, device):
    """A (tasks, dim, state) that vmap hides must not be read as (batch, state, length), even where the sizes agree."""
    call = build("initial_state", invariant=(name,), batch=3, dim=3, length=3, state=3)(torch.float64, device)
    many = torch.stack([call.tensors[name] * (i + 1) for i in range(3)])
    got = torch.vmap(lambda x: outputs(selective_scan, call, **{name: x}))(many)
    for i in range(3):
        want = outputs(selective_scan_reference, call, **{name: many[i]})
        close([out[i] for out in got], want, FACTOR)


# ---- properties --------------------------------------------------------------------------------------------------

SEQUENCES = ("u", "delta", "z", "reset")


def steps_of(tensors: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """The arguments of a scan over steps start..stop."""
    variable = {n for n in ("B", "C") if tensors[n].dim() > 2}
    return {n: x[..., start:stop] if n in SEQUENCES or n in variable else x for n, x in tensors.items()}


def in_pieces(*cuts: int) -> Any:
    """A scan that is cut at these steps, with the state handed on."""

    def function(delta_softplus: bool, return_last_state: bool, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        bounds = [0, *cuts, tensors["u"].shape[-1]]
        state, ys = tensors["initial_state"], []
        for start, stop in itertools.pairwise(bounds):
            piece = steps_of({**tensors, "initial_state": state}, start, stop)
            y, state = selective_scan(**piece, delta_softplus=delta_softplus, return_last_state=True)
            ys.append(y)
        return torch.cat(ys, -1), state

    return function


def in_steps(delta_softplus: bool, return_last_state: bool, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    state, ys = tensors["initial_state"], []
    for t in range(tensors["u"].shape[-1]):
        step = {
            n: x.squeeze(-1) if n in ("u", "delta", "z", "B", "C") else x
            for n, x in steps_of(tensors, t, t + 1).items()
        }
        fresh = step.pop("reset", None)
        step.pop("initial_state")
        if fresh is not None:
            state = torch.where(fresh[..., None], 0, state)
        y, state = selective_scan_step(state, **step, delta_softplus=delta_softplus)
        ys.append(y)
    return torch.stack(ys, -1), state


def in_episodes(delta_softplus: bool, return_last_state: bool, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Each row cut where it is reset, every episode scanned from a zero state."""
    ys, states = [], []
    reset = tensors.pop("reset")
    for row in range(reset.shape[0]):
        alone = {n: x[row : row + 1] if n not in ("A", "D", "delta_bias") else x for n, x in tensors.items()}
        bounds = sorted({0, *reset[row].nonzero().flatten().tolist(), reset.shape[1]})
        pieces = []
        for start, stop in itertools.pairwise(bounds):
            piece = steps_of(alone, start, stop)
            if reset[row, start]:
                piece["initial_state"] = torch.zeros_like(piece["initial_state"])
            y, state = selective_scan(**piece, delta_softplus=delta_softplus, return_last_state=True)
            pieces.append(y)
        ys.append(torch.cat(pieces, -1))
        states.append(state)
    return torch.cat(ys), torch.cat(states)


@pytest.mark.parametrize("other", [in_pieces(1), in_pieces(20), in_pieces(5, 32, 37), in_steps, in_episodes])
def test_scan_equals(other, device):
    call = build(*OPTIONAL, length=40, dim=3, state=2, softplus=True)(torch.float64, device)
    names = TestScan.op.names(call)
    close(outputs(other, call), outputs(selective_scan, call), FACTOR)
    close(derivatives(other, call, names), derivatives(selective_scan, call, names), FACTOR)


def test_reset_is_exact_whatever_the_state(device):
    """Nothing crosses a reset, not even an infinity."""
    call = build("initial_state", "reset", length=6)(torch.float32, device)
    tensors = call.tensors
    tensors["reset"].zero_()[:, 3] = True
    y, last = outputs(selective_scan, call)
    tensors["initial_state"] = torch.full_like(tensors["initial_state"], torch.inf)
    tensors["u"] = tensors["u"].clone()
    tensors["u"][..., :3] = torch.nan
    x = leaves(call, ("initial_state", "u", "A"))
    again, last_again = outputs(selective_scan, call, **x)
    assert torch.equal(again[..., 3:], y[..., 3:]) and torch.equal(last_again, last)
    assert not again[..., :3].isfinite().any()


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim, length, channel_last", [(37, 70, True), (37, 70, False), (48, 33, True), (5, 1, False)])
def test_half_types_compute_in_float32(dim, length, channel_last, dtype, device):
    """Outputs, gradients and second order are those of the widened arguments, rounded once."""
    call = build(*OPTIONAL, dim=dim, length=length, state=5, softplus=True, invariant=("C",))(torch.float32, device)

    def memory(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if channel_last else x

    half = {n: memory(x).to(dtype) if n in ("u", "delta", "z", "B") else x for n, x in call.tensors.items()}
    wide = {n: x.float() if x.is_floating_point() else x for n, x in half.items()}

    def results(tensors: dict[str, Tensor]) -> list[Tensor]:
        x = list(leaves(call._replace(tensors=tensors), ARGUMENTS).values())
        y, last = outputs(selective_scan, call._replace(tensors=tensors), **dict(zip(ARGUMENTS, x, strict=True)))
        assert y.dtype == tensors["u"].dtype and last.dtype == torch.float32
        y = y.to(dtype)
        first = torch.autograd.grad((y, last), x, (torch.ones_like(y), last.detach()), create_graph=True)
        assert [g.dtype for g in first] == [v.dtype for v in x]
        first = [g.to(half[n].dtype) for n, g in zip(ARGUMENTS, first, strict=True)]
        second = torch.autograd.grad(first, x, [torch.ones_like(g) for g in first])
        return [y, last, *first, *(g.to(half[n].dtype) for n, g in zip(ARGUMENTS, second, strict=True))]

    assert all(map(torch.equal, results(half), results(wide)))
    all_half = {n: x.to(dtype) if x.is_floating_point() else x for n, x in half.items()}
    y, last = outputs(selective_scan, call._replace(tensors=all_half))
    assert y.dtype == dtype and last.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channel_last", [True, False])
def test_every_half_number_passes_unchanged(channel_last, dtype, device):
    u = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 16, 4096).to(device)
    if channel_last:
        u = u.transpose(1, 2).contiguous().transpose(1, 2)
    none = torch.zeros(1, 1, 4096, dtype=dtype, device=device)
    A, D = -torch.ones(16, 1, device=device), torch.ones(16, device=device)
    y = selective_scan(u, torch.zeros_like(u), A, none, none, D)
    finite = u.float().isfinite()
    assert torch.equal(y[finite], u[finite]) and y[u.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channel_last", [True, False])
def test_numbers_are_rounded_as_torch_rounds_them(channel_last, dtype, device):
    """Of a step of ones with C = 0, y is D: numbers of every magnitude, and all that lie halfway between two halves."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    scattered = torch.arange(-(2**31), 2**31, 65521).to(torch.int32).view(torch.float32)
    D = torch.cat((scattered, (halves[:-1] + halves[1:]) / 2))
    D = D[D.isfinite()].to(device)
    u = torch.ones(1, len(D), 2, dtype=dtype, device=device)
    if channel_last:
        u = u.transpose(1, 2).contiguous().transpose(1, 2)
    none = torch.zeros(1, 1, 2, dtype=dtype, device=device)
    y = selective_scan(u, torch.zeros_like(u), -torch.ones(len(D), 1, device=device), none, none, D)
    assert torch.equal(y, D.to(dtype).view(1, -1, 1).expand_as(y))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_are_widened_in_a_step(dtype, device):
    """Compiled as well, where nothing but shapes is known of what the op takes."""
    call = as_step(build("initial_state", "D", "z", length=1))(torch.float32, device)
    half = call._replace(
        tensors={n: x.to(dtype) if n in ("u", "delta", "z", "B", "C") else x for n, x in call.tensors.items()}
    )
    y, state = outputs(selective_scan_step, call._replace(tensors={n: x.float() for n, x in half.tensors.items()}))

    def step(**tensors: Tensor) -> tuple[Tensor, ...]:
        return outputs(selective_scan_step, half, **tensors)

    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        got = function(**half.tensors)
        assert got[0].dtype == dtype and torch.equal(got[0], y.to(dtype)) and torch.equal(got[1], state)


MIXABLE = ("u", "delta", "B", "C", "z")


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("names", [("B", "C"), ("delta",), ("z", "C"), ("u",)], ids=str)
def test_step_mixed_dtypes_equal_the_float32_step(names, dtype, no_grad, device):
    """``names`` are in another dtype than the rest, as in calls of mamba_ssm's selective_state_update."""
    call = as_step(build("initial_state", "D", "z", "delta_bias", length=1, softplus=True))(torch.float32, device)
    for other in {torch.float32, *HALVES} - {dtype}:
        mixed = {n: x.to(other if n in names else dtype) if n in MIXABLE else x for n, x in call.tensors.items()}
        with torch.set_grad_enabled(not no_grad):
            mixed = {n: x.clone().requires_grad_(not no_grad) for n, x in mixed.items()}
            wide = {n: x.detach().float().requires_grad_(not no_grad) for n, x in mixed.items()}
            got = outputs(selective_scan_step, Call(mixed, call.options))
            want = outputs(selective_scan_step, Call(wide, call.options))
            assert got[0].dtype == mixed["u"].dtype and got[1].dtype == torch.float32
            assert torch.equal(got[0], want[0].to(got[0].dtype)) and torch.equal(got[1], want[1])
        if not no_grad:
            grads, wanted = (
                torch.autograd.grad(y.float().sum() + state.sum(), list(x.values()))
                for (y, state), x in ((got, mixed), (want, wide))
            )
            for x, g, w in zip(mixed.values(), grads, wanted, strict=True):
                assert g.dtype == x.dtype and torch.equal(g, w.to(x.dtype))


def test_step_float64_beside_float32_is_refused(device):
    for name in MIXABLE:
        with pytest.raises(
            TypeError, match=r"^selective_scan_step: [a-zA-Z]+ must be float(32|64) for u of float(32|64)"
        ):
            selective_scan_step(**GOOD_STEP | {name: GOOD_STEP[name].double()})


def test_step_takes_the_call_of_selective_state_update_with_heads():
    """mamba_ssm's selective_state_update on half inputs, float32 B and C, heads and groups, by its formula."""
    batch, heads, dim, states, groups = 2, 4, 3, 5, 2
    state, A = torch.randn(batch, heads, dim, states), -torch.rand(heads, dim, states)
    x, dt, z = (torch.randn(batch, heads, dim).bfloat16() for _ in range(3))
    B, C = torch.randn(batch, groups, states), torch.randn(batch, groups, states)
    D, dt_bias = torch.randn(heads, dim), torch.randn(heads, dim)
    step = torch.nn.functional.softplus(dt.float() + dt_bias).unsqueeze(-1)
    B_head, C_head = (m.repeat_interleave(heads // groups, dim=1).unsqueeze(2) for m in (B, C))
    last = torch.exp(step * A) * state + step * B_head * x.float().unsqueeze(-1)
    want = ((last * C_head).sum(-1) + D * x.float()) * torch.nn.functional.silu(z.float())
    y, got = selective_scan_step(
        state.flatten(1, 2),
        x.flatten(1),
        dt.flatten(1),
        A.flatten(0, 1),
        B,
        C,
        D.flatten(),
        z.flatten(1),
        dt_bias.flatten(),
        True,
    )
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(got, last.flatten(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, want.bfloat16().flatten(1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e2, 1e6, 1e30])
def test_underflow_is_zero_and_never_nan(scale, dtype, device):
    call = build("initial_state", length=40)(dtype, device)
    call.tensors["A"] = call.tensors["A"] * scale
    names = TestScan.op.names(call)
    close(outputs(selective_scan, call), outputs(selective_scan_reference, call), FACTOR)
    assert all(x.isfinite().all() for x in derivatives(selective_scan, call, names))
    with_zero_input = outputs(selective_scan, call, u=torch.zeros_like(call.tensors["u"]))
    if scale > 1e3:
        assert all((x == 0).all() for x in with_zero_input)


def test_inputs_are_left_alone(device):
    call = build(*OPTIONAL, softplus=True)(torch.float32, device)
    before = {n: x.clone() for n, x in call.tensors.items()}
    derivatives(selective_scan, call, TestScan.op.names(call))
    assert all(torch.equal(x, before[n]) for n, x in call.tensors.items())


def test_output_has_the_strides_of_u(device):
    call = build(*OPTIONAL)(torch.float32, device)
    for order in itertools.permutations(range(3)):
        back = [order.index(i) for i in range(3)]
        u = call.tensors["u"].permute(order).contiguous().permute(back)
        assert outputs(selective_scan, call, u=u)[0].stride() == u.stride()


# ---- errors ------------------------------------------------------------------------------------------------------

GOOD = build(*OPTIONAL, batch=4, dim=6, length=5, state=3)(torch.float32, "cpu").tensors
GOOD_STEP = as_step(build("initial_state", "D", "z", "delta_bias", batch=4, dim=6, length=1, state=3))(
    torch.float32, "cpu"
).tensors
REQUIRED = ("state", "u", "delta", "A", "B", "C")

BAD_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "u": [(), (6,), (4, 6), (4, 6, 5, 1)],
    "delta": [(), (4, 6), (4, 6, 4), (4, 5, 5), (1, 6, 5), (4, 6, 5, 1)],
    "A": [(), (6,), (6, 4), (5, 3), (3, 6, 3), (0, 6, 3), (2, 5, 3), (2, 2, 6, 3)],
    "B": [(), (3,), (6, 4), (5, 3), (4, 3, 4), (4, 2, 5), (1, 3, 5), (4, 4, 3, 5), (4, 0, 3, 5), (4, 2, 3, 4)],
    "C": [(), (3,), (6, 4), (5, 3), (4, 3, 4), (4, 2, 5), (1, 3, 5), (4, 4, 3, 5), (4, 2, 3, 5), (4, 1, 1, 3, 5)],
    "D": [(), (5,), (1,), (3, 6), (4, 5), (2, 2, 6)],
    "z": [(), (4, 6), (4, 6, 4), (4, 5, 5), (1, 6, 5)],
    "delta_bias": [(), (5,), (3, 6), (4, 5), (2, 2, 6)],
    "initial_state": [(), (4, 6), (4, 6, 4), (1, 6, 3), (4, 5, 3)],
    "reset": [(), (5,), (4, 6), (1, 5), (4, 5, 1)],
}
BAD_STEP_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "state": [(), (4, 6), (4, 6, 4), (1, 6, 3), (4, 5, 3)],
    "u": [(), (6,), (4, 6, 1)],
    "delta": [(), (6,), (4, 5), (1, 6), (4, 6, 1)],
    "A": BAD_SHAPES["A"],
    "B": [(), (3,), (4, 4), (1, 3), (4, 4, 3), (4, 0, 3), (4, 1, 3, 1)],
    "C": [(), (3,), (4, 4), (1, 3), (4, 4, 3), (4, 2, 3), (4, 1, 3, 1)],
    "D": BAD_SHAPES["D"],
    "z": [(), (6,), (4, 5), (4, 6, 1)],
    "delta_bias": BAD_SHAPES["delta_bias"],
}


def mistakes() -> Any:
    """Every argument of every public function with a wrong type, shape, dtype and device."""
    for function, good, shapes in (
        (selective_scan, GOOD, BAD_SHAPES),
        (selective_scan_reference, GOOD, BAD_SHAPES),
        (selective_scan_step, GOOD_STEP, BAD_STEP_SHAPES),
    ):
        for name, x in good.items():
            types: list[Any] = [1.0, "x", [[0.0]], x.numpy(), *[None] * (name in REQUIRED)]
            dtypes = [torch.int64, torch.complex64, torch.float64, *[torch.bool] * (name != "reset")]
            if name == "reset":
                dtypes.append(torch.float32)
            wrong = [(f"type {type(v).__name__}", TypeError, v) for v in types]
            wrong += [(f"shape {shape}", ValueError, x.new_zeros(shape)) for shape in shapes[name]]
            wrong += [(f"dtype {dtype}", TypeError, x.to(dtype)) for dtype in dtypes]
            wrong += [("device meta", ValueError, x.to("meta"))]
            for what, error, value in wrong:
                yield pytest.param(
                    function, {**good, name: value}, name, error, id=f"{function.__name__}-{name}-{what}"
                )
        flags = ["delta_softplus"] + ["return_last_state"] * (function is not selective_scan_step)
        for flag in flags:
            for value in ("yes", 1, torch.ones(())):
                identifier = f"{function.__name__}-{flag}-{type(value).__name__}"
                yield pytest.param(function, {**good, flag: value}, flag, TypeError, id=identifier)
        sparse = good["u"].to_sparse()
        yield pytest.param(function, {**good, "u": sparse}, "u", TypeError, id=f"{function.__name__}-u-sparse")


@pytest.mark.parametrize("function, arguments, name, error", list(mistakes()))
def test_bad_input_gives_one_sentence_that_names_it(function, arguments, name, error):
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**arguments)
    message = str(caught.value)
    assert caught.type is error
    assert message.startswith(f"{function.__name__}: ")
    words = message.replace(":", " ").replace(",", " ").split()
    assert name in words, message
    assert "\n" not in message and "/" not in message and ".py" not in message, message
    assert ". " not in message and not message.endswith("."), message


@pytest.mark.parametrize(
    "fault", [RuntimeError("CUDA error: an illegal memory access"), MemoryError("host"), OSError()]
)
def test_step_fault_of_a_kernel_is_raised_and_not_computed_again(fault, monkeypatch):
    def fails(*_: Any) -> None:
        raise fault

    def never(*_: Any) -> None:
        raise AssertionError("computed again")

    with torch.no_grad():
        selective_scan_step(**GOOD_STEP)  # the raw op takes these arguments
        kernels = type("Ops", (), {"selective_scan_step": staticmethod(fails), "selective_scan": staticmethod(never)})
        monkeypatch.setattr(functional, "library", kernels)
        monkeypatch.setattr(functional, "reference", never)
        with pytest.raises(type(fault)) as caught:
            selective_scan_step(**GOOD_STEP)
    assert caught.value is fault


def test_step_refusal_of_the_raw_op_alone_is_raised(monkeypatch):
    def refuses(*_: Any) -> None:
        raise ValueError("selective_scan: u has a wrong dtype")

    monkeypatch.setattr(functional, "library", type("Ops", (), {"selective_scan_step": staticmethod(refuses)}))
    with pytest.raises(ValueError, match=r"^selective_scan: u has a wrong dtype$"):
        selective_scan_step(**GOOD_STEP)


def test_examples():
    failures, examples = doctest.testmod(functional)
    assert examples and not failures


# ---- long sequences of few channels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("present", [(), OPTIONAL], ids=["plain", "all"])
@pytest.mark.parametrize("state, invariant", [(16, ()), (9, ("B",))])
def test_few_channels_are_summed_in_parts(state, invariant, present, device, reference_only):
    """The states of few, long channels are two sums, for two threads; in a batch there is enough work without them."""
    if reference_only:
        pytest.skip("only the kernels divide states into parts: the reference is one loop, minutes long here")
    single = build(*present, batch=1, dim=17, length=70000 // state, state=state, invariant=invariant, softplus=True)(
        torch.float32, device
    )
    check_few_channels(single, invariant, threads=(2,), factor=4 * FACTOR)


@pytest.mark.parametrize(
    "number, invariant",
    [
        ("real", ()),
        ("complex", ("B",)),
        pytest.param("real", ("B",), marks=pytest.mark.exhaustive),
        pytest.param("complex", (), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "case", ["fast", "slow", "fast where stretches meet", "large at the ends", "infinite", "resets"]
)
def test_few_channels_are_done_in_stretches(case, invariant, number, device, reference_only):
    """Threads start in the middle, from what some steps before make of zeros; where that is wrong, they do it again."""
    if reference_only:
        pytest.skip("only the kernels divide time into stretches: the reference is one loop, minutes long here")
    present = {*OPTIONAL} - {"reset"}
    length, dim = 3 * 4096, 7
    call = build(*present, batch=1, dim=dim, length=length, state=13, invariant=invariant)(torch.float32, device)
    tensors = dict(call.tensors)
    fast_at_edges = case in ("fast where stretches meet", "large at the ends")
    slow = fast_at_edges or case == "slow"
    delta = torch.full((length,), 1e-4 if slow else 1.0)
    if fast_at_edges:
        step = torch.arange(length) % 2048  # threads may start at every multiple
        delta[(step < 64) | (step >= 2048 - 64)] = 1
    tensors["delta"] = delta.to(device).expand(1, dim, length).contiguous()
    tensors["delta_bias"] = tensors["delta_bias"] * 0
    if case == "large at the ends":  # more than a guess foresees
        tensors["initial_state"] = tensors["initial_state"] * 1e5
        tensors["u"][..., -1] = 1e5
    if case == "infinite":
        tensors["u"][0, 3, 100] = math.inf
    if case == "resets":
        tensors["reset"] = torch.zeros(1, length, dtype=torch.bool, device=device)
        tensors["reset"][0, [2000, 4090, 4096, 7000]] = True
    if number == "complex":
        kinds = ("A", "B", "C", "initial_state")
        tensors |= {n: torch.complex(tensors[n], 0.5 * tensors[n].flip(-1)) for n in kinds}
    factor = 32 if slow else 4  # what is remembered for thousands of steps is rounded as often
    check_few_channels(call._replace(tensors=tensors), invariant, threads=(2, 3), factor=factor * FACTOR)


def check_few_channels(single: Call, invariant: Sequence[str], threads: Sequence[int], factor: float) -> None:
    """All results of a call of one row: the same bits on several threads, close to those of a batch of such rows."""
    rows = 4
    names = [name for name in ARGUMENTS if name in single.tensors]
    shared = {"A", "D", "delta_bias", *invariant}
    repeated = {n: x if n in shared else x.expand(rows, *x.shape[1:]) for n, x in single.tensors.items()}

    def results(call: Call, count: int = 1) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            x = list(leaves(call, names).values())
            outs = outputs(selective_scan, call, **dict(zip(names, x, strict=True)))
            first = torch.autograd.grad(outs, x, [out.detach() for out in outs], create_graph=True)
            every = [*outs, *first, *torch.autograd.grad(first, x, [v.detach() for v in x])]
            return [torch.view_as_real(x) if x.is_complex() else x for x in every]
        finally:
            torch.set_num_threads(before)

    got = results(single)
    for count in threads:
        for i, (a, b) in enumerate(zip(got, results(single, count), strict=True)):
            assert torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32)), f"{i}, {count} threads"
    want = results(single._replace(tensors=repeated))
    of = ["y", "last", *names, *names]
    close(got, [w / rows if n in shared else w[:1] for n, w in zip(of, want, strict=True)], factor)
