"""Roll out a policy with memory in many tasks at once: trials of several episodes, one environment per task."""

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
from eaml_ext.rl._rollout_loop import RolloutLoop, check_collection, check_dist, check_finite
from eaml_ext.rl.losses import advantages
from eaml_ext.rl.policy import SSMMetaPolicy
from eaml_ext.tasks.base import Task, TaskDistribution

MAX_EPISODE_STEPS = 10_000


class Recurrent(Protocol):
    """The policy interface of :func:`rollout`, which :class:`eaml_ext.rl.SSMMetaPolicy` has."""

    def init_hidden(self, batch: int) -> Tensor:
        """Return the state before the first step, ``(batch, ...)``, on the policy's device."""

    def step(self, obs: Tensor, state: Tensor, reset: Tensor) -> tuple[Distribution, Tensor, Tensor]:
        """Advance by one time step.

        Args:
            obs: ``(batch, features)``, float32.
            state: ``(batch, ...)``; the state that the last step returned.
            reset: ``(batch,)``, bool; the state is zeroed before the step.

        Returns:
            The distribution of actions, of batch shape ``(batch,)``; values ``(batch,)``; the next state.
        """


def feature_dim(dist: TaskDistribution[Any]) -> int:
    """``obs_dim + action_dim + 2``: the ``state_dim`` of a policy in :func:`rollout`, see :class:`Trials`.

    >>> from eaml_ext.tasks import CartPoleTasks
    >>> feature_dim(CartPoleTasks())
    8
    """
    return int(dist.obs_dim) + int(dist.action_dim) + 2


def check_policy(where: str, policy: SSMMetaPolicy, dist: TaskDistribution[Any]) -> None:
    """Raise TypeError or ValueError unless ``policy`` fits observations and actions of ``dist``."""
    check_dist(where, dist)
    if not isinstance(policy, SSMMetaPolicy):
        raise TypeError(f"{where}: policy must be an SSMMetaPolicy, got {type(policy).__name__}")
    if policy.state_dim != feature_dim(dist) or policy.action_dim != dist.action_dim:
        wanted = f"state_dim {feature_dim(dist)} and action_dim {dist.action_dim}"
        raise ValueError(f"{where}: policy must have {wanted}, got {policy.state_dim} and {policy.action_dim}")


def check_length(where: str, episodes: Any, steps: Any) -> dict[str, int]:
    """Return name and value of the argument that is not None; raise unless one is, a positive integer."""
    if (episodes is None) == (steps is None):
        raise ValueError(f"{where}: one of episodes and steps must be given, got {episodes} and {steps}")
    name, value = ("steps", steps) if episodes is None else ("episodes", episodes)
    return {name: _check.positive(where, name, value, integer=True)}


