"""Remaining useful life of turbofan engines (C-MAPSS FD001): does adaptation to an engine's own past help?

    python -m benchmarks.experiments.remaining_life --data DIR [--seeds 5] [--variants ...] [--report] [--quick]

A Mamba SSM reads the 14 informative sensors of an engine, cycle by cycle. It predicts the remaining cycles, and the
next row of sensors. Labels above 125 are cut in training, and predictions are between 0 and 125. Each of the 100 test
engines gets one prediction, after its last row. RMSE and NASA's score are against labels cut at 125 and against labels
as they are. The label of a test engine is NaN in everything that a model receives.

All variants continue from the same plainly trained model, whose weights are averaged, for the same CPU time:

| variant | training | at test time |
|---|---|---|
| start | none: this model, with less CPU time | no update |
| frozen | plain: remaining life, and next sensors with a small weight | no update |
| plain + Adapter | the same model | a gradient step on each chunk's next-sensor loss |
| lookup only | the same model | mean label of the training steps with the nearest features |
| first order | StreamMAML through these updates, their gradients constant | the same step, with learned step sizes |
| second order | StreamMAML | the same |
| + experience | StreamMAML with StreamExperience | the step is also on labelled chunks of similar training engines |

The rows "no update" are the last three models without updates at test time. The inner loss of a chunk is that of its
next rows of sensors, the outer loss that of plain training. In meta-training an engine finds no chunks of itself.

Settings were chosen on 20 held-out training engines (``--split valid``), cut at every cycle from the 31st, which is the
mean over random cuts. Models of the results on test were trained on all 100 training engines.

A second measurement is the CPU time of an epoch of MetaMAML over the 100 engines, whose halves are support and query
set: one launch with a MaskedLoss against a launch for each length, as in version 0.1.

Published rows:

- FC-STGNN: Wang et al. 2023, arXiv 2309.05305; labels cut at 125. Its code keeps the checkpoint with the least test
  error.
- MTSTAN, MS-DCNN and AGCNN: table 4 of the benchmark of FFVE, github.com/LLerDagu/RUL-FFVE, without their caps.
- An earlier code base of this idea: its README, C-MAPSS FD001; labels cut at 125.
"""

import copy
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from benchmarks.experiments import turbofan
from benchmarks.experiments.runs import Line, Runs, Table, interval, paired, parser, show
from benchmarks.experiments.turbofan import CAP, HAS_NEXT, LABEL, NEXT, SENSORS, SHOWN, Batch, Engines
from eaml_ext import SSM, AdaptationConfig, Adapter, MetaMAML
from eaml_ext.meta import MaskedLoss, StreamExperience, StreamMAML
from eaml_ext.ops import knn

HIDDEN, LAYERS, CHUNK = 32, 2, 64
BATCH = 20  # engines of an update
WARM_SECONDS, SECONDS = 40.0, 15.0  # CPU time of the common start, and of each variant's training after it
WARM_LR, LR, WEIGHT_DECAY = 3e-3, 1e-3, 0.01
AVERAGED = 100  # updates over which weights are averaged
SENSOR_WEIGHT = 0.1  # of the next-sensor loss in plain training
LABEL_WEIGHT = 1.0  # of retrieved labels in the inner loss
STREAM_LR, STEP_SIZE_LR = 5e-4, 0.1
FAST = ["norms", "norm"]
INNER_LR = {"plain": 1.0, "first order": 0.3, "second order": 0.3, "experience": 0.1}
SLOTS, PAST, FOUND, TEMPERATURE = 400, 64, 4, 0.1  # of the memory; 64 chunks are in it in training, all at test time
NEIGHBOURS, STRIDE = 32, 4  # of the lookup; every fourth step of a training engine is in its memory
PUBLISHED = [  # method, RMSE, score
    ("an earlier code base", 21.80, 906.0),
    ("AGCNN", 12.42, 225.5),
    ("FC-STGNN", 11.62, math.nan),
    ("MS-DCNN", 11.44, 196.22),
    ("MTSTAN", 10.97, 175.36),
]
Shape = Callable[[float], float]


# --- losses ----------------------------------------------------------------------------------------------------------


def sensor_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of the next row of sensors, ``(n, time)``."""
    return (prediction[..., NEXT] - target[..., NEXT]).square().mean(-1) * target[..., HAS_NEXT]


def label_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of the remaining life, ``(n, time)``."""
    return (prediction[..., -1] - target[..., LABEL]).square()


