"""Test time of the main job: adaptation to held-out tasks in every variant, and a planner that acts on the models."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from eaml_ext._random import Purpose, derive_seed
from eaml_ext._terminal import progress_bar, write_line
from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.experience import ExperienceBuffer, Experiences, retrieval
from eaml_ext.experience.retrieval import Retriever
from eaml_ext.jobs.config import STEPS_PER_CALL, DynamicsConfig
from eaml_ext.jobs.world_model import BatchedWorldModel, DynamicsModel, features, model_data, task_embedding
from eaml_ext.meta import AdaptedTaskModels, MetaMAML
from eaml_ext.meta._types import Params
from eaml_ext.meta.functional import functional_call
from eaml_ext.rl import Planner, Policy, collect, planned_returns
from eaml_ext.tasks import Task, TaskDistribution

SIMILAR_TASKS = 5  # past tasks whose experience is retrieved
MEMORY_STEPS = 20  # gradient steps by which the models of past tasks are adapted, for best_fit
MEMORY_ENTRIES = 2**25  # of data and parameters of the past tasks that are adapted at once; at most 64 tasks are


def adapt(
    settings: DynamicsConfig, distribution: TaskDistribution[Task], maml: MetaMAML, buffer: ExperienceBuffer
) -> tuple[dict[str, Tensor], dict[str, Params]]:
    """Adapt to held-out tasks in every variant.

    A call of the Adapter that begins at a multiple of 10 gradient steps prints a line. The line has this number, the
    mean hybrid loss before the last step of the call, and the number of its steps.

    Returns:
        By variant: the error of each task after each call, ``(calls + 1, tasks)``, or ``(1, tasks)`` without
        adaptation; and the parameters at the end, by name, each ``(tasks, *shape)``. Errors are mean squared, in mean
        squares of a step, so that copying the input is about 1.
    """
    model = _dynamics_model(maml)
    tasks = distribution.sample(settings.test_tasks, "test", settings.seed)
    x, y = model_data(collect(distribution, tasks, settings.shots + settings.query, settings.seed), model)
    k = settings.shots
    support = {
        "states": x[:, :k],
        "targets": y[:, :k],
        "context_embedding": task_embedding(model.in_units(x[:, :k]), y[:, :k]),
        "task": -1 - torch.arange(len(tasks), device=x.device),  # no past task has a negative number
    }

    @torch.no_grad()
    def error(params: Params) -> Tensor:
        predict = vmap(lambda params, x: functional_call(model, params, (x,)))
        errors: Tensor = (predict(params, x[:, k:]) - y[:, k:]).square().mean(dim=(1, 2))
        return errors

    cfg = AdaptationConfig(lr=settings.inner_lr, max_steps_per_call=STEPS_PER_CALL)
    retrievers = _retrievers(maml, buffer, settings.shots + settings.query)
    unadapted = {name: p.detach().expand(len(tasks), *p.shape) for name, p in maml.parameters().items()}
    variants = {"copy input": y[:, k:].square().mean(dim=(1, 2)).unsqueeze(0), "no adaptation": error(unadapted)[None]}
    adapted = {"no adaptation": unadapted}
    print("Starting test-time adaptation with Experience Buffer...")
    for name in ("plain", *sorted(retrievers, key=lambda name: name == settings.retrieval)):
        weight = 0.0 if name == "plain" else settings.experience_weight
        adapter = Adapter(model, cfg, buffer, weight, retriever=memoize(retrievers.get(name, retrieval.uniform(1))))
        params, errors = None, [error(unadapted)]
        for call in progress_bar(range(settings.adaptation_calls), desc=name, unit="call"):
            params, losses = adapter.adapt_many(F.mse_loss, support, params)
            errors.append(error(params))
            began = call * STEPS_PER_CALL
            if name == settings.retrieval and began % 10 == 0:
                write_line(f"Adaptation step {began}, Hybrid Loss: {losses.mean():.4f}, Steps taken: {STEPS_PER_CALL}")
        variants[name] = torch.stack(errors)
        adapted[name] = unadapted if params is None else params
    print("Adaptation completed.")
    return variants, adapted


def _dynamics_model(maml: MetaMAML) -> DynamicsModel:
    assert isinstance(maml.model, DynamicsModel)
    return maml.model


def _retrievers(maml: MetaMAML, buffer: ExperienceBuffer, length: int) -> dict[str, Retriever]:
    """Return the retrievers by their names in ``--retrieval``; ``length`` is that of a task in the buffer."""
    model = _dynamics_model(maml)

    def inputs(e: Experiences) -> Tensor:
        return features(e.state, e.action, e.start)

    def targets(e: Experiences) -> Tensor:
        return model.targets(e.state, e.next_state)

    obs_dim, action_dim, start = model.sizes
    entries = length * (2 * obs_dim + action_dim + start) + sum(p.numel() for p in model.parameters())
    models = AdaptedTaskModels(
        maml,
        buffer,
        F.mse_loss,
        MEMORY_STEPS,
        length=length,
        states=inputs,
        targets=targets,
        chunk_size=max(1, min(64, MEMORY_ENTRIES // entries)),
    )
    count = min(SIMILAR_TASKS * length, len(buffer))
    return {
        "uniform": retrieval.uniform(count, states=inputs, targets=targets),
        "nearest": retrieval.nearest(count, states=inputs, targets=targets),
        "best_fit": retrieval.best_fit(models.score, SIMILAR_TASKS, states=inputs, targets=targets),
    }


def memoize(retriever: Retriever) -> Retriever:
    """Return a retriever that calls ``retriever`` once per task: the buffer does not change during evaluation."""
    found: dict[int, dict[str, Tensor] | None] = {}

    def retrieve(buffer: ExperienceBuffer, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        task = int(batch["task"])
        if task not in found:
            found[task] = retriever(buffer, batch)
        return found[task]

    return retrieve


def reporting(policy: Policy, steps: int, bar: Any) -> Policy:
    """Return a policy that acts as ``policy`` does, moves a progress bar, and prints a line every 20 steps.

    Args:
        policy: called once per step, and once more for each reset.
        steps: most steps of an episode.
        bar: see :func:`eaml_ext._terminal.progress_bar`.
    """
    calls = 0

    def act(observations: np.ndarray, resets: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        nonlocal calls
        if calls < steps:
            if calls % 20 == 0:
                write_line(f"Planning step {calls} of {steps}")
            bar.update()
        calls += 1
        actions: np.ndarray = policy(observations, resets, generator)
        return actions

    return act


def act(
    settings: DynamicsConfig,
    distribution: TaskDistribution[Task],
    model: DynamicsModel,
    adapted: dict[str, Params],
) -> dict[str, Tensor]:
    """Play one episode in each of the first held-out tasks with a planner on each variant's model.

    Args:
        settings: of the run; ``plan_*`` are the planner's.
        distribution: of the held-out tasks.
        model: the dynamics model.
        adapted: its parameters by variant and name, each ``(tasks, *shape)``.

    Returns:
        Returns ``(tasks,)`` of random actions and of each variant, whose episodes have starts of their own. Empty for
        a distribution without ``outcomes``, which compute the rewards of imagined steps.
    """
    outcomes: Any = getattr(distribution, "outcomes", None)
    if not settings.plan_tasks:
        return {}
    if outcomes is None:
        print(f"No planner: {distribution.name} has no outcomes(), which computes the rewards of imagined steps.")
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
    with progress_bar(desc="planning", unit="step", total=settings.plan_steps) as bar:
        policy = reporting(planner, settings.plan_steps, bar)
        returns = planned_returns(distribution, many, policy, settings.plan_steps, seed).split(count)
    chance = planned_returns(distribution, tasks, None, settings.plan_steps, seed)
    return {"random actions": chance, **dict(zip(adapted, returns, strict=True))}
