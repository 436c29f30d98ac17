"""The meta-RL jobs: a policy on an SSM adapts to held-out tasks in context (rl2) or by gradient (maml)."""

import time
from typing import Any

import torch

from eaml_ext.distributed import world_size
from eaml_ext.jobs import report, rl_report
from eaml_ext.jobs.device import torch_device
from eaml_ext.jobs.rl_config import MAMLConfig, RL2Config, RLConfig
from eaml_ext.jobs.rl_evaluation import RANDOM, evaluate, measured_reward_scale, random_baseline, time_limit
from eaml_ext.jobs.rl_training import load_run, restore, train
from eaml_ext.jobs.run_folder import RunFolder
from eaml_ext.jobs.tasks import prepare
from eaml_ext.rl import MAMLRL, RL2, SSMMetaPolicy, feature_dim
from eaml_ext.tasks import TaskDistribution


def run(settings: RLConfig) -> dict[str, Any]:
    """Run the job, print its progress and write ``settings.folder``.

    The folder gets ``settings.toml``, ``report.json``, ``report.png`` (with the extra ``plot``), ``policy.safetensors``
    and, during training, ``checkpoint.safetensors``. One process at a time runs in a folder. Files of an earlier run
    are refused, unless ``settings.overwrite`` replaces or ``settings.resume`` continues them. A run that was killed at
    any moment and is resumed ends with the bits of an uninterrupted one. Another ``num_epochs`` goes on, too; the
    learning rate of rl2 then falls to 0 over the new total. Ctrl-C or SIGTERM during training ends it after the
    checkpoint is written.

    Returns:
        The report.

    Raises:
        ValueError: a bad device or environment, a run that does not fit into memory, a checkpoint that is damaged or of
            other settings, a reward or an observation that is not finite, or several processes of ``torchrun``: this
            job is one process. The folder cannot be written, is in use, or holds an earlier run.
        OSError: a file cannot be written, for example because the disk is full.
        KeyboardInterrupt: Ctrl-C or SIGTERM, with a text that states how the run goes on.
    """
    started = time.monotonic()
    where = type(settings).__name__
    if world_size() > 1:
        raise ValueError(f"{where}: this job is one process, torchrun has started {world_size()}")
    device = torch_device(where, settings.device)
    distribution = prepare(settings)
    with RunFolder(settings) as folder:
        return _run(settings, device, distribution, folder, started)


def _run(
    settings: RLConfig, device: torch.device, distribution: TaskDistribution[Any], folder: RunFolder, started: float
) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    state = load_run(settings, folder)
    scale: Any = settings.reward_scale
    if scale == "auto":
        scale = measured_reward_scale(settings, distribution) if state is None else state["reward_scale"]
    learner = make_learner(settings, distribution, make_policy(settings, distribution, device), scale)
    curve = [] if state is None else restore(settings, folder, state, learner)
    limit = time_limit(distribution)
    chance = random_baseline(settings, distribution, limit)  # first: episodes without an end must not cost a run
    folder.begin()  # only now, because a run that is refused changes no file

    rl_report.print_start(settings, scale, limit, resumed=None if state is None else len(curve))
    train(settings, folder, learner, curve, scale)
    folder.trained = True
    unadapted, returns = evaluate(settings, learner, limit)
    baselines = {RANDOM: chance, **unadapted}

    results = {
        **report.header(settings, started),
        "reward_scale": scale,
        "curve": curve,
        "skipped_updates": learner.skipped_updates,
        "baselines": {name: report.summary(column) for name, column in baselines.items()},
        "returns": {name: report.summary(column) for name, column in returns.items()},
    }
    path = folder.path
    learner.policy.save(path / "policy.safetensors")
    report.write_json(path / "report.json", results)
    rl_report.plot(path / "report.png", settings, results)
    print(rl_report.table(results))
    print(f"Results: {path}")
    return results


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


def make_learner(
    settings: RLConfig, distribution: TaskDistribution[Any], policy: SSMMetaPolicy, reward_scale: float
) -> RL2 | MAMLRL:
    """Return the learner of a policy."""
    shared: dict[str, Any] = {"gamma": settings.gamma, "reward_scale": reward_scale, "seed": settings.seed}
    if isinstance(settings, RL2Config):
        return RL2(
            policy,
            distribution,
            steps=settings.steps,
            tasks_per_update=settings.tasks_per_update,
            num_minibatches=min(4, settings.tasks_per_update),
            lr=settings.lr,
            **shared,
        )
    assert isinstance(settings, MAMLConfig)
    return MAMLRL(
        policy,
        distribution,
        inner_lr=settings.inner_lr,
        outer_lr=settings.outer_lr,
        inner_steps=settings.inner_steps,
        tasks_per_update=settings.tasks_per_update,
        rollouts_per_task=settings.rollouts_per_task,
        steps=settings.steps,
        **shared,
    )
