"""mamba_ssm's options of selective_scan_fn and selective_state_update, on an oracle in float64."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from parametrisations import FLAG, FLOATS, _one_thread, assert_near, covering, label, opmath_dtype, product  # noqa: F401
from torch import Tensor

from eaml_ext.ops import selective_scan, selective_scan_step


def test_covering_any_two_parameters_contains_every_pair() -> None:
    options = {"a": "xyz", "b": (1, 2), "c": FLAG, "d": range(5)}
    rows = covering(options)
    for i, j in itertools.combinations(range(4), 2):
        values = [*options.values()]
        assert {(row[i], row[j]) for row in rows} == {*itertools.product(values[i], values[j])}
    assert len(rows) < 24


# ---- mamba_ssm: selective_scan_fn --------------------------------------------------------------------------------

Inputs = dict[str, Tensor]


class Scan(NamedTuple):
    """``weights`` is "real", "complex" or "packed" (complex, with variable B and C as interleaved reals)."""

    weights: str
    itype: torch.dtype
    seqlen: int
    return_last_state: bool
    has_delta_bias: bool
    delta_softplus: bool
    has_z: bool
    has_D: bool
    groups: int
    is_variable_B: bool
    is_variable_C: bool
    dim: int
    dstate: int


SCAN: dict[str, Sequence[Any]] = {
    "weights": ("real", "complex", "packed"),
    "itype": FLOATS,
    "seqlen": (1, 8, 33, 64, 100, 256),
    **dict.fromkeys(("return_last_state", "has_delta_bias", "delta_softplus", "has_z", "has_D"), FLAG),
    "groups": (1, 2, 3),
    **dict.fromkeys(("is_variable_B", "is_variable_C"), FLAG),
    "dim": (6, 36),
    "dstate": (5, 16, 1),
}
BATCH = 3


def drawn_step_size(shape: Sequence[int], softplus: bool) -> Tensor:
    """Draw step sizes between 0.02 and 0.6; with softplus, of any sign."""
    return 2 * torch.randn(shape) - 1 if softplus else 0.02 + 0.58 * torch.rand(shape)


def scan_inputs(case: Scan) -> Inputs:
    opmath, length = opmath_dtype(case.itype), case.seqlen
    complex_type = case.weights != "real"

    def matrix(variable: bool) -> Tensor:
        groups = () if case.groups == 1 else (case.groups,)
        shape = (BATCH, *groups, case.dstate, length) if variable else (case.dim, case.dstate)
        if not complex_type:
            return torch.randn(shape).to(case.itype if variable else opmath)
        value = torch.randn(shape, dtype=torch.complex64)
        if variable and case.weights == "packed":
            return torch.view_as_real(value).flatten(-2).to(case.itype)
        return value.to(opmath.to_complex())

    A = -0.1 - 1.4 * torch.rand(case.dim, case.dstate)
    if complex_type:
        A = torch.complex(A, 6 * torch.rand_like(A) - 3)
    x = {
        "u": torch.randn(BATCH, case.dim, length).to(case.itype),
        "delta": drawn_step_size((BATCH, case.dim, length), case.delta_softplus).to(case.itype),
        "A": A.to(opmath.to_complex() if complex_type else opmath),
        "B": matrix(case.is_variable_B),
        "C": matrix(case.is_variable_C),
    }
    if case.has_D:
        x["D"] = torch.randn(case.dim, dtype=opmath)
    if case.has_z:
        x["z"] = torch.randn(BATCH, case.dim, length).to(case.itype)
    if case.has_delta_bias:
        x["delta_bias"] = 0.3 * torch.rand(case.dim, dtype=opmath)
    return x


def in_double(x: Inputs) -> Inputs:
    """Return leaves in float64 and complex128; packed matrices become complex."""
    length, leaves = x["u"].shape[-1], {}
    for name, value in x.items():
        value = value.detach().to(torch.complex128 if value.is_complex() else torch.float64)
        if name in ("B", "C") and x["A"].is_complex() and not value.is_complex() and value.shape[-1] == 2 * length:
            value = torch.view_as_complex(value.unflatten(-1, (length, 2)))
        leaves[name] = value.requires_grad_()
    return leaves


def scan_oracle(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, state=None, *, softplus, magnitudes=False
) -> tuple[Tensor, Tensor]:
    """Return y and the last state by a loop over time; with ``magnitudes``, the sums of their terms' absolute values.

    The gradients of magnitudes are, up to their sign, such sums for the gradients.
    """
    magnitude = torch.abs if magnitudes else torch.Tensor.clone

    def at_steps(matrix: Tensor) -> Tensor:  # (batch, dim, state, length)
        if matrix.dim() == 2:
            return magnitude(matrix)[None, :, :, None].expand(len(u), -1, -1, u.shape[-1])
        matrix = magnitude(matrix if matrix.dim() == 4 else matrix[:, None])
        return matrix.repeat_interleave(u.shape[1] // matrix.shape[1], dim=1)

    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    if softplus:
        dt = torch.logaddexp(dt, torch.zeros_like(dt))
    decay = torch.exp(dt[:, :, None] * A[..., None])
    if magnitudes:
        exponent = dt[:, :, None] * A.abs()[..., None]
        decay = decay.abs().detach() * (1 + exponent - exponent.detach())
    drive = (dt * magnitude(u))[:, :, None] * at_steps(B)
    h = torch.zeros_like(drive[..., 0]) if state is None else magnitude(state)
    states = []
    for a, b in zip(decay.unbind(-1), drive.unbind(-1), strict=True):
        h = a * h + b
        states.append(h)
    y = (at_steps(C) * torch.stack(states, dim=-1)).sum(2)
    y = 2 * y.real if A.is_complex() else y
    if D is not None:
        y = y + magnitude(D)[:, None] * magnitude(u)
    if z is not None:
        gate = z.sigmoid()
        if magnitudes:
            slope = (gate + z.abs() * gate * (1 - gate)).detach()
            y = y * ((z.abs() * gate).detach() + slope * (z.abs() - z.abs().detach()))
        else:
            y = y * z * gate
    return y, h


def oracle_results(x: Inputs, cotangents: Sequence[Tensor | None], softplus: bool, magnitudes: bool) -> Inputs:
    """Return outputs and gradients by name, or the magnitudes of both."""
    leaves = in_double(x)
    outs = scan_oracle(**leaves, softplus=softplus, magnitudes=magnitudes)
    given = []
    for out, cotangent in zip(outs, cotangents, strict=True):
        if cotangent is not None:
            value = cotangent.reshape(out.shape).to(torch.complex128 if cotangent.is_complex() else torch.float64)
            given.append((out, value.abs() if magnitudes else value))
    grads = torch.autograd.grad([out for out, _ in given], [*leaves.values()], [g for _, g in given])
    results = {"y": outs[0], "last state": outs[1], **{f"d {n}": g for n, g in zip(leaves, grads, strict=True)}}
    return {name: value.abs() if magnitudes else value for name, value in results.items()}


def check_scan_results(
    x: Inputs, leaves: Inputs, outs: Sequence[Tensor], opmath: torch.dtype, softplus: bool, roundings: float
) -> None:
    """Compare ``outs``, which are y and perhaps the last state, and gradients of ``leaves`` with the oracle's."""
    y, *last = outs
    cotangents = [torch.randn(out.shape, dtype=opmath_dtype(out.dtype)).to(out.dtype) for out in outs]
    grads = torch.autograd.grad(outs, [*leaves.values()], [g.to(y.device) for g in cotangents])
    got = {"y": y, **({"last state": last[0]} if last else {})}
    for (name, value), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == value.dtype
        got[f"d {name}"] = grad
    given = (*cotangents, *(() if last else (None,)))
    want, magnitude = (oracle_results(x, given, softplus, magnitudes) for magnitudes in FLAG)
    for name, value in got.items():
        expected, terms = want[name], magnitude[name]
        if expected.is_complex() and not value.is_complex():  # packed
            expected, terms = torch.view_as_real(expected).flatten(-2), terms.repeat_interleave(2, dim=-1)
        assert_near(name, value, expected.reshape(value.shape), terms.reshape(value.shape), roundings, opmath)


