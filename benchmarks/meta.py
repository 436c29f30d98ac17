"""A second-order meta-update of the SSM: ours against the same update with the scan as a loop over steps.

    python -m benchmarks.meta [--quick] [--threads 1]

Three ways to the same gradient: MetaMAML with the fused scan, tasks in one vmapped batch; the same with the scan as a
Python loop over steps under vmap; a Python loop over tasks and steps.
"""

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import flags, medians, write
from eaml_ext import SSM, MetaMAML
from eaml_ext.ops import selective_scan_reference

SHAPES = [(8, 50), (8, 200), (32, 50)]  # (tasks, steps)


def make_tasks(tasks: int, steps: int) -> list[tuple[Tensor, ...]]:
    sizes = ((1, steps, 6), (1, steps, 4), (1, steps, 6), (1, steps, 4))
    return [tuple(torch.randn(size) for size in sizes) for _ in range(tasks)]


def gradient(maml: MetaMAML, tasks: Any) -> list[Tensor]:
    """The meta-gradient of a batch of tasks."""
    params = maml.parameters()
    return list(torch.autograd.grad(maml.task_losses(params, tasks, F.mse_loss).mean(), list(params.values())))


def one_by_one(maml: MetaMAML, tasks: Any) -> list[Tensor]:
    """The same, a Python loop over tasks."""
    params = maml.parameters()
    loss = torch.stack([maml.task_losses(params, [task], F.mse_loss).sum() for task in tasks]).mean()
    return list(torch.autograd.grad(loss, list(params.values())))


def main() -> None:
    arguments = flags(__doc__)
    maml = MetaMAML(SSM(6, 64, 4), inner_lr=0.05, outer_lr=1e-3)
    slow = mock.patch("eaml_ext.nn.cores.s6.selective_scan", selective_scan_reference)
    results = []
    print(f"{'tasks x steps':<16}{'ours ms':>9}{'vmapped loop':>14}{'loop over both':>16}   (times ours)")
    for shape in SHAPES[: 1 if arguments.quick else None]:
        tasks = make_tasks(*shape)

        def vmapped(tasks: Any = tasks) -> list[Tensor]:
            with slow:
                return gradient(maml, tasks)

        def looped(tasks: Any = tasks) -> list[Tensor]:
            with slow:
                return one_by_one(maml, tasks)

        functions = {
            "ours": lambda tasks=tasks: gradient(maml, tasks),
            "vmapped loop": vmapped,
            "loop over both": looped,
        }
        for name, function in functions.items():
            for ours, other in zip(gradient(maml, tasks), function(), strict=True):
                torch.testing.assert_close(other, ours, rtol=1e-3, atol=1e-5, msg=f"{name} gives another gradient")
        t = medians(functions, seconds=1.0 if arguments.quick else 3.0)
        results.append({"shape": shape, **t})
        print(
            f"{shape[0]} x {shape[1]:<12}{1e3 * t['ours']:>9.1f}"
            f"{t['vmapped loop'] / t['ours']:>13.1f}x{t['loop over both'] / t['ours']:>15.1f}x"
        )
    if not arguments.quick:
        print(write(f"meta-{arguments.threads}-thread", {"threads": arguments.threads, "shapes": results}))


if __name__ == "__main__":
    main()
