"""Bits of the CPU scan: rows, parts, episodes, single steps and threads, see ``benchmarks/ops/scan_bits.py``."""

import sys
from pathlib import Path

import pytest
import torch

from eaml_ext.ops import selective_scan, selective_scan_step

sys.path.append(str(Path(__file__).parents[2]))  # last, so as not to hide an installed eaml_ext
from benchmarks.ops.scan_bits import check, draw, same_bits

SMALL = (6, 300, 40, 40)
# Shapes in which the order of a sum once looked at the batch or the length: (batch, length, dim, state).
SHAPES = [(4, 4096, 16, 16), (4, 2048, 256, 16), (1, 20000, 4, 16)]


def test_same_bits_rounding_and_signed_zero_differ() -> None:
    x = torch.tensor([1.0, 0.0])
    assert same_bits(x, x.clone())
    assert not same_bits(x, torch.tensor([1.0000001, 0.0])) and not same_bits(x, torch.tensor([1.0, -0.0]))
    assert not same_bits(x.to(torch.complex64), torch.tensor([1.0, 0.0j + 1e-9]))


@pytest.mark.kernels
@pytest.mark.parametrize("seed", range(16))
def test_scan_drawn_shapes_rows_parts_episodes_steps_give_same_bits(seed: int) -> None:
    assert not list(check(draw(seed, SMALL), seed))


@pytest.mark.kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_scan_row_gives_bits_of_batch(shape: tuple[int, int, int, int]) -> None:
    batch, length, dim, dstate = shape
    x = {**draw(0, (1, 1, 1, 1)), "reset": None, "D": None, "z": None}
    x |= {name: torch.randn(batch, length, dim).mT for name in ("u", "delta", "grad_y")}
    x |= {"A": -torch.rand(dim, dstate), "delta_bias": torch.zeros(dim), "B": torch.randn(batch, length, dstate).mT}
    x |= {"C": torch.randn(batch, length, dstate).mT, "initial_state": torch.randn(batch, dim, dstate)}
    x |= {"grad_state": torch.randn(batch, dim, dstate)}
    assert not [item for item in check(x, 1) if item[0] in ("row", "split", "threads")]


@pytest.mark.kernels
@pytest.mark.parametrize("dstate", [8, 16, 48, 64])
@pytest.mark.parametrize("dim", [3, 16, 40, 256])
def test_step_where_lanes_are_states_gives_bits_of_scan(dim: int, dstate: int) -> None:
    u, delta, z, bias = torch.randn(3, dim, 5), torch.randn(3, dim, 5), torch.randn(3, dim, 5), torch.randn(dim)
    A, B, C, D = -torch.rand(dim, dstate), torch.randn(3, dstate, 5), torch.randn(3, dstate, 5), torch.randn(dim)
    with torch.no_grad():
        y, last = selective_scan(u, delta, A, B, C, D, z, bias, True, True)
        state = torch.zeros(3, dim, dstate)
        for t in range(5):
            args = (u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, True)
            out, state = selective_scan_step(state, *args)
            assert torch.equal(out, y[..., t])
    assert torch.equal(state, last)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch, dim, length, dstate", [(2, 40, 70, 16), (1, 5, 33, 7)])
def test_scan_decay_shared_by_states_gives_bits_of_materialised_decay(
    batch: int, dim: int, length: int, dstate: int, dtype: torch.dtype
) -> None:
    full = torch.promote_types(dtype, torch.float32)
    u, delta, z = torch.randn(3, batch, length, dim).to(dtype).mT
    B, C = torch.randn(2, batch, length, dstate).to(dtype).mT
    shared = (-torch.rand(dim, 1, dtype=full)).expand(dim, dstate)

    def derivatives(A: torch.Tensor) -> list[torch.Tensor]:
        leaves = [v.detach().requires_grad_() for v in (u, delta, A, B, C, torch.ones(dim, dtype=full), z)]
        assert leaves[2].stride() == A.stride()
        out = selective_scan(*leaves, None, True, True)
        first = torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out], create_graph=True)
        return [*out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    for a, b in zip(derivatives(shared), derivatives(shared.contiguous()), strict=True):
        assert same_bits(a.detach(), b.detach())
