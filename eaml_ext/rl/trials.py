"""A policy with memory plays several episodes of each of many tasks at once: a trial, one environment per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Distribution

from eaml_ext import _check
from eaml_ext._random import check_seed
from eaml_ext.rl.losses import advantages
from eaml_ext.rl.policy import SSMMetaPolicy
from eaml_ext.rl.rollout import check_finite
from eaml_ext.tasks.base import Task, TaskDistribution, check_tasks, collection_stream

MAX_EPISODE_STEPS = 10_000


class Recurrent(Protocol):
    """What :func:`rollout` asks of a policy; :class:`eaml_ext.rl.SSMMetaPolicy` is one."""

    def init_hidden(self, batch: int) -> Tensor:
        """The state before the first step, ``(batch, ...)``, on the policy's device."""

    def step(self, obs: Tensor, state: Tensor, reset: Tensor) -> tuple[Distribution, Tensor, Tensor]:
        """``obs`` ``(batch, features)``, ``reset`` ``(batch,)`` bool -> distribution of actions, values, next state."""


def feature_dim(dist: TaskDistribution[Any]) -> int:
    """The ``state_dim`` of a policy in :func:`rollout`: observation, last action, last reward, start flag."""
    return int(dist.obs_dim) + int(dist.action_dim) + 2


def check_learner(where: str, policy: SSMMetaPolicy, dist: TaskDistribution[Any]) -> None:
    """Raise unless ``policy`` can act in the tasks of ``dist``."""
    if isinstance(dist, type) or not isinstance(dist, TaskDistribution):
        raise TypeError(f"{where}: dist must be a task distribution as of make_tasks, got {type(dist).__name__}")
    if not isinstance(policy, SSMMetaPolicy):
        raise TypeError(f"{where}: policy must be an SSMMetaPolicy, got {type(policy).__name__}")
    if policy.state_dim != feature_dim(dist) or policy.action_dim != dist.action_dim:
        wanted = f"state_dim {feature_dim(dist)} and action_dim {dist.action_dim}"
        raise ValueError(f"{where}: policy must have {wanted}, got {policy.state_dim} and {policy.action_dim}")


def check_length(where: str, episodes: Any, steps: Any) -> dict[str, int]:
    """Return name and value of the argument that is given; raise unless one is, a positive integer."""
    if (episodes is None) == (steps is None):
        raise ValueError(f"{where}: one of episodes and steps must be given, got {episodes} and {steps}")
    name, value = ("steps", steps) if episodes is None else ("episodes", episodes)
    return {name: _check.positive(where, name, value, integer=True)}


