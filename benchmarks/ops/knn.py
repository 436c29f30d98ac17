"""Exact kNN against torch's cdist + topk and addmm + topk.

python -m benchmarks.ops.knn [--quick] [--threads 1]
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.common import flags, medians, write
from eaml_ext.ops import knn

K = 8
SHAPES = [  # (memories, queries, keys, features)
    (1, 1, 1000, 64),
    (1, 1, 50_000, 128),
    (1, 8, 50_000, 128),
    (1, 64, 50_000, 128),
    (1, 1024, 50_000, 128),
    (64, 1, 1000, 64),
    (256, 1, 1024, 64),
    (16, 8, 10_000, 128),
]


def addmm(queries: Tensor, keys: Tensor) -> Any:
    """Squared distances from one matrix product; inexact where norms are large."""
    scores = torch.baddbmm(keys.square().sum(-1).unsqueeze(1), queries, keys.mT, alpha=-2)
    return scores.topk(K, dim=-1, largest=False)


def cdist(queries: Tensor, keys: Tensor) -> Any:
    return torch.cdist(queries, keys).topk(K, dim=-1, largest=False)


def main() -> None:
    arguments = flags(__doc__)
    shapes = [SHAPES[i] for i in (0, 1, 3, 5)] if arguments.quick else SHAPES
    results = []
    print(f"{'(memories, Q, M, d)':<24}{'ours ms':>9}{'addmm':>8}{'cdist':>8}   (peers: times ours)")
    for shape in shapes:
        memories, q, m, d = shape
        queries, keys = torch.randn(memories, q, d), torch.randn(memories, m, d)
        functions = {
            "ours": lambda q=queries, k=keys: knn(q, k, K),
            "addmm": lambda q=queries, k=keys: addmm(q, k),
            "cdist": lambda q=queries, k=keys: cdist(q, k),
        }
        with torch.no_grad():
            t = medians(functions, seconds=0.5 if arguments.quick else 2.0)
        results.append({"shape": shape, **t})
        print(
            f"{shape!s:<24}{1e3 * t['ours']:>9.3f}" + "".join(f"{t[p] / t['ours']:>7.1f}x" for p in ("addmm", "cdist"))
        )
    if not arguments.quick:
        print(write(f"knn-{arguments.threads}-thread", {"threads": arguments.threads, "k": K, "shapes": results}))


if __name__ == "__main__":
    main()
