"""Second-order meta-updates: MetaMAML against the same gradient by Python loops.

    python -m benchmarks.meta [--quick] [--threads 1]

The MLP of MAML's sinusoids (1-40-40-1, 25 tasks of 10 + 10 points, 5 inner steps) gets its gradient in three ways:

- MetaMAML (tasks in one vmapped batch);
- MetaMAML(compile=True);
- a Python loop over tasks with create_graph, the faster of two: through functional_call, and by hand with F.linear.

An SSM gets it in four ways:

- MetaMAML with the fused scan, and the same with compile=True;
- the scan as a Python loop over steps under vmap;
- a Python loop over tasks and steps.

Tasks of different lengths (32 engines of 128 to 362 steps, as in C-MAPSS) get it in two ways:

- one launch, padded, with a MaskedLoss;
- a launch for each length.

Tasks of the mean length, which need no padding, show the cost of padding and of the mask.
"""

import time
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.common import flags, medians, write
from eaml_ext import SSM, MetaMAML
from eaml_ext.meta import MaskedLoss
from eaml_ext.ops import selective_scan_reference
from eaml_ext.tasks import SinusoidTasks

SHAPES = [(8, 50), (8, 200), (32, 50)]  # (tasks, steps)


def gradient(maml: MetaMAML, tasks: Any, loss_fn: Any = F.mse_loss) -> list[Tensor]:
    """The meta-gradient of a batch of tasks, as a meta-update takes it."""
    computation = maml._meta_gradient()
    grads = computation.run(tasks, [loss_fn] * len(tasks))[1]
    return [torch.zeros_like(p) if g is None else g for p, g in zip(computation.leaves, grads, strict=True)]


# --- the MLP of the sinusoids ----------------------------------------------------------------------------------------


def by_functional_call(model: nn.Module, tasks: Any, inner_lr: float, steps: int) -> list[Tensor]:
    """The textbook, for any module: plain autograd through every inner step, one task after another."""
    params = dict(model.named_parameters())
    total = torch.zeros(())
    for support_x, support_y, query_x, query_y in tasks:
        fast = params
        for _ in range(steps):
            loss = F.mse_loss(functional_call(model, fast, (support_x,)), support_y)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: p - inner_lr * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        total = total + F.mse_loss(functional_call(model, fast, (query_x,)), query_y)
    return list(torch.autograd.grad(total / len(tasks), list(params.values())))


def by_hand(model: nn.Module, tasks: Any, inner_lr: float, steps: int) -> list[Tensor]:
    """The same with this MLP written out, as MAML's own code does."""

    def call(p: Any, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(F.relu(F.linear(x, p[0], p[1])), p[2], p[3])), p[4], p[5])

    params = list(model.parameters())
    total = torch.zeros(())
    for support_x, support_y, query_x, query_y in tasks:
        fast: Any = params
        for _ in range(steps):
            loss = F.mse_loss(call(fast, support_x), support_y)
            grads = torch.autograd.grad(loss, fast, create_graph=True)
            fast = [p - inner_lr * g for p, g in zip(fast, grads, strict=True)]
        total = total + F.mse_loss(call(fast, query_x), query_y)
    return list(torch.autograd.grad(total / len(tasks), params))


