"""MAML's sinusoid regression (Finn, Abbeel & Levine 2017, section 5.1): test error after adaptation.

    python -m benchmarks.experiments.sinusoid [--seeds 0 1 2 3 4] [--settings ...] [--quick]

The model is an MLP 1-40-40-1 (ReLU), trained in second order with 15,000 meta-updates of 25 tasks with K support and
10 query points. Step sizes are 0.01 (inner) and 0.001 (Adam; falling to 0 in the last fifth). Each seed is tested on
5,000 unseen tasks with 100 query points. One thread. The results file keeps earlier seeds. --quick makes 3,000
meta-updates of one seed and writes no file.
"""

import argparse
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from benchmarks.common import RESULTS, load, machine, save
from eaml_ext import MetaMAML
from eaml_ext.tasks import SinusoidTasks

ITERATIONS, TASKS, TEST_TASKS = 15_000, 25, 5_000
STEPS = range(11)  # of adaptation at test time
SHOWN = (0, 1, 5, 10)
SETTINGS = {  # name: (shots, inner steps in training)
    "5 shots, 1 step": (5, 1),
    "10 shots, 5 steps": (10, 5),
}
PATH = RESULTS / "sinusoid.json"
PAPER = {1: 0.67, 5: 0.38, 10: 0.35}  # 5 shots, 1 step


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def train(distribution: SinusoidTasks, inner_steps: int, seed: int, iterations: int) -> MetaMAML:
    """The network, meta-trained on the distribution."""
    torch.manual_seed(seed)
    maml = MetaMAML(network(), inner_lr=0.01, outer_lr=0.001, inner_steps=inner_steps, compile=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(maml.optimizer, lambda i: min(1.0, 5 * (1 - i / iterations)))
    for iteration in range(iterations):
        columns = [t.unbind() for t in distribution.draw(TASKS, "train", seed, iteration)]
        maml.meta_update(zip(*columns, strict=True), F.mse_loss)
        schedule.step()
    return maml


def test(maml: MetaMAML, shots: int, seed: int) -> list[float]:
    """Mean squared error over the test tasks after each number of gradient steps."""
    data = SinusoidTasks(shots, queries=100).draw(TEST_TASKS, "test", seed)
    start = {name: p.detach() for name, p in maml.parameters().items()}

    def errors(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        params, out = start, []
        for steps in STEPS:
            params = maml.adapt_params(params, support_x, support_y, F.mse_loss, min(steps, 1))
            out.append(F.mse_loss(maml.call(params, query_x), query_y))
        return torch.stack(out)

    return vmap(errors, chunk_size=1000)(*data).mean(dim=0).tolist()


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation over seeds after each number of steps."""
    columns = list(zip(*(run["error"] for run in runs.values()), strict=True))
    spread = [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]
    return {"mean": [statistics.mean(c) for c in columns], "spread": spread}


def results() -> dict[str, Any]:
    """The settings in the results file."""
    return load(PATH)["settings"] if PATH.exists() else {}


def plot(settings: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, setting in settings.items():
        mean, spread = torch.tensor(setting["mean"]), torch.tensor(setting["spread"])
        axes.plot(STEPS, mean, label=f"{name} in training")
        axes.fill_between(STEPS, mean - spread, mean + spread, alpha=0.3)
    axes.plot(list(PAPER), list(PAPER.values()), "k*", label="Finn et al. 2017, 5 shots, 1 step")
    axes.axhline(
        next(iter(settings.values()))["baselines"]["mean"],
        color="0.4",
        linestyle="--",
        label="the best without adaptation",
    )
    axes.set(xlabel="gradient steps at test time", ylabel="mean squared error", yscale="log", title="Sinusoids")
    axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.92), frameon=False)
    figure.savefig(RESULTS / "sinusoid.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':<20}" + "".join(f"{f'{s} steps':>18}" for s in SHOWN) + f"{'s a seed':>10}")
    for name in arguments.settings:
        shots, inner_steps = SETTINGS[name]
        setting: dict[str, Any] = {} if arguments.quick else results().get(name, {})
        runs = setting.get("runs", {})
        baselines = SinusoidTasks(shots, queries=100).baselines(TEST_TASKS)
        for seed in arguments.seeds[:1] if arguments.quick else arguments.seeds:
            start = time.process_time()
            iterations = 3000 if arguments.quick else ITERATIONS
            maml = train(SinusoidTasks(shots, queries=10), inner_steps, seed, iterations)
            seconds = time.process_time() - start
            runs[str(seed)] = {"error": test(maml, shots, seed), "seconds": seconds, "skipped": maml.skipped_updates}
            setting = {**summary(runs), "baselines": baselines, "runs": dict(sorted(runs.items()))}
            if not arguments.quick:
                settings = {**results(), name: setting}
                save(PATH, {"machine": machine(), "test_tasks": TEST_TASKS, "settings": settings})
        mean, spread = setting["mean"], setting["spread"]
        row = "".join(f"{f'{mean[s]:.3f} +- {spread[s]:.3f}':>18}" for s in SHOWN)
        seconds = statistics.median(run["seconds"] for run in runs.values())
        print(f"{name:<20}{row}{seconds:>10.0f}   ({len(runs)} seeds)", flush=True)
    print(f"the best without adaptation {baselines['mean']:.2f}, predicting zero {baselines['zero']:.2f}")
    if not arguments.quick:
        plot(results())


if __name__ == "__main__":
    main()
