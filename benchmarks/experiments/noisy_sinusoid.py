"""Noisy sinusoids: compare adaptation with and without experience.

    python -m benchmarks.experiments.noisy_sinusoid [--seeds 0 1 2] [--quick]

Two MLPs 1-40-40-1 are meta-trained as in benchmarks.experiments.sinusoid, one with K and one with 10 noisy support
points (10 noisy query points, 5 inner steps). The MLP that adapts better to K points alone, on the split "valid", then
adapts to unseen tasks with K noisy points. The memory holds 20 noisy points of each of many training tasks. All
variants start from the same meta-trained parameters:

| variant | data of the gradient steps |
|---|---|
| no adaptation | none |
| plain | the K points |
| uniform | the K points and 100 points drawn from the memory |
| retrieved | the K points and the points of the 5 past tasks whose adapted models fit the K points best |
| lookup only | none; the mean prediction of those 5 models |
| oracle | the K points and 100 noisy points of the same task |

Each variant has the number of steps (up to 50) and the weight of experience with the least error on 100 tasks of the
split "valid". The reported error is against the noiseless sinusoid, on tasks of the split "test", with half the width
of its 95 % interval over all tasks. Where new tasks have larger amplitudes than the training tasks, so have those of
the split "valid". Gradients are clipped in all variants. One thread. A seed and setting in the results file is not run
again. --quick makes 3,000 meta-updates for one seed and one setting, and writes no file.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap

from benchmarks.common import RESULTS, load, machine, save
from benchmarks.experiments.sinusoid import ITERATIONS, train
from eaml_ext import AdaptationConfig, Adapter, ExperienceBuffer, MetaMAML
from eaml_ext._statistics import half_width
from eaml_ext.experience import retrieval
from eaml_ext.meta import AdaptedTaskModels
from eaml_ext.tasks import SinusoidTasks

SHOTS = (2, 3, 5, 10)
VALID_TASKS, TEST_TASKS = 100, 400  # a seed
POINTS, SIMILAR, MEMORY_STEPS = 20, 5, 20  # of a past task; past tasks taken; steps of their models
CALLS, STEPS_A_CALL = 10, 5
WEIGHTS = (0.3, 1.0, 3.0)
KNOWN, BEYOND = (0.1, 5.0), (5.0, 10.0)  # amplitudes of tasks like those trained on, and of others
SETTINGS = [  # noise, past tasks in memory, K, amplitudes of the new tasks
    *[(0.3, 1000, k, KNOWN) for k in reversed(SHOTS)],
    (0.3, 100, 5, KNOWN),
    (0.3, 1000, 5, BEYOND),
    (1.0, 1000, 5, KNOWN),
]
CLIP = 30.0  # of gradients on amplitudes beyond: some are larger than any of the training, and plain steps diverge
Setting = tuple[float, int, int, tuple[float, float]]
VARIANTS = ("no adaptation", "plain", "uniform", "retrieved", "lookup only", "oracle")
Split = tuple[Tensor, Tensor, Tensor, Tensor]


def fill(noise: float, past: int, seed: int, iterations: int) -> ExperienceBuffer:
    """The memory: points of tasks of the training split that no meta-update has seen."""
    buffer = ExperienceBuffer(past * POINTS, seed=seed)
    x, y, *_ = SinusoidTasks(POINTS, queries=1, noise=noise).draw(past, "train", seed, iterations)
    buffer.add(x.flatten(0, 1), y.flatten(0, 1), task=torch.arange(past).repeat_interleave(POINTS))
    return buffer


def draw(setting: Setting, n: int, split: str, seed: int) -> Split:
    """Noisy support points and noiseless query points of the same tasks."""
    noise, _, shots, amplitudes = setting
    noisy, clean = (SinusoidTasks(shots, 100, level, amplitudes=amplitudes) for level in (noise, 0.0))
    support_x, support_y, query_x, _ = noisy.draw(n, split, seed)
    *_, query_y = clean.draw(n, split, seed)
    return support_x, support_y, query_x, query_y


def same_task(setting: Setting, n: int, split: str, seed: int) -> list[dict[str, Tensor]]:
    """100 noisy points of each task."""
    noise, _, shots, amplitudes = setting
    *_, x, y = SinusoidTasks(shots, 100, noise, amplitudes=amplitudes).draw(n, split, seed)
    points = slice(0, SIMILAR * POINTS)
    return [{"states": a[points], "targets": b[points]} for a, b in zip(x, y, strict=True)]


def errors(
    maml: MetaMAML,
    models: AdaptedTaskModels,
    buffer: ExperienceBuffer,
    data: Split,
    own: list[dict[str, Tensor]],
    clip: float | None,
) -> dict[str, dict[str, Tensor]]:
    """Error of each task ``(tasks,)`` in every variant, for every number of steps and weight."""
    support_x, support_y, query_x, query_y = data
    count, tasks = len(support_x), buffer.tasks()

    def error(params: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            predicted = vmap(lambda p, x: functional_call(maml.model, p, (x,)))(params, query_x)
        return (predicted - query_y).square().mean(dim=(1, 2))

    batches = [{"states": x, "targets": y} for x, y in zip(support_x, support_y, strict=True)]
    scores = torch.stack([models.score(buffer, tasks, batch) for batch in batches])
    cfg = AdaptationConfig(
        lr=maml.inner_lr, grad_clip_norm=clip, trust_region_eps=None, max_steps_per_call=STEPS_A_CALL
    )

    def adapted(retriever: retrieval.Retriever | None, weight: float) -> dict[str, Tensor]:
        found: dict[int, Any] = {}

        def once(memory: ExperienceBuffer, batch: Any) -> Any:
            number = int(batch["number"])
            if number not in found:
                assert retriever is not None
                found[number] = retriever(memory, batch)
            return found[number]

        adapter = Adapter(maml.model, cfg, None if retriever is None else buffer, weight, retriever=once)
        batch = {"states": support_x, "targets": support_y, "number": torch.arange(count)}
        params, out = None, {}
        for call in range(1, CALLS + 1):
            params, _ = adapter.adapt_many(F.mse_loss, batch, params, per_user=["number"])
            out[f"{call * STEPS_A_CALL} steps, weight {weight:g}"] = error(params)
        return out

    retrievers: dict[str, Callable[..., Any]] = {
        "uniform": retrieval.uniform(SIMILAR * POINTS),
        "retrieved": retrieval.best_fit(lambda buffer, tasks, batch: scores[int(batch["number"])], SIMILAR),
        "oracle": lambda buffer, batch: own[int(batch["number"])],
    }
    start = {name: p.detach().expand(count, *p.shape) for name, p in maml.parameters().items()}
    best = tasks[scores.argsort(dim=1, stable=True)[:, :SIMILAR]]
    with torch.no_grad():
        each = vmap(lambda p, x: functional_call(maml.model, p, (x,)))
        predicted = torch.stack([each(models.params(best[:, i]), query_x) for i in range(SIMILAR)]).mean(dim=0)
    variants = {
        "no adaptation": {"": error(start)},
        "plain": adapted(None, 0.0),
        "lookup only": {"": (predicted - query_y).square().mean(dim=(1, 2))},
    }
    for name, retriever in retrievers.items():
        variants[name] = {key: e for weight in WEIGHTS for key, e in adapted(retriever, weight).items()}
    return variants


def plain_error(maml: MetaMAML, data: Split) -> float:
    """Mean error after 10 steps on the support points alone."""
    start = {name: p.detach() for name, p in maml.parameters().items()}

    def error(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        return F.mse_loss(maml.call(maml.adapt_params(start, support_x, support_y, F.mse_loss, 10), query_x), query_y)

    return float(vmap(error)(*data).mean())


def run(setting: Setting, maml: MetaMAML, seed: int, iterations: int, tasks: int) -> dict[str, Any]:
    """The variants of one setting and seed on the test tasks, at what was best on the valid ones."""
    noise, past, _, amplitudes = setting
    clip = None if amplitudes == KNOWN else CLIP
    buffer = fill(noise, past, seed, iterations)
    models = AdaptedTaskModels(maml, buffer, F.mse_loss, MEMORY_STEPS, chunk_size=None)
    found = {}
    for split, n in (("valid", VALID_TASKS), ("test", tasks)):
        data, own = (make(setting, n, split, seed) for make in (draw, same_task))
        found[split] = errors(maml, models, buffer, data, own, clip)
    out = {}
    for variant, valid in found["valid"].items():
        chosen = min(valid, key=lambda key: float(valid[key].mean()))
        error = found["test"][variant][chosen].double()
        out[variant] = {"chosen": chosen, "mean": float(error.mean()), "variance": float(error.var())}
    return out


def summary(runs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Mean, half width of its 95 % interval and variance of each variant over the tasks of all seeds."""
    table = {}
    for variant in VARIANTS:
        means = torch.tensor([run[variant]["mean"] for run in runs.values()], dtype=torch.float64)
        within = torch.tensor([run[variant]["variance"] for run in runs.values()], dtype=torch.float64)
        variance = float(within.mean() + means.var(correction=0))
        half = half_width(math.sqrt(variance), TEST_TASKS * len(runs))
        table[variant] = {"mean": float(means.mean()), "half": half, "variance": variance}
    return table


