"""The emulator reports faults of kernels, and the scan's CUDA kernels are right beyond the conformance tests.

Needs ``pytest --cuda-emulator LIBRARY`` (``make cuda-emulator``), which runs tests/ops/test_selective_scan.py and
test_complex_scan.py on the CUDA kernels, too.
"""

import ctypes
import itertools
from typing import Any

import pytest
import torch
from scan_bits import SCANS, check_parts_and_steps, check_rows, make_arguments
from torch import Tensor

from eaml_ext.ops import selective_scan, selective_scan_reference


@pytest.fixture(scope="module")
def library(request) -> ctypes.CDLL:
    return ctypes.CDLL(request.config.getoption("--cuda-emulator"))


@pytest.mark.parametrize(
    "fault, message",
    [
        (0, None),
        (1, "with no barrier since another thread"),
        (2, "with no barrier since another thread"),
        (3, "not all threads reach a barrier"),
        (4, "outside shared memory"),
        (5, None),
    ],
)
def test_emulator_fault_is_reported(library, fault, message):
    library.eaml_fault.restype = ctypes.c_char_p
    out = (ctypes.c_int * 192)(*[-1] * 192)
    got = library.eaml_fault(fault, out)
    if message is not None:
        assert message in got.decode(), got
        return
    assert got is None
    if fault == 5:
        assert list(out[:64]) == [0] * 64, "shared memory is not NaN at the start of a block"
    else:
        assert list(out) == [i + (i ^ 1) + (i ^ 16) for i in range(64)] * 3


def test_exp2_by_polynomial_and_by_instruction_is_accurate(library):
    t = torch.linspace(-126, 127.4, 100_000).repeat_interleave(4)
    t[:8] = torch.tensor([float("-inf"), -200.0, -1e30, 0.0, float("nan"), float("nan"), float("nan"), 0.0])
    got = torch.empty_like(t)
    library.eaml_exp2(ctypes.c_void_p(t.data_ptr()), ctypes.c_void_p(got.data_ptr()), len(t))
    want = t.double().exp2()
    assert got[4:7].isnan().all() and (got[:3] == 0).all() and got[3] == got[7] == 1
    assert ((got.double() - want).abs() <= 2.5 * 2.0**-23 * want)[8:].all()


def arguments(
    batch: int, dim: int, length: int, state: int, groups: int | None, invariant: str, kind: torch.dtype
) -> dict[str, Any]:
    """Return arguments of a scan; ``kind`` is the dtype of A, B, C and the states."""

    def matrix(name: str) -> Tensor:
        if name in invariant:
            return torch.randn(dim, state, dtype=kind)
        return torch.randn(batch, *(() if groups is None else (groups,)), state, length, dtype=kind)

    A = -0.3 - torch.rand(dim, state)
    x = {
        "u": torch.randn(batch, length, dim).transpose(1, 2),
        "delta": torch.randn(batch, dim, length) - 2,
        "A": torch.complex(A, torch.randn(dim, state)) if kind.is_complex else A,
        "B": matrix("B"),
        "C": matrix("C"),
        "D": torch.randn(dim),
        "z": torch.randn(batch, dim, length),
        "delta_bias": torch.randn(dim),
        "initial_state": torch.randn(batch, dim, state, dtype=kind),
    }
    return {name: v.to(kind if v.is_complex() else kind.to_real()) for name, v in x.items()}


def to_double(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def all_derivatives(function: Any, x: dict[str, Any], reset: Tensor | None) -> dict[str, Tensor]:
    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(x, values, strict=True))
        return function(**named, delta_softplus=True, return_last_state=True, reset=reset)

    inputs = [value.detach().requires_grad_() for value in x.values()]
    outs = scan(*inputs)
    first = torch.autograd.grad(outs, inputs, [out.detach() for out in outs], create_graph=True)
    second = torch.autograd.grad(first, inputs, [g.detach() for g in first])
    along: Any = torch.func.jvp(scan, tuple(x.values()), tuple(g.detach() for g in first))[1]
    names = ["y", "last", *(f"{of} {name}" for of in ("first", "second") for name in x), "y along", "last along"]
    return {name: v.detach() for name, v in zip(names, (*outs, *first, *second, *along), strict=True)}


