"""Rounding errors of the scan against a float64 loop, underflow, and bits independent of batch and threads.

The bounds are four times the largest errors measured here and by ``python -m benchmarks.ops.scan_numerics``, up to
length 1024.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from op_calls import Call, derivatives, gradients, leaves, outputs, to_float64
from torch import Tensor

from eaml_ext.ops import selective_scan, selective_scan_reference
from eaml_ext.ops.selective_scan import ARGUMENTS

SEQUENCES = ("u", "delta", "B", "C", "z")
# the tensors that `results` returns
NAMES = (
    *("y", "last state"),
    *(f"d {name}" for name in ARGUMENTS),
    *(f"dd {name}" for name in (*ARGUMENTS, "grad y", "grad state")),
)


def make(
    dtype: torch.dtype, length: int, batch: int = 2, dim: int = 16, state: int = 16, per_row: bool = False
) -> Call:
    """Draw all arguments, with A = -(1..dstate) and step sizes log-uniform in [0.001, 1]; float32 represents all."""
    draw = torch.Generator().manual_seed(0)
    rows = (batch,) * per_row

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    bias = 0.1 * randn(*rows, dim)
    dt = torch.exp(math.log(1e-3) * torch.rand(batch, dim, length, generator=draw, dtype=torch.float64))
    tensors = {
        "u": randn(batch, dim, length),
        "delta": (dt.expm1().log() - bias.unsqueeze(-1)).float(),
        "A": -torch.arange(1.0, state + 1).expand(*rows, dim, state).clone(),
        "B": randn(batch, state, length),
        "C": randn(batch, state, length),
        "D": randn(*rows, dim),
        "z": randn(batch, dim, length),
        "delta_bias": bias,
        "initial_state": randn(batch, dim, state),
    }
    opmath = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {n: x.to(dtype if n in SEQUENCES else opmath) for n, x in tensors.items()}
    return Call(tensors, {"delta_softplus": True, "return_last_state": True})


def loop(delta_softplus: bool, return_last_state: bool, **x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the reference in segments, which keeps autograd's work linear in length."""
    state, ys = x.pop("initial_state"), []
    rest = {n: v for n, v in x.items() if n not in SEQUENCES}
    for segment in zip(*(x[n].split(64, dim=-1) for n in SEQUENCES), strict=True):
        arguments = {**rest, **dict(zip(SEQUENCES, segment, strict=True))}
        y, state = selective_scan_reference(
            **arguments, initial_state=state, delta_softplus=delta_softplus, return_last_state=True
        )
        ys.append(y)
    return torch.cat(ys, dim=-1), state


