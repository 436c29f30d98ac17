"""Meta-RL in context on CartPole with action flip and hidden velocity: return per episode of a trial, per memory.

One policy, one training (RL^2 by PPO), one budget; what differs is the core: none ("mlp"), the last four inputs
("frames"), a GRU, the selective SSM. The learning rate of each is chosen on tasks of the split "valid" with a seed that
is not reported. Returns are those of the likeliest actions on unseen tasks of the split "test", 500 is the most.

python -m benchmarks.experiments.cartpole_rl [--seeds 3] [--updates 120] [--physics] [--projection 4] [--workers 1]
        [--steps 128] [--trials 64]
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import statistics
import time
from typing import Any

import torch

from benchmarks.common import RESULTS, machine
from benchmarks.experiments.cores import GRU, Frames, Memoryless
from eaml_ext.rl import RL2, SSMMetaPolicy, feature_dim
from eaml_ext.tasks import CartPoleTasks

CORES: dict[str, Any] = {"mlp": Memoryless, "frames": Frames, "gru": GRU, "ssm": "s6"}
RATES = (1e-3, 3e-3)
EPISODES = 3  # of a trial at test time
HIDDEN, STATE = 64, 8
TUNING_SEED = 1000


def run(
    arm: str, rate: float, seed: int, updates: int, tasks: dict[str, Any], length: dict[str, int], split: str
) -> dict[str, Any]:
    """Trains one policy and plays one trial of each of 64 unseen tasks with it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    dist = CartPoleTasks(hide_velocity=True, **tasks)
    policy = SSMMetaPolicy(feature_dim(dist), dist.action_dim, HIDDEN, state_size=STATE, core=CORES[arm])
    trainer = RL2(policy, dist, **length, lr=rate, seed=seed)
    start, unseen = time.process_time(), dist.sample(64, split, seed)
    curve = []

    def report(update: int, _: float) -> None:
        if (update + 1) % 20 == 0:
            returns = trainer.evaluate(dist.sample(16, "valid", seed), EPISODES, seed)
            curve.append([trainer.steps, float(returns[:, -1].mean())])

    trainer.train(updates, report)
    seconds = time.process_time() - start
    returns = trainer.evaluate(unseen, EPISODES, seed)
    flip = torch.tensor([task.flip for task in unseen])
    return {
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "steps": trainer.steps,
        "cpu_seconds": seconds,
        "returns": returns.mean(0).tolist(),
        "returns_drawn": trainer.evaluate(unseen, EPISODES, seed, greedy=False).mean(0).tolist(),
        "flipped_and_not": [returns[flip].mean(0).tolist(), returns[~flip].mean(0).tolist()],
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--physics", action="store_true", help="draw physics per task, too")
    parser.add_argument("--projection", type=int, help="project observations, per task, to so many entries")
    parser.add_argument("--steps", type=int, default=128, help="length of a training trial")
    parser.add_argument("--trials", type=int, default=64, help="trials per update")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--quick", action="store_true", help="3 updates, one seed, no file written")
    flags = parser.parse_args()
    if flags.quick:
        flags.updates, flags.seeds = 3, 1
    tasks = {"physics": flags.physics, "projection": flags.projection}

    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(flags.workers, spawn) as pool:
        common = (flags.updates, tasks, {"steps": flags.steps, "tasks_per_update": flags.trials})
        tried = {(a, r): pool.submit(run, a, r, TUNING_SEED, *common, "valid") for a in CORES for r in RATES}
        rates = {a: max(RATES, key=lambda r, a=a: tried[a, r].result()["returns"][-1]) for a in CORES}  # type: ignore[misc]
        print("learning rates:", rates, flush=True)
        jobs = [pool.submit(run, a, rates[a], seed, *common, "test") for seed in range(flags.seeds) for a in CORES]
        runs = []
        for job in jobs:
            runs.append(job.result())
            print({k: runs[-1][k] for k in ("arm", "seed", "returns", "cpu_seconds")}, flush=True)

    table = {}
    for arm in CORES:
        mine = [r for r in runs if r["arm"] == arm]
        columns = list(zip(*(r["returns"] for r in mine), strict=True))
        table[arm] = {
            "mean": [statistics.mean(c) for c in columns],
            "spread": [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns],
            "drawn": [statistics.mean(c) for c in zip(*(r["returns_drawn"] for r in mine), strict=True)],
            "parameters": mine[0]["parameters"],
            "cpu_seconds": statistics.median(r["cpu_seconds"] for r in mine),
        }
    print(f"| memory | parameters | {' | '.join(f'episode {i + 1}' for i in range(EPISODES))} | CPU s |")
    for arm, row in table.items():
        cells = " | ".join(f"{m:.0f} +- {s:.0f}" for m, s in zip(row["mean"], row["spread"], strict=True))
        print(f"| {arm} | {row['parameters']} | {cells} | {row['cpu_seconds']:.0f} |")
    memoryless = max(table["mlp"]["mean"][-1], table["mlp"]["drawn"][-1])
    print(f"ssm / memoryless, last episode: {table['ssm']['mean'][-1] / memoryless:.1f}")
    if flags.quick:
        return
    dist = CartPoleTasks(hide_velocity=True, **tasks)
    trial = "" if flags.steps == 128 else f"-trials-of-{flags.steps}"
    name = RESULTS / f"cartpole_rl-{dist.name.removeprefix('CartPole-v1-')}{trial}.json"
    tuning = [job.result() for job in tried.values()]
    results = {"machine": machine(), "tasks": dist.name, "table": table, "runs": runs, "tuning": tuning}
    name.write_text(json.dumps(results, indent=1) + "\n")
    plot(name.with_suffix(".png"), table, runs, dist.name)


def plot(path: Any, table: dict[str, Any], runs: list[dict[str, Any]], title: str) -> None:
    """Return over the episodes of a trial, and over training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (arm, row) in enumerate(table.items()):
        x = [e + 0.04 * (i - 1.5) for e in range(1, EPISODES + 1)]
        left.errorbar(x, row["mean"], row["spread"], marker="o", capsize=3, label=arm)
        curves = [r["curve"] for r in runs if r["arm"] == arm]
        means = [statistics.mean(returns) for returns in zip(*([v for _, v in c] for c in curves), strict=True)]
        right.plot([steps for steps, _ in curves[0]], means)
    left.set(xlabel="episode of the trial", ylabel="return (500 at most)", xticks=range(1, EPISODES + 1), ylim=(0, 515))
    left.set_title("unseen tasks")
    right.set(xlabel="environment steps of training", title="last episode, during training")
    left.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
