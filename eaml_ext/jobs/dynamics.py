"""The main job: an SSM learns the dynamics of many tasks by MAML, then adapts to unseen ones with retrieved experience.

The model predicts the next observation from the observations and actions of an episode so far. Every transition met in
meta-training goes into an ExperienceBuffer. At test time each held-out task gives ``shots`` transitions; the model
adapts on them alone (plain), with experience of other tasks (uniform, nearest, best fit), or not at all, and is judged
on the transitions that follow, beside the predictor that copies its input.

Under ``torchrun`` the ranks share the tasks of every meta-batch; rank 0 alone prints, keeps the experience and adapts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from eaml_ext import _check, checkpoint
from eaml_ext._random import Purpose, derive_seed
from eaml_ext._terminal import progress_bar
from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.distributed import Group, any_rank, run_on_rank_zero, torchrun_group
from eaml_ext.experience import ExperienceBuffer, Experiences, retrieval
from eaml_ext.jobs import config_file, report
from eaml_ext.jobs.config import DynamicsConfig
from eaml_ext.jobs.device import torch_device
from eaml_ext.meta import AdaptedTaskModels, MetaMAML
from eaml_ext.meta.functional import functional_call
from eaml_ext.nn import SSM
from eaml_ext.rl import Planner, Trajectories, collect, planned_returns
from eaml_ext.tasks import Task, TaskDistribution, make_tasks

SIMILAR_TASKS = 5  # past tasks whose experience is taken
MEMORY_STEPS = 20  # gradient steps by which the models of past tasks are adapted, for best_fit
RIDGE = 0.1  # of fingerprints, chosen on the split "valid" of CartPole-v1
FORMAT = 2  # of a run's checkpoint; version 0.1 wrote none and had other units of steps and embeddings


class DynamicsModel(nn.Module):
    """Predicts the step ``next_observation - observation``, in units of ``scale``, with an SSM over the episode.

    Input features: observation, action, and 1 where an episode starts (the state is zeroed there, else 0).

    Args:
        obs_dim, action_dim: sizes of observation and encoded action.
        hidden_dim, state_size, num_layers: of the :class:`eaml_ext.nn.SSM`.

    >>> model = DynamicsModel(4, 2, hidden_dim=8)
    >>> model(torch.zeros(20, 7)).shape, model(torch.zeros(3, 20, 7)).shape
    (torch.Size([20, 4]), torch.Size([3, 20, 4]))
    """

    mean: Tensor
    std: Tensor
    scale: Tensor

    def __init__(
        self, obs_dim: int, action_dim: int, hidden_dim: int = 32, state_size: int = 16, num_layers: int = 1
    ) -> None:
        super().__init__()
        obs_dim, action_dim = (
            _check.positive("DynamicsModel", name, value, integer=True)
            for name, value in (("obs_dim", obs_dim), ("action_dim", action_dim))
        )
        self.sizes = (obs_dim, action_dim, 1)
        self.ssm = SSM(obs_dim + action_dim, hidden_dim, obs_dim, state_size=state_size, num_layers=num_layers)
        self.register_buffer("mean", torch.zeros(obs_dim))  # of observations
        self.register_buffer("std", torch.ones(obs_dim))
        self.register_buffer("scale", torch.ones(obs_dim))  # of steps

    def normalise(self, data: Trajectories) -> None:
        """Set the units from data: standard deviations of observations, root mean squares of steps.

        An observation that moves by a constant, such as a clock, thus has steps of size 1. Where all steps are rounding
        errors of the observation's dtype, their unit is the standard deviation of the observation. The units of a
        constant are its size, at least 1.
        """
        observations, following = (t.flatten(0, -2).double() for t in (data.observations, data.next_observations))
        size, steps = observations.abs().amax(0), following - observations
        # Absolute part: rounding errors of a simulator that computes zeros from numbers of order one in float64.
        ulp = (torch.finfo(data.observations.dtype).eps * size).clamp(min=2 * torch.finfo(torch.float64).eps)
        std, step = observations.std(0), steps.square().mean(0).sqrt()
        std = torch.where(std > 2 * ulp, std, size.clamp(min=1))
        self.mean.copy_(observations.mean(0))
        self.std.copy_(std)
        # A clock may step by one ulp, more than eps * size / 2. Rounding errors of that size have a mean near 0.
        moves = (step > 2 * ulp) | (steps.mean(0).abs() > ulp / 2)
        self.scale.copy_(torch.where(moves, step, std))

    def forward(self, x: Tensor) -> Tensor:
        """``(time, features)`` or ``(batch, time, features)`` -> steps of the same leading shape."""
        if x.dim() == 2:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        inputs = self.in_units(x)
        return self.ssm.scan(inputs[..., :-1], reset=inputs[..., -1] > 0.5)[0]

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of :meth:`forward`: ``(batch, features)`` -> ``(batch, obs_dim)`` and the SSM's next state.

        Where an episode starts, the state is for the caller to zero.
        """
        return self.ssm.step(self.in_units(x)[..., :-1], state)

    def in_units(self, x: Tensor) -> Tensor:
        """The features ``(..., obs_dim + action_dim + 1)`` with the observation in its units, of mean 0."""
        observation, rest = x.tensor_split([self.sizes[0]], dim=-1)
        return torch.cat([(observation - self.mean) / self.std, rest], dim=-1)