@dataclass(frozen=True)
class Trials:
    """What was met and done, ``(tasks, time)``; trials shorter than the longest are padded at the end.

    - ``inputs``: float32 ``(tasks, time, features)``, what the policy saw: the observation, the action before it
      (one-hot if discrete), the reward before it, and 1 where an episode starts. Action and reward are zeros at a
      trial's start, and at every episode's where the state is not kept.
    - ``actions``: int64 ``(tasks, time)`` in [0, number of actions), or float32 ``(tasks, time, action_dim)`` as drawn,
      before they were clipped to the space's bounds.
    - ``log_probs``, ``values``: of the policy at the time; ``next_values``: its value of the observation that came of
      the action, the true final one where an episode ended, with the memory it had then.
    - ``rewards``: float32; ``starts``: bool, an episode starts here; ``terminations``: bool, it ended here of itself;
      ``ends``: bool, it ended here, or the recording did.
    - ``mask``: bool, what is no padding.
    - ``resets``: bool, where the policy's state was zeroed: at a trial's start, or at every episode's.
    - ``truncations``: bool, the episode was ended here by a time limit; nowhere if absent.
    """

    inputs: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    next_values: Tensor
    rewards: Tensor
    starts: Tensor
    terminations: Tensor
    ends: Tensor
    mask: Tensor
    resets: Tensor
    truncations: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.truncations is None:
            object.__setattr__(self, "truncations", torch.zeros_like(self.mask))

    def __getitem__(self, index: Any) -> Trials:
        return Trials(*(getattr(self, field.name)[index] for field in fields(self)))

    def episode_returns(self, episodes: int) -> Tensor:
        """The sum of rewards in each task's first ``episodes`` episodes, ``(tasks, episodes)``; NaN: not played.

        The last episode may have been cut by the end of the recording; :meth:`finished_returns` leaves it out.
        """
        episodes = _check.positive("Trials.episode_returns", "episodes", episodes, integer=True)
        number = self.starts.long().cumsum(1) - 1
        rewards = self.rewards.masked_fill(~self.mask, 0.0)
        number = number.clamp(min=0)
        width = max(episodes, int(number.max()) + 1)
        sums = rewards.new_zeros(len(rewards), width).scatter_add_(1, number, rewards)
        played = torch.arange(width, device=number.device) <= number.masked_fill(~self.mask, 0).amax(1, keepdim=True)
        return torch.where(played, sums, torch.nan)[:, :episodes]

    def finished_returns(self) -> Tensor:
        """Return the returns of all episodes that terminated or were truncated, ``(episodes,)``, task by task."""
        finished = ((self.terminations | self.truncations) & self.mask).sum(1, keepdim=True)
        returns = self.episode_returns(max(1, int(finished.max())))
        return returns[torch.arange(returns.shape[1], device=returns.device) < finished]

    def advantages(self, gamma: float = 0.99, gae_lambda: float = 0.95, *, across_episodes: bool = False) -> Tensor:
        """:func:`eaml_ext.rl.losses.advantages`, of each episode for itself or of the whole trial.

        ``across_episodes`` lets an action answer for what it brings in later episodes of its trial, as exploration
        does; the end of an episode then costs nothing by itself.
        """
        _check.flag("Trials.advantages", "across_episodes", across_episodes)
        if not across_episodes:
            return advantages(
                self.rewards, self.values, self.next_values, self.terminations, self.ends, gamma, gae_lambda
            )
        last = self.mask & ~F.pad(self.mask[:, 1:], (0, 1))
        following = torch.cat([self.values[:, 1:], self.next_values[:, -1:]], dim=1)
        following = torch.where(last, self.next_values, following)
        return advantages(
            self.rewards, self.values, following, self.terminations & last, last | ~self.mask, gamma, gae_lambda
        )