def check(x: dict[str, Any], reset: Tensor | None) -> None:
    """Assert that all derivatives match the reference, and that two calls give the same bits."""
    got = all_derivatives(selective_scan, x, reset)
    want = all_derivatives(selective_scan_reference, {name: to_double(value) for name, value in x.items()}, reset)
    eps = torch.finfo(x["A"].dtype).eps
    for name, a in got.items():
        error = (to_double(a) - want[name]).abs().max().item()
        assert error <= 128 * eps * want[name].abs().max().item(), name
    again = all_derivatives(selective_scan, x, reset)
    assert all(torch.equal(a, again[name]) for name, a in got.items())


KINDS = (torch.float32, torch.float64, torch.complex64, torch.complex128)
STATES = [(kind, state) for kind in KINDS for state in (1, 5, 17, 33, 65, 129) if state <= 128 or not kind.is_complex]


@pytest.mark.parametrize("invariant", ["", "BC"])
@pytest.mark.parametrize("kind, state", STATES, ids=str)
def test_scan_every_tiling_matches_reference(library, kind, state, invariant):
    """Covers each number of lanes and of a thread's states, with partial chunks and blocks."""
    check(arguments(1, 3, 37, state, None, invariant, kind), torch.rand(1, 37) < 0.1)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 600, 3, None, "", torch.float32),
        (2, 2, 777, 16, 2, "", torch.float32),
        (1, 35, 520, 9, None, "B", torch.float32),
        (1, 1, 530, 129, None, "C", torch.float32),
        (1, 2, 540, 17, 1, "C", torch.complex64),
        (1, 3, 520, 2, None, "BC", torch.complex64),
        (1, 2, 515, 2, None, "", torch.float64),
        (1, 2, 515, 2, None, "", torch.complex128),
    ],
    ids=str,
)
def test_scan_long_sequences_in_segments_match_reference(library, shape, resets):
    """With few channels and many steps, time is divided into segments."""
    check(arguments(*shape), torch.rand(shape[0], shape[2]) < 0.004 if resets else None)


@pytest.mark.parametrize("kind, words", [(torch.float32, "257 states"), (torch.complex64, "129 complex states")])
def test_scan_more_states_than_a_tiling_holds_raises(library, kind, words):
    most = int(words.split()[0]) - 1
    with pytest.raises(Exception, match=f"A has {words}, the CUDA kernels take up to {most}"):
        selective_scan(**arguments(1, 1, 1, most + 1, None, "", kind))


def at_odd_address(x: Tensor) -> Tensor:
    """Copy a tensor, with its strides, to an address that no fast kernel reads: it is no multiple of 16 bytes."""
    size = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return torch.empty(size + 1, dtype=x.dtype).as_strided(x.shape, x.stride(), 1).copy_(x)


