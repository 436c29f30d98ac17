"""Test time of the meta-RL jobs: returns on held-out tasks and their baselines; the reward scale of random actions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eaml_ext._random import Purpose, derive_seed
from eaml_ext.jobs.rl_config import RL2Config, RLConfig
from eaml_ext.rl import MAMLRL, RL2, RandomPolicy, advantages
from eaml_ext.rl._rollout_loop import RolloutLoop, Transitions
from eaml_ext.rl.trials import MAX_EPISODE_STEPS
from eaml_ext.tasks import Task, TaskDistribution

RANDOM, UNADAPTED = "random actions", "unadapted policy"
SCALE_TASKS = 64  # tasks of the split "valid" in which the reward scale is measured


def random_baseline(settings: Any, dist: TaskDistribution[Any], limit: int | None) -> Tensor:
    """Return the mean returns of random actions on held-out tasks, ``(tasks,)``.

    Args:
        settings: a config with ``seed`` and ``test_tasks``, and the ``episodes`` of rl2 or the ``rollouts_per_task`` of
            maml.
        dist: of the tasks.
        limit: most steps of an episode, if known.

    Raises:
        ValueError: a reward or an observation is not finite, or an episode has not ended within 10,000 steps or within
            a larger ``limit``.
    """
    tasks = dist.sample(settings.test_tasks, "test", settings.seed)
    episodes = settings.episodes if isinstance(settings, RL2Config) else settings.rollouts_per_task
    seed = derive_seed(settings.seed, Purpose.RANDOM_ACTIONS, bits=32)
    return random_returns(dist, tasks, episodes, seed, _max_episode_steps(limit)).mean(1)


def evaluate(
    settings: RLConfig, learner: RL2 | MAMLRL, limit: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the returns of the unadapted and of the adapted policy on held-out tasks, ``(tasks,)`` each, by name.

    The unadapted policy of rl2 has a state that is zeroed at each episode; its return is the mean over the episodes of
    a task. That of maml makes no inner step.

    Args:
        settings: of the run.
        learner: after the training.
        limit: as in :func:`random_baseline`.
    """
    tasks = learner.dist.sample(settings.test_tasks, "test", settings.seed)
    most = _max_episode_steps(limit)
    if isinstance(learner, RL2):
        assert isinstance(settings, RL2Config)
        episodes = settings.episodes
        unadapted = learner.evaluate(tasks, episodes, keep_state=False, max_episode_steps=most).mean(1)
        columns = list(learner.evaluate(tasks, episodes, max_episode_steps=most).T)
        names = [f"episode {i + 1}" for i in range(episodes)]
    else:
        unadapted, *columns = learner.evaluate(tasks, max_episode_steps=most).T
        names = [f"after {i + 1} step{'s' * (i > 0)}" for i in range(len(columns))]
    return {UNADAPTED: unadapted}, dict(zip(names, columns, strict=True))


def measured_reward_scale(settings: Any, dist: TaskDistribution[Any]) -> float:
    """``1 / sqrt(mean(R^2))``, to two digits, of the discounted returns R of random actions; 1 without any reward.

    Args:
        settings: a config with ``seed``, ``gamma``, and the ``steps`` of a rollout.
        dist: of the tasks.

    Raises:
        NonFiniteError: a reward or an observation is not finite.
    """
    tasks = dist.sample(SCALE_TASKS, "valid", settings.seed)
    seed = derive_seed(settings.seed, Purpose.REWARD_SCALE, bits=32)
    done = _random_actions("measured_reward_scale", dist, tasks, seed, steps=settings.steps)
    rewards = torch.from_numpy(done.rewards.astype(np.float64))  # squares of float32 overflow
    zero, ends = torch.zeros_like(rewards), torch.from_numpy(done.terminations | done.truncations)
    returns = advantages(rewards, zero, zero, ends, ends, settings.gamma, 1.0)
    rms = float(returns.square().mean().sqrt())
    return float(f"{1 / rms:.2g}") if rms > 0 else 1.0


def random_returns(
    dist: TaskDistribution[Any],
    tasks: Sequence[Task],
    episodes: int,
    seed: int,
    max_episode_steps: int = MAX_EPISODE_STEPS,
) -> Tensor:
    """Return the returns of actions drawn at random, ``(tasks, episodes)``."""
    length = {"episodes": episodes, "max_episode_steps": max_episode_steps}
    done = _random_actions("random_returns", dist, tasks, seed, **length)
    number = np.maximum(done.episode_starts.cumsum(1) - 1, 0)
    returns = np.zeros((len(tasks), episodes))
    np.add.at(returns, (np.arange(len(tasks))[:, None], number), done.rewards)
    return torch.from_numpy(returns)


def time_limit(dist: TaskDistribution[Any]) -> int | None:
    """Return the most steps of an episode, as Gymnasium's spec has them; None where it has none."""
    env = dist.make_env(dist.sample(1, "valid"))
    try:
        # A SyncVectorEnv that no spec has made has none; its environments may.
        specs = [getattr(part, "spec", None) for part in (env, *getattr(env, "envs", ()))]
        return next((spec.max_episode_steps for spec in specs if spec is not None), None)
    finally:
        env.close()


def _max_episode_steps(limit: int | None) -> int:
    """Return the most steps of an evaluated episode: a known limit may exceed the default."""
    return max(MAX_EPISODE_STEPS, limit or 0)


def _random_actions(
    where: str, dist: TaskDistribution[Any], tasks: Sequence[Task], seed: int, **length: Any
) -> Transitions:
    with RolloutLoop(where, dist, tasks, seed, **length) as loop:
        generator, policy = np.random.default_rng(loop.action_seed), RandomPolicy(loop.env.action_space, hold=0.0)
        while loop.active.any():
            loop.step(policy(loop.observation, loop.episode_starts, generator))
    return loop.transitions()
