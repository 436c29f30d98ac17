"""Meta-RL in context on CartPole with flipped actions and hidden velocities: returns of a trial for each memory.

All variants have the same policy, training (RL^2 by PPO) and budget. They differ in the core:

- "mlp": no memory;
- "frames": the last four inputs;
- "gru": a GRU;
- "s6": the selective scan alone;
- "ssm": the whole block of Mamba, whose convolution computes differences between steps;
- "s6 + feedforward": "s6" between perceptrons, with initial step sizes of at least 0.1;
- "gru + feedforward": a GRU between perceptrons;
- "ssm + adapter": the policy of "ssm", which also takes gradient steps between the episodes of a trial.

The learning rate of each is selected on tasks of the split "valid", with a seed that is not reported. Returns are those
of the most probable actions on unseen tasks of the split "test"; 500 is the maximum. +- is a 95 % interval over seeds
(Student's t).

python -m benchmarks.experiments.cartpole_rl [--seeds 5] [--updates 120] [--physics] [--projection 4] [--workers 1]
        [--steps 128] [--trials 64] [--resume]
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, load, machine, save
from benchmarks.experiments.adapted_trials import adapted_returns
from benchmarks.experiments.cores import GRU, Frames, Memoryless
from eaml_ext._statistics import confidence_interval
from eaml_ext.rl import RL2, SSMMetaPolicy, feature_dim
from eaml_ext.tasks import CartPoleTasks

VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {"core": Memoryless},
    "frames": {"core": Frames},
    "gru": {"core": GRU},
    "s6": {"core": "s6"},
    "ssm": {"core": "mamba"},
    "s6 + feedforward": {"core": "s6", "feedforward": True, "dt_min": 0.1},
    "gru + feedforward": {"core": GRU, "feedforward": True},
}
ADAPTED = "ssm + adapter"
RATES = (1e-3, 3e-3)
ADAPTER_RATES = (1e-3, 1e-2, 1e-1)
EPISODES = 3  # episodes of a trial at test time
HIDDEN, STATE = 64, 8
TUNING_SEED = 1000


def run(
    variant: str,
    rate: float,
    seed: int,
    updates: int,
    tasks: dict[str, Any],
    length: dict[str, int],
    split: str,
    adapter_rates: Sequence[float],
) -> dict[str, Any]:
    """Train one policy; evaluate it on one trial of each of 64 unseen tasks, without and with an Adapter."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    dist = CartPoleTasks(hide_velocity=True, **tasks)
    policy = SSMMetaPolicy(feature_dim(dist), dist.action_dim, HIDDEN, state_size=STATE, **VARIANTS[variant])
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
        "variant": variant,
        "learning_rate": rate,
        "seed": seed,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "steps": trainer.steps,
        "cpu_seconds": seconds,
        "returns": returns.mean(0).tolist(),
        "returns_drawn": trainer.evaluate(unseen, EPISODES, seed, greedy=False).mean(0).tolist(),
        "flipped_and_not": [returns[flip].mean(0).tolist(), returns[~flip].mean(0).tolist()],
        "curve": curve,
        "adapted": {
            str(lr): adapted_returns(policy, dist, unseen, EPISODES, seed, lr).mean(0).tolist() for lr in adapter_rates
        },
        "settings": settings_key(variant, rate, seed, updates, length, split, adapter_rates),
    }


