"""Packed sequences against the same sequences padded to rows of one length: selective_scan, and nn.Mamba around it.

    python -m benchmarks.ops.packed [--quick] [--threads 1] [--shape DIM STATE]

256 sequences with lengths log-uniform in [16, 2048], float32, channel-last; --quick: 16 sequences. ``DIM`` channels are
the inner width of the layer. Passes: forward without gradients; with backward, all gradients for a random cotangent.
``speedup`` is the time of the padded call over that of the packed one. It should reach 0.8 of ``ideal``, the padded
steps over the real ones. Both layouts have equal sequences in the layer, whose results are compared first.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.common import flags, medians, write
from eaml_ext.nn import Mamba
from eaml_ext.ops import selective_scan

SHAPES = ((64, 16), (256, 16))  # (dim, dstate)
SHORTEST, LONGEST = 16, 2048
BAR = 0.8  # of the ideal speedup

Call = Callable[[], Tensor]


def draw_lengths(sequences: int) -> Tensor:
    """Return ``(sequences,)`` lengths, log-uniform in [SHORTEST, LONGEST]."""
    return torch.empty(sequences).uniform_(math.log(SHORTEST), math.log(LONGEST)).exp().round().long()


def passes(call: Call, leaves: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Return a call without gradients, and the gradients of its ``leaves``."""
    cotangent = torch.randn_like(call())

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), leaves, cotangent)

    return {"forward": torch.no_grad()(call), "backward": backward}


def scan_passes(shape: tuple[int, int], batch: int, length: int, cu_seqlens: Tensor | None) -> Any:
    """Return the passes of ``selective_scan`` with ``(batch, length)`` steps."""
    dim, dstate = shape
    sequences = [torch.randn(batch, length, size).requires_grad_() for size in (dim, dim, dim, dstate, dstate)]
    A, D = (-torch.rand(dim, dstate)).requires_grad_(), torch.ones(dim, requires_grad=True)

    def scan() -> Tensor:
        u, delta, z, B, C = (v.mT for v in sequences)
        return selective_scan(u, delta, A, B, C, D, z, delta_softplus=True, cu_seqlens=cu_seqlens)

    return passes(scan, [*sequences, A, D])


def layer_passes(shape: tuple[int, int], x: Tensor, **options: Tensor) -> Any:
    """Return the passes of ``nn.Mamba`` on ``x`` and its one output, with the parameters of one seed."""
    dim, dstate = shape
    torch.manual_seed(0)
    layer, x = Mamba(dim // 2, dstate), x.clone().requires_grad_()
    return passes(lambda: layer.scan(x, **options)[0], [x, *layer.parameters()])


def measure(shape: tuple[int, int], lengths: Tensor, seconds: float) -> list[dict[str, Any]]:
    """Return a row per function and pass, with medians in seconds."""
    total, longest = int(lengths.sum()), int(lengths.max())
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    ideal = len(lengths) * longest / total
    parts = [torch.randn(n, shape[0] // 2) for n in lengths.tolist()]

    def layer() -> dict[str, Any]:
        packed, padded = torch.cat(parts).unsqueeze(0), pad_sequence(parts, batch_first=True)
        by_layout = {
            "packed": layer_passes(shape, packed, cu_seqlens=cu_seqlens),
            "padded": layer_passes(shape, padded, lengths=lengths),
        }
        y = by_layout["padded"]["forward"]()
        rows = torch.cat([row[:n] for row, n in zip(y, lengths.tolist(), strict=True)])
        torch.testing.assert_close(by_layout["packed"]["forward"]()[0], rows)
        return by_layout

    def scan() -> dict[str, Any]:
        return {
            "packed": scan_passes(shape, 1, total, cu_seqlens),
            "padded": scan_passes(shape, len(lengths), longest, None),
        }

    rows = []
    for name, build in (("selective_scan", scan), ("Mamba", layer)):
        by_layout = build()
        for kind in ("forward", "backward"):
            times = medians({layout: of[kind] for layout, of in by_layout.items()}, seconds=seconds)
            speedup = times["padded"] / times["packed"]
            row = {"function": name, "shape": list(shape), "pass": kind, **times, "speedup": speedup, "ideal": ideal}
            rows.append(row)
        del by_layout  # gigabytes of padding
    return rows


def main() -> None:
    arguments = flags(__doc__, shape=("DIM", "STATE"))
    shapes = [tuple(arguments.shape)] if arguments.shape else SHAPES[:1] if arguments.quick else SHAPES
    lengths = draw_lengths(16 if arguments.quick else 256)
    rows = []
    for shape in shapes:
        for row in measure(shape, lengths, 0.2 if arguments.quick else 1.0):
            rows.append(row)
            verdict = "" if row["speedup"] >= BAR * row["ideal"] else f"  below {BAR} of it"
            print(
                f"{row['function']:15}{shape!s:12}{row['pass']:10}packed {1e3 * row['packed']:9.2f} ms  "
                f"padded {1e3 * row['padded']:9.2f} ms  speedup {row['speedup']:5.2f} of {row['ideal']:5.2f}{verdict}"
            )
    if not (arguments.quick or arguments.shape):
        print(write(f"packed-{arguments.threads}-thread", {"lengths": lengths.tolist(), "rows": rows}))


if __name__ == "__main__":
    main()
