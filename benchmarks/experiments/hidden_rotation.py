"""Compare models that must find a hidden rotation: python -m benchmarks.experiments.hidden_rotation [--quick]

The systems are linear (LDSTasks), and observations show two mixed coordinates of four. Every run has its own system, so
a predictor must find the rotation while it predicts the next frame. An SSM, a GRU and an MLP with about the same number
of parameters get the last four frames; SSM and GRU also have a state. All train on the same runs with the same schedule
and number of steps, each with the learning rate that is best on other systems (split valid).

Errors are squared, in variances of an observation: means over 256 unseen systems and three trainings, with 95 %
intervals over systems. The baselines are persistence, least squares on four frames of the same system, and the Kalman
filter with the true parameters.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import RESULTS, flags, line_plot, write
from eaml_ext import SSM
from eaml_ext._statistics import confidence_interval
from eaml_ext.tasks import LDSTasks
from eaml_ext.tasks.baselines import fit_linear

TASKS = LDSTasks()
DIM = TASKS.obs_dim
FRAMES = 4
LENGTH = 96  # steps of a run that are predicted
LRS = (3e-3, 1e-2)
LATE = 48  # from this step on a run's past is long


class GRU(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.gru, self.head = nn.GRU(FRAMES * DIM, hidden, batch_first=True), nn.Linear(hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0])


def mlp(hidden: int) -> nn.Module:
    layers = nn.Linear(FRAMES * DIM, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, DIM)
    return nn.Sequential(*layers)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "SSM": lambda: SSM(FRAMES * DIM, 32, DIM, num_layers=2),
    "GRU": lambda: GRU(47),
    "MLP": lambda: mlp(84),
}


def frames(x: Tensor) -> Tensor:
    """``(*, FRAMES + steps, DIM)`` -> ``(*, steps, FRAMES * DIM)``."""
    return x[..., :-1, :].unfold(-2, FRAMES, 1).flatten(-2)


def draw(tasks: int, runs: int, split: str, seed: int) -> Tensor:
    """``(tasks, runs, FRAMES + LENGTH, DIM)``."""
    return TASKS.simulate(TASKS.sample(tasks, split, seed), runs, FRAMES + LENGTH, seed)[0]


def trained(name: str, lr: float, seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name]()
    x = draw(2048, 1, "train", seed)[:, 0]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    rows = torch.randint(len(x), (steps, 32), generator=torch.Generator().manual_seed(seed))
    for i in range(steps):
        here = x[rows[i]]
        optimizer.zero_grad()
        F.mse_loss(model(frames(here)), here[:, FRAMES:]).backward()
        optimizer.step()
        schedule.step()
    return model


def errors(model: nn.Module, x: Tensor) -> Tensor:
    """``(tasks, LENGTH)``."""
    with torch.no_grad():
        y = model(frames(x.flatten(0, 1))).unflatten(0, x.shape[:2])
    return (y - x[:, :, FRAMES:]).square().mean((1, 3))


def references(x: Tensor, tasks: list[Any], modes: Tensor) -> dict[str, Tensor]:
    """Errors of predictors that are not trained; least squares is fitted to half of the runs, judged on the others."""
    wanted, half = x[:, :, FRAMES:], x.shape[1] // 2
    kalman = TASKS.kalman(tasks, x, modes)[0][:, :, FRAMES - 1 :]
    linear = torch.stack(
        [torch.cat([fit_linear(r[half:], FRAMES)(r[:half]), fit_linear(r[:half], FRAMES)(r[half:])]) for r in x]
    )
    predictions = {"persistence": x[:, :, FRAMES - 1 : -1], "least squares on 4 frames": linear, "Kalman": kalman}
    return {name: (y - wanted).square().mean((1, 3)) for name, y in predictions.items()}


def plot(curves: dict[str, list[float]]) -> None:
    x = range(FRAMES, FRAMES + LENGTH)
    styles = {name: "-" if name in MODELS else ":" for name in curves if name != "persistence"}
    lines = {name: (x, curves[name], style) for name, style in styles.items()}
    line_plot(RESULTS / "hidden_rotation.png", lines, xlabel="steps seen", ylabel="squared error of the next frame")


def main() -> None:
    quick = flags(__doc__).quick
    steps, seeds, start = (200, 1, time.perf_counter()) if quick else (800, 3, time.perf_counter())
    tasks = TASKS.sample(64 if quick else 256, "test", 0)
    x, modes = TASKS.simulate(tasks, 4, FRAMES + LENGTH, 0)
    found, chosen = references(x, tasks, modes), {}
    valid = draw(64, 4, "valid", 0)
    for name in MODELS:
        tried = {lr: float(errors(trained(name, lr, 100, max(30, steps // 4)), valid).mean()) for lr in LRS}
        lr = min(tried, key=lambda lr: tried[lr] if math.isfinite(tried[lr]) else math.inf)
        chosen[name] = {"lr": lr, "parameters": sum(p.numel() for p in MODELS[name]().parameters())}
        found[name] = torch.stack([errors(trained(name, lr, seed, steps), x) for seed in range(seeds)]).mean(0)
        print(f"{name}: {chosen[name]}, {time.perf_counter() - start:.0f} s", flush=True)
    table = {
        name: {
            "whole run": confidence_interval(e.mean(1).tolist()),
            "late": confidence_interval(e[:, LATE:].mean(1).tolist()),
        }
        for name, e in found.items()
    }
    gap = {name: confidence_interval((e - found["Kalman"]).mean(1).tolist()) for name, e in found.items()}
    print(f"| model | whole run | from step {FRAMES + LATE} on | above Kalman, paired |")
    for name, row in table.items():
        cells = [row["whole run"], row["late"], gap[name]]
        print(f"| {name} | " + " | ".join(f"{c['mean']:.4f} +- {c['half']:.4f}" for c in cells) + " |")
    if not quick:
        curves = {name: e.mean(0).tolist() for name, e in found.items()}
        plot(curves)
        results = {"tasks": TASKS.name, "models": chosen, "errors": table, "above Kalman": gap, "curves": curves}
        print(write("hidden_rotation", results, timed=False))


if __name__ == "__main__":
    main()
