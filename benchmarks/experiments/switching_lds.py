"""Switching regimes: does experience help when a regime returns?

    python -m benchmarks.experiments.switching_lds [--quick]

A linear system with a hidden rotation switches between three rotations (LDSTasks, modes=3), every 128 steps on average.
An SSM with the last four frames as input is trained to predict the next one, on switching runs of other systems. It is
then meta-trained (MetaMAML, second order) to predict after a few gradient steps on 32 to 128 steps of a regime.

At test time the model follows one long run, 4 steps at a time. It predicts, then adapts from the meta-trained
parameters. An ExperienceBuffer receives chunks of 32 steps with the parameters at the end of each. The regime is not
given. Errors are squared, in variances of an observation, in the 64 steps after a switch ("shock") and later
("steady"): means over unseen systems with 95 % intervals. Each variant has the settings that are best on other systems
(split valid), out of the same number of settings.

The prediction of a variant is the mean of the adapted model's and the one of the model before meta-training. Their
weights are the odds of their last errors, with a decay over some batches. All variants thus fall back on no adaptation.

| variant | adapts to |
|---|---|
| no adaptation | nothing; the model before meta-training, whose state adapts in context |
| plain | the last batch or, continuing from the last parameters, all batches |
| recent | also the last four chunks |
| uniform | also any four chunks |
| retrieved | also the four chunks whose parameters predict the last batch best |
| oracle | also the latest four chunks of the true regime |
| lookup-only | nothing; the parameters of the best chunk |

The baselines are persistence, an MLP on four frames, and the Kalman filter with the true regime. The spike rule is off,
because a loss that jumps is a switch here.
"""

import copy
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from benchmarks.common import RESULTS, flags, line_plot, write
from eaml_ext import SSM, AdaptationConfig, Adapter, ExperienceBuffer, MetaMAML
from eaml_ext._statistics import confidence_interval
from eaml_ext.experience import retrieval
from eaml_ext.tasks import LDSTasks, baselines

TASKS = LDSTasks(modes=3, stay=1 - 1 / 128)
FRAMES = 4  # that model and MLP see
LENGTH = 4  # steps of a batch
CHUNK = 8  # batches that make one past task of the memory
TAKEN = 4  # past tasks that make the experience of a batch
SHOCK = 64  # steps since the last switch
EXPERIENCED = ("recent", "uniform", "retrieved", "oracle")

INNER_LR, STEPS = 0.03, 5  # of the meta-training
LRS, WEIGHT = (0.03, 0.1), 8.0
FORGET = 0.7  # what counts of the batch before, in odds and in scores of chunks


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one variant."""

    lr: float
    anew: bool = True  # each batch is adapted to from the trained parameters, not from the last ones


@dataclasses.dataclass(frozen=True)
class Runs:
    """One run of each task: ``x`` (tasks, steps + FRAMES, obs_dim), the mode by which each step was reached."""

    tasks: list[Any]
    x: Tensor
    modes: Tensor

    @classmethod
    def draw(cls, tasks: int, steps: int, split: str, seed: int) -> "Runs":
        drawn = TASKS.sample(tasks, split, seed)
        x, modes = TASKS.simulate(drawn, 1, steps + FRAMES, seed)
        return cls(drawn, x[:, 0], modes[:, 0])

    @property
    def inputs(self) -> Tensor:
        """``(tasks, steps, FRAMES * obs_dim)``."""
        return self.x[:, :-1].unfold(1, FRAMES, 1).flatten(2)

    @property
    def targets(self) -> Tensor:
        return self.x[:, FRAMES:]

    def since(self) -> Tensor:
        """Steps since the last switch, ``(tasks, steps)``; those before the first one count from the start."""
        switched = F.pad(self.modes[:, 1:] != self.modes[:, :-1], (1, 0))
        now = torch.arange(self.x.shape[1])
        return (now - torch.where(switched, now, 0).cummax(1).values)[:, FRAMES:]

    def back(self) -> Tensor:
        """Whether a step's regime has been there before the last switch, ``(tasks, steps)``."""
        modes, since = self.modes[:, FRAMES:], self.since()
        switch = torch.arange(modes.shape[1]) - since  # where the present stretch began
        first = torch.stack([(modes == m).int().argmax(1) for m in range(TASKS.modes)], 1)
        return first.gather(1, modes) < switch