def settings_key(*settings: Any) -> str:
    """Return the settings of a run as a string, which identifies the run within one result file."""
    return json.dumps(settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--physics", action="store_true", help="also draw the physics of each task")
    parser.add_argument("--projection", type=int, help="number of entries to which each task projects observations")
    parser.add_argument("--steps", type=int, default=128, help="length of a training trial")
    parser.add_argument("--trials", type=int, default=64, help="trials per update")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--resume", action="store_true", help="reuse the runs in the result file")
    parser.add_argument("--report", action="store_true", help="table and plot of the result file, without new runs")
    parser.add_argument("--quick", action="store_true", help="one seed, tuned as in the result file; write no file")
    flags = parser.parse_args()
    if flags.quick:
        flags.seeds = 1
    tasks = {"physics": flags.physics, "projection": flags.projection}

    dist = CartPoleTasks(hide_velocity=True, **tasks)
    trial = "" if flags.steps == 128 else f"-trials-of-{flags.steps}"
    path = RESULTS / f"cartpole_rl-{dist.name.removeprefix('CartPole-v1-')}{trial}.json"
    done: dict[str, dict[str, Any]] = {}
    if (flags.resume or flags.report or flags.quick) and path.exists():
        before = load(path)
        done = {r["settings"]: r for r in before["tuning"] + before["runs"] * (not flags.quick)}
    length = {"steps": flags.steps, "tasks_per_update": flags.trials}

    with concurrent.futures.ProcessPoolExecutor(flags.workers, multiprocessing.get_context("spawn")) as pool:

        def submit(variant: str, rate: float, seed: int, split: str, adapter_rates: Sequence[float]) -> Any:
            ready = done.get(settings_key(variant, rate, seed, flags.updates, length, split, adapter_rates))
            if ready is None and not flags.report:
                return pool.submit(run, variant, rate, seed, flags.updates, tasks, length, split, adapter_rates)
            future: Any = concurrent.futures.Future()
            future.set_result(ready)
            return future

        def keep(new: dict[str, Any], *printed: str) -> dict[str, Any]:
            """Write all runs so far, so that an interruption loses none of them."""
            done[new["settings"]] = new
            print({k: new[k] for k in printed}, flush=True)
            write([], list(done.values()))
            return new

        def write(tuning: list[dict[str, Any]], runs: list[dict[str, Any]], **results: Any) -> None:
            if not flags.quick:
                results |= {"machine": machine(), "tasks": dist.name, "runs": runs, "tuning": tuning}
                save(path, results)

        candidates = [
            submit(a, r, TUNING_SEED, "valid", ADAPTER_RATES if a == "ssm" else ()) for a in VARIANTS for r in RATES
        ]
        columns = ("variant", "seed", "learning_rate", "returns", "adapted", "cpu_seconds")
        tuning = [keep(job.result(), *columns) for job in candidates]
        best = {a: max((t for t in tuning if t["variant"] == a), key=lambda t: t["returns"][-1]) for a in VARIANTS}
        rates = {a: t["learning_rate"] for a, t in best.items()}
        adapter_rate = float(max(best["ssm"]["adapted"].items(), key=lambda item: item[1][-1])[0])
        print("learning rates:", rates, "of the adapter:", adapter_rate, flush=True)
        jobs = [
            submit(a, rates[a], seed, "test", (adapter_rate,) if a == "ssm" else ())
            for a in ("ssm", *(a for a in VARIANTS if a != "ssm"))  # the slowest variant first
            for seed in range(flags.seeds)
        ]
        found = [job.result() for job in jobs] if flags.report else [keep(job.result(), *columns) for job in jobs]
        runs = [r for r in found if r is not None]

    table = {}
    for variant in (*VARIANTS, ADAPTED):
        of_variant = [r for r in runs if r["variant"] == ("ssm" if variant == ADAPTED else variant)]
        returns = [r["adapted"][str(adapter_rate)] if variant == ADAPTED else r["returns"] for r in of_variant]
        if not of_variant:
            continue
        episodes = [confidence_interval(column) for column in zip(*returns, strict=True)]
        table[variant] = {
            "mean": [column["mean"] for column in episodes],
            "half": [column["half"] for column in episodes],
            "seeds": len(of_variant),
            "parameters": of_variant[0]["parameters"],
            "cpu_seconds": statistics.median(r["cpu_seconds"] for r in of_variant),
        }
        if variant != ADAPTED:
            drawn = zip(*(r["returns_drawn"] for r in of_variant), strict=True)
            table[variant]["drawn"] = [statistics.mean(column) for column in drawn]
    print(f"| memory | parameters | seeds | {' | '.join(f'episode {i + 1}' for i in range(EPISODES))} | CPU s |")
    for variant, row in table.items():
        intervals = [f" +- {half:.0f}" if row["seeds"] > 1 else "" for half in row["half"]]
        cells = " | ".join(f"{mean:.0f}{text}" for mean, text in zip(row["mean"], intervals, strict=True))
        print(f"| {variant} | {row['parameters']} | {row['seeds']} | {cells} | {row['cpu_seconds']:.0f} |")
    memoryless = max(table["mlp"]["mean"][-1], table["mlp"]["drawn"][-1])
    print(f"ssm / memoryless, last episode: {table['ssm']['mean'][-1] / memoryless:.1f}")
    write(tuning, runs, table=table, adapter_rate=adapter_rate)
    if not flags.quick:
        plot(path.with_suffix(".png"), table, runs, dist.name)


def plot(path: Path, table: dict[str, Any], runs: list[dict[str, Any]], title: str) -> None:
    """Plot returns over the episodes of a trial, and over training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (variant, row) in enumerate(table.items()):
        x = [e + 0.04 * (i - (len(table) - 1) / 2) for e in range(1, EPISODES + 1)]
        left.errorbar(x, row["mean"], row["half"], marker="o", capsize=3, label=variant)
        curves = [r["curve"] for r in runs if r["variant"] == variant]
        if not curves:  # "ssm + adapter" has no training of its own
            continue
        means = [statistics.mean(returns) for returns in zip(*([v for _, v in c] for c in curves), strict=True)]
        right.plot([steps for steps, _ in curves[0]], means)
    left.set(xlabel="episode of the trial", ylabel="return (500 at most)", xticks=range(1, EPISODES + 1), ylim=(0, 515))
    left.set_title("unseen tasks")
    right.set(xlabel="environment steps of training", title="last episode, during training")
    figure.legend(loc="outside right center", frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
