"""Second-order meta-gradients of long inner loops: by the graph of all inner steps, and without it.

    python -m benchmarks.inner_steps [--quick] [--threads 1]

Each row is a model, its tasks and a number of inner steps. It has the time, in units of the graph's, and the peak
memory of each ``memory`` of ``MetaMAML``. Calls are interleaved. Peak memory is the largest increase of resident memory
in a fresh process.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import flags, in_fresh_process, medians, peak_bytes, write
from eaml_ext import SSM, MetaMAML
from eaml_ext.meta._hessian_vector_products import Memory
from eaml_ext.tasks import SinusoidTasks

INNER_STEPS = (1, 5, 20, 50)
MEMORIES: tuple[Memory, ...] = get_args(Memory)


def sinusoid_mlp() -> tuple[nn.Module, list[Any]]:
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    return model, list(zip(*(column.unbind() for column in SinusoidTasks(10).draw(25)), strict=True))


def ssm(tasks: int, sequences: int, steps: int) -> tuple[nn.Module, list[Any]]:
    sizes = [(sequences, steps, size) for size in (6, 4, 6, 4)]
    return SSM(6, 64, 4), [tuple(map(torch.randn, sizes)) for _ in range(tasks)]


CASES: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "sinusoid MLP, 25 tasks x 10 points": sinusoid_mlp,
    "SSM, 8 tasks x 200 steps": partial(ssm, 8, 1, 200),
    "SSM, 2 tasks x 16 x 100 steps": partial(ssm, 2, 16, 100),
}


def meta_gradient(name: str, inner_steps: int, memory: Memory) -> Callable[[], list[Tensor]]:
    """Return the meta-gradient of a case as a function without arguments."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tasks = CASES[name]()
    maml = MetaMAML(model, inner_lr=0.01, outer_lr=1e-3, inner_steps=inner_steps, memory=memory)
    computation = maml._meta_gradient()

    def gradient() -> list[Tensor]:
        grads = computation.run(tasks, [F.mse_loss] * len(tasks))[1]
        return [torch.zeros_like(p) if g is None else g for p, g in zip(computation.leaves, grads, strict=True)]

    return gradient


def peak_of(name: str, inner_steps: int, memory: Memory) -> int:
    return peak_bytes(meta_gradient(name, inner_steps, memory))


def measure(name: str, inner_steps: int, seconds: float) -> dict[str, Any]:
    """Seconds, and by memory the time in units of the graph's and the peak bytes."""
    functions = {memory: meta_gradient(name, inner_steps, memory) for memory in MEMORIES}
    wanted = functions["reverse_over_reverse"]()
    for memory, function in functions.items():
        for ours, other in zip(wanted, function(), strict=True):
            tolerance = 1e-5 * float(ours.abs().max())
            torch.testing.assert_close(other, ours, rtol=1e-5, atol=tolerance, msg=f"{memory} gives another gradient")
    times = medians(functions, seconds=seconds)
    graph = times["reverse_over_reverse"]
    peaks = {memory: in_fresh_process(peak_of, name, inner_steps, memory) for memory in MEMORIES}
    return {
        "case": name,
        "inner steps": inner_steps,
        "seconds": graph,
        **{f"time {memory}": time / graph for memory, time in times.items()},
        **{f"bytes {memory}": peak for memory, peak in peaks.items()},
    }


def main() -> None:
    arguments = flags(__doc__)
    rows = []
    print(f"{'':<36}{'inner':>6}{'graph':>16}{'recompute':>16}{'forward':>16}   (time and peak memory)")
    for name in list(CASES)[: 2 if arguments.quick else None]:
        for inner_steps in INNER_STEPS[: 2 if arguments.quick else None]:
            row = measure(name, inner_steps, 0.5 if arguments.quick else 1.0)
            rows.append(row)
            cells = [f"{row[f'time {memory}']:>8.2f}x{row[f'bytes {memory}'] / 2**20:>5.0f}MB" for memory in MEMORIES]
            print(f"{name:<36}{inner_steps:>6}{''.join(cells)}   ({1e3 * row['seconds']:.1f} ms)", flush=True)
    if not arguments.quick:
        print(write(f"inner_steps-{arguments.threads}-thread", {"threads": arguments.threads, "rows": rows}))


if __name__ == "__main__":
    main()
