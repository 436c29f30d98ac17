"""The options over which mamba_ssm, pytorch3d and torch_cluster test their operators, on oracles written here.

Every pair of options of two parameters occurs. The oracles are the formulas of docs/ops.md in float64, complex128 or
integers, and use nothing of the library. Tolerances count roundings: each result is bounded entry by entry, relative
to the sum of the absolute values of its terms.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from eaml_ext.ops import PackedKeys, knn, selective_scan, selective_scan_step

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
METRICS = ("sqeuclidean", "cosine", "inner_product")
FLAG = (False, True)


@pytest.fixture(autouse=True)
def _one_thread(_reproducible: None) -> None:
    """The tensors are so small that two threads take ten times as long as one."""
    torch.set_num_threads(1)


def covering(options: dict[str, Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Rows of one choice per parameter, in which every pair of choices of two parameters occurs; greedy."""
    choices = [range(len(values)) for values in options.values()]
    left = {
        frozenset(((i, a), (j, b)))
        for i, j in itertools.combinations(range(len(choices)), 2)
        for a, b in itertools.product(choices[i], choices[j])
    }
    rows = []
    while left:
        row = dict(min(left, key=sorted))
        for i in range(len(choices)):
            if i not in row:
                new = {a: sum(frozenset(((i, a), pair)) in left for pair in row.items()) for a in choices[i]}
                row[i] = max(new, key=lambda a: (new[a], (a + len(rows)) % len(new)))
        left -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append(tuple(values[row[i]] for i, values in enumerate(options.values())))
    return rows


def product(make: Callable[..., Any], options: dict[str, Sequence[Any]], **fewer: Sequence[Any]) -> Iterator[Any]:
    """All combinations of options, with fewer choices for some parameters."""
    return itertools.starmap(make, itertools.product(*(options | fewer).values()))


def label(case: Iterable[Any]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case)


def test_covering_any_two_parameters_contains_every_pair() -> None:
    options = {"a": "xyz", "b": (1, 2), "c": FLAG, "d": range(5)}
    rows = covering(options)
    for i, j in itertools.combinations(range(4), 2):
        values = [*options.values()]
        assert {(row[i], row[j]) for row in rows} == {*itertools.product(values[i], values[j])}
    assert len(rows) < 24


def assert_near(
    name: str, got: Tensor, want: Tensor, magnitude: Tensor, roundings: float, accumulated: torch.dtype
) -> None:
    """|got - want| <= half an ulp in the dtype of ``got``, plus ``roundings`` epsilons of the accumulation dtype.

    The epsilons are relative to ``magnitude``, the sum of the absolute values of the terms of each entry.
    """
    out, wide = torch.finfo(got.dtype), torch.finfo(accumulated)
    got, want, magnitude = got.detach().cpu().to(want.dtype), want.detach(), magnitude.detach()
    assert got.shape == want.shape == magnitude.shape, f"{name}: {tuple(got.shape)}, {tuple(want.shape)}"
    bound = out.eps / 2 * want.abs().clamp(min=out.tiny) + roundings * wide.eps * (magnitude + wide.tiny)
    error = (got - want).abs()
    assert (error <= bound).all(), f"{name}: {(error / bound).max().item():.3g} times the bound"


# ---- mamba_ssm: selective_scan_fn --------------------------------------------------------------------------------

Inputs = dict[str, Tensor]


class Scan(NamedTuple):
    """``weights`` is "real", "complex" or "packed": complex, with variable B and C as interleaved reals."""

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


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def drawn_step_size(shape: Sequence[int], softplus: bool) -> Tensor:
    """Step sizes between 0.02 and 0.6; with softplus, any sign."""
    return 2 * torch.randn(shape) - 1 if softplus else 0.02 + 0.58 * torch.rand(shape)


