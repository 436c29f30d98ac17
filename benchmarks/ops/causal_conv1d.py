"""causal_conv1d against PyTorch's own convolution and against a sum of shifted inputs.

    python -m benchmarks.ops.causal_conv1d [--quick] [--threads 1] [--shape BATCH DIM LENGTH]

Four taps, a bias, silu, float32. ``copy`` is a copy of x, which reads and writes the elements that a forward pass must.
Passes: forward without gradients; with backward, all gradients for a random cotangent; with double backward, the
gradients of the sum of their squares, too. Peers: ``F.conv1d`` with groups, and taps added one by one (``shifts``),
whose double backward does not loop over channels.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import flags, medians, write
from eaml_ext.ops import causal_conv1d

SHAPES = ((8, 128, 128), (4, 512, 512), (1, 3072, 2048), (64, 128, 1))  # (batch, dim, length)
QUICK = SHAPES[:1]
WIDTH = 4

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, activation="silu")


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=WIDTH - 1, groups=len(weight))
    return F.silu(y[..., : x.shape[2]])


def shifts(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y, length, padded = bias.unsqueeze(-1), x.shape[2], F.pad(x, (WIDTH - 1, 0))
    for k in range(WIDTH):
        y = torch.addcmul(y, padded[..., k : k + length], weight[:, k : k + 1])
    return F.silu(y)


PEERS = {"ours": ours, "conv1d": conv1d, "shifts": shifts}


def passes(function: Function, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Callable[[], object]]:
    """Return the three passes of a function."""
    leaves = [v.clone().requires_grad_() for v in inputs]
    cotangent = torch.randn_like(inputs[0])

    @torch.no_grad()
    def forward() -> Tensor:
        return function(*inputs)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, cotangent)

    def double_backward() -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(function(*leaves), leaves, cotangent, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    return {"forward": forward, "backward": backward, "double_backward": double_backward}


def measure(shape: tuple[int, ...], channel_last: bool, seconds: float) -> dict[str, Any]:
    """Return the medians of a shape, in seconds."""
    batch, dim, length = shape
    x = torch.randn(batch, length, dim).mT if channel_last else torch.randn(batch, dim, length)
    inputs = (x, torch.randn(dim, WIDTH), torch.randn(dim))
    by_peer = {name: passes(peer, inputs) for name, peer in PEERS.items()}
    row: dict[str, Any] = {"shape": list(shape), "channel_last": channel_last}
    row["copy"] = medians({"copy": x.clone}, seconds=seconds)["copy"]
    for kind in ("forward", "backward", "double_backward"):
        row[kind] = medians({name: of[kind] for name, of in by_peer.items()}, seconds=seconds)
    return row


def main() -> None:
    arguments = flags(__doc__, shape=("BATCH", "DIM", "LENGTH"))
    shapes = [tuple(arguments.shape)] if arguments.shape else QUICK if arguments.quick else SHAPES
    rows = []
    for shape in shapes:
        for channel_last in (True, False):
            row = measure(shape, channel_last, 0.2 if arguments.quick else 1.0)
            rows.append(row)
            print(f"{shape}, {'channel-last' if channel_last else 'channel-first'}; copy {1e3 * row['copy']:.3f} ms")
            for kind in ("forward", "backward", "double_backward"):
                print(f"  {kind:16}" + "".join(f"{name} {1e3 * t:8.3f} ms  " for name, t in row[kind].items()))
    if not (arguments.quick or arguments.shape):
        print(write(f"causal_conv1d-{arguments.threads}-thread", {"rows": rows}))


if __name__ == "__main__":
    main()