def plot(settings: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = [settings[key((0.3, 1000, k, KNOWN))]["variants"] for k in SHOTS]
    for variant in VARIANTS:
        mean, half = ([row[variant][part] for row in rows] for part in ("mean", "half"))
        axes.errorbar(SHOTS, mean, half, marker="o", capsize=3, label=variant)
    title = "Noisy sinusoids, noise 0.3, memory of 1000 tasks"
    axes.set(xlabel="points of the new task", ylabel="mean squared error", xscale="log", yscale="log", title=title)
    axes.minorticks_off()
    axes.set_xticks(SHOTS, [str(k) for k in SHOTS])
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(RESULTS / "noisy_sinusoid.png", dpi=120)


def key(setting: Setting) -> str:
    noise, past, shots, amplitudes = setting
    beyond = "" if amplitudes == KNOWN else f", amplitudes {amplitudes[0]:g} to {amplitudes[1]:g}"
    return f"noise {noise:g}, {past} past tasks, K = {shots}{beyond}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(3))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    iterations, tasks = (3000, 100) if arguments.quick else (ITERATIONS, TEST_TASKS)
    path = RESULTS / "noisy_sinusoid.json"
    results: dict[str, Any] = {}
    if path.exists() and not arguments.quick:
        results = load(path)["settings"]
    for seed in arguments.seeds[:1] if arguments.quick else arguments.seeds:
        mamls: dict[tuple[float, int], MetaMAML] = {}
        for setting in SETTINGS[:1] if arguments.quick else SETTINGS:
            noise, _, shots, _ = setting
            if str(seed) in results.get(key(setting), {}).get("runs", {}):
                continue
            for support in {shots, 10}:
                if (noise, support) not in mamls:
                    distribution = SinusoidTasks(support, queries=10, noise=noise)
                    mamls[noise, support] = train(distribution, 5, seed, iterations)
            valid = draw(setting, VALID_TASKS, "valid", seed)
            maml = min((mamls[noise, support] for support in {shots, 10}), key=lambda m: plain_error(m, valid))
            runs = results.setdefault(key(setting), {}).setdefault("runs", {})
            runs[str(seed)] = run(setting, maml, seed, iterations, tasks)
            results[key(setting)]["variants"] = summary(runs)
            print(f"{key(setting)} ({len(runs)} seeds)")
            for variant, row in results[key(setting)]["variants"].items():
                chosen = runs[str(seed)][variant]["chosen"]
                print(
                    f"  {variant:<14}{row['mean']:>9.4f} +- {row['half']:.4f}{row['variance']:>10.4f}  {chosen}",
                    flush=True,
                )
            if not arguments.quick:
                save(path, {"machine": machine(), "settings": results})
    if not arguments.quick:
        plot(results)


if __name__ == "__main__":
    main()