def scan_inputs(case: Scan) -> Inputs:
    wide, length = wide_of(case.itype), case.seqlen
    complex_type = case.weights != "real"

    def matrix(variable: bool) -> Tensor:
        groups = () if case.groups == 1 else (case.groups,)
        shape = (BATCH, *groups, case.dstate, length) if variable else (case.dim, case.dstate)
        if not complex_type:
            return torch.randn(shape).to(case.itype if variable else wide)
        value = torch.randn(shape, dtype=torch.complex64)
        if variable and case.weights == "packed":
            return torch.view_as_real(value).flatten(-2).to(case.itype)
        return value.to(wide.to_complex())

    A = -0.1 - 1.4 * torch.rand(case.dim, case.dstate)
    if complex_type:
        A = torch.complex(A, 6 * torch.rand_like(A) - 3)
    x = {
        "u": torch.randn(BATCH, case.dim, length).to(case.itype),
        "delta": drawn_step_size((BATCH, case.dim, length), case.delta_softplus).to(case.itype),
        "A": A.to(wide.to_complex() if complex_type else wide),
        "B": matrix(case.is_variable_B),
        "C": matrix(case.is_variable_C),
    }
    if case.has_D:
        x["D"] = torch.randn(case.dim, dtype=wide)
    if case.has_z:
        x["z"] = torch.randn(BATCH, case.dim, length).to(case.itype)
    if case.has_delta_bias:
        x["delta_bias"] = 0.3 * torch.rand(case.dim, dtype=wide)
    return x


def in_double(x: Inputs) -> Inputs:
    """Leaves in float64 and complex128; packed matrices become complex."""
    length, leaves = x["u"].shape[-1], {}
    for name, value in x.items():
        value = value.detach().to(torch.complex128 if value.is_complex() else torch.float64)
        if name in ("B", "C") and x["A"].is_complex() and not value.is_complex() and value.shape[-1] == 2 * length:
            value = torch.view_as_complex(value.unflatten(-1, (length, 2)))
        leaves[name] = value.requires_grad_()
    return leaves


def scan_oracle(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    softplus: bool,
    magnitudes: bool = False,
) -> tuple[Tensor, Tensor]:
    """y and the last state by a loop over time, or, with ``magnitudes``, the absolute values of their terms, summed.

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
    """Outputs and gradients by name, or the magnitudes of both."""
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
    x: Inputs, leaves: Inputs, outs: Sequence[Tensor], wide: torch.dtype, softplus: bool, roundings: float
) -> None:
    """Compare ``outs``, which are y and perhaps the last state, and gradients of ``leaves`` with the oracle's."""
    y, *last = outs
    cotangents = [torch.randn(out.shape, dtype=wide_of(out.dtype)).to(out.dtype) for out in outs]
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
        assert_near(name, value, expected.reshape(value.shape), terms.reshape(value.shape), roundings, wide)