@pytest.mark.parametrize("channel_last, states_last", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize(
    "length, gated, has_reset, shared_decay, dtype",
    [
        (32, True, False, False, torch.float32),
        (104, False, True, False, torch.float16),
        (72, True, True, True, torch.bfloat16),
        (100, True, True, True, torch.float32),
        (512, False, False, False, torch.float32),  # two time segments
    ],
    ids=str,
)
@pytest.mark.parametrize("dim, dstate, groups", [(64, 16, 2), (16, 64, 1)])
def test_fast_kernels_equal_general_kernels(
    library, channel_last, states_last, length, gated, has_reset, shared_decay, dtype, dim, dstate, groups
):
    """The outputs have the same bits. Derivatives are sums in another order."""
    batch, padded = 2, (length + 7) // 8 * 8  # rows of 16 bytes

    def sequence(*shape: int, last: int) -> Tensor:
        x = torch.randn(batch, *shape[:-1], padded, shape[-1]).mT if last else torch.randn(batch, *shape, padded)
        return (x.to(dtype).mT.contiguous().mT if last else x.to(dtype))[..., :length]

    u, delta, z, grad_y = (sequence(dim, last=channel_last) for _ in range(4))
    inputs = {
        "u": u,
        "delta": delta,
        "A": (-2 * torch.rand(dim, 1)).expand(dim, dstate) if shared_decay else -2 * torch.rand(dim, dstate),
        **dict(zip("BC", (sequence(groups, dstate, last=states_last) for _ in range(2)), strict=True)),
        "D": torch.randn(dim),
        **({"z": z} if gated else {}),
        "delta_bias": torch.randn(dim),
        "initial_state": torch.randn(batch, dim, dstate),
    }
    grad_state = torch.randn(batch, dim, dstate)
    cotangents = [torch.randn_like(x) for x in inputs.values()]
    reset = torch.rand(batch, length) < 0.1 if has_reset else None

    library.eaml_total_shared_bytes.restype = ctypes.c_int64

    def run(totals: list[int], **changed: Tensor) -> dict[str, Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in {**inputs, **changed}.items()}
        outs = selective_scan(**leaves, delta_softplus=True, return_last_state=True, reset=reset)
        totals.append(library.eaml_total_shared_bytes())
        first = torch.autograd.grad(outs, [*leaves.values()], (grad_y, grad_state), create_graph=True)
        totals.append(library.eaml_total_shared_bytes())
        second = torch.autograd.grad(first, [*leaves.values()], cotangents)
        totals.append(library.eaml_total_shared_bytes())
        names = ["y", "last", *(f"{order} {name}" for order in ("first", "second") for name in leaves)]
        return {name: x.detach() for name, x in zip(names, (*outs, *first, *second), strict=True)}

    launched, results = [], []
    for changed in ({}, {"u": at_odd_address(u)}):
        totals = [library.eaml_total_shared_bytes()]
        results.append(run(totals, **changed))
        launched.append([b - a for a, b in itertools.pairwise(totals)])
    assert all(a != b for a, b in zip(*launched, strict=True)), "the same kernels ran"
    fast, general = results
    for name, x in general.items():
        eps = torch.finfo(x.dtype).eps
        bound = 0 if name in ("y", "last") else 16 * eps * x.abs().max()
        assert (fast[name] - x).abs().max() <= bound, name
    if shared_decay:
        own_decay = run([], A=inputs["A"].contiguous())
        assert all(torch.equal(x, own_decay[name]) for name, x in fast.items())


@pytest.mark.parametrize("dstate, kind", [(5, torch.float32), (128, torch.float32), (3, torch.float64)], ids=str)
def test_general_kernels_shared_decay_has_the_bits_of_own_decays(library, dstate, kind):
    x = arguments(1, 3, 540, dstate, None, "", kind)  # two time segments
    x["A"] = x["A"][:, :1]

    def scan(A: Tensor, **others: Any) -> Any:
        return selective_scan(A=A.expand(-1, dstate), **others)

    def materialised_scan(A: Tensor, **others: Any) -> Any:
        return selective_scan(A=A.expand(-1, dstate).contiguous(), **others)

    shared, own = all_derivatives(scan, x, None), all_derivatives(materialised_scan, x, None)
    assert all(torch.equal(v, own[name]) for name, v in shared.items())


@pytest.mark.parametrize("size", SCANS, ids=str)
def test_split_invariant_scan_equals_its_parts_and_steps(library, size):
    check_parts_and_steps(make_arguments(*size, "cpu"))


@pytest.mark.parametrize("size", SCANS, ids=str)
def test_row_bits_do_not_depend_on_the_batch(library, size):
    check_rows(make_arguments(*size, "cpu"))
