"""Does the memory of regimes help when one of them returns? python -m benchmarks.experiments.switching_lds [--quick]

A linear system with a hidden rotation switches between three rotations of its own (LDSTasks, modes=3), every 128 steps
on average. An SSM that sees the last four frames, trained on runs of other such systems, predicts the next frame along
one long run, 8 steps at a time: first it predicts, then it adapts. What it has met goes to an ExperienceBuffer in
chunks of 32 steps, with the parameters at the end of each; nobody tells it the regime. Errors are squared, in variances
of an observation, in the 64 steps after a switch ("shock") and later ("steady"): means over unseen systems with 95 %
intervals. Each arm has the settings that did best on other systems (split valid), of equally many tried for each.

Arms: no adaptation (the state adapts: in-context only); plain adaptation; with experience: uniform, retrieved (the
chunk whose parameters predict the last batch best), oracle (the latest chunk of the true regime); lookup-only (the
parameters of the best chunk, those of plain adaptation, as they are). Beside them: persistence, an MLP on four frames,
the Kalman filter that is told the regime. The spike rule is off: here a loss that jumps is a switch.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from benchmarks.common import RESULTS, flags, interval, write
from eaml_ext import SSM, AdaptationConfig, Adapter, ExperienceBuffer
from eaml_ext.experience import retrieval
from eaml_ext.tasks import LDSTasks, bounds

TASKS = LDSTasks(modes=3, stay=1 - 1 / 128)
FRAMES = 4  # that model and MLP see
LENGTH = 8  # steps of a batch
CHUNK = 4  # batches that make one past task of the memory
SHOCK = 64  # steps since the last switch
EXPERIENCED = ("uniform", "retrieved", "oracle")

LRS, WEIGHT, STEPS = (0.01, 0.03), 4.0, 2  # steps per batch


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one arm."""

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


class Memory:
    """What all runs have met, each its own: batches in a buffer, parameters at the end of each chunk."""

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
        """The loss on each run's batch of the parameters of each of its chunks."""

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return (functional_call(model, params, (x,)) - y).square().mean()

        if self.params:
            stacked = {name: torch.stack([p[name] for p in self.params], 1) for name in self.params[0]}
            with torch.no_grad():
                self.scores = vmap(vmap(loss, (0, None, None)))(stacked, batch["states"], batch["targets"])

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


