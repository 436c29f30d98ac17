"""Adaptation along a stream with corrupted targets: python -m benchmarks.adaptation [--quick] [--threads 1].

An SSM is trained on linear systems with hidden rotations (LDSTasks, split train). It then adapts along one long run of
a system of the split test, one step per batch. 1 % of the batches have corrupted targets: one NaN, a factor of 1e4, the
other sign, or noise. Every 100 steps it predicts clean held-out runs. For each seed the table has the error before, the
worst and the last of the guarded Adapter, the worst of the first 1000 steps without guards, and the baselines.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import flags, write
from eaml_ext import SSM, AdaptationConfig, Adapter
from eaml_ext.tasks import LDSTasks

TASKS = LDSTasks()
GUARDED = AdaptationConfig(max_steps_per_call=1)
UNGUARDED = dataclasses.replace(GUARDED, grad_clip_norm=None, trust_region_eps=None, ema_decay=None)
BATCH = (2, 32)  # sequences, steps
CORRUPTED = 0.01
FRAMES = 4  # first frames of a sequence, not scored: the baselines read that many


def pretrained(seed: int, steps: int = 400) -> SSM:
    """The default SSM, trained on 32 systems of the split train."""
    torch.manual_seed(seed)
    model = SSM(TASKS.obs_dim, output_dim=TASKS.obs_dim)
    x = TASKS.simulate(TASKS.sample(32, "train", seed), 16, 65, seed)[0].flatten(0, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = x[torch.randint(len(x), (16,))]
        optimizer.zero_grad()
        F.mse_loss(model(rows[:, :-1]), rows[:, 1:]).backward()
        optimizer.step()
        schedule.step()
    return model


def corrupt(targets: Tensor, generator: np.random.Generator) -> Tensor:
    """One of the four ways in which targets go wrong."""
    kind = generator.integers(4)
    if kind == 0:
        targets = targets.clone()
        targets.view(-1)[int(generator.integers(targets.numel()))] = math.nan
        return targets
    if kind == 1:
        return 1e4 * targets
    return -targets if kind == 2 else 10 * torch.from_numpy(generator.standard_normal(targets.shape)).to(targets)


def stream(model: SSM, seed: int, steps: int, cfg: AdaptationConfig, every: int = 100, first: int = -1) -> dict:
    """Adapt along the stream of ``seed``; ``first``: a step that is corrupted for certain.

    Returns the held-out error before (``errors[0]``) and every ``every`` steps, whether the parameters were finite
    after each step, and how many calls were rolled back.
    """
    (task,) = TASKS.sample(1, "test", seed)
    sequences, length = BATCH
    runs = TASKS.simulate([task], sequences, steps * length + 1, seed)[0][0]
    clean = TASKS.simulate([task], 32, 128, seed + 2**16)[0][0]
    generator = np.random.default_rng(seed)

    def error() -> float:
        with torch.no_grad():
            return float(F.mse_loss(model(clean[:, :-1])[:, FRAMES - 1 :], clean[:, FRAMES:]))

    corrupted = [s for s in range(steps) if generator.random() < CORRUPTED or s == first]

    def batches() -> Iterator[dict[str, Tensor]]:
        for step in range(steps):
            here = runs[:, step * length : (step + 1) * length + 1]
            targets = here[:, 1:]
            yield {"states": here[:, :-1], "targets": corrupt(targets, generator) if step in corrupted else targets}

    adapter = Adapter(model, cfg)
    errors, finite = [error()], True
    for step, _ in enumerate(adapter.adapt_stream(F.mse_loss, batches()), 1):
        finite = finite and all(bool(torch.isfinite(p).all()) for p in model.parameters())
        if step % every == 0:
            errors.append(error())
    return {"errors": errors, "finite": finite, "corrupted": len(corrupted), "rollbacks": adapter.rollbacks}


def streams(seeds: int, steps: int) -> list[dict[str, Any]]:
    print(f"{steps} steps, {CORRUPTED:.0%} of the batches corrupted; error in variances of an observation")
    print("| seed | unadapted | worst | last | rollbacks | worst without guards | 4 frames, least squares | Kalman |")
    results = []
    for seed in range(seeds):
        model = pretrained(seed)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        run = stream(model, seed, steps, GUARDED)
        model.load_state_dict(before)
        bare = stream(model, seed, min(steps, 1000), UNGUARDED)
        baselines = {
            k: float(v) for k, v in TASKS.baselines(TASKS.sample(1, "test", seed), length=128, frames=FRAMES).items()
        }
        results.append({"seed": seed, **run, "without guards": bare, "baselines": baselines})
        errors, ruined = run["errors"], torch.tensor(bare["errors"]).max()  # NaN is the largest
        print(
            f"| {seed} | {errors[0]:.4f} | {max(errors[1:]):.4f} | {errors[-1]:.4f} | {run['rollbacks']} of "
            f"{run['corrupted']} | {float(ruined):.3g} | {baselines['linear']:.4f} | {baselines['kalman']:.4f} |",
            flush=True,
        )
        held = run["finite"] and max(errors[1:]) <= 1.1 * errors[0] and errors[-1] < errors[0]
        if not held:
            print(f"seed {seed}: the bound of 1.1 times the unadapted error did not hold")
    return results


def main() -> None:
    quick = flags(__doc__).quick
    results = streams(1 if quick else 5, 500 if quick else 10_000)
    ratio = statistics.mean(r["errors"][-1] / r["errors"][0] for r in results)
    print(f"last error over unadapted error, mean over seeds: {ratio:.3f}")
    if not quick:
        print(write("adaptation", {"streams": results}))


if __name__ == "__main__":
    main()