def inner_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of the updates at test time, ``(n, time)``: next sensors, and labels where they are shown."""
    life = prediction[..., -1]
    label = torch.where(target[..., SHOWN] > 0, target[..., LABEL], life)
    return sensor_losses(prediction, target) + LABEL_WEIGHT * (life - label).square()


def plain_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of plain training, ``(n, time)``."""
    return label_losses(prediction, target) + SENSOR_WEIGHT * sensor_losses(prediction, target)


# --- training --------------------------------------------------------------------------------------------------------


def one_cycle(progress: float) -> float:
    """Rise in the first tenth, then fall along a cosine."""
    return min(10 * progress, falling((progress - 0.1) / 0.9))


def falling(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * max(progress, 0.0)))


def fit(
    step: Callable[[Tensor], Any],
    optimizer: torch.optim.Optimizer,
    engines: int,
    seconds: float,
    seed: int,
    shape: Shape,
) -> int:
    """Call ``step`` with the numbers of the engines of an update until the CPU time is spent; return the updates."""
    rates = [group["lr"] for group in optimizer.param_groups]
    generator, start, updates = torch.Generator().manual_seed(seed), time.process_time(), 0
    while True:
        for numbers in torch.randperm(engines, generator=generator).split(BATCH)[: engines // BATCH]:
            progress = (time.process_time() - start) / seconds
            if progress >= 1:
                return updates
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * shape(progress)
            step(numbers)
            updates += 1


def make_model() -> SSM:
    """Return a model from sensors and cycle to the next sensors and the remaining life, with new parameters."""
    return SSM(len(SENSORS) + 1, HIDDEN, len(SENSORS) + 1, num_layers=LAYERS, core="mamba")


def fit_plainly(model: SSM, fitted: Batch, lr: float, seconds: float, seed: int, shape: Shape, average: bool) -> int:
    """Train on whole engines, all steps at once; with ``average`` the result is the average of the latest weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    loss_fn = MaskedLoss(plain_losses)
    averaged = AveragedModel(model, avg_fn=lambda mean, new, n: mean + (new - mean) * max(1 / AVERAGED, 9 / (10 + n)))

    def step(numbers: Tensor) -> None:
        x, y, lengths = fitted.pick(numbers)
        mask = torch.arange(x.shape[1]) < lengths.unsqueeze(1)
        optimizer.zero_grad()
        loss_fn(model(x, lengths=lengths), y, mask).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)

    updates = fit(step, optimizer, len(fitted.lengths), seconds, seed, shape)
    if average:
        model.load_state_dict(averaged.module.state_dict())
    return updates


def make_stream(model: SSM, training: str) -> StreamMAML:
    """Return the training of a variant through its updates."""
    experience = None
    if training == "experience":
        encoder = nn.Linear(len(SENSORS) + 1, 8)
        # The stream's own chunks have no labels.
        experience = StreamExperience(encoder, SLOTS, FOUND, temperature=TEMPERATURE, own_chunks=False)
    return StreamMAML(
        model,
        INNER_LR[training],
        STREAM_LR,
        training == "first order",
        chunk_size=CHUNK,
        parameters=FAST,
        step_size_lr=STEP_SIZE_LR,
        optimizer=functools.partial(torch.optim.AdamW, weight_decay=WEIGHT_DECAY),
        experience=experience,
    )


def fit_stream(maml: StreamMAML, fitted: Batch, seconds: float, seed: int) -> int:
    """Train through the updates on whole engines; with experience, each has random chunks of others in its memory."""
    xs, ys, owners = turbofan.chunks(fitted, CHUNK)
    generator = torch.Generator().manual_seed(seed)

    def step(numbers: Tensor) -> None:
        x, y, lengths = fitted.pick(numbers)
        past = None
        if maml.experience is not None:
            others = (owners != numbers.unsqueeze(1)).float()
            chosen = torch.multinomial(others, min(PAST, int(others.sum(1).min())), generator=generator)
            past = xs[chosen], ys[chosen]
        outer = MaskedLoss(plain_losses)
        maml.meta_update(x, y, MaskedLoss(inner_losses), outer_loss_fn=outer, lengths=lengths, past=past)

    return fit(step, maml.optimizer, len(fitted.lengths), seconds, seed, falling)


# --- predictions -----------------------------------------------------------------------------------------------------


def cycles(prediction: Tensor) -> Tensor:
    """The remaining cycles of the model's output."""
    return (CAP * (prediction[..., -1] + 0.5)).clamp(0, CAP)


@torch.no_grad()
def frozen(model: SSM, scored: Batch) -> Tensor:
    """Remaining cycles at every step, ``(engines, time)``."""
    return cycles(model(scored.x, lengths=scored.lengths))


def adapted(model: SSM, scored: Batch, lr: float) -> Tensor:
    """The same by an Adapter along each engine, from the same weights."""
    cfg = AdaptationConfig(lr=lr, grad_clip_norm=None, trust_region_eps=None, ema_decay=None, max_steps_per_call=1)
    adapter = Adapter(copy.deepcopy(model), cfg, parameters=FAST)
    result = torch.zeros(scored.x.shape[:2])
    for i, length in enumerate(scored.lengths.tolist()):
        adapter.reset()
        parts = zip(scored.x[i, :length].split(CHUNK), scored.y[i, :length].split(CHUNK), strict=True)
        stream = ({"states": x.unsqueeze(0), "targets": y.unsqueeze(0)} for x, y in parts)
        outputs = [prediction for prediction, _ in adapter.adapt_stream(MaskedLoss(inner_losses), stream)]
        result[i, :length] = cycles(torch.cat(outputs, 1))[0]
    return result


def streamed(maml: StreamMAML, scored: Batch, fitted: Batch) -> Tensor:
    """Remaining cycles at every step by the updates of StreamMAML; the memory starts with all training engines."""
    pool, results = turbofan.chunks(fitted, CHUNK)[:2], []
    for numbers in torch.arange(len(scored.lengths)).split(25):  # the memory is copied for each engine
        x, y, lengths = (part[numbers] for part in scored)
        past = None if maml.experience is None else tuple(p.expand(len(numbers), *p.shape) for p in pool)
        results.append(cycles(maml.predict(x, y, MaskedLoss(inner_losses), lengths=lengths, past=past)))
    return torch.cat(results)


@torch.no_grad()
def looked_up(model: SSM, scored: Batch, fitted: Batch) -> Tensor:
    """Mean label of the training steps whose features, the input of the output layer, are nearest."""
    found: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda module, inputs, output: found.append(output))
    for one in (fitted, scored):
        model(one.x, lengths=one.lengths)
    handle.remove()
    steps = torch.arange(fitted.x.shape[1])
    stored = (steps < fitted.lengths.unsqueeze(1)) & (steps % STRIDE == 0)
    numbers = knn(found[1].flatten(0, 1).unsqueeze(0), found[0][stored].unsqueeze(0), NEIGHBOURS)[1][0]
    labels = fitted.y[..., LABEL][stored]
    return cycles(labels[numbers].mean(-1).unflatten(0, scored.x.shape[:2]).unsqueeze(-1))


