"""Small calls that reach the CUDA kernels of both ops, for compute-sanitizer: python -m benchmarks.ops.gpu_small OP.

A sanitizer checks every access of a kernel, so calls are small. Shapes reach the fast kernels, the general ones, time
segments, resets, and each search of nearest neighbours. Results are only checked to be finite; the tests compare them.
"""

import argparse
import itertools

import torch
from torch import Tensor

from eaml_ext.ops import PackedKeys, knn, selective_scan

TYPES = (torch.float32, torch.bfloat16, torch.float16)
# (batch, length, dim, state): whole blocks of channels and a last chunk of 8 steps; few channels; two time segments
SCANS = [(2, 72, 64, 16), (1, 40, 16, 64), (2, 37, 5, 7), (1, 1024, 32, 16)]
# (memories, queries, keys, features): one query, few, many; many memories
SEARCHES = [(1, 1, 5000, 64), (1, 8, 5000, 128), (1, 600, 3000, 64), (64, 1, 300, 32), (16, 4, 500, 48)]


def scan(shape: tuple[int, int, int, int], dtype: torch.dtype, channel_last: bool, gated: bool, device: str) -> None:
    """Forward, backward and, in float32, double backward, with a reset."""
    batch, length, dim, state = shape

    def sequence(width: int) -> Tensor:
        if channel_last:
            return torch.randn(batch, length, width, device=device, dtype=dtype).mT
        return torch.randn(batch, width, length, device=device, dtype=dtype)

    A, D = -torch.rand(dim, state, device=device) - 0.3, torch.randn(dim, device=device)
    x = [sequence(dim), sequence(dim) - 2, A, sequence(state), sequence(state), D]
    x += [sequence(dim)] if gated else []
    x = [v.detach().requires_grad_() for v in x]
    reset = torch.zeros(batch, length, dtype=torch.bool, device=device)
    for starts in (False, True):
        reset[:, length // 3] = starts
        y = selective_scan(*x, delta_softplus=True, reset=reset)
        grads = torch.autograd.grad(y.float().square().sum(), x, create_graph=dtype == torch.float32)
        if dtype == torch.float32:
            grads = torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), x)
        assert all(g.isfinite().all() for g in grads)


def search(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    """Plain keys, and packed ones that are written, overwritten and erased."""
    memories, count, size, features = shape
    queries = torch.randn(memories, count, features, device=device, dtype=dtype)
    keys = torch.randn(memories, size, features, device=device, dtype=dtype)
    assert knn(queries, keys, 8).values.isfinite().all()
    packed = PackedKeys(size, features, memories=memories, dtype=dtype, device=device)
    slots = torch.arange(size, device=device).expand(memories, size)
    packed.write(slots, keys)
    packed.write(slots[:, :7], keys[:, 7:14])
    packed.erase(slots[:, 20:30])
    assert packed.search(queries, 8).values.isfinite().all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=("scan", "knn"))
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.op == "scan":
        for case in itertools.product(SCANS, TYPES, (False, True), (False, True)):
            scan(*case, arguments.device)
    else:
        for shape, dtype in itertools.product(SEARCHES, TYPES):
            search(shape, dtype, arguments.device)
    print(f"{arguments.op}: all calls returned finite numbers")


if __name__ == "__main__":
    main()