def check_scan(case: Scan, device: str) -> None:
    x = scan_inputs(case)
    leaves = {name: value.to(device).requires_grad_() for name, value in x.items()}
    out = selective_scan(**leaves, delta_softplus=case.delta_softplus, return_last_state=case.return_last_state)
    outs = out if isinstance(out, tuple) else (out,)
    assert len(outs) == 1 + case.return_last_state and outs[0].dtype == case.itype
    # One step rounds its step size, exponent, exponential, product and sum, each by half an epsilon or twice that.
    # Reductions have batch * length, dim or dstate terms.
    roundings = 4.5 * case.seqlen + BATCH * case.seqlen / 2 + case.dim + case.dstate + 16
    check_scan_results(x, leaves, outs, wide_of(case.itype), case.delta_softplus, roundings)


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
    wide = wide_of(case.itype)
    matrix_type = wide if case.itype == torch.float64 else case.matrix_type or case.itype
    groups = () if case.groups is None else (case.groups,)

    def per_channel(make: Any, *lead: int) -> Tensor:
        if not case.tied:
            return make((*lead, case.dim))
        return make((*lead, HEADS)).repeat_interleave(case.dim // HEADS, dim=-1)

    if case.tied:
        A = (-1.1 - 2 * per_channel(torch.rand)).to(wide)[:, None].expand(-1, case.dstate)
    else:
        A = (-1.1 - 2 * torch.rand(case.dim, case.dstate)).to(wide)
    x = {
        "state": torch.randn(BATCH, case.dim, case.dstate).to(case.itype if case.half_state else wide),
        "u": torch.randn(BATCH, case.dim).to(case.itype),
        "delta": per_channel(lambda shape: drawn_step_size(shape, case.dt_softplus), BATCH).to(case.itype),
        "A": A,
        "B": torch.randn(BATCH, *groups, case.dstate).to(matrix_type),
        "C": torch.randn(BATCH, *groups, case.dstate).to(matrix_type),
    }
    if case.has_D:
        x["D"] = per_channel(torch.randn).to(wide)
    if case.has_z:
        x["z"] = torch.randn(BATCH, case.dim).to(case.itype)
    if case.has_dt_bias:
        x["delta_bias"] = per_channel(torch.rand).to(wide)
    return x


def check_step(case: Step, device: str) -> None:
    x, wide, options = step_inputs(case), wide_of(case.itype), {"softplus": case.dt_softplus}
    leaves = {name: value.to(device).detach().requires_grad_() for name, value in x.items()}
    before = {name: value.clone() for name, value in x.items()}
    outs = selective_scan_step(**leaves, delta_softplus=case.dt_softplus)
    with torch.no_grad():  # runs another kernel
        without_graph = selective_scan_step(**leaves, delta_softplus=case.dt_softplus)
    assert all(torch.equal(value.cpu(), before[name]) for name, value in leaves.items())
    assert [out.dtype for out in (*outs, *without_graph)] == 2 * [case.itype, wide]

    over_time = {n: v.unsqueeze(-1) if n in ("u", "delta", "B", "C", "z") else v for n, v in x.items()}
    roundings = case.dim + case.dstate + 24
    check_scan_results(over_time, leaves, outs, wide, **options, roundings=roundings)
    want, magnitude = (scan_oracle(**in_double(over_time), **options, magnitudes=magnitudes) for magnitudes in FLAG)
    for name, got, expected, terms in zip(("y", "next state"), without_graph, want, magnitude, strict=True):
        assert_near(name, got, expected.reshape(got.shape), terms.reshape(got.shape), roundings, wide)


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


# ---- pytorch3d: knn_points ---------------------------------------------------------------------------------------


class Clouds(NamedTuple):
    """``points`` is "random", "repeated" (each key about three times) or "lattice": integer coordinates with ties."""

    batch: int | None
    P1: int
    P2: int
    D: int
    K: int
    dtype: torch.dtype
    metric: str
    points: str
    ragged: bool


CLOUDS: dict[str, Sequence[Any]] = {
    "batch": (None, 1, 5),
    "P1": (1, 9, 40),
    "P2": (1, 12, 70),
    "D": (1, 2, 3, 8, 19),
    "K": (1, 4, 11, 80),
    "dtype": FLOATS,
    "metric": METRICS,
    "points": ("random", "repeated", "lattice"),
    "ragged": FLAG,
}


def knn_formula(query: Tensor, key: Tensor, metric: str) -> Tensor:
    """Values of broadcast pairs."""
    if metric == "sqeuclidean":
        return (query - key).square().sum(-1)
    value = (query * key).sum(-1)
    return value if metric == "inner_product" else value / (query.norm(dim=-1) * key.norm(dim=-1))


def knn_slopes(query: Tensor, key: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Absolute values of the terms of the derivatives with respect to query and key, summed."""
    if metric == "sqeuclidean":
        return 2 * (query - key).abs(), 2 * (query - key).abs()
    if metric == "inner_product":
        return key.abs().expand(torch.broadcast_shapes(query.shape, key.shape)), query.abs().expand_as(key)
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
    cosine = (a * b).sum(-1, keepdim=True).abs()
    by_query, by_key = b.abs() + cosine * a.abs(), a.abs() + cosine * b.abs()
    return by_query / query.norm(dim=-1, keepdim=True), by_key / key.norm(dim=-1, keepdim=True)


def nearest(values: Tensor, k: int, metric: str, valid: Tensor | None) -> Tensor:
    """(*, k) indices of values (*, M), best first, equal ones by index; -1 where fewer than ``k`` are valid."""
    worse = values if metric == "sqeuclidean" else -values
    live = torch.ones_like(values, dtype=torch.bool) if valid is None else valid.expand_as(values)
    found = []
    for row, allowed in zip(worse.flatten(0, -2).tolist(), live.flatten(0, -2).tolist(), strict=True):
        best = sorted((j for j, is_live in enumerate(allowed) if is_live), key=row.__getitem__)[:k]
        found.append(best + [-1] * (k - len(best)))
    return torch.tensor(found).reshape(*values.shape[:-1], k)


def drawn_points(case: Clouds, count: int) -> Tensor:
    shape = (case.batch or 1, count, case.D)
    if case.points == "lattice":  # for cosines the corners of a cube: their norms are equal, so that ties are exact
        points = 2 * torch.randint(2, shape) - 1 if case.metric == "cosine" else torch.randint(-2, 3, shape)
    elif case.points == "repeated":
        points = torch.randn(shape)[:, torch.randint(-(-count // 3), (count,))]
    else:
        points = torch.randn(shape)
    return points.to(case.dtype)


def check_clouds(case: Clouds, device: str) -> None:
    queries, keys = drawn_points(case, case.P1), drawn_points(case, case.P2)
    if case.points == "repeated":
        queries[:, ::2] = keys[:, :1]
    valid, used = torch.ones(keys.shape[:2], dtype=torch.bool), torch.ones(queries.shape[:2], dtype=torch.bool)
    if case.ragged:  # a cloud of keys may be empty; their padding is NaN
        valid = torch.arange(case.P2) < torch.randint(case.P2 + 1, (len(keys), 1))
        used = torch.arange(case.P1) < torch.randint(1, case.P1 + 1, (len(keys), 1))
        queries[~used] = 1e3

    q, key = (x.double().requires_grad_() for x in (queries, keys))
    wide = wide_of(case.dtype)
    everything = knn_formula(q[:, :, None], key[:, None], case.metric)
    indices = nearest(everything.to(wide), case.K, case.metric, valid[:, None])
    near, pairs = key[torch.arange(len(key))[:, None, None], indices.clamp(min=0)], q[:, :, None]
    values, live = knn_formula(pairs, near, case.metric), indices >= 0
    real = live & used[..., None]
    cotangent = torch.where(used[..., None], torch.randn(values.shape), 0).to(case.dtype)
    exact = torch.where(real, cotangent.double(), 0)  # absent neighbours have no gradient
    want = torch.autograd.grad(values, (q, key), exact, retain_graph=True)
    by_query, by_key = (slope.detach() for slope in knn_slopes(pairs, near, case.metric))
    magnitudes = torch.autograd.grad(by_query * pairs + by_key * near, (q, key), exact.abs()[..., None].expand_as(near))

    def given(x: Tensor) -> Tensor:
        return (x[0] if case.batch is None else x).to(device)

    leaves = [given(x).requires_grad_() for x in (queries, keys.masked_fill(~valid[..., None], torch.nan))]
    found = knn(*leaves, case.K, metric=case.metric, valid=given(valid) if case.ragged else None)
    got = torch.autograd.grad(found.values, leaves, given(cotangent))
    assert found.values.dtype == case.dtype and torch.equal(found.indices, given(indices))
    found_values = found.values.cpu().reshape(values.shape)
    assert (found_values[~live] == (torch.inf if case.metric == "sqeuclidean" else -torch.inf)).all()
    terms = values.abs() if case.metric == "sqeuclidean" else knn_formula(pairs.abs(), near.abs(), case.metric)
    # Values are summed in float64 and rounded once, half types by way of float32.
    rounding = (case.D + 4, torch.float64) if wide == case.dtype else (0.5, wide)
    assert_near("values", found_values[real], values[real], terms[real], *rounding)
    terms_of = {"d queries": case.K, "d keys": case.P1}
    for (name, count), gradient, expected, summed in zip(terms_of.items(), got, want, magnitudes, strict=True):
        assert_near(name, gradient.reshape(expected.shape), expected, summed, count + case.D + 8, wide)


@pytest.mark.parametrize("case", [Clouds(*row) for row in covering(CLOUDS)], ids=label)
def test_knn_pytorch3d_options_match_float64_formula(case: Clouds, device: str) -> None:
    check_clouds(case, device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_knn_every_combination_of_pytorch3d_options_matches_float64_formula(
    dtype: torch.dtype, metric: str, device: str
) -> None:
    for case in product(Clouds, CLOUDS, dtype=[dtype], metric=[metric], P1=[9]):
        check_clouds(case, device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_knn_key_of_many_queries_gradient_is_rounded_once(dtype: torch.dtype, device: str) -> None:
    queries, cotangent = torch.randn(900, 3).to(dtype), (1 + torch.rand(900, 1)).to(dtype)
    keys = torch.tensor([[0.25, -0.5, 0.125], [80.0, 80.0, 80.0]], dtype=dtype)
    x = [value.to(device).requires_grad_() for value in (queries, keys, torch.zeros(2, dtype=dtype))]
    found = knn(x[0], x[1], 1, bias=x[2])
    assert (found.indices == 0).all()
    _, by_keys, by_bias = torch.autograd.grad(found.values, x, cotangent.to(device))
    terms = 2 * (keys[0].double() - queries.double()) * cotangent.double()
    sums = (terms.sum(0), terms.abs().sum(0)), (-cotangent.double().sum(), cotangent.double().sum())
    for name, gradient, (want, magnitude) in zip(("d keys", "d bias"), (by_keys, by_bias), sums, strict=True):
        assert_near(name, gradient[0], want, magnitude, roundings=900, accumulated=wide_of(dtype))
        assert not gradient[1].any()


# ---- torch_cluster: knn, knn_graph, nearest ----------------------------------------------------------------------


class Graph(NamedTuple):
    """``batches`` is a key of BATCHES."""

    dtype: torch.dtype
    metric: str
    D: int
    k: int
    batches: str


BATCHES = {  # the example of each key, the example of each query
    "one": ([0] * 15, [0] * 7),
    "sorted": ([0] * 4 + [1] * 9 + [2] * 2, [0] * 3 + [1] + [2] * 3),
    "skipping": ([0] * 6 + [3] * 8 + [7], [0, 3, 3, 5, 7]),
    "interleaved": ([2, 0, 1] * 5, [1, 0, 0, 2, 1, 2]),
}
GRAPH: dict[str, Sequence[Any]] = {
    "dtype": FLOATS,
    "metric": METRICS,
    "D": (1, 2, 3, 9),
    "k": (1, 3, 12),
    "batches": tuple(BATCHES),
}
Edge = tuple[int, int, float]


def integer_points(count: int, D: int, metric: str) -> list[list[int]]:
    """Small integers, some points twice; for cosines the corners of a cube."""
    points = 2 * torch.randint(2, (count, D)) - 1 if metric == "cosine" else torch.randint(-2, 3, (count, D))
    return points.tolist()


def integer_edges(
    x: list[list[int]],
    y: list[list[int]],
    k: int,
    metric: str,
    batch_x: list[int],
    batch_y: list[int],
    loop: bool = True,
) -> list[Edge]:
    """Edges (i, j, value) from y_i to the ``k`` nearest x_j of its example, in integers; ties are ordered by index."""
    edges = []
    for i, center in enumerate(y):
        if metric == "sqeuclidean":
            score = [sum((a - b) ** 2 for a, b in zip(center, point, strict=True)) for point in x]
        else:
            score = [-sum(a * b for a, b in zip(center, point, strict=True)) for point in x]
        same = [j for j in range(len(x)) if batch_x[j] == batch_y[i] and (loop or j != i)]
        for j in sorted(same, key=score.__getitem__)[:k]:
            value = score[j] if metric == "sqeuclidean" else -score[j]
            edges.append((i, j, value / len(center) if metric == "cosine" else value))
    return edges


def assert_edges(got: Iterable[Edge], want: list[Edge], metric: str, dtype: torch.dtype) -> None:
    got = list(got)
    assert [edge[:2] for edge in got] == [edge[:2] for edge in want]
    rtol = torch.finfo(dtype).eps if metric == "cosine" else 0  # integers and their sums are exact in every dtype
    values = (torch.tensor([edge[2] for edge in edges], dtype=torch.float64) for edges in (got, want))
    torch.testing.assert_close(*values, rtol=rtol, atol=0)


def edges_of(values: Tensor, indices: Tensor) -> Iterable[Edge]:
    """Edges of the neighbours (Q, k) that exist."""
    for i, (row, found) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        yield from ((i, j, value) for value, j in zip(row, found, strict=True) if j >= 0)


@pytest.mark.parametrize("case", [Graph(*row) for row in covering(GRAPH)], ids=label)
def test_knn_batch_vector_as_mask_matches_integer_search(case: Graph, device: str) -> None:
    batch_x, batch_y = BATCHES[case.batches]
    x, y = (integer_points(len(batch), case.D, case.metric) for batch in (batch_x, batch_y))
    keys, queries = (torch.tensor(points, dtype=case.dtype, device=device) for points in (x, y))
    valid = torch.tensor(batch_y)[:, None] == torch.tensor(batch_x)
    found = knn(queries[:, None], keys, case.k, metric=case.metric, valid=valid.to(device))
    want = integer_edges(x, y, case.k, case.metric, batch_x, batch_y)
    assert want
    assert_edges(edges_of(*(out[:, 0] for out in found)), want, case.metric, case.dtype)


@pytest.mark.parametrize("case", [Graph(*row) for row in covering(GRAPH)], ids=label)
def test_knn_batch_vector_as_memories_matches_integer_search(case: Graph, device: str) -> None:
    batch_x, batch_y = BATCHES[case.batches]
    x, y = (integer_points(len(batch), case.D, case.metric) for batch in (batch_x, batch_y))
    examples = sorted({*batch_x, *batch_y})
    places_x, places_y = (
        [[i for i, b in enumerate(batch) if b == example] for example in examples] for batch in (batch_x, batch_y)
    )

    def padded(points: list[list[int]], places: list[list[int]]) -> Tensor:
        width = max(map(len, places))
        rows = [[points[i] for i in place] + [[5] * case.D] * (width - len(place)) for place in places]
        return torch.tensor(rows, dtype=case.dtype, device=device)

    keys, queries = padded(x, places_x), padded(y, places_y)
    slots = torch.arange(keys.shape[1], device=device)
    valid = slots < torch.tensor([[len(place)] for place in places_x], device=device)
    memory = PackedKeys(
        keys.shape[1] + 1, case.D, memories=len(examples), metric=case.metric, dtype=case.dtype, device=device
    )
    memory.write(slots.where(valid, keys.shape[1]), keys)  # padding goes to the last slot
    memory.erase(torch.full((len(examples), 1), keys.shape[1], device=device))
    assert len(memory) == len(x)

    want = integer_edges(x, y, case.k, case.metric, batch_x, batch_y)
    for found in (knn(queries, keys, case.k, metric=case.metric, valid=valid), memory.search(queries, case.k)):
        got = []
        for places, centers, values, indices in zip(places_x, places_y, *found, strict=True):
            edges = edges_of(values[: len(centers)], indices[: len(centers)])
            got += [(centers[i], places[j], value) for i, j, value in edges]
        assert_edges(sorted(got, key=lambda edge: edge[0]), want, case.metric, case.dtype)


@pytest.mark.parametrize("loop", FLAG)
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("metric", METRICS)
def test_knn_graph_loops_masked_matches_integer_search(metric: str, batches: str, loop: bool, device: str) -> None:
    batch, _ = BATCHES[batches]
    points = integer_points(len(batch), 2, metric)
    x = torch.tensor(points, dtype=torch.float32, device=device)
    valid = torch.tensor(batch)[:, None] == torch.tensor(batch)
    if not loop:
        valid.fill_diagonal_(False)
    found = knn(x[:, None], x, 5, metric=metric, valid=valid.to(device))
    want = integer_edges(points, points, 5, metric, batch, batch, loop)
    assert_edges(edges_of(*(out[:, 0] for out in found)), want, metric, x.dtype)
    assert loop or all(i != j for i, j, _ in want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_knn_nearest_of_tied_points_returns_first(dtype: torch.dtype, device: str) -> None:
    x = torch.tensor([[3, 0], [0, 3], [0, -3], [-3, 0], [3, 0], [1, 1]], dtype=dtype, device=device)
    y = torch.tensor([[0, 0], [2, 2], [0, -2], [4, 0], [0, 0]], dtype=dtype, device=device)
    batch_x, batch_y = torch.tensor([0, 0, 0, 1, 1, 1], device=device), torch.tensor([0, 0, 0, 1, 2], device=device)
    found = knn(y[:, None], x, 1, valid=batch_y[:, None] == batch_x)
    assert found.indices.flatten().tolist() == [0, 0, 2, 4, -1]
    assert found.values.flatten().tolist() == [9, 5, 1, 1, torch.inf]


def test_knn_graph_of_many_points_matches_float64_search(device: str) -> None:
    x = torch.randn(700, 3, device=device)
    found = knn(x, x, 6)
    exact = x.cpu().double()
    values = knn_formula(exact[:, None], exact, "sqeuclidean")
    assert torch.equal(found.indices.cpu(), nearest(values.float(), 6, "sqeuclidean", None))
    assert torch.equal(found.indices[:, 0].cpu(), torch.arange(700)) and not found.values[:, 0].any()