@dataclass(frozen=True)
class Trials:
    """The record of one trial per task; trials shorter than the longest are padded at their end.

    An index applies to all tensors.

    Attributes:
        inputs: ``(tasks, time, features)``, float32; the policy's inputs. Features are the observation, the last action
            (one-hot if discrete), the last reward, and 1 where an episode starts. Last action and last reward are 0
            where the state is zeroed.
        actions: ``(tasks, time)``, int64 in [0, number of actions); or ``(tasks, time, action_dim)``, float32, before
            they were clipped to the bounds of the action space.
        log_probs: ``(tasks, time)``, float32; log-probabilities of the actions when they were taken.
        values: ``(tasks, time)``, float32; the policy's values of the observations acted on.
        next_values: ``(tasks, time)``, float32; its values of the next observations. At the end of an episode that is
            the episode's final observation, valued with the memory of that time.
        rewards: ``(tasks, time)``, float32.
        episode_starts: ``(tasks, time)``, bool; an episode starts at this step.
        terminations: ``(tasks, time)``, bool; the episode terminated at this step.
        episode_ends: ``(tasks, time)``, bool; the episode or the recording ended at this step. True in the padding that
            follows.
        mask: ``(tasks, time)``, bool; False in the padding.
        resets: ``(tasks, time)``, bool; the policy's state was zeroed before this step: at the start of the trial, or
            of every episode.
        truncations: ``(tasks, time)``, bool; a time limit ended the episode at this step.
    """

    inputs: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    next_values: Tensor
    rewards: Tensor
    episode_starts: Tensor
    terminations: Tensor
    episode_ends: Tensor
    mask: Tensor
    resets: Tensor
    truncations: Tensor

    def __getitem__(self, index: Any) -> Trials:
        return Trials(*(getattr(self, field.name)[index] for field in fields(self)))

    def episode_returns(self, episodes: int) -> Tensor:
        """Return the sums of rewards of each task's first ``episodes`` episodes.

        The end of the recording may have cut the last episode; :meth:`finished_returns` leaves such an episode out.

        Args:
            episodes: how many, > 0.

        Returns:
            ``(tasks, episodes)``, float32; NaN where a trial has fewer episodes.

        Raises:
            TypeError, ValueError: ``episodes`` is no positive integer.
        """
        episodes = _check.positive("Trials.episode_returns", "episodes", episodes, integer=True)
        rewards = self.rewards.masked_fill(~self.mask, 0.0)
        number = (self.episode_starts.long().cumsum(1) - 1).clamp(min=0)
        width = max(episodes, int(number.max()) + 1)
        sums = rewards.new_zeros(len(rewards), width).scatter_add_(1, number, rewards)
        recorded = torch.arange(width, device=number.device) <= number.masked_fill(~self.mask, 0).amax(1, keepdim=True)
        return torch.where(recorded, sums, torch.nan)[:, :episodes]

    def finished_returns(self) -> Tensor:
        """Return the returns of all episodes that terminated or were truncated, ``(episodes,)``, task by task."""
        finished = ((self.terminations | self.truncations) & self.mask).sum(1, keepdim=True)
        returns = self.episode_returns(max(1, int(finished.max())))
        return returns[torch.arange(returns.shape[1], device=returns.device) < finished]

    def advantages(self, gamma: float = 0.99, gae_lambda: float = 0.95, *, episodic: bool = True) -> Tensor:
        """Return :func:`eaml_ext.rl.advantages` of each episode, or of the trial as a whole.

        Args:
            gamma: discount of one step, in [0, 1].
            gae_lambda: in [0, 1].
            episodic: True: returns stop at the end of an episode. False: non-episodic returns (Burda et al. 2018,
                "Exploration by random network distillation") continue to the end of the trial. They credit exploration
                with the rewards of later episodes; the end of an episode costs nothing by itself.

        Returns:
            ``(tasks, time)``, without a gradient.

        Raises:
            TypeError, ValueError: an argument has another type or is out of its range.
        """
        _check.flag("Trials.advantages", "episodic", episodic)
        if episodic:
            return advantages(
                self.rewards, self.values, self.next_values, self.terminations, self.episode_ends, gamma, gae_lambda
            )
        last = self.mask & ~F.pad(self.mask[:, 1:], (0, 1))
        next_values = torch.cat([self.values[:, 1:], self.next_values[:, -1:]], dim=1)
        next_values = torch.where(last, self.next_values, next_values)
        return advantages(
            self.rewards, self.values, next_values, self.terminations & last, last | ~self.mask, gamma, gae_lambda
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
    """Roll out one trial in each of ``tasks``, all at the same time; the policy steps as one batch.

    The result is a pure function of the arguments. Starting states and actions depend on the seed *and* the tasks' ids.
    The call in which Gymnasium resets an environment (autoreset mode NEXT_STEP) is no transition and leaves the
    policy's state unchanged. In that call the critic values the final observation of the episode.

    Args:
        dist: the distribution of the tasks.
        tasks: one environment each; a task may be repeated.
        policy: its observations have ``feature_dim(dist)`` entries, see ``Trials.inputs``.
        seed: in [0, 2**32).
        episodes: episodes of each trial; or
        steps: steps of each trial. Exactly one of the two is given.
        keep_state: keep the policy's state from episode to episode (RL²); False: zero it at every start of an episode.
        greedy: take the most probable action instead of a sampled one.
        max_episode_steps: with ``episodes``, the number of steps within which every episode must end. It bounds the
            run in an environment without a time limit.

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range, before any environment is made.
        ValueError: an episode has not ended within ``max_episode_steps``, or an environment returned values that do
            not fit Gymnasium's interface, such as an observation that does not fit its space.
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
    where = "rollout"
    seed = check_collection(where, dist, tasks, seed)
    if not (hasattr(policy, "step") and hasattr(policy, "init_hidden")):
        raise TypeError(f"{where}: policy must have step and init_hidden, got {type(policy).__name__}")
    length = check_length(where, episodes, steps)
    max_steps = _check.positive(where, "max_episode_steps", max_episode_steps, integer=True)
    _check.flag(where, "keep_state", keep_state)
    _check.flag(where, "greedy", greedy)

    n, space, action_dim = len(tasks), dist.action_space, int(dist.action_dim)
    record: dict[str, list[Tensor]] = {name: [] for name in ("inputs", "actions", "log_probs", "values", "resets")}
    limit = max_steps if "episodes" in length else None
    with RolloutLoop(where, dist, tasks, seed, **length, max_episode_steps=limit) as loop, torch.no_grad():
        state = policy.init_hidden(n)
        device = state.device
        generator = torch.Generator(device).manual_seed(loop.action_seed)
        observation, start_of_trial = loop.observation.reshape(n, -1), True
        last_action, last_reward = torch.zeros(n, action_dim, device=device), np.zeros(n, np.float32)
        while True:
            starts = loop.episode_starts
            obs = torch.from_numpy(observation).to(device)
            scalars = torch.from_numpy(np.stack([last_reward, starts.astype(np.float32)], axis=1)).to(device)
            inputs = torch.cat([obs, last_action, scalars], dim=1)
            reset = torch.from_numpy(starts & (start_of_trial or not keep_state)).to(device)
            distribution, value, next_state = policy.step(inputs, state, reset)
            record["values"].append(value)
            active = loop.active
            if not active.any():
                break
            action_params = {"policy's action distribution": _finite_summary(distribution)}
            check_finite(where, dist, tasks, loop.num_steps, **action_params)
            action = _sample_action(distribution, generator, greedy)
            for name, tensor in (("inputs", inputs), ("actions", action), ("resets", reset)):
                record[name].append(tensor)
            record["log_probs"].append(distribution.log_prob(action))
            loop.step(_as_env_action(action, space))

            # Observations of tasks that have made all their steps are replaced by zeros and not recorded.
            observation = np.where(active[:, None], loop.observation.reshape(n, -1), 0.0)
            resetting, start_of_trial = loop.episode_starts, False
            frozen = torch.from_numpy(resetting).to(device)
            state = torch.where(frozen.view(-1, *[1] * (state.dim() - 1)), state, next_state)
            encoded = F.one_hot(action, action_dim).float() if _is_discrete(space) else action
            if not keep_state:
                last_action, last_reward = torch.zeros_like(last_action), np.zeros_like(last_reward)
            last_action = torch.where(frozen[:, None], last_action, encoded)
            last_reward = np.where(resetting, last_reward, loop.reward).astype(np.float32)

    done = loop.transitions()
    rows = torch.arange(n, device=device)[:, None]
    calls = torch.from_numpy(np.ascontiguousarray(done.calls)).to(device)
    columns = {name: torch.stack(column) for name, column in record.items()}
    mask, rewards, episode_starts, terminations, truncations = (
        torch.from_numpy(np.ascontiguousarray(column)).to(device) for column in done[1:]
    )
    final = torch.from_numpy(np.arange(mask.shape[1]) >= loop.num_steps[:, None] - 1).to(device)
    return Trials(
        inputs=columns["inputs"][calls, rows],
        actions=columns["actions"][calls, rows],
        log_probs=columns["log_probs"][calls, rows],
        values=columns["values"][calls, rows],
        next_values=columns["values"][calls + 1, rows],
        rewards=rewards,
        episode_starts=episode_starts,
        terminations=terminations,
        episode_ends=terminations | truncations | final,
        mask=mask,
        resets=columns["resets"][calls, rows] & mask,
        truncations=truncations,
    )


def _is_discrete(space: Any) -> bool:
    from gymnasium.spaces import Discrete

    return isinstance(space, Discrete)


def _as_env_action(action: Tensor, space: Any) -> np.ndarray:
    """Convert a policy's actions to an array of the environment: shifted to the space's start, or clipped to it."""
    from gymnasium.spaces import Box

    array: np.ndarray = action.cpu().numpy()
    if _is_discrete(space):
        array = array.astype(space.dtype) + space.start
    elif isinstance(space, Box):
        array = array.reshape(len(array), *space.shape).clip(space.low, space.high).astype(space.dtype)
    return array


def _finite_summary(distribution: Distribution) -> np.ndarray:
    """Return probabilities, or means plus standard deviations; they are finite where the parameters are."""
    if isinstance(distribution, Categorical):
        numbers: Tensor = distribution.probs
    else:
        numbers = distribution.mean + distribution.stddev
    return np.asarray(numbers.float().cpu())


def _sample_action(distribution: Distribution, generator: torch.Generator, greedy: bool) -> Tensor:
    """Sample with ``generator``, which ``Distribution.sample`` does not accept."""
    if isinstance(distribution, Categorical):
        if greedy:
            return distribution.logits.argmax(-1)
        return torch.multinomial(distribution.probs, 1, generator=generator).squeeze(-1)
    if greedy:
        return distribution.mean
    noise = torch.randn(distribution.mean.shape, generator=generator, device=distribution.mean.device)
    return distribution.mean + distribution.stddev * noise