def predictions(model: SSM, runs: Runs, arm: str, settings: Settings) -> Tensor:
    """Of all runs side by side, ``(tasks, steps, obs_dim)``, each batch predicted before it is learned from."""
    inputs, targets, users = runs.inputs, runs.targets, len(runs.x)
    memory, everyone = Memory(users), torch.arange(users)
    best_fit = retrieval.best_fit(memory.score, 1)

    def retriever(buffer: ExperienceBuffer, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        found = best_fit(buffer, batch)
        if found is None and memory.params:  # a regime not met before: the batch stands for its own experience
            found = {name: batch[name].repeat(1, CHUNK, 1) for name in ("states", "targets")}
        return found

    cfg = AdaptationConfig(lr=settings.lr, ema_decay=None, max_steps_per_call=STEPS)  # spikes are switches here
    adapter = Adapter(model, cfg, memory.buffer, WEIGHT if arm in EXPERIENCED else 0.0, retriever=retriever)
    history = adapter.history(users)
    params = served = {name: p.detach().expand(users, *p.shape) for name, p in model.named_parameters()}
    scan = vmap(lambda p, x, h: functional_call(Scan(model), {f"model.{n}": v for n, v in p.items()}, (x, h)))
    hidden, said = torch.stack([model.init_hidden(1)] * users), []
    generator = torch.Generator().manual_seed(0)
    for number in range(inputs.shape[1] // LENGTH):
        here = slice(number * LENGTH, (number + 1) * LENGTH)
        batch = {"states": inputs[:, None, here], "targets": targets[:, None, here], "run": everyone}
        with torch.no_grad():
            y, after = scan(served, batch["states"], hidden)
        said.append(y[:, 0])
        mode = runs.modes[:, FRAMES + here.stop - 1]
        if arm == "uniform":
            memory.scores = torch.rand(users, len(memory.params), generator=generator)
        elif arm == "oracle":
            memory.score_modes(mode)
        elif arm != "plain":
            memory.score_params(model, batch)
        start = None if settings.anew else params
        params, _ = adapter.adapt_many(F.mse_loss, {**batch, "hidden_state": hidden}, start, history)
        hidden, served = after, params
        if number % CHUNK == CHUNK - 1:
            past = slice(here.stop - CHUNK * LENGTH, here.stop)
            chunk = {"states": inputs[:, None, past], "targets": targets[:, None, past]}
            memory.add(chunk, params, runs.modes[:, FRAMES + past.start : FRAMES + past.stop])
        if arm == "lookup-only" and memory.scores.shape[1]:
            best = memory.scores.argmin(1)
            served = {name: torch.stack([p[name] for p in memory.params], 1)[everyone, best] for name in params}
    return torch.cat(said, 1)


# ------------------------------------------------------------------------------------------------------------- figures


def windows(runs: Runs, y: Tensor) -> dict[str, Tensor]:
    """The error of each run, ``(tasks,)``, by part of it; NaN where a run has no such part."""
    errors, since = (y - runs.targets).square().mean(-1), runs.since()
    met = torch.arange(since.shape[1]) >= since + 1  # after the first switch
    parts = {"whole": torch.ones_like(met), "shock": (since < SHOCK) & met, "steady": since >= SHOCK}
    return {name: torch.where(part, errors, 0).sum(1) / part.sum(1) for name, part in parts.items()}


def after_a_switch(runs: Runs, y: Tensor, until: int = 128) -> list[float]:
    """Mean error by steps since the last switch, in bins of a batch."""
    errors, since = (y - runs.targets).square().mean(-1), runs.since()
    met = torch.arange(since.shape[1]) >= since + 1
    return [float(errors[met & (since // LENGTH == b)].mean()) for b in range(until // LENGTH)]


def tune(model: SSM, runs: Runs, arm: str) -> Settings:
    """The settings with the least error over whole runs."""
    grid = [Settings(lr, anew) for lr in LRS for anew in (True, False)]
    found = [float((predictions(model, runs, arm, one) - runs.targets).square().mean()) for one in grid]
    return grid[found.index(min(found))]


def references(runs: Runs, model: SSM) -> dict[str, Tensor]:
    """Predictions that need no Adapter."""
    train = TASKS.simulate(TASKS.sample(512), 1, 256 + FRAMES)[0]
    with torch.no_grad():
        kalman = TASKS.kalman(runs.tasks, runs.x.unsqueeze(1), runs.modes.unsqueeze(1))[0][:, 0]
        return {
            "persistence": runs.x[:, FRAMES - 1 : -1],
            "MLP on 4 frames": bounds.fit_mlp(train, FRAMES)(runs.x),
            "no adaptation (in-context only)": model(runs.inputs),
            "Kalman, told the regime": kalman[:, FRAMES - 1 :].to(runs.x),
        }


def plot(curves: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, curve in curves.items():
        if name != "persistence":
            style = "k:" if name.startswith("Kalman") else "-"
            axes.plot([LENGTH * (b + 0.5) for b in range(len(curve))], curve, style, label=name)
    axes.set(xlabel="steps since the regime switched", ylabel="squared error", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(RESULTS / "switching_lds.png", dpi=150, bbox_inches="tight")


def main() -> None:
    quick = flags(__doc__).quick
    start = time.perf_counter()
    model = pretrained(0, 50 if quick else 400)
    valid = Runs.draw(8, 256 if quick else 384, "valid", 0)
    test = Runs.draw(8 if quick else 32, 256 if quick else 768, "test", 0)
    said, chosen = references(test, model), {}
    print(f"trained: {time.perf_counter() - start:.0f} s", flush=True)
    for arm in ("plain", "uniform", "retrieved", "lookup-only", "oracle"):
        settings = Settings(LRS[0]) if quick else tune(model, valid, arm)
        chosen[arm] = dataclasses.asdict(settings)
        said[arm] = predictions(model, test, arm, settings)
        print(f"{arm}: {chosen[arm]}, {time.perf_counter() - start:.0f} s", flush=True)
    parts = {name: windows(test, y) for name, y in said.items()}
    table = {name: {part: interval(v) for part, v in row.items()} for name, row in parts.items()}
    paired = {  # by system, what retrieval takes off the other's error
        name: {part: interval(row[part] - parts["retrieved"][part]) for part in row} for name, row in parts.items()
    }
    print("| arm | shock | steady | whole run | shock: arm - retrieved, paired |")
    for name, row in table.items():
        cells = [*(row[part] for part in ("shock", "steady", "whole")), paired[name]["shock"]]
        print(f"| {name} | " + " | ".join(f"{c['mean']:.4f} +- {c['half']:.4f}" for c in cells) + " |")
    if not quick:
        curves = {name: after_a_switch(test, y) for name, y in said.items()}
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