# --- runs ------------------------------------------------------------------------------------------------------------


class Experiment:
    """The runs on one folder of data.

    Args:
        directory: folder of the files.
        seconds: CPU time of the common start, and of each training after it.
    """

    def __init__(self, directory: Path, seconds: tuple[float, float] = (WARM_SECONDS, SECONDS)):
        self.train, self.test = turbofan.read(directory)
        self.seconds = seconds
        self.start = functools.lru_cache(maxsize=1)(self._start)

    def engines(self, split: str, seed: int) -> tuple[Batch, Batch, Engines]:
        """Return the engines to fit, and those to predict: as a batch without labels, and with them."""
        fit_on, score_on = (self.train, self.test) if split == "test" else turbofan.split(self.train, seed)
        by = turbofan.scale(fit_on)
        return turbofan.batch(fit_on, by, labels=True), turbofan.batch(score_on, by, labels=False), score_on

    def _start(self, split: str, seed: int) -> tuple[SSM, int]:
        fitted, _, _ = self.engines(split, seed)
        torch.manual_seed(seed)
        model = make_model()
        updates = fit_plainly(model, fitted, WARM_LR, self.seconds[0], seed, one_cycle, average=True)
        return model, updates

    def run(self, training: str, split: str, seed: int) -> Line:
        """Train once, and score the variants that share the trained model."""
        fitted, scored, engines = self.engines(split, seed)
        model, warm_updates = self.start(split, seed)
        model, updates, details = copy.deepcopy(model), 0, {}
        if training == "start":
            predictions = {"start": frozen(model, scored)}
        elif training == "plain":
            updates = fit_plainly(model, fitted, LR, self.seconds[1], seed + 1, falling, average=False)
            predictions = {
                "frozen": frozen(model, scored),
                "plain + Adapter": adapted(model, scored, INNER_LR["plain"]),
                "lookup only": looked_up(model, scored, fitted),
            }
        else:
            maml = make_stream(model, training)
            updates = fit_stream(maml, fitted, self.seconds[1], seed + 1)
            names = TRAININGS[training]
            predictions = {names[0]: streamed(maml, scored, fitted), names[1]: frozen(model, scored)}
            details = {"step sizes": {name: round(float(size), 5) for name, size in maml.step_sizes.items()}}
        choose = turbofan.last_predictions if split == "test" else turbofan.truncated_predictions
        results = {variant: turbofan.scores(*choose(p, engines)) for variant, p in predictions.items()}
        return {"variants": results, "updates": [warm_updates, updates], **details}

    def epochs(self, rounds: int = 5) -> Line:
        """Median CPU seconds of an epoch of MetaMAML over all training engines, in meta-updates of all and of 25."""
        by = turbofan.scale(self.train)
        engines = [(sensors - by.mean) / by.std for sensors in self.train.sensors]
        halves = [(one[: len(one) // 2 + 1], one[len(one) // 2 :]) for one in engines]
        lists = [tuple([part] for half in pair for part in (half[:-1], half[1:])) for pair in halves]
        alone = [tuple(part[0].unsqueeze(0) for part in task) for task in lists]
        maml = MetaMAML(SSM(len(SENSORS), HIDDEN, len(SENSORS), num_layers=LAYERS, core="mamba"), 0.05, 1e-3)
        loss_fn = MaskedLoss(nn.MSELoss(reduction="none"))

        def seconds(tasks: list[Any], size: int) -> float:
            start = time.process_time()
            for first in range(0, len(tasks), size):
                maml.meta_update(tasks[first : first + size], loss_fn)
            return time.process_time() - start

        found: Line = {"lengths": len({len(one) for one in engines})}
        for size in (len(engines), 25):
            pairs = [(seconds(lists, size), seconds(alone, size)) for _ in range(rounds + 1)][1:]
            one, each = (sorted(times)[rounds // 2] for times in zip(*pairs, strict=True))
            found[f"meta-batch {size}"] = {"one launch": one, "launch per length": each, "ratio": each / one}
        return found


TRAININGS: dict[str, tuple[str, ...]] = {
    "start": ("start",),
    "plain": ("frozen", "plain + Adapter", "lookup only"),
    "first order": ("first order", "first order, no update"),
    "second order": ("second order", "second order, no update"),
    "experience": ("+ experience", "+ experience, no update"),
}
TRAINED = {variant: training for training, variants in TRAININGS.items() for variant in variants}


def tables(runs: Runs, split: str = "test") -> list[Table]:
    """Return means with 95 % intervals over seeds, differences in RMSE paired by seed, and published rows."""
    heads = ("rmse", "score", "rmse uncapped", "score uncapped")
    found: dict[str, list[dict[str, float]]] = {}
    for variant, training in TRAINED.items():
        lines = sorted(runs.find(split=split, training=training), key=lambda one: one["settings"]["seed"])
        found[variant] = [one["variants"][variant] for one in lines]
    rows: list[Sequence[str]] = []
    for variant, some in found.items():
        cells = [interval((row[head] for row in some), 2) for head in heads]
        for other in ("frozen", variant + ", no update"):
            pair = [[row["rmse"] for row in one] for one in (some, found.get(other, []))]
            difference = paired(*pair) if variant != other and len(pair[0]) == len(pair[1]) else {}
            cells.append(f"{difference['mean']:.3f} ± {difference['half']:.3f}" if difference else "")
        rows.append([variant, *cells])
    for name, error, score in PUBLISHED:
        rows.append([name, f"{error:.2f}", "" if math.isnan(score) else f"{score:.0f}", "", "", "", ""])
    result: list[Table] = [("", ["variant", *heads, "rmse, minus frozen", "minus no update"], rows)]
    for one in runs.find(measure="epoch"):
        timed = {name: value for name, value in one.items() if name.startswith("meta-batch")}
        cells = [
            [n, f"{v['one launch']:.2f}", f"{v['launch per length']:.2f}", f"{v['ratio']:.2f}x"]
            for n, v in timed.items()
        ]
        result.append(("An epoch of MetaMAML", ["CPU seconds", "one launch", "a launch per length", "ratio"], cells))
    return result


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--split", choices=("test", "valid"), help="valid: to choose settings; the default of --quick")
    arguments = flags.parse_args()
    split = arguments.split or ("valid" if arguments.quick else "test")
    runs = Runs("remaining_life", arguments.quick)
    if not arguments.report:
        experiment = Experiment(arguments.data, (3.0, 3.0) if arguments.quick else (WARM_SECONDS, SECONDS))
        runs.run(lambda measure: experiment.epochs(), measure="epoch")
        chosen = {TRAINED[variant] for variant in arguments.variants or TRAINED}
        for seed in range(1 if arguments.quick else arguments.seeds):
            for training in TRAININGS:
                if training in chosen:
                    runs.run(experiment.run, training=training, split=split, seed=seed)
    print(show(tables(runs, split)))


if __name__ == "__main__":
    main()