def sinusoids(seconds: float) -> dict[str, Any]:
    """Median seconds of each way, and of the first compiled call."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    tasks = list(zip(*(column.unbind() for column in SinusoidTasks(10).draw(25)), strict=True))
    eager = MetaMAML(model, inner_lr=0.01, outer_lr=1e-3, inner_steps=5)
    compiled = MetaMAML(model, inner_lr=0.01, outer_lr=1e-3, inner_steps=5, compile=True)
    start = time.perf_counter()
    wanted = gradient(compiled, tasks)
    compilation = time.perf_counter() - start
    functions = {
        "eager": lambda: gradient(eager, tasks),
        "compiled": lambda: gradient(compiled, tasks),
        "functional_call": lambda: by_functional_call(model, tasks, 0.01, 5),
        "by hand": lambda: by_hand(model, tasks, 0.01, 5),
    }
    for name, function in functions.items():
        for ours, other in zip(wanted, function(), strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-3, atol=1e-5, msg=f"{name} gives another gradient")
    return {**medians(functions, seconds=seconds), "compilation": compilation}


# --- an SSM ----------------------------------------------------------------------------------------------------------


def make_tasks(tasks: int, steps: int) -> list[tuple[Tensor, ...]]:
    sizes = ((1, steps, 6), (1, steps, 4), (1, steps, 6), (1, steps, 4))
    return [tuple(torch.randn(size) for size in sizes) for _ in range(tasks)]


def one_by_one(maml: MetaMAML, tasks: Any) -> list[Tensor]:
    """The meta-gradient by a Python loop over tasks."""
    params = maml.parameters()
    loss = torch.stack([maml.task_losses(params, [task], F.mse_loss).sum() for task in tasks]).mean()
    return list(torch.autograd.grad(loss, list(params.values())))


def ssm(shape: tuple[int, int], seconds: float) -> dict[str, float]:
    """Median seconds of each way."""
    model, tasks = SSM(6, 64, 4), make_tasks(*shape)
    maml = MetaMAML(model, inner_lr=0.05, outer_lr=1e-3)
    compiled = MetaMAML(model, inner_lr=0.05, outer_lr=1e-3, compile=True)
    start = time.perf_counter()
    gradient(compiled, tasks)
    compilation = time.perf_counter() - start
    slow = mock.patch("eaml_ext.nn.cores.s6.selective_scan", selective_scan_reference)

    def vmapped() -> list[Tensor]:
        with slow:
            return gradient(maml, tasks)

    def looped() -> list[Tensor]:
        with slow:
            return one_by_one(maml, tasks)

    functions = {
        "ours": lambda: gradient(maml, tasks),
        "compiled": lambda: gradient(compiled, tasks),
        "vmapped loop": vmapped,
        "loop over both": looped,
    }
    for name, function in functions.items():
        for ours, other in zip(gradient(maml, tasks), function(), strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-3, atol=1e-5, msg=f"{name} gives another gradient")
    return {**medians(functions, seconds=seconds), "compilation": compilation}


# --- tasks of different lengths --------------------------------------------------------------------------------------


def ragged(seconds: float) -> dict[str, float]:
    """Median seconds of each way: next-step prediction of 14 sensors, a support and a query half of each engine."""
    lengths = [128 + 234 * i // 31 for i in range(32)]
    engines = [torch.randn(1, steps, 14) for steps in lengths]
    halves = [(e[:, : e.shape[1] // 2 + 1], e[:, e.shape[1] // 2 :]) for e in engines]
    alone = [tuple(part for half in pair for part in (half[:, :-1], half[:, 1:])) for pair in halves]
    lists = [tuple([part[0]] for part in task) for task in alone]
    equal = [tuple(torch.randn(1, sum(lengths) // 64, 14) for _ in range(4)) for _ in lengths]
    maml, masked = MetaMAML(SSM(14, 32, 14), inner_lr=0.05, outer_lr=1e-3), MaskedLoss(nn.MSELoss(reduction="none"))
    for ours, other in zip(gradient(maml, lists, masked), gradient(maml, alone), strict=True):
        torch.testing.assert_close(other, ours, rtol=1e-3, atol=1e-5, msg="padding gives another gradient")
    functions = {
        "one launch": lambda: gradient(maml, lists, masked),
        "launch per length": lambda: gradient(maml, alone),
        "mean length": lambda: gradient(maml, equal),
    }
    return medians(functions, seconds=seconds)


def main() -> None:
    arguments = flags(__doc__)
    seconds = 1.0 if arguments.quick else 3.0
    t = sinusoids(seconds)
    loop = min(t["functional_call"], t["by hand"])
    print(f"sinusoid MLP, 25 tasks x 5 steps: loop over tasks {1e3 * loop:.1f} ms")
    print(f"  eager    {1e3 * t['eager']:>7.2f} ms, {loop / t['eager']:.1f} times as fast")
    print(f"  compiled {1e3 * t['compiled']:>7.2f} ms, {loop / t['compiled']:.1f} times as fast", end="")
    print(f" (after {t['compilation']:.0f} s of compilation, or less where its cache is warm)")
    results = []
    print(f"{'SSM, tasks x steps':<20}{'ms':>18}{'vmapped loop':>14}{'loop over both':>16}   (times as long)")
    for shape in SHAPES[: 1 if arguments.quick else None]:
        row = ssm(shape, seconds)
        results.append({"shape": shape, **row})
        for way in ("ours", "compiled"):
            print(
                f"{shape[0]} x {shape[1]:<16}{way:<9}{1e3 * row[way]:>8.1f}"
                f"{row['vmapped loop'] / row[way]:>13.1f}x{row['loop over both'] / row[way]:>15.1f}x"
                + f"   (compiled in {row['compilation']:.0f} s)"
                * (way == "compiled")
            )
    r = ragged(seconds)
    print(f"32 engines of 128 to 362 steps, SSM: one launch {1e3 * r['one launch']:.1f} ms,", end="")
    print(f" {r['launch per length'] / r['one launch']:.1f} times as fast as a launch per length;", end="")
    print(f" tasks of the mean length take {r['mean length'] / r['one launch']:.2f} of its time")
    if not arguments.quick:
        name = f"meta-{arguments.threads}-thread"
        print(write(name, {"threads": arguments.threads, "sinusoid": t, "shapes": results, "ragged": r}))


if __name__ == "__main__":
    main()