def rollout(
    dist: TaskDistribution[Any],
    tasks: Sequence[Task],
    policy: Recurrent,
    seed: int,
    *,
    episodes: int | None = None,
    steps: int | None = None,
    keep_state: bool = True,
    greedy: bool = False,
    max_episode_steps: int = MAX_EPISODE_STEPS,
) -> Trials:
    """Act in all ``tasks`` side by side, the policy stepped as one batch, for so many episodes or steps of each.

    The result is a pure function of the arguments: starts and actions are drawn from the seed *and* the tasks' ids.
    Gymnasium's vector environments spend a call on starting the next episode (autoreset mode NEXT_STEP): it is left
    out, moves nothing, and leaves the policy's state alone, but lets the critic see the final observation.

    Args:
        dist: the distribution the tasks were sampled from.
        tasks: one environment each; repeat a task to play it several times over.
        policy: as :class:`Recurrent`; its observations have ``feature_dim(dist)`` entries, see ``Trials.inputs``.
        seed: an integer in [0, 2**32).
        episodes: play so many whole episodes of each task; or
        steps: so many steps, whatever they hold. One of the two.
        keep_state: the policy remembers from episode to episode (RL²); else each starts from nothing.
        greedy: the likeliest action in place of a drawn one.
        max_episode_steps: with ``episodes``, the number of steps within which every episode must end. It keeps an
            environment without a time limit from being played forever.

    Raises:
        TypeError, ValueError: naming the argument, before anything is simulated.
        ValueError: an episode has not ended within ``max_episode_steps``.
        NonFiniteError: a reward, an observation or an action distribution is not finite. This ValueError names the
            environment, the task and the step.

    >>> from eaml_ext import tasks
    >>> from eaml_ext.rl import SSMMetaPolicy
    >>> distribution = tasks.CartPoleTasks(hide_velocity=True)
    >>> policy = SSMMetaPolicy(feature_dim(distribution), distribution.action_dim)
    >>> trials = rollout(distribution, distribution.sample(8), policy, seed=0, episodes=3)
    >>> trials.episode_returns(3).shape
    torch.Size([8, 3])
    """
    from gymnasium.spaces import Box, Discrete
    from gymnasium.vector import AutoresetMode

    where = "rollout"
    if isinstance(dist, type) or not isinstance(dist, TaskDistribution):
        raise TypeError(f"{where}: dist must be a task distribution as of make_tasks, got {type(dist).__name__}")
    check_tasks(where, tasks, Task)
    seed = check_seed(where, "seed", seed)
    if not (hasattr(policy, "step") and hasattr(policy, "init_hidden")):
        raise TypeError(f"{where}: policy must have step and init_hidden, got {type(policy).__name__}")
    ((unit, length),) = check_length(where, episodes, steps).items()
    max_episode_steps = _check.positive(where, "max_episode_steps", max_episode_steps, integer=True)
    _check.flag(where, "keep_state", keep_state)
    _check.flag(where, "greedy", greedy)

    env_seed, action_seed = (int(word) for word in collection_stream(tasks, seed).generate_state(2))
    n, space, action_dim = len(tasks), dist.action_space, int(dist.action_dim)
    env = dist.make_env(tasks)
    record: dict[str, list[Any]] = {name: [] for name in ("input", "action", "log_prob", "value", "reset")}
    names = ("reward", "start", "termination", "truncation", "moved")
    happened: dict[str, list[np.ndarray]] = {name: [] for name in names}
    try:
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.NEXT_STEP:
            raise ValueError(f"{where}: dist must make environments in autoreset mode NEXT_STEP, got {mode}")
        seeds: Any = dist.reset_seeds(tasks, env_seed)
        # Copies: vector environments may hand out the same array again.
        observation = np.array(env.reset(seed=seeds)[0], np.float32).reshape(n, -1)
        check_finite(where, dist, tasks, np.zeros(n, int), observation=observation)
        with torch.no_grad():
            state = policy.init_hidden(n)
            device = state.device
            generator = torch.Generator(device).manual_seed(action_seed)
            last_action = torch.zeros(n, action_dim, device=device)
            last_reward, start, done = np.zeros(n, np.float32), np.ones(n, bool), np.zeros(n, bool)
            ended, moves, since_start, first = np.zeros(n, int), np.zeros(n, int), np.zeros(n, int), True
            while True:
                seen = torch.from_numpy(observation).to(device)
                flags = torch.from_numpy(np.stack([last_reward, start.astype(np.float32)], axis=1)).to(device)
                inputs = torch.cat([seen, last_action, flags], dim=1)
                reset = torch.from_numpy(start & (first or not keep_state)).to(device)
                distribution, value, following = policy.step(inputs, state, reset)
                record["value"].append(value)
                alive = (ended if unit == "episodes" else moves) < length
                if not alive.any():
                    break
                check_finite(where, dist, tasks, moves, **{"policy's action distribution": _numbers(distribution)})
                action = _choose(distribution, generator, greedy)
                for name, tensor in (("input", inputs), ("action", action), ("reset", reset)):
                    record[name].append(tensor)
                record["log_prob"].append(distribution.log_prob(action))
                chosen: Any = action.cpu().numpy()
                if isinstance(space, Discrete):
                    chosen = chosen.astype(space.dtype) + space.start
                elif isinstance(space, Box):
                    chosen = chosen.reshape(n, *space.shape).clip(space.low, space.high).astype(space.dtype)
                observation, reward, terminated, truncated, _ = env.step(chosen)

                dead = done  # the environment reset instead of moving
                moved = alive & ~dead
                done = np.logical_or(terminated, truncated)
                moves, ended = moves + moved, ended + (done & moved)
                # Zeros for tasks that have played all they should: what they return is not recorded.
                observation = np.where(alive[:, None], np.array(observation, np.float32).reshape(n, -1), 0.0)
                reward = np.where(moved, np.array(reward, np.float32), 0.0)
                check_finite(where, dist, tasks, moves, reward=reward, observation=observation)
                happened["reward"].append(reward)
                happened["start"].append(start)
                happened["termination"].append(np.array(terminated, bool))
                happened["truncation"].append(np.array(truncated, bool))
                happened["moved"].append(moved)
                since_start = np.where(dead, 0, since_start + moved)
                endless = moved & ~done & (since_start >= max_episode_steps)
                if unit == "episodes" and endless.any():
                    i = int(endless.argmax())
                    place = f"tasks[{i}] of {dist.name}, {tasks[i].id}"
                    text = f"episodes must end within max_episode_steps, got {max_episode_steps} steps without an end"
                    raise ValueError(f"{where}: {text} in {place}")
                frozen = torch.from_numpy(dead).to(device)
                state = torch.where(frozen.view(-1, *[1] * (state.dim() - 1)), state, following)
                encoded = F.one_hot(action, action_dim).float() if isinstance(space, Discrete) else action
                start, first = dead, False
                if keep_state:
                    last_action = torch.where(frozen[:, None], last_action, encoded)
                    last_reward = np.where(dead, last_reward, reward).astype(np.float32)
                else:
                    last_action = encoded.masked_fill(frozen[:, None], 0.0)
                    last_reward = np.where(dead, 0.0, reward).astype(np.float32)
    finally:
        env.close()

    # (tasks, time): the calls at which each task moved, first to last; what follows them is padding.
    order = np.argsort(~np.array(happened["moved"]), axis=0, kind="stable")[: moves.max()].T
    calls = torch.from_numpy(np.ascontiguousarray(order)).to(device)
    rows = torch.arange(n, device=device)[:, None]
    stacked = {name: torch.stack(column) for name, column in record.items()}
    stacked |= {name: torch.from_numpy(np.array(column)).to(device) for name, column in happened.items()}
    mask = torch.from_numpy(np.arange(order.shape[1]) < moves[:, None]).to(device)
    final = torch.from_numpy(np.arange(order.shape[1]) >= moves[:, None] - 1).to(device)
    terminations, truncations = (stacked[name][calls, rows] & mask for name in ("termination", "truncation"))
    return Trials(
        inputs=stacked["input"][calls, rows],
        actions=stacked["action"][calls, rows],
        log_probs=stacked["log_prob"][calls, rows],
        values=stacked["value"][calls, rows],
        next_values=stacked["value"][calls + 1, rows],
        rewards=stacked["reward"][calls, rows].masked_fill(~mask, 0.0),
        starts=stacked["start"][calls, rows] & mask,
        terminations=terminations,
        ends=terminations | truncations | final,
        mask=mask,
        resets=stacked["reset"][calls, rows] & mask,
        truncations=truncations,
    )


def _numbers(distribution: Distribution) -> np.ndarray:
    """Probabilities, or sums of mean and standard deviation: finite where the parameters are."""
    if isinstance(distribution, Categorical):
        numbers: Tensor = distribution.probs
    else:
        numbers = distribution.mean + distribution.stddev
    return np.asarray(numbers.float().cpu())


def _choose(distribution: Distribution, generator: torch.Generator, greedy: bool) -> Tensor:
    """Actions drawn with ``generator``, which ``Distribution.sample`` does not take."""
    if isinstance(distribution, Categorical):
        if greedy:
            return distribution.logits.argmax(-1)
        return torch.multinomial(distribution.probs, 1, generator=generator).squeeze(-1)
    if greedy:
        return distribution.mean
    noise = torch.randn(distribution.mean.shape, generator=generator, device=distribution.mean.device)
    return distribution.mean + distribution.stddev * noise
