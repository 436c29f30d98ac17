"""Selective scan against an honest PyTorch loop: forward, + backward, + double backward.

    python -m benchmarks.ops.selective_scan [--quick] [--threads 1]

The loop discretises step by step on contiguous slices; its product with C is a bmm. The passes of a row start from
scratch: "+double backward" is forward, backward and double backward together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import flags, medians, write
from eaml_ext.ops import selective_scan

SHAPES = [(4, 512, 256, 16), (8, 128, 64, 16), (32, 64, 64, 16), (256, 32, 64, 16), (1, 2048, 1536, 16)]


def loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence, one step at a time."""
    dt, u, B, C = (t.permute(2, 0, 1).contiguous() for t in (F.softplus(delta), u, B, C))
    h, ys = A.new_zeros(u.shape[1], *A.shape), []
    for dt_t, u_t, B_t, C_t in zip(dt.unbind(0), u.unbind(0), B.unbind(0), C.unbind(0), strict=True):
        h = torch.exp(dt_t.unsqueeze(-1) * A) * h + (dt_t * u_t).unsqueeze(-1) * B_t.unsqueeze(1)
        ys.append(torch.bmm(h, C_t.unsqueeze(-1)).squeeze(-1))
    return torch.stack(ys, dim=-1)


def fused(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
    """Ours."""
    return selective_scan(u, delta, A, B, C, delta_softplus=True)


def inputs(batch: int, length: int, dim: int, state: int, channel_last: bool = True) -> list[Tensor]:
    """Random arguments; channel-last memory is what a layer produces."""

    def sequence(width: int) -> Tensor:
        if channel_last:
            return torch.randn(batch, length, width).transpose(1, 2)
        return torch.randn(batch, width, length)

    A = -torch.arange(1.0, state + 1).repeat(dim, 1)
    return [sequence(dim), sequence(dim) - 2, A, sequence(state), sequence(state)]


def passes(function: Any, xs: list[Tensor]) -> dict[str, Any]:
    """The three passes of one function, each from scratch."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in xs]
    grad = torch.randn(xs[0].shape[0], xs[0].shape[2], xs[0].shape[1]).transpose(1, 2)

    def forward() -> None:
        with torch.no_grad():
            function(*xs)

    def backward() -> None:
        torch.autograd.grad(function(*leaves), leaves, grad)

    def double() -> None:
        grads = torch.autograd.grad(function(*leaves), leaves, grad, create_graph=True)
        torch.autograd.grad(grads, leaves, [g.detach() for g in grads])

    return {"forward": forward, "+backward": backward, "+double backward": double}


def main() -> None:
    arguments = flags(__doc__)
    results: dict[str, Any] = {"threads": arguments.threads, "shapes": []}
    print(f"{'(batch, length, dim, state)':<28}{'pass':<18}{'ours ms':>9}{'loop ms':>10}{'ratio':>8}")
    for shape in SHAPES[: 2 if arguments.quick else None]:
        xs = inputs(*shape)
        torch.testing.assert_close(fused(*xs), loop(*xs), rtol=1e-3, atol=1e-3)
        ours, theirs = passes(fused, xs), passes(loop, xs)
        for name in ours:
            t = medians({"ours": ours[name], "loop": theirs[name]}, seconds=0.5 if arguments.quick else 2.0)
            row = {"shape": shape, "pass": name, **t, "ratio": t["loop"] / t["ours"]}
            results["shapes"].append(row)
            print(f"{shape!s:<28}{name:<18}{1e3 * t['ours']:>9.2f}{1e3 * t['loop']:>10.1f}{row['ratio']:>8.1f}")
    if not arguments.quick:
        print(write(f"selective_scan-{arguments.threads}-thread", results))


if __name__ == "__main__":
    main()