def check_scan(case: Scan, device: str) -> None:
    x = scan_inputs(case)
    leaves = {name: value.to(device).requires_grad_() for name, value in x.items()}
    out = selective_scan(**leaves, delta_softplus=case.delta_softplus, return_last_state=case.return_last_state)
    outs = out if isinstance(out, tuple) else (out,)
    assert len(outs) == 1 + case.return_last_state and outs[0].dtype == case.itype
    # One step rounds its step size, exponent, exponential, product and sum, each by half an epsilon or twice that.
    # Reductions have batch * length, dim or dstate terms.
    roundings = 4.5 * case.seqlen + BATCH * case.seqlen / 2 + case.dim + case.dstate + 16
    check_scan_results(x, leaves, outs, opmath_dtype(case.itype), case.delta_softplus, roundings)


SCANS = [Scan(*row) for row in covering(SCAN)]


@pytest.mark.parametrize("case", SCANS, ids=label)
def test_selective_scan_mamba_options_match_float64_loop(case: Scan, device: str) -> None:
    check_scan(case, device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("itype", FLOATS, ids=str)
@pytest.mark.parametrize("weights", SCAN["weights"])
def test_selective_scan_every_combination_of_mamba_options_matches_float64_loop(
    weights: str, itype: torch.dtype, device: str
) -> None:
    for case in product(Scan, SCAN, weights=[weights], itype=[itype], seqlen=(1, 8, 33, 100), dim=[6], dstate=[5]):
        check_scan(case, device)


# ---- mamba_ssm: selective_state_update ---------------------------------------------------------------------------


class Step(NamedTuple):
    """With ``tied``, the channels of a head share delta, D, delta_bias and one decay for all states."""

    itype: torch.dtype
    matrix_type: torch.dtype | None  # of B and C; None is itype
    half_state: bool  # the state in itype, not in the accumulation dtype
    has_z: bool
    has_D: bool
    has_dt_bias: bool
    dt_softplus: bool
    tied: bool
    groups: int | None
    dstate: int
    dim: int


STEP: dict[str, Sequence[Any]] = {
    "itype": FLOATS,
    "matrix_type": (torch.float32, None),
    **dict.fromkeys(("half_state", "has_z", "has_D", "has_dt_bias", "dt_softplus", "tied"), FLAG),
    "groups": (None, 1, 3, 6),
    "dstate": (4, 24, 65),
    "dim": (12, 78, 540),
}
HEADS = 6


def step_inputs(case: Step) -> Inputs:
    opmath = opmath_dtype(case.itype)
    matrix_type = opmath if case.itype == torch.float64 else case.matrix_type or case.itype
    groups = () if case.groups is None else (case.groups,)

    def per_channel(make: Any, *lead: int) -> Tensor:
        if not case.tied:
            return make((*lead, case.dim))
        return make((*lead, HEADS)).repeat_interleave(case.dim // HEADS, dim=-1)

    if case.tied:
        A = (-1.1 - 2 * per_channel(torch.rand)).to(opmath)[:, None].expand(-1, case.dstate)
    else:
        A = (-1.1 - 2 * torch.rand(case.dim, case.dstate)).to(opmath)
    x = {
        "state": torch.randn(BATCH, case.dim, case.dstate).to(case.itype if case.half_state else opmath),
        "u": torch.randn(BATCH, case.dim).to(case.itype),
        "delta": per_channel(lambda shape: drawn_step_size(shape, case.dt_softplus), BATCH).to(case.itype),
        "A": A,
        "B": torch.randn(BATCH, *groups, case.dstate).to(matrix_type),
        "C": torch.randn(BATCH, *groups, case.dstate).to(matrix_type),
    }
    if case.has_D:
        x["D"] = per_channel(torch.randn).to(opmath)
    if case.has_z:
        x["z"] = torch.randn(BATCH, case.dim).to(case.itype)
    if case.has_dt_bias:
        x["delta_bias"] = per_channel(torch.rand).to(opmath)
    return x


def check_step(case: Step, device: str) -> None:
    x, opmath, options = step_inputs(case), opmath_dtype(case.itype), {"softplus": case.dt_softplus}
    leaves = {name: value.to(device).detach().requires_grad_() for name, value in x.items()}
    before = {name: value.clone() for name, value in x.items()}
    outs = selective_scan_step(**leaves, delta_softplus=case.dt_softplus)
    with torch.no_grad():  # runs another kernel
        without_graph = selective_scan_step(**leaves, delta_softplus=case.dt_softplus)
    assert all(torch.equal(value.cpu(), before[name]) for name, value in leaves.items())
    assert [out.dtype for out in (*outs, *without_graph)] == 2 * [case.itype, opmath]

    over_time = {n: v.unsqueeze(-1) if n in ("u", "delta", "B", "C", "z") else v for n, v in x.items()}
    roundings = case.dim + case.dstate + 24
    check_scan_results(over_time, leaves, outs, opmath, **options, roundings=roundings)
    want, magnitude = (scan_oracle(**in_double(over_time), **options, magnitudes=magnitudes) for magnitudes in FLAG)
    for name, got, expected, terms in zip(("y", "next state"), without_graph, want, magnitude, strict=True):
        assert_near(name, got, expected.reshape(got.shape), terms.reshape(got.shape), roundings, opmath)


STEPS = [Step(*row) for row in covering(STEP)]


@pytest.mark.parametrize("case", STEPS, ids=label)
def test_selective_scan_step_mamba_options_match_float64_formula(case: Step, device: str) -> None:
    check_step(case, device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dstate", STEP["dstate"])
@pytest.mark.parametrize("itype", FLOATS, ids=str)
def test_selective_scan_step_every_combination_of_mamba_options_matches_float64_formula(
    itype: torch.dtype, dstate: int, device: str
) -> None:
    for case in product(Step, STEP, itype=[itype], dstate=[dstate], dim=[12]):
        check_step(case, device)