class BatchedWorldModel(nn.Module):
    """A dynamics model as :class:`eaml_ext.rl.Planner` steps it; ``params`` are of each task, ``(tasks, ...)`` each."""

    def __init__(self, model: DynamicsModel, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self._params = {f"model.{name}": p for name, p in params.items()}
        self._call = vmap(lambda params, *args: functional_call(self, params, args))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.step(x, state)

    def init_hidden(self, tasks: int) -> Tensor:
        return self.model.ssm.init_hidden(tasks).unsqueeze(1)

    def step(self, obs: Tensor, action: Tensor, start: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if start.any():  # not a product: what a finished episode left may be infinite
            state = state.masked_fill(start.view(*start.shape, *[1] * (state.dim() - 2)), 0.0)
        change, state = self._call(self._params, features(obs, action, start), state)
        return obs + change * self.model.scale, state


def features(observation: Tensor, action: Tensor, start: Tensor) -> Tensor:
    """The model's input, ``(..., obs_dim + action_dim + 1)``."""
    return torch.cat([observation, action, start.unsqueeze(-1).to(observation.dtype)], dim=-1)


def task_embedding(x: Tensor, y: Tensor) -> Tensor:
    """A task's context embedding: ridge-regression weights of steps on features, ``(tasks, features * obs_dim)``.

    ``x`` ``(tasks, time, features)`` as of :meth:`DynamicsModel.in_units`, ``y`` ``(tasks, time, obs_dim)``. It depends
    on no learned parameter, so it never goes stale. In float64, because clocks and constants are nearly collinear.
    """
    inputs = torch.cat([x[..., :-1], torch.ones_like(x[..., :1])], dim=-1).double()
    gram = inputs.mT @ inputs + RIDGE * torch.eye(inputs.shape[-1], dtype=inputs.dtype, device=x.device)
    weights: Tensor = torch.linalg.solve(gram, inputs.mT @ y.double()).flatten(1).to(y.dtype)
    return weights


def run(settings: DynamicsConfig) -> dict[str, Any]:
    """Runs the job, prints its progress and writes ``settings.folder``; returns the report.

    The folder gets ``settings.toml``, ``report.json``, ``report.png`` (with the extra ``plot``), ``model.safetensors``,
    ``buffer.safetensors`` and, while meta-training runs, ``checkpoint.safetensors``. From it ``settings.resume`` goes
    on: a run that was killed at any moment then ends with the bits of an uninterrupted one. Ctrl-C writes the
    checkpoint before it ends meta-training.

    Under ``torchrun`` all ranks call it alike. Each draws every task, which is cheap, and adapts its part; after
    meta-training only rank 0 goes on, the report of the others is empty. The result is that of one process to rounding,
    and a run may be resumed by another number of ranks.

    Raises ValueError for a bad device or environment, for a checkpoint that is damaged or of other settings, and for a
    reward or an observation that is not finite; OSError where the folder cannot be written; RankError, an OSError,
    where another rank has died.
    """
    with torchrun_group() as group:
        return _run(settings, group)


def _run(settings: DynamicsConfig, group: Group | None) -> dict[str, Any]:
    first = group is None or group.rank == 0
    device = torch_device("DynamicsConfig", settings.device)
    distribution = make_tasks(settings.env_name)
    folder = Path(settings.folder)
    # First: a bad path must not cost a run.
    run_on_rank_zero(group, lambda: folder.mkdir(parents=True, exist_ok=True))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    model = DynamicsModel(
        distribution.obs_dim, distribution.action_dim, settings.hidden_dim, settings.state_size, settings.num_layers
    )
    model.normalise(collect(distribution, distribution.sample(64, "valid", settings.seed), 64, settings.seed))
    model.to(device)
    maml = MetaMAML(model, settings.inner_lr, settings.outer_lr, inner_steps=settings.inner_steps, group=group)
    buffer = ExperienceBuffer(settings.buffer_size, distribution.obs_dim, distribution.action_dim, device=device)

    losses = meta_train(settings, distribution, maml, buffer)
    if not first:
        return {}
    print("MetaMAML training completed.")
    print(f"Experience Buffer populated with {len(buffer)} experiences.")
    checkpoint.save(folder / "model.safetensors", model.state_dict(), {"settings": vars(settings)}, kind="dynamics")
    buffer.save(folder / "buffer.safetensors")
    variants, adapted = adapt(settings, distribution, maml, buffer)
    returns = act(settings, distribution, model, adapted)

    results: dict[str, Any] = {
        "settings": vars(settings),
        "meta_loss": losses,
        "variants": {name: report.summary(errors[-1]) for name, errors in variants.items()},
        "returns": {name: report.summary(column) for name, column in returns.items()},
        "curves": {name: errors.mean(dim=1).tolist() for name, errors in variants.items()},
    }
    report.write_json(folder / "report.json", results)
    report.plot(folder / "report.png", results)
    print("=== Hybrid Execution completed successfully ===")
    print(report.table(results["variants"], results["returns"], settings.plan_steps))
    print(f"Results: {folder}")
    return results


def meta_train(
    settings: DynamicsConfig, distribution: TaskDistribution[Task], maml: MetaMAML, buffer: ExperienceBuffer
) -> list[float]:
    """Second-order MAML over freshly drawn tasks; every transition goes into the buffer. Returns the loss per epoch.

    Update number i is a function of the settings, i and what the checkpoint holds. With a group the buffer of rank 0
    alone is written to.
    """
    group = maml.group
    first = group is None or group.rank == 0
    updates = settings.updates_per_epoch
    total = settings.num_epochs * updates
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(maml.optimizer, total)
    run = Run(Path(settings.folder) / "checkpoint.safetensors", settings.decisive, maml, schedule, buffer)
    if settings.resume:
        done = run.load()
        if first:
            print(f"Resumed after {done} of {total} meta-updates.")
    else:
        run_on_rank_zero(group, lambda: run.path.unlink(missing_ok=True))  # an earlier run's
    run_on_rank_zero(group, lambda: config_file.write(run.path.parent, settings))  # not those of a run that is refused
    with (
        progress_bar(
            desc="meta-training", unit="update", total=total, initial=len(run.losses), hidden=not first
        ) as progress,
        checkpoint.deferred_interrupt() as seen,
    ):
        while len(run.losses) < total and not any_rank(group, bool(seen)):
            run.losses.append(update(settings, distribution, maml, buffer, len(run.losses)))
            schedule.step()
            progress.update()
            epoch, rest = divmod(len(run.losses), updates)
            if first and rest == 0 and (epoch % 10 == 1 or epoch == settings.num_epochs):
                progress.write(f"Epoch {epoch - 1}, Meta Loss: {sum(run.losses[-updates:]) / updates:.4f}")
            if rest == 0 and epoch % settings.checkpoint_every == 0 and len(run.losses) < total:
                run.save()
        run.save()
    if any_rank(group, bool(seen)):
        raise KeyboardInterrupt
    return [sum(run.losses[i : i + updates]) / updates for i in range(0, total, updates)]


def update(
    settings: DynamicsConfig,
    distribution: TaskDistribution[Task],
    maml: MetaMAML,
    buffer: ExperienceBuffer,
    number: int,
) -> float:
    """Meta-update ``number`` on fresh tasks, whose transitions the buffer then holds; returns its loss."""
    tasks = distribution.sample(settings.tasks_per_update, "train", settings.seed, epoch=number)
    data = collect(distribution, tasks, settings.shots + settings.query, settings.seed)
    model: Any = maml.model
    x, y = tensors(data, model)
    k = settings.shots
    group = maml.group
    mine = range(len(tasks)) if group is None else group.shard(len(tasks))
    loss = maml.meta_update([(x[i, :k], y[i, :k], x[i, k:], y[i, k:]) for i in mine], F.mse_loss)
    if group is None or group.rank == 0:
        start = number * len(tasks)
        remember(buffer, range(start, start + len(tasks)), data, task_embedding(model.in_units(x), y))
    return loss


@dataclass
class Run:
    """Everything meta-training has made so far, and the file that keeps it."""

    path: Path
    settings: dict[str, Any]
    maml: MetaMAML
    schedule: torch.optim.lr_scheduler.LRScheduler
    buffer: ExperienceBuffer
    losses: list[float] = field(default_factory=list)  # of each meta-update

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all; on rank 0, who alone holds the buffer."""
        state = {
            "format": FORMAT,
            "settings": self.settings,
            "losses": self.losses,
            "maml": self.maml.state_dict(),
            "schedule": self.schedule.state_dict(),
            "buffer": self.buffer.state_dict(),
            "generator": torch.get_rng_state(),
        }
        run_on_rank_zero(self.maml.group, lambda: checkpoint.save_state(self.path, state, kind="dynamics-run"))

    def load(self) -> int:
        """Takes over the checkpoint, where there is one; returns how many meta-updates were made."""

        def read() -> Any:
            if not self.path.exists():
                return None
            state = checkpoint.load_state(self.path, kind="dynamics-run")
            with checkpoint.sound("DynamicsConfig: resume", self.path):
                self.check(state)
                self.buffer.load_state_dict(state.pop("buffer"))
            return state

        state = run_on_rank_zero(self.maml.group, read)
        if state is None:
            return 0
        with checkpoint.sound("DynamicsConfig: resume", self.path):
            self.maml.load_state_dict(state["maml"])
            self.schedule.load_state_dict(state["schedule"])
            torch.set_rng_state(state["generator"])
            self.losses = state["losses"]
            return len(self.losses)

    def check(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is of a run with other settings, or of another version's format."""
        if state.get("format") != FORMAT:
            begun = "version 0.1" if "format" not in state else "another version"
            text = f"{self.path} was begun by {begun}, whose units differ; start a new run in another folder"
            raise ValueError(f"DynamicsConfig: resume: {text}")
        for name, mine in self.settings.items():
            if (came := state["settings"].get(name)) != mine:
                text = f"{self.path} is of a run with {name}={came!r}, this one has {mine!r}"
                raise ValueError(f"DynamicsConfig: resume: {text}")


def tensors(data: Trajectories, model: DynamicsModel) -> tuple[Tensor, Tensor]:
    """Features and targets of the model, ``(tasks, time, ...)``, on its device."""
    device = model.scale.device
    x = features(data.observations, data.actions, data.resets).to(device)
    return x, (data.next_observations - data.observations).to(device) / model.scale


def remember(buffer: ExperienceBuffer, numbers: Iterable[int], data: Trajectories, embeddings: Tensor) -> None:
    """Adds all transitions, task by task, so that a task's transitions stand in the buffer in their order in time."""
    time = data.rewards.shape[1]
    buffer.add(
        state=data.observations.flatten(0, 1).to(buffer.device),
        action=data.actions.flatten(0, 1).to(buffer.device),
        reward=data.rewards.flatten().to(buffer.device),
        next_state=data.next_observations.flatten(0, 1).to(buffer.device),
        start=data.resets.flatten().to(buffer.device),
        context_embedding=embeddings.repeat_interleave(time, dim=0),
        task=torch.tensor(list(numbers), device=buffer.device).repeat_interleave(time),
    )


def adapt(
    settings: DynamicsConfig, distribution: TaskDistribution[Task], maml: MetaMAML, buffer: ExperienceBuffer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Adapts to held-out tasks in every variant; the error of each task after each call, ``(calls + 1, tasks)``.

    Errors are mean squared, in units of the root mean square of a step, so that copying the input is about 1.
    Beside them the parameters that each variant ends with, ``(tasks, ...)`` each.
    """
    model: Any = maml.model
    tasks = distribution.sample(settings.test_tasks, "test", settings.seed)
    x, y = tensors(collect(distribution, tasks, settings.shots + settings.query, settings.seed), model)
    k, length = settings.shots, settings.shots + settings.query
    support = {
        "states": x[:, :k],
        "targets": y[:, :k],
        "context_embedding": task_embedding(model.in_units(x[:, :k]), y[:, :k]),
        "task": -1 - torch.arange(len(tasks), device=x.device),  # no past task has a negative number
    }

    def error(params: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            predict = vmap(lambda params, x: functional_call(model, params, (x,)))
            errors: Tensor = (predict(params, x[:, k:]) - y[:, k:]).square().mean(dim=(1, 2))
            return errors

    def inputs(e: Experiences) -> Tensor:
        return features(e.state, e.action, e.start)

    def targets(e: Experiences) -> Tensor:
        steps: Tensor = (e.next_state - e.state) / model.scale
        return steps

    select: dict[str, Any] = {"states": inputs, "targets": targets}
    models = AdaptedTaskModels(maml, buffer, F.mse_loss, MEMORY_STEPS, length=length, **select)
    count = min(SIMILAR_TASKS * length, len(buffer))
    retrievers: dict[str, Callable[..., Any]] = {
        "uniform": retrieval.uniform(count, **select),
        "nearest": retrieval.nearest(count, **select),
        "best_fit": retrieval.best_fit(models.score, SIMILAR_TASKS, **select),
    }
    cfg = AdaptationConfig(lr=settings.inner_lr, max_steps_per_call=5)
    unadapted = {name: p.detach().expand(len(tasks), *p.shape) for name, p in maml.parameters().items()}
    variants = {"copy input": y[:, k:].square().mean(dim=(1, 2)).unsqueeze(0), "no adaptation": error(unadapted)[None]}
    adapted = {"no adaptation": unadapted}
    print("Starting test-time adaptation with Experience Buffer...")
    for name in ("plain", *sorted(retrievers, key=lambda name: name == settings.retrieval)):
        weight = 0.0 if name == "plain" else settings.experience_weight
        adapter = Adapter(model, cfg, buffer, weight, retriever=memoize(retrievers.get(name, retrieval.uniform(1))))
        params, errors = None, [error(unadapted)]
        progress = progress_bar(range(settings.adaptation_calls), desc=name, unit="call")
        for call in progress:
            params, losses = adapter.adapt_many(F.mse_loss, support, params)
            errors.append(error(params))
            if name == settings.retrieval and call % 10 == 0:
                progress.write(
                    f"Adaptation step {call}, Hybrid Loss: {losses.mean():.4f}, Steps taken: {cfg.max_steps_per_call}"
                )
        variants[name] = torch.stack(errors)
        adapted[name] = unadapted if params is None else params
    print("Adaptation completed.")
    return variants, adapted


def act(
    settings: DynamicsConfig,
    distribution: TaskDistribution[Task],
    model: DynamicsModel,
    adapted: dict[str, dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The return of one episode of each of the first held-out tasks, of a planner with each variant's model.

    Beside them that of random actions. Each variant has starts of its own. Nothing for a distribution that
    cannot tell the outcomes of what was imagined.
    """
    outcomes: Any = getattr(distribution, "outcomes", None)
    if outcomes is None or not settings.plan_tasks:
        return {}
    count = min(settings.plan_tasks, settings.test_tasks)
    tasks = distribution.sample(count, "test", settings.seed)
    many = tasks * len(adapted)  # all variants as one batch: a step costs little more for it
    params = {
        key: torch.cat([variant[key][:count] for variant in adapted.values()]) for key in next(iter(adapted.values()))
    }
    planner = Planner(
        BatchedWorldModel(model, params),
        partial(outcomes, many),
        distribution.action_space,
        horizon=settings.plan_horizon,
        candidates=settings.plan_candidates,
    )
    seed = derive_seed(settings.seed, Purpose.PLANNING, bits=32)  # other starts than those of the support
    returns = planned_returns(distribution, many, planner, settings.plan_steps, seed).split(count)
    chance = planned_returns(distribution, tasks, None, settings.plan_steps, seed)
    return {"random actions": chance, **dict(zip(adapted, returns, strict=True))}


def memoize(retriever: Callable[..., Any]) -> Callable[..., Any]:
    """The retriever, asked once per task: the buffer does not change while the job adapts."""
    found: dict[int, Any] = {}

    def retrieve(buffer: ExperienceBuffer, batch: Any) -> Any:
        task = int(batch["task"])
        if task not in found:
            found[task] = retriever(buffer, batch)
        return found[task]

    return retrieve
