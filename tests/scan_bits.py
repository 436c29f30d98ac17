"""Bits of the scan that its CUDA kernels promise, for the tests on the emulator and those on a GPU."""

import torch
from torch import Tensor

from eaml_ext.ops import selective_scan, selective_scan_step, split_invariant

SEQUENCES = ("u", "delta", "z")
PER_STEP = (*SEQUENCES, "B", "C")
PER_ROW = (*PER_STEP, "initial_state")
# (batch, dim, length, dstate, dtype of the sequences, or the dtype of A if it is complex)
SCANS = [
    (2, 64, 600, 16, torch.float32),  # fast kernels
    (3, 8, 530, 64, torch.bfloat16),  # fast kernels
    (2, 9, 530, 5, torch.float32),
    (2, 6, 520, 65, torch.float16),
    (2, 3, 515, 4, torch.complex64),
    (2, 3, 515, 4, torch.float64),
    (2, 3, 515, 4, torch.complex128),
]


def make_arguments(
    batch: int, dim: int, length: int, dstate: int, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Return arguments of a scan whose sequences are channel-last, and whose B and C vary in time."""
    real = dtype.to_real() if dtype.is_complex else dtype
    state = dtype if dtype.is_complex else torch.promote_types(dtype, torch.float32)
    A = -0.3 - torch.rand(dim, dstate)
    x = {
        **{name: torch.randn(batch, length, dim).mT.to(real) for name in SEQUENCES},
        "A": torch.complex(A, torch.randn(dim, dstate)) if dtype.is_complex else A,
        **{name: torch.randn(batch, length, dstate).to(dtype).mT for name in "BC"},
        "D": torch.randn(dim),
        "delta_bias": torch.randn(dim) - 2,
        "initial_state": torch.randn(batch, dim, dstate).to(state),
    }
    opmath = state.to_real() if state.is_complex else state
    full = {"A": state, "D": opmath, "delta_bias": opmath}
    return {name: v.to(device, full.get(name, v.dtype)) for name, v in x.items()}


def part_of(x: dict[str, Tensor], steps: slice | int) -> dict[str, Tensor]:
    """Return the arguments of some steps, without the state."""
    return {name: v[..., steps] if name in PER_STEP else v for name, v in x.items() if name != "initial_state"}


def check_parts_and_steps(x: dict[str, Tensor]) -> None:
    """Assert that a split-invariant scan equals scans of its parts, and its steps, bit for bit."""
    with split_invariant():
        y, last = selective_scan(**x, delta_softplus=True, return_last_state=True)
        parts, state = [], x["initial_state"]
        for steps in (slice(0, 64), slice(64, 173), slice(173, None)):
            part = {**part_of(x, steps), "initial_state": state}
            out, state = selective_scan(**part, delta_softplus=True, return_last_state=True)
            parts.append(out)
    assert torch.equal(torch.cat(parts, -1), y) and torch.equal(state, last)
    state, outs = x["initial_state"], []
    for t in range(40):
        out, state = selective_scan_step(state, **part_of(x, t), delta_softplus=True)
        outs.append(out)
    assert torch.equal(torch.stack(outs, -1), y[..., :40])


def check_rows(x: dict[str, Tensor]) -> None:
    """Assert that outputs and gradients of a row have the bits that the row has alone."""

    def run(rows: slice) -> list[Tensor]:
        leaves = {name: (v[rows] if name in PER_ROW else v).detach().requires_grad_() for name, v in x.items()}
        outs = selective_scan(**leaves, delta_softplus=True, return_last_state=True)
        cotangents = [torch.ones((), dtype=out.dtype, device=out.device).expand_as(out) for out in outs]
        return [*outs, *torch.autograd.grad(outs, [leaves[name] for name in PER_ROW], cotangents)]

    for a, b in zip(run(slice(None)), run(slice(1, 2)), strict=True):
        assert torch.equal(a[1:2], b)
