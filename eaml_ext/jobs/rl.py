"""The meta-RL jobs: a policy on an SSM adapts to held-out tasks in context (rl2) or by gradient (maml)."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _terminal, checkpoint
from eaml_ext.distributed import world_size
from eaml_ext.jobs import config_file, report
from eaml_ext.jobs.device import torch_device
from eaml_ext.jobs.rl_config import MAMLConfig, RL2Config, RLConfig
from eaml_ext.rl import MAMLRL, RL2, SSMMetaPolicy, feature_dim
from eaml_ext.tasks import TaskDistribution, make_tasks

UPDATES = 10  # per epoch


def run(settings: RLConfig) -> dict[str, Any]:
    """Run the job, print its progress and write ``settings.folder``.

    The folder gets ``settings.toml``, ``report.json`` and ``policy.safetensors``.

    Returns:
        The report.

    Raises:
        ValueError: a bad device or environment, or several processes of ``torchrun``: this job is one process.
        OSError: the folder cannot be written.
    """
    if world_size() > 1:
        raise ValueError(f"{type(settings).__name__}: this job is one process, torchrun has started {world_size()}")
    device = torch_device(type(settings).__name__, settings.device)
    distribution = make_tasks(settings.env_name)
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)  # first: a bad path must not cost a run
    config_file.write(folder, settings)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    policy = make_policy(settings, distribution, device)
    job: Any = rl2 if isinstance(settings, RL2Config) else maml
    learned, returns, columns = job(settings, distribution, policy)
    curve, skipped = learned

    table = {name: report.summary(column) for name, column in zip(columns, returns.T, strict=True)}
    results = {"settings": vars(settings), "training": curve, "skipped_updates": skipped, "returns": table}
    checkpoint.save(folder / "policy.safetensors", policy.state_dict(), {"settings": vars(settings)}, kind="policy")
    report.write_json(folder / "report.json", results)
    print(f"Return on {len(returns)} held-out tasks:")
    rows = [["", "mean", "95 % +-", "median"], *([name, *report.cells(row, 1)] for name, row in table.items())]
    print("\n".join(_terminal.table(rows, first=24, width=10)))
    if skipped:
        print(f"{skipped} updates were skipped: their data or gradients were not finite.")
    print(f"Results: {folder}")
    return results


Learned = tuple[list["float | None"], int]
"""The number reported for each update (None: no number), and the count of skipped updates."""


def numbers(values: list[float]) -> list[float | None]:
    """Replace NaN by None, because JSON has no NaN."""
    return [None if math.isnan(value) else value for value in values]


def make_policy(settings: RLConfig, distribution: TaskDistribution[Any], device: torch.device) -> SSMMetaPolicy:
    """Return a policy for a distribution's observations and actions."""
    from gymnasium.spaces import Discrete

    return SSMMetaPolicy(
        feature_dim(distribution),
        distribution.action_dim,
        settings.hidden_dim,
        device,
        continuous=not isinstance(distribution.action_space, Discrete),
        state_size=settings.state_size,
        num_layers=settings.num_layers,
        core=settings.core,
    )


def rl2(
    settings: RL2Config, distribution: TaskDistribution[Any], policy: SSMMetaPolicy
) -> tuple[Learned, Tensor, list[str]]:
    """Train by RL^2 and evaluate in context.

    Returns:
        The mean return of each update (None: no episode finished), returns on held-out tasks ``(tasks, episodes)``,
        and the names of their columns.
    """
    trainer = RL2(
        policy,
        distribution,
        steps=settings.steps,
        tasks_per_update=settings.tasks_per_update,
        num_minibatches=min(4, settings.tasks_per_update),
        lr=settings.lr,
        gamma=settings.gamma,
        reward_scale=settings.reward_scale,
        seed=settings.seed,
    )

    def progress(update: int, value: float) -> None:
        if update % UPDATES == UPDATES - 1:
            text = "no episode finished" if math.isnan(value) else f"{value:.1f}"
            print(f"Epoch {update // UPDATES}, Return of finished episodes: {text}", flush=True)

    returned = trainer.train(settings.num_epochs * UPDATES, progress)
    returns = trainer.evaluate(distribution.sample(settings.test_tasks, "test", settings.seed), settings.episodes)
    return (numbers(returned), trainer.skipped_updates), returns, [f"episode {i + 1}" for i in range(settings.episodes)]


def maml(
    settings: MAMLConfig, distribution: TaskDistribution[Any], policy: SSMMetaPolicy
) -> tuple[Learned, Tensor, list[str]]:
    """Train by MAML and evaluate after every gradient step.

    Returns:
        The mean reward of a step after adaptation in each update (None: skipped), returns on held-out tasks
        ``(tasks, inner_steps + 1)``, and the names of their columns.
    """
    trainer = MAMLRL(
        policy,
        distribution,
        inner_lr=settings.inner_lr,
        outer_lr=settings.outer_lr,
        inner_steps=settings.inner_steps,
        tasks_per_update=settings.tasks_per_update,
        rollouts_per_task=settings.rollouts_per_task,
        steps=settings.steps,
        gamma=settings.gamma,
        reward_scale=settings.reward_scale,
        seed=settings.seed,
    )
    curve: list[float] = []
    for epoch in range(settings.num_epochs):
        curve += trainer.train(UPDATES)
        print(f"Epoch {epoch}, Reward of a step after adaptation: {curve[-1]:.4f}", flush=True)
    returns = trainer.evaluate(distribution.sample(settings.test_tasks, "test", settings.seed))
    columns = [f"after {i} steps" for i in range(settings.inner_steps + 1)]
    return (numbers(curve), trainer.skipped_updates), returns, columns