class Scan(nn.Module):
    """``model.scan`` as a call, for functional_call."""

    def __init__(self, model: SSM):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.scan(x, state)


def pretrained(seed: int, steps: int) -> SSM:
    """An SSM trained to predict switching runs of 512 systems of the split train."""
    torch.manual_seed(seed)
    model = SSM(FRAMES * TASKS.obs_dim, 32, TASKS.obs_dim)
    runs = Runs.draw(512, 256, "train", seed)
    inputs, targets = runs.inputs, runs.targets
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (16,))
        optimizer.zero_grad()
        F.mse_loss(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        schedule.step()
    return model


def meta_trained(model: SSM, seed: int, updates: int) -> SSM:
    """A copy of the model, meta-trained on stretches of a regime: 32 to 128 steps to adapt to, the next 64 to test."""
    torch.manual_seed(seed)
    one = LDSTasks()
    x = one.simulate(one.sample(1024, "train", seed), 1, FRAMES + 192, seed)[0][:, 0]
    inputs, targets = x[:, :-1].unfold(1, FRAMES, 1).flatten(2), x[:, FRAMES:]
    maml = MetaMAML(copy.deepcopy(model), INNER_LR, 3e-3, inner_steps=STEPS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(maml.optimizer, updates)
    for i in range(updates):
        rows, start = torch.randint(len(x), (16, 1)), 128 - (32, 64, 128)[i % 3]
        support, query = slice(start, 128), slice(128, None)
        tasks = [(inputs[r, support], targets[r, support], inputs[r, query], targets[r, query]) for r in rows]
        maml.meta_update(tasks, F.mse_loss)
        schedule.step()
    return maml.model


@dataclasses.dataclass(frozen=True)
class Models:
    trained: SSM
    adaptable: SSM
    error: float  # of the trained one, on switching runs of other systems


class Memory:
    """The past of each run: its batches in a buffer, and the parameters at the end of each chunk."""

    def __init__(self, runs: int):
        self.buffer = ExperienceBuffer(10**5, seed=0)
        self.runs = runs
        self.params: list[dict[str, Tensor]] = []  # by chunk, (runs, *shape)
        self.modes: list[Tensor] = []  # by chunk, (runs,)
        self.scores = torch.empty(runs, 0)

    def add(self, chunk: Mapping[str, Tensor], params: dict[str, Tensor], modes: Tensor) -> None:
        """A chunk of each run, the parameters it ended with, its modes ``(runs, steps)``: -1 where it has several."""
        task = torch.arange(self.runs) + self.runs * len(self.params)
        self.buffer.add(chunk["states"][:, 0], chunk["targets"][:, 0], task=task)
        self.params.append(params)
        self.modes.append(torch.where((modes == modes[:, :1]).all(1), modes[:, 0], -1))

    def score_params(self, model: SSM, batch: Mapping[str, Tensor]) -> None:
        """The loss on each run's last batches of the parameters of each of its chunks, older ones counting less."""

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return (functional_call(model, params, (x,)) - y).square().mean()

        if self.params:
            stacked = {name: torch.stack([p[name] for p in self.params], 1) for name in self.params[0]}
            with torch.no_grad():
                now = vmap(vmap(loss, (0, None, None)))(stacked, batch["states"], batch["targets"])
            old = now / (1 - FORGET)  # of a new chunk, as if it had always been so
            old[:, : self.scores.shape[1]] = self.scores
            self.scores = FORGET * old + now

    def score_modes(self, modes: Tensor) -> None:
        """The age of chunks of the true regime; inf for others."""
        if self.modes:
            age = torch.arange(len(self.modes), 0, -1.0)
            self.scores = torch.where(torch.stack(self.modes, 1) == modes.unsqueeze(1), age, torch.inf)

    def score(self, buffer: ExperienceBuffer, tasks: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """For ``retrieval.best_fit``: inf for other runs' chunks and the one that is not complete."""
        chunk = tasks // self.runs
        mine = (tasks % self.runs == batch["run"]) & (chunk < self.scores.shape[1])
        row = self.scores[int(batch["run"])]
        return torch.where(mine, row[chunk.clamp(max=len(row) - 1)] if len(row) else torch.inf, torch.inf)


def predictions(models: Models, runs: Runs, variant: str, settings: Settings) -> Tensor:
    """Predictions of all runs, ``(tasks, steps, obs_dim)``; each batch is predicted before the step on it."""
    model = models.adaptable
    inputs, targets, users = runs.inputs, runs.targets, len(runs.x)
    memory, everyone = Memory(users), torch.arange(users)
    best_fit = retrieval.best_fit(memory.score, TAKEN)

    def retriever(buffer: ExperienceBuffer, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        found = best_fit(buffer, batch)
        if found is None and memory.params:  # a regime not met before: the batch stands for its own experience
            found = {name: batch[name].repeat(1, CHUNK, 1) for name in ("states", "targets")}
        return found and {name: v[torch.arange(TAKEN) % len(v)] for name, v in found.items()}

    cfg = AdaptationConfig(settings.lr, 10.0, trust_region_eps=None, ema_decay=None, max_steps_per_call=STEPS)
    helped = variant in EXPERIENCED or variant == "lookup-only"
    adapter = Adapter(model, cfg, memory.buffer, WEIGHT if helped else 0.0, retriever=retriever)
    history = adapter.history(users)
    params = served = {name: p.detach().expand(users, *p.shape) for name, p in model.named_parameters()}
    scan = vmap(lambda p, x, h: functional_call(Scan(model), {f"model.{n}": v for n, v in p.items()}, (x, h)))
    hidden, predicted = torch.stack([model.init_hidden(1)] * users), []
    with torch.no_grad():
        plain = models.trained(inputs)
    trust = torch.zeros(users)  # log odds of the adapted model against the other
    generator = torch.Generator().manual_seed(0)
    for number in range(inputs.shape[1] // LENGTH):
        here = slice(number * LENGTH, (number + 1) * LENGTH)
        batch = {"states": inputs[:, None, here], "targets": targets[:, None, here], "run": everyone}
        with torch.no_grad():
            y, after = scan(served, batch["states"], hidden)
        share = trust.sigmoid().view(-1, 1, 1)
        predicted.append(share * y[:, 0] + (1 - share) * plain[:, here])
        errors = [(x - targets[:, here]).square().sum((1, 2)) for x in (plain[:, here], y[:, 0])]
        trust = FORGET * trust + (errors[0] - errors[1]) / (2 * models.error)
        mode = runs.modes[:, FRAMES + here.stop - 1]
        if variant == "uniform":
            memory.scores = torch.rand(users, len(memory.params), generator=generator)
        elif variant == "recent":
            memory.scores = torch.arange(len(memory.params), 0, -1.0).repeat(users, 1)
        elif variant == "oracle":
            memory.score_modes(mode)
        elif variant != "plain":
            memory.score_params(model, batch)
        start = None if settings.anew else params
        params, _ = adapter.adapt_many(F.mse_loss, {**batch, "hidden_state": hidden}, start, history, per_user="run")
        hidden, served = after, params
        if number % CHUNK == CHUNK - 1:
            past = slice(here.stop - CHUNK * LENGTH, here.stop)
            chunk = {"states": inputs[:, None, past], "targets": targets[:, None, past]}
            memory.add(chunk, params, runs.modes[:, FRAMES + past.start : FRAMES + past.stop])
        if variant == "lookup-only" and memory.scores.shape[1]:
            best = memory.scores.argmin(1)
            served = {name: torch.stack([p[name] for p in memory.params], 1)[everyone, best] for name in params}
    return torch.cat(predicted, 1)


# ------------------------------------------------------------------------------------------------------------- figures


def windows(runs: Runs, y: Tensor) -> dict[str, Tensor]:
    """The error of each run, ``(tasks,)``, by part of it; NaN where a run has no such part."""
    errors, since = (y - runs.targets).square().mean(-1), runs.since()
    met = torch.arange(since.shape[1]) >= since + 1  # after the first switch
    shock = (since < SHOCK) & met
    parts = {
        "whole": torch.ones_like(met),
        "shock": shock,
        "steady": since >= SHOCK,
        "back": shock & runs.back(),
    }
    return {name: torch.where(part, errors, 0).sum(1) / part.sum(1) for name, part in parts.items()}


def after_a_switch(runs: Runs, y: Tensor, until: int = 128) -> list[float]:
    """Mean error by steps since the last switch, in bins of a batch."""
    errors, since = (y - runs.targets).square().mean(-1), runs.since()
    met = torch.arange(since.shape[1]) >= since + 1
    return [float(errors[met & (since // LENGTH == b)].mean()) for b in range(until // LENGTH)]


def tune(models: Models, runs: Runs, variant: str) -> Settings:
    """The settings with the least error over whole runs."""
    grid = [Settings(lr, anew) for lr in LRS for anew in (True, False)]
    found = [float((predictions(models, runs, variant, one) - runs.targets).square().mean()) for one in grid]
    return grid[found.index(min(found))]


def references(runs: Runs, model: SSM) -> dict[str, Tensor]:
    """Predictions that need no Adapter."""
    train = TASKS.simulate(TASKS.sample(512), 1, 256 + FRAMES)[0]
    with torch.no_grad():
        kalman = TASKS.kalman(runs.tasks, runs.x.unsqueeze(1), runs.modes.unsqueeze(1))[0][:, 0]
        return {
            "persistence": runs.x[:, FRAMES - 1 : -1],
            "MLP on 4 frames": baselines.fit_mlp(train, FRAMES)(runs.x),
            "no adaptation (in-context only)": model(runs.inputs),
            "Kalman, told the regime": kalman[:, FRAMES - 1 :].to(runs.x),
        }


def plot(curves: dict[str, list[float]]) -> None:
    styles = {name: "k:" if name.startswith("Kalman") else "-" for name in curves if name != "persistence"}
    x = [LENGTH * (batch + 0.5) for batch in range(len(next(iter(curves.values()))))]
    lines = {name: (x, curves[name], style) for name, style in styles.items()}
    line_plot(RESULTS / "switching_lds.png", lines, xlabel="steps since the regime switched", ylabel="squared error")


def main() -> None:
    quick = flags(__doc__).quick
    start = time.perf_counter()
    model = pretrained(0, 200 if quick else 400)
    valid = Runs.draw(8, 256 if quick else 512, "valid", 0)
    test = Runs.draw(16 if quick else 256, 512 if quick else 1536, "test", 0)
    predicted, chosen = references(test, model), {}
    with torch.no_grad():
        error = float((model(valid.inputs) - valid.targets).square().mean())
    models = Models(model, meta_trained(model, 0, 100 if quick else 300), error)
    print(f"trained: {time.perf_counter() - start:.0f} s", flush=True)
    for variant in ("plain", "recent", "uniform", "retrieved", "lookup-only", "oracle"):
        settings = Settings(LRS[0]) if quick else tune(models, valid, variant)
        chosen[variant] = dataclasses.asdict(settings)
        predicted[variant] = predictions(models, test, variant, settings)
        print(f"{variant}: {chosen[variant]}, {time.perf_counter() - start:.0f} s", flush=True)
    parts = {name: windows(test, y) for name, y in predicted.items()}
    table = {name: {part: confidence_interval(v.tolist()) for part, v in row.items()} for name, row in parts.items()}
    paired = {  # by system, what retrieval takes off the other's error
        name: {part: confidence_interval((row[part] - parts["retrieved"][part]).tolist()) for part in row}
        for name, row in parts.items()
    }
    print("| variant | shock | of a regime met before | steady | whole run | shock: variant - retrieved, paired |")
    for name, row in table.items():
        cells = [*(row[part] for part in ("shock", "back", "steady", "whole")), paired[name]["shock"]]
        print(f"| {name} | " + " | ".join(f"{c['mean']:.4f} +- {c['half']:.4f}" for c in cells) + " |")
    if not quick:
        curves = {name: after_a_switch(test, y) for name, y in predicted.items()}
        plot(curves)
        results = {
            "tasks": TASKS.name,
            "settings": chosen,
            "errors": table,
            "minus retrieved": paired,
            "curves": curves,
        }
        print(write("switching_lds", results, timed=False))


if __name__ == "__main__":
    main()
