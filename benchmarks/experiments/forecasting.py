"""Forecasting ETTh1, ETTh2 and Exchange, 96 values -> 96 values: compare adaptation along the test stream.

    python -m benchmarks.experiments.forecasting --data DIR [--datasets ETTh1 ...] [--variants frozen ...] [--report]

All models are CycleLinear, one linear map for all channels around a learned cycle; W starts at ridge regression. Every
window of the test part counts, at stride 1, in values standardised by the training part: MSE and MAE.

| variant | input | training and test time |
|---|---|---|
| frozen | 96 values | plain training, no update |
| frozen, 336 values | 336 values | plain training, no update |
| plain + Adapter | 96 values, and the past through its updates | plain training, updates at test time |
| plain + Adapter, 336 values | 336 values, and the past through its updates | the same |
| first order | 96 values, and the past through its updates | StreamMAML with first_order |
| second order | the same | StreamMAML |
| second order, 336 values | 336 values, and the past through its updates | StreamMAML |
| + experience | 96 values, and the past through its updates | StreamMAML with StreamExperience |
| lookup only | all of the past | the mean of what followed the most similar windows of the past |
| last value | 1 value | none: the last value again |
| bound | the test part | ridge regression on the test windows: of fixed linear maps without a cycle |

An update is made every 96 origins, on the 96 origins before, so that each of its targets lies at or before the next
origin. The stream of a split begins 1,344 steps before it. StreamMAML follows plain training for 30 % of the seconds.
All variants are trained for equal CPU seconds. Each has three trials (TRIALS, on seed 0) and equally many checkpoints,
and keeps those of least validation MSE. The test part has no influence on any choice. Runs stop by CPU time, so
another machine gives other figures.

DLinear, PatchTST and iTransformer are published for ETT's split of 12, 4 and 4 months. TAFAS and PETSA take 60, 20 and
20 % of all rows of ETT. Both splits are run. Sources of the published rows: forecasting_data.PUBLISHED.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.experiments import runs
from benchmarks.experiments.forecasting_data import DATASETS, HORIZON, PUBLISHED, Series, read, windows
from benchmarks.experiments.forecasting_model import CycleLinear, lookup, ridge
from eaml_ext import AdaptationConfig, Adapter, ExperienceBuffer
from eaml_ext.meta import StreamExperience, StreamMAML

CHUNK = 96  # origins between two updates
DELAY = 1  # chunks until all targets of a chunk lie at or before the next origin
WARMUP = 14 * CHUNK  # origins before a split with which its stream begins
STRIDE = 8  # of the origins in training: neighbouring windows are almost equal
STREAMS, LENGTH = 4, 8 * CHUNK  # of a training batch
PAST, SLOTS, NEIGHBOURS = 16, 64, 2  # chunks in the memory at the start of a stream and at most; found by a search
FAST = ["weight", "cycle", "shift", "gain"]
SECONDS, CHECKPOINTS = 4.0, 5  # of a training, CPU
PLAIN_SHARE = 0.3  # of a meta-training: the seconds for which the model is trained without updates first
OUTER_RATE = 3e-3  # of meta-training, and of the plain training before it
TRIALS = {
    "frozen": (3e-4, 1e-3, 3e-3),  # rate of the optimizer
    "adapted": (0.03, 0.1, 0.3),  # step size of the Adapter; where the step sizes of StreamMAML start
    "lookup only": (16, 32, 64),  # windows of the past
}
SGD = AdaptationConfig(grad_clip_norm=None, trust_region_eps=None, ema_decay=None, max_steps_per_call=1)
TRAINED = ("frozen", "plain + Adapter", "first order", "second order")
LONGER = ("frozen, 336 values", "plain + Adapter, 336 values", "second order, 336 values")
VARIANTS: dict[str, tuple[str, ...]] = {
    "ETTh1": (*TRAINED, "+ experience", "lookup only", *LONGER, "bound"),
    "ETTh2": (*TRAINED, *LONGER),
    "Exchange": (*TRAINED, *LONGER, "last value"),
    "ETTh1 60/20/20": ("frozen", "plain + Adapter", "second order", *LONGER),
    "ETTh2 60/20/20": ("frozen", "plain + Adapter", "second order", *LONGER),
}


class WindowEncoder(nn.Module):
    """Embed windows ``(n, time, 1 + look_back, channels)`` by their last day, ``(n, time, dim)``."""

    def __init__(self, channels: int, steps: int = 24, dim: int = 16):
        super().__init__()
        self.steps = steps
        self.proj = nn.Linear(steps * channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.proj(x[..., -self.steps :, :].flatten(-2))
        return result


class Forecaster(NamedTuple):
    """A trained model and how it adapts at test time; without ``step_sizes`` it does not."""

    model: nn.Module
    step_sizes: dict[str, Any] | None = None
    experience: StreamExperience | None = None


def forecast(forecaster: Forecaster, series: Series, split: str, look_back: int) -> Tensor:
    """Forecast every window of a split, ``(origins, HORIZON, channels)``, with updates along the way."""
    first, last = series.targets(split)
    if forecaster.step_sizes is None:
        with torch.no_grad():
            result: Tensor = forecaster.model(windows(series, first - 1, last - HORIZON, look_back)[0])
        return result
    warmup = min(WARMUP, (first - look_back) // CHUNK * CHUNK)
    x, y = windows(series, first - 1 - warmup, last - HORIZON, look_back)
    model, experience, options = copy.deepcopy(forecaster.model), forecaster.experience, {}
    if experience is not None:
        buffer = ExperienceBuffer(SLOTS)
        experience.fill(buffer, *past_chunks(series, first - 1 - warmup, look_back, 1))
        options = {
            "experience_buffer": buffer,
            "experience_weight": float(experience.weight.detach()),
            "retriever": experience,
        }
    adapter = Adapter(model, SGD, step_sizes=forecaster.step_sizes, **options)
    chunks = zip(x[None].split(CHUNK, 1), y[None].split(CHUNK, 1), strict=True)
    stream = adapter.adapt_stream(mse_loss, ({"states": a, "targets": b} for a, b in chunks), label_delay=DELAY)
    return torch.cat([prediction[0] for prediction, _ in stream])[warmup:]


def past_chunks(series: Series, origin: int, look_back: int, stride: int) -> tuple[Tensor, Tensor]:
    """Return the last PAST chunks whose targets all lie at or before ``origin``, ``(PAST, CHUNK / stride, ...)``."""
    x, y = windows(series, origin - HORIZON + 1 - PAST * CHUNK, origin - HORIZON + 1, look_back)
    count = CHUNK // stride
    return x[::stride].unflatten(0, (PAST, count)), y[::stride].unflatten(0, (PAST, count))


def errors(prediction: Tensor, series: Series, split: str) -> dict[str, float]:
    """MSE and MAE over all windows of a split."""
    first, last = series.targets(split)
    residual = prediction - windows(series, first - 1, last - HORIZON, 1)[1]
    return {"mse": round(float(residual.square().mean()), 5), "mae": round(float(residual.abs().mean()), 5)}


def train(
    update: Callable[[], Any],
    current: Callable[[], Forecaster],
    optimizer: torch.optim.Optimizer,
    series: Series,
    look_back: int,
    seconds: float,
) -> Forecaster:
    """Update for ``seconds`` of CPU time, at rates that fall to 0; return the checkpoint of least validation MSE."""
    spent, best, least = 0.0, current(), float("inf")
    rates = [group["lr"] for group in optimizer.param_groups]
    for checkpoint in range(CHECKPOINTS + 1):
        while spent < checkpoint * seconds / CHECKPOINTS:
            start = time.process_time()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - spent / seconds)
            update()
            spent += time.process_time() - start
        value = errors(forecast(current(), series, "valid", look_back), series, "valid")["mse"]
        if value < least:
            best, least = copy.deepcopy(current()), value
    return best


class Batches:
    """Draw training streams: windows of LENGTH origins at stride STRIDE, with a random start."""

    def __init__(self, series: Series, look_back: int, seed: int):
        self.series, self.look_back = series, look_back
        self.last = series.borders[0] - HORIZON
        self.first = look_back - 1
        self.x, self.y = windows(series, self.first, self.last, look_back)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, margin: int = 0) -> tuple[Tensor, Tensor, list[int]]:
        """Return ``(STREAMS, LENGTH / STRIDE, ...)`` and the origins at which the streams start."""
        length = min(LENGTH, (len(self.x) - margin) // CHUNK * CHUNK)
        starts = torch.randint(margin, len(self.x) - length + 1, (STREAMS,), generator=self.generator).tolist()
        x, y = (torch.stack([v[i : i + length : STRIDE] for i in starts]) for v in (self.x, self.y))
        return x, y, [i + self.first for i in starts]


@functools.lru_cache(maxsize=8)
def plain(directory: Path, dataset: str, look_back: int, seed: int, rate: float, seconds: float) -> Forecaster:
    """Train a model without updates along the stream."""
    series = read(directory, dataset)
    batches = Batches(series, look_back, seed)
    model = CycleLinear(ridge(series, look_back), series.values.shape[1], series.period)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)

    def update() -> None:
        x, y, _ = batches.draw()
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return train(update, lambda: Forecaster(model), optimizer, series, look_back, seconds)


def meta_trained(
    directory: Path,
    dataset: str,
    look_back: int,
    seed: int,
    rate: float,
    seconds: float,
    *,
    first_order: bool = False,
    with_experience: bool = False,
) -> Forecaster:
    """Train a model through its updates, after a share of plain training."""
    series = read(directory, dataset)
    channels = series.values.shape[1]
    start = plain(directory, dataset, look_back, seed, OUTER_RATE, PLAIN_SHARE * seconds)
    batches = Batches(series, look_back, seed)
    torch.manual_seed(seed)
    experience = None
    if with_experience:
        experience = StreamExperience(WindowEncoder(channels), SLOTS, NEIGHBOURS, weight=0.3)
    maml = StreamMAML(
        copy.deepcopy(start.model),
        inner_lr=rate,
        outer_lr=OUTER_RATE,
        first_order=first_order,
        chunk_size=CHUNK // STRIDE,
        parameters=FAST,
        label_delay=DELAY,
        step_size_lr=0.05,
        experience=experience,
    )

    rest = (1 - PLAIN_SHARE) * seconds

    def update() -> None:
        margin = (PAST + 1) * CHUNK if experience is not None else 0
        x, y, origins = batches.draw(margin)
        past = None
        if experience is not None:
            chunks = [past_chunks(series, origin, look_back, STRIDE) for origin in origins]
            past = torch.stack([c[0] for c in chunks]), torch.stack([c[1] for c in chunks])
        maml.meta_update(x, y, mse_loss, past=past)

    def current() -> Forecaster:
        return Forecaster(maml.model, maml.step_sizes, experience)

    return train(update, current, maml.optimizer, series, look_back, rest)


def run(
    directory: Path, dataset: str, variant: str, seed: int, trial: int, seconds: float, plain_rate: float | None = None
) -> runs.Line:
    """Train and measure a variant; ``trial`` counts its rates."""
    series, look_back = read(directory, dataset), 336 if "336" in variant else HORIZON
    if variant == "lookup only":
        made = {s: lookup(series, s, look_back, TRIALS[variant][trial], CHUNK) for s in ("valid", "test")}
        return {split: errors(prediction, series, split) for split, prediction in made.items()}
    if variant == "last value":
        model = CycleLinear(torch.zeros(look_back, HORIZON), series.values.shape[1], series.period)
        return {s: errors(forecast(Forecaster(model), series, s, look_back), series, s) for s in ("valid", "test")}
    if variant == "bound":
        model = CycleLinear(ridge(series, look_back, "test"), series.values.shape[1], series.period)
        return {"test": errors(forecast(Forecaster(model), series, "test", look_back), series, "test")}
    if variant.startswith("frozen"):
        forecaster = plain(directory, dataset, look_back, seed, TRIALS["frozen"][trial], seconds)
    elif variant.startswith("plain + Adapter"):
        assert plain_rate is not None
        forecaster = plain(directory, dataset, look_back, seed, plain_rate, seconds)
        forecaster = forecaster._replace(step_sizes=dict.fromkeys(FAST, TRIALS["adapted"][trial]))
    else:
        options = {"first_order": variant == "first order", "with_experience": variant == "+ experience"}
        forecaster = meta_trained(directory, dataset, look_back, seed, TRIALS["adapted"][trial], seconds, **options)
    line: runs.Line = {s: errors(forecast(forecaster, series, s, look_back), series, s) for s in ("valid", "test")}
    if forecaster.step_sizes is not None:
        line["step_sizes"] = {name: round(float(size), 4) for name, size in forecaster.step_sizes.items()}
    return line


def chosen_trial(lines: list[runs.Line]) -> int:
    """Return the trial of seed 0 with the least validation MSE."""
    first = [one for one in lines if one["settings"]["seed"] == 0]
    return int(min(first, key=lambda one: one["valid"]["mse"])["settings"]["trial"])


def measure(store: runs.Runs, directory: Path, dataset: str, variant: str, seeds: int, seconds: float) -> None:
    """Run all trials of a variant for seed 0, and the best one for all seeds."""
    settings: dict[str, Any] = {"dataset": dataset, "variant": variant, "seconds": seconds}
    if variant.startswith("plain + Adapter"):
        trained = store.find(dataset=dataset, variant=variant.replace("plain + Adapter", "frozen"), seconds=seconds)
        settings["plain_rate"] = TRIALS["frozen"][chosen_trial(trained)]
    function = functools.partial(run, directory)
    if variant in ("bound", "last value"):
        store.run(function, **settings, seed=0, trial=0)
        return
    for trial in range(3):
        store.run(function, **settings, seed=0, trial=trial)
    trial = chosen_trial(store.find(**settings))
    for seed in range(1, 1 if variant == "lookup only" else seeds):
        store.run(function, **settings, seed=seed, trial=trial)


def tables(store: runs.Runs) -> list[runs.Table]:
    """Return a table for each data set; the variant chosen on validation is marked."""
    result: list[runs.Table] = []
    for dataset in DATASETS:
        lines = {variant: store.find(dataset=dataset, variant=variant) for variant in VARIANTS[dataset]}
        found: dict[str, list[runs.Line]] = {}
        for variant, some in lines.items():
            if some:
                trial = 0 if variant == "bound" else chosen_trial(some)
                found[variant] = [one for one in some if one["settings"]["trial"] == trial]
        if not found:
            continue
        valid = {v: sum(one["valid"]["mse"] for one in f) / len(f) for v, f in found.items() if v != "bound"}
        best, second = min(valid, key=valid.__getitem__), found.get("second order", [])
        rows: list[Sequence[str]] = []
        for variant, some in found.items():
            cells = [
                runs.interval(one["test"][m] for one in some) if len(some) > 1 else f"{some[0]['test'][m]:.4f}"
                for m in ("mse", "mae")
            ]
            if len(some) == len(second) > 1 and variant != "second order":
                difference = runs.paired([one["test"]["mse"] for one in second], [one["test"]["mse"] for one in some])
                cells.append(f"{difference['mean']:.4f} ± {difference['half']:.4f}")
            mark = " (chosen)" if variant == best else ""
            rows.append([variant + mark, f"{valid[variant]:.4f}" if variant in valid else "", *cells])
        for name, (value, absolute, source) in PUBLISHED[dataset].items():
            rows.append([f"{name} (arXiv {source})", "", f"{value:g}", "" if absolute is None else f"{absolute:g}"])
        head = ["variant", "validation MSE", "test MSE", "test MAE", "second order, minus this one"]
        result.append((dataset, head, [[*row, *[""] * (5 - len(row))] for row in rows]))
    return result


def main() -> None:
    """Run or report."""
    flags = runs.parser(__doc__)
    flags.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    args: argparse.Namespace = flags.parse_args()
    store = runs.Runs("forecasting", args.quick)
    if not args.report:
        for dataset in args.datasets[:1] if args.quick else args.datasets:
            for variant in args.variants or VARIANTS[dataset]:
                seeds, seconds = (1, 1.0) if args.quick else (args.seeds, SECONDS)
                measure(store, args.data, dataset, variant, seeds, seconds)
    print(runs.show(tables(store)))


if __name__ == "__main__":
    main()