def results(function: Any, call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return outputs, gradients and second derivatives, along directions that ``dtype`` represents."""
    along = derivatives(function, call, ARGUMENTS, layout=lambda x: x.to(dtype).to(x.dtype))
    return dict(zip(NAMES, (*outputs(function, call), *along), strict=True))


@functools.cache
def truth(dtype: torch.dtype, length: int) -> dict[str, Tensor]:
    torch.set_num_threads(1)  # two threads are slower on steps as small as these
    return results(loop, to_float64(make(dtype, length)), dtype)


def group(name: str) -> str:
    """Return the group of a tensor; a group has one bound: sums over states, or over batch and time too."""
    order, _, argument = name.partition(" ")
    if order not in ("d", "dd"):
        return name
    return f"{order} sequences" if argument in (*SEQUENCES, "grad y") else f"{order} parameters"


def moved(call: Call, device: str) -> Call:
    return call._replace(tensors={n: x.to(device) for n, x in call.tensors.items()})


# ---- rounding ----------------------------------------------------------------------------------------------------

# max|got - want| / max|want| in units of the tensor's eps. The float64 truth is rounded too, once per operation.
BOUNDS = {
    torch.float32: {
        "y": 5,
        "last state": 11,
        "d sequences": 10,
        "d parameters": 40,
        "dd sequences": 11,
        "dd parameters": 35,
    },
    torch.float64: {
        "y": 8,
        "last state": 8,
        "d sequences": 13,
        "d parameters": 65,
        "dd sequences": 22,
        "dd parameters": 30,
    },
}
# A tensor in reduced precision is computed in float32 and rounded once, by half an eps of an entry.
HALF = 0.51


@pytest.mark.parametrize("length", [64, pytest.param(1024, marks=pytest.mark.kernels)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_full_precision_is_within_bounds(dtype, length, device):
    want = truth(torch.float32, length)
    for name, got in results(selective_scan, moved(make(dtype, length), device), torch.float32).items():
        error = (got.cpu().double() - want[name]).abs().max() / want[name].abs().max() / torch.finfo(dtype).eps
        assert error <= BOUNDS[dtype][group(name)], f"{name}: {error:.1f} roundings"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_half_types_is_within_one_rounding(dtype, device):
    want = truth(dtype, 256)
    for name, got in results(selective_scan, moved(make(dtype, 256), device), dtype).items():
        error = (got.cpu().double() - want[name]).abs().max() / want[name].abs().max() / torch.finfo(got.dtype).eps
        half = got.dtype == dtype
        assert half == (name in ("y", "dd grad y") or name.split()[-1] in SEQUENCES)
        assert error <= (HALF if half else BOUNDS[torch.float32][group(name)]), f"{name}: {error:.2f} roundings"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decay_of_one_step_is_within_roundings(dtype, device):
    """Check exp(delta A) from 1 to underflow: rounding delta A costs |delta A| eps / 2, exp two roundings more."""
    info = torch.finfo(dtype)
    exponent = torch.linspace(0, -1.1 * abs(math.log(info.tiny)), 20001, dtype=dtype, device=device)
    one = torch.ones(1, len(exponent), 1, dtype=dtype, device=device)
    A, B = exponent.unsqueeze(-1), torch.ones(1, 1, 1, dtype=dtype, device=device)
    _, last = selective_scan(0 * one, one, A, B, B, return_last_state=True, initial_state=one)
    want = exponent.double().exp()
    error = (last.flatten().double() - want).abs()
    normal = want >= 2 * info.tiny
    assert (error[normal] <= (exponent.double().abs()[normal] + 4) * info.eps * want[normal]).all()
    assert (error[~normal] <= 2 * info.tiny).all()


# ---- underflow ---------------------------------------------------------------------------------------------------


def forgetful(dtype: torch.dtype, device: str, A: float) -> tuple[Call, Call]:
    """Return a call whose states decay to exactly 0 in each step, and its equal with A = 0 and a reset at each step."""
    call = moved(make(dtype, 40, dim=5, state=3), device)
    call.tensors["delta"] = call.tensors["delta"].abs()  # steps above 0.5
    want = {**call.tensors, "A": torch.zeros_like(call.tensors["A"])}
    want["reset"] = torch.ones(2, 40, dtype=torch.bool, device=device)
    return (
        call._replace(tensors={**call.tensors, "A": torch.full_like(call.tensors["A"], A)}),
        call._replace(tensors=want),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("A", [-1e4, -1e10, -1e30])
def test_decay_underflow_is_exact_reset(A, dtype, device):
    """Results to second order are finite and equal those with a reset before each step."""
    got, want = (results(selective_scan, call, dtype) for call in forgetful(dtype, device, A))
    for name in NAMES:
        assert got[name].isfinite().all(), name
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, msg=name)
    assert not any(got[name].any() for name in ("d A", "d initial_state", "dd A", "dd initial_state"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decay_minus_infinity_is_exact_reset(dtype, device):
    got, want = forgetful(dtype, device, -math.inf)
    for a, b in zip(outputs(selective_scan, got), outputs(selective_scan, want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    got, want = (results(selective_scan, call, dtype) for call in (got, want))
    for name in NAMES:  # d delta has A as a factor: 0 times infinity, also in the reference
        if name.startswith("d ") and name not in ("d delta", "d delta_bias"):
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, msg=name)


# ---- bits --------------------------------------------------------------------------------------------------------

SIZES = {"plain": (5, 24, 300, 16), "units": (3, 130, 70, 5), "long": (2, 16, 2048, 16), "tails": (4, 3, 33, 3)}


@pytest.fixture(params=SIZES)
def rows(request, device, reference_only, on_cuda_emulator) -> Call:
    """A call of independent rows, with parameters per row."""
    if reference_only and not on_cuda_emulator:
        pytest.skip("in the reference, torch's sums depend on sizes")
    if device != "cpu":
        pytest.skip("test_scan_on_gpu.py has the bits of rows on a GPU")
    batch, dim, length, state = SIZES[request.param]
    call = make(torch.float32, length, batch, dim, state, per_row=True)
    call.tensors["reset"] = torch.rand(batch, length) > 0.97
    return call


def results_of(call: Call, chosen: Any) -> tuple[Tensor, ...]:
    """Return outputs, gradients and second derivatives of these rows, along the rows' own directions."""
    draw = torch.Generator().manual_seed(0)

    def directions(like: Sequence[Tensor]) -> list[Tensor]:
        return [torch.randn(len(call.tensors["u"]), *x.shape[1:], generator=draw)[chosen] for x in like]

    part = call._replace(tensors={n: x[chosen] for n, x in call.tensors.items()})
    x = leaves(part, ARGUMENTS)
    outs = outputs(selective_scan, part, **x)
    cotangents = [c.requires_grad_() for c in directions(outs)]
    first = gradients(outs, list(x.values()), cotangents, create_graph=True)
    return *outs, *first, *gradients(first, [*x.values(), *cotangents], directions(first))


def test_bits_of_rows_independent_of_batch_and_threads(rows):
    count = len(rows.tensors["u"])
    torch.set_num_threads(1)
    want = results_of(rows, slice(None))
    everyone = torch.arange(count)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for chosen in (everyone, everyone.flip(0), torch.randperm(count), everyone[:1], everyone[-1:], everyone[1:]):
            for name, a, b in zip(NAMES, results_of(rows, chosen), want, strict=True):
                assert torch.equal(a, b[chosen]), f"{name}: rows {chosen.tolist()}, {threads} threads"


def test_bits_of_shared_parameters_independent_of_threads(rows):
    """Sums over the batch have one order for any number of threads."""
    shared = {n: x[0] if n in ("A", "D", "delta_bias") else x for n, x in rows.tensors.items()}
    call, got = rows._replace(tensors=shared), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got.append(results(selective_scan, call, torch.float32))
    assert all(torch.equal(got[0][name], got[1][name]) for name in NAMES)
