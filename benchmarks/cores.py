"""The cores of nn.SSM side by side: their cost, and their error after the same number of steps.

    python -m benchmarks.cores [--quick] [--threads 1]

Times are CPU seconds of one core, 64 channels, a batch of 8 sequences of 128 steps. The tasks, for two layers of 32
channels, report the mean squared error on unseen sequences in variances of the target, as a mean over seeds:

- delay: output the input of 8 steps ago, at every step;
- recall: one of 31 random inputs is marked; output it at the end;
- frequency: predict the next value of a noisy sine whose frequency differs between sequences.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import flags, write
from eaml_ext import SSM
from eaml_ext.nn.cores import CORES, make_core

LENGTH, STEPS, SEEDS, LAG = 32, 300, 2, 8
SHARED_STATE = ("s5", "lru")  # their state_size is that of the whole


def state_size(name: str, dim: int) -> int:
    return dim if name in SHARED_STATE else 16


def delay(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, and where they count."""
    x = torch.randn(batch, LENGTH, 2)
    y = torch.roll(x[..., :1], LAG, dims=1)
    return x, y, (torch.arange(LENGTH) >= LAG).expand(batch, LENGTH)


def recall(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, LENGTH, 2)
    at = torch.randint(LENGTH - 1, (batch,))
    x[..., 1] = torch.nn.functional.one_hot(at, LENGTH)
    y = x[torch.arange(batch), at, 0].view(-1, 1, 1).expand(batch, LENGTH, 1)
    return x, y, (torch.arange(LENGTH) == LENGTH - 1).expand(batch, LENGTH)


def frequency(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    omega, phase = 0.2 + 2 * torch.rand(batch, 1), 2 * math.pi * torch.rand(batch, 1)
    wave = torch.sin(omega * torch.arange(LENGTH + 1) + phase) * math.sqrt(2)
    x = torch.stack([wave[:, :-1] + 0.1 * torch.randn(batch, LENGTH), torch.zeros(batch, LENGTH)], dim=-1)
    return x, wave[:, 1:].unsqueeze(-1), (torch.arange(LENGTH) >= LENGTH // 2).expand(batch, LENGTH)


TASKS: dict[str, Callable[[int], tuple[Tensor, Tensor, Tensor]]] = {
    "delay": delay,
    "recall": recall,
    "frequency": frequency,
}


def learned(name: str, task: Callable[[int], tuple[Tensor, Tensor, Tensor]], seed: int, steps: int) -> float:
    torch.manual_seed(seed)
    model = SSM(2, 32, 1, num_layers=2, state_size=state_size(name, 32), core=name)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y, counts = task(32)
        loss = (model(x) - y)[counts].square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    x, y, counts = task(512)
    with torch.no_grad():
        return float((model(x) - y)[counts].square().mean() / y[counts].var())


def times(rounds: int) -> dict[str, dict[str, float]]:
    x = torch.randn(8, 128, 64)
    cores = {name: make_core(name, 64, state_size(name, 64)) for name in CORES}
    state = {name: torch.zeros(8, *core.state_shape) for name, core in cores.items()}

    def forward(core: Any) -> None:
        with torch.no_grad():
            core.scan(x)

    def backward(core: Any) -> None:
        core.scan(x)[0].square().sum().backward()

    def step(core: Any, h: Tensor) -> None:
        with torch.no_grad():
            core.step(x[:, 0], h)

    passes = {
        "forward": {name: lambda core=core: forward(core) for name, core in cores.items()},
        "+ backward": {name: lambda core=core: backward(core) for name, core in cores.items()},
        "step": {name: lambda core=core, h=state[name]: step(core, h) for name, core in cores.items()},
    }
    results: dict[str, dict[str, float]] = {}
    for name, functions in passes.items():
        samples: dict[str, list[float]] = {core: [] for core in functions}
        for _ in range(rounds):
            for core, function in functions.items():
                start = time.process_time()
                function()
                samples[core].append(time.process_time() - start)
        results[name] = {core: statistics.median(t) for core, t in samples.items()}
    return results


def main() -> None:
    arguments = flags(__doc__)
    quick = arguments.quick
    t = times(5 if quick else 30)
    results: dict[str, Any] = {"threads": arguments.threads, "seconds": t, "errors": {}}
    print(f"{'core':<12}{'forward ms':>11}{'+ backward':>11}{'step':>7}" + "".join(f"{task:>12}" for task in TASKS))
    for name in CORES:
        errors = {
            task: [learned(name, function, seed, 40 if quick else STEPS) for seed in range(1 if quick else SEEDS)]
            for task, function in TASKS.items()
        }
        results["errors"][name] = errors
        row = "".join(f"{1e3 * t[p][name]:>{w}.2f}" for p, w in (("forward", 11), ("+ backward", 11), ("step", 7)))
        print(f"{name:<12}{row}" + "".join(f"{statistics.mean(e):>12.4f}" for e in errors.values()), flush=True)
    if not quick:
        print(write(f"cores-{arguments.threads}-thread", results))


if __name__ == "__main__":
    main()
