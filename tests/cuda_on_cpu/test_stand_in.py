"""The stand-in for CUDA finds faults; and what of the scan's CUDA kernels the battery does not reach.

Runs with ``pytest --cuda-on-cpu LIBRARY`` alone (``make cuda-on-cpu``), where tests/ops/test_selective_scan.py and
test_complex_scan.py run on the CUDA kernels, too.
"""

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from eaml_ext.ops import selective_scan, selective_scan_reference

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@pytest.fixture(scope="module")
def library(request) -> ctypes.CDLL:
    path = request.config.getoption("--cuda-on-cpu")
    if path is None:
        pytest.skip("needs --cuda-on-cpu: make cuda-on-cpu")
    return ctypes.CDLL(path)


@pytest.mark.parametrize(
    "fault, message",
    [
        (0, None),
        (1, "with no barrier since another thread"),
        (2, "with no barrier since another thread"),
        (3, "not all threads come to a barrier"),
        (4, "outside shared memory"),
        (5, None),
    ],
)
def test_faults_are_found(library, fault, message):
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


def arguments(
    batch: int, dim: int, length: int, state: int, groups: int | None, invariant: str, kind: torch.dtype
) -> dict[str, Any]:
    def matrix(name: str) -> Tensor:
        if name in invariant:
            return torch.randn(dim, state, dtype=kind)
        return torch.randn(batch, *(() if groups is None else (groups,)), state, length, dtype=kind)

    A = -0.3 - torch.rand(dim, state)
    return {
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


def wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def all_derivatives(function: Any, x: dict[str, Any], reset: Tensor | None) -> list[Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in x.items()}
    y, last = function(**leaves, delta_softplus=True, return_last_state=True, reset=reset)
    inputs = list(leaves.values())
    first = torch.autograd.grad((y, last), inputs, (y.detach(), last.detach()), create_graph=True)
    second = torch.autograd.grad(first, inputs, [g.detach() for g in first])
    return [y.detach(), last.detach(), *(g.detach() for g in first), *second]


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
    ],
    ids=str,
)
def test_long_sequences_in_segments(library, shape, resets):
    """Few channels and many steps: time is cut into segments. Two calls give the same bits."""
    x = arguments(*shape)
    reset = torch.rand(shape[0], shape[2]) < 0.004 if resets else None
    got = all_derivatives(selective_scan, x, reset)
    want = all_derivatives(selective_scan_reference, {name: wide(value) for name, value in x.items()}, reset)
    for name, a, b in zip(("y", "last", *NAMES, *NAMES), got, want, strict=True):
        error = (wide(a) - b).abs().max().item()
        assert error <= 128 * torch.finfo(torch.float32).eps * b.abs().max().item(), name
    assert all(map(torch.equal, got, all_derivatives(selective_scan, x, reset)))


@pytest.mark.parametrize("kind, words", [(torch.float32, "257 states"), (torch.complex64, "129 complex states")])
def test_more_states_than_a_tiling_holds(library, kind, words):
    most = int(words.split()[0]) - 1
    with pytest.raises(Exception, match=f"A has {words}, the CUDA kernels take up to {most}"):
        selective_scan(**arguments(1, 1, 1, most + 1, None, "", kind))
