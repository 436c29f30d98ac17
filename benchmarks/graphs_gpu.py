"""Meta-updates, steps of an Adapter and steps of a policy on a GPU, with and without CUDA graphs: time and launches.

    python -m benchmarks.graphs_gpu [--quick] [--out FOLDER]

Times are of the wall clock, because launches bound these calls. Writes `graphs-<gpu>.json` after each row.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import machine, medians, save
from benchmarks.gpu import gpu_name, launches, start
from benchmarks.meta import make_tasks
from eaml_ext import SSM, AdaptationConfig, Adapter, MetaMAML
from eaml_ext.rl import SSMMetaPolicy

SHAPES = [(8, 50), (8, 200), (512, 200)]  # (tasks, steps)


def meta_update(tasks: int, steps: int, device: str, compile: bool) -> Callable[[], Any]:
    """Return a meta-update of an SSM as in :mod:`benchmarks.meta`."""
    maml = MetaMAML(SSM(6, 64, 4, device), inner_lr=0.05, outer_lr=1e-3, compile=compile)
    data: Any = [tuple(t.to(device) for t in task) for task in make_tasks(tasks, steps)]
    return lambda: maml.meta_update(data, F.mse_loss)


def adapter_step(device: str, compile: bool) -> Callable[[], Any]:
    """Return one step of an Adapter of the default SSM."""
    adapter = Adapter(SSM(4, device=device), AdaptationConfig(1e-4, max_steps_per_call=1), compile=compile)
    batch = {"states": torch.randn(1, 64, 4, device=device), "targets": torch.randn(1, 64, 32, device=device)}
    return lambda: adapter.adapt(F.mse_loss, batch)


def policy_step(device: str, compile: bool) -> Callable[[], Any]:
    """Return one step of a policy in 64 environments."""
    policy = SSMMetaPolicy(8, 2, device=device, compile=compile)
    obs, state, reset = torch.randn(64, 8), policy.init_hidden(64), torch.zeros(64, dtype=torch.bool)
    obs, reset = obs.to(device), reset.to(device)

    def step() -> Any:
        with torch.no_grad():
            return policy.step(obs, state, reset)

    return step


def measure(make: Callable[[bool], Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Measure the median seconds of a call, and its launches, without and with graphs."""
    functions = {"plain": make(False), "graph": make(True)}
    for function in functions.values():
        for _ in range(3):  # compiles, captures, replays
            function()
    counts = {f"launches, {name}": float(sum(launches(function))) for name, function in functions.items()}

    def waits(function: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            function()
            torch.cuda.synchronize()

        return call

    return {**medians({name: waits(function) for name, function in functions.items()}, seconds=seconds), **counts}


def main() -> None:
    arguments = start(__doc__, "graphs_gpu")
    quick = arguments.quick
    calls: dict[str, Callable[[bool], Callable[[], Any]]] = {
        f"meta-update, {tasks} x {steps}": lambda compile, tasks=tasks, steps=steps: meta_update(
            tasks, steps, "cuda", compile
        )
        for tasks, steps in SHAPES[: 1 if quick else None]
    }
    calls["step of an Adapter"] = lambda compile: adapter_step("cuda", compile)
    calls["step of a policy"] = lambda compile: policy_step("cuda", compile)
    rows = []
    print(f"{'':<26}{'plain, ms':>12}{'launches':>10}{'graph, ms':>12}{'launches':>10}")
    for name, make in calls.items():
        row = measure(make, 0.5 if quick else 3.0)
        rows.append({"call": name, **row})
        plain, graph = (f"{1e3 * row[way]:>12.3f}{row[f'launches, {way}']:>10.0f}" for way in ("plain", "graph"))
        print(f"{name:<26}{plain}{graph}", flush=True)
        if not quick:
            gpu = torch.cuda.get_device_name()
            save(arguments.out / f"graphs-{gpu_name()}.json", {"machine": {"gpu": gpu, **machine()}, "results": rows})


if __name__ == "__main__":
    main()
