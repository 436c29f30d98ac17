"""Collect transitions from many tasks at once, one environment of a Gymnasium vector environment per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._random import check_seed
from eaml_ext.tasks.base import Task, TaskDistribution, check_tasks, collection_stream, encode_action

if TYPE_CHECKING:
    from gymnasium.spaces import Space


class NonFiniteError(ValueError):
    """An environment returned a reward or observation that is not finite, or a policy an action distribution."""


def check_finite(
    where: str, dist: TaskDistribution[Any], tasks: Sequence[Task], steps: np.ndarray, **values: np.ndarray
) -> None:
    """Raise NonFiniteError, naming the environment, the task and its step, unless all ``values`` are finite.

    Args:
        where: the function that names itself in the message.
        dist, tasks: whose environments returned the values.
        steps: ``(tasks,)`` integers, the number of steps that each task has made; negative: its values are not checked.
        values: ``(tasks, ...)`` floats by name.
    """
    for name, value in values.items():
        if np.isfinite(value).all():
            continue
        rows = value.reshape(len(tasks), -1)
        wrong = ~np.isfinite(rows).all(1) & (steps >= 0)
        if wrong.any():
            i = int(wrong.argmax())
            got = rows[i][~np.isfinite(rows[i])][0]
            place = f"step {steps[i]} of tasks[{i}] of {dist.name}, {tasks[i].id}"
            raise NonFiniteError(f"{where}: {name} must be finite, got {got} at {place}")


@dataclass(frozen=True)
class Trajectories:
    """Transitions in the order they happened, as many of every task; all tensors are contiguous and on the CPU.

    - ``observations``, ``next_observations``: float32 ``(tasks, steps, obs_dim)``. The next observation of a transition
      that ends an episode is the true final one, never the start of the next episode.
    - ``actions``: float32 ``(tasks, steps, action_dim)``, as the agent chose them, written by ``tasks.encode_action``.
    - ``rewards``: float32 ``(tasks, steps)``.
    - ``resets``: bool ``(tasks, steps)``, an episode starts at this step. Elsewhere ``observations[:, t]`` is
      ``next_observations[:, t - 1]``. True at step 0.
    - ``terminations``: bool ``(tasks, steps)``, the episode ended here of itself: nothing follows the next observation.
      An episode cut by a time limit shows in the following ``resets`` only.

    An index applies to all of them: ``trajectories[:, :10]`` holds the first ten transitions of each task.
    """

    observations: Tensor
    actions: Tensor
    next_observations: Tensor
    rewards: Tensor
    resets: Tensor
    terminations: Tensor

    def __getitem__(self, index: Any) -> Trajectories:
        return Trajectories(*(getattr(self, field.name)[index] for field in fields(self)))


class Policy(Protocol):
    """``policy(observations, resets, generator) -> actions`` for all tasks at once.

    ``observations`` are float32 ``(tasks, *observation shape)`` and ``resets`` bool ``(tasks,)``, true where an episode
    starts, for a policy that carries a state; all are numpy arrays. ``generator`` is the only randomness to use. The
    actions are an array of the vector environment's action space: ``(tasks,)`` integers or ``(tasks, *shape)`` floats.
    """

    def __call__(self, observations: np.ndarray, resets: np.ndarray, generator: np.random.Generator) -> Any: ...


class RandomPolicy:
    """Random actions, each held at every step with probability ``hold`` and else drawn anew ("sticky actions").

    ``action_space`` is that of the vector environment; Gymnasium draws from it: uniformly where bounded, standard
    normal where unbounded. Actions that ignore the observation keep a task's secret, such as a flipped sign, out of
    them: only the transitions tell. Holding reaches higher velocities than independent draws, which cancel out, at
    the price of shorter CartPole episodes (19 steps against 21; 17 with ``hold=0.5``). The default is that of Machado
    et al. (2018), Revisiting the Arcade Learning Environment.

    Raises TypeError unless ``action_space`` is a Gymnasium space and ``hold`` a number, ValueError unless ``hold`` is
    in [0, 1).

    >>> from gymnasium.spaces import MultiDiscrete
    >>> policy = RandomPolicy(MultiDiscrete([2, 2, 2]), hold=0.5)
    >>> policy(np.zeros((3, 4)), np.ones(3, dtype=bool), np.random.default_rng(0)).shape
    (3,)
    """

    def __init__(self, action_space: Space[Any], hold: float = 0.25) -> None:
        from gymnasium.spaces import Space

        if not isinstance(action_space, Space):
            raise TypeError(f"RandomPolicy: action_space must be a Gymnasium space, got {type(action_space).__name__}")
        self._hold = _check.positive("RandomPolicy", "hold", hold, zero=True)
        if self._hold >= 1:
            raise ValueError(f"RandomPolicy: hold must be < 1, got {self._hold!r}")
        self._space = action_space
        self._held: np.ndarray | None = None

    def __call__(self, observations: np.ndarray, resets: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        if self._held is None:
            # Gymnasium's spaces draw from a generator of their own.
            self._space.seed(int(generator.integers(2**31)))
            self._held = self._space.sample()
        else:
            hold = generator.random(len(self._held)) < self._hold
            hold = hold.reshape(-1, *(1,) * (self._held.ndim - 1))
            self._held = np.where(hold, self._held, self._space.sample())
        return self._held


def collect(
    dist: TaskDistribution[Any], tasks: Sequence[Task], steps: int, seed: int, policy: Policy | None = None
) -> Trajectories:
    """Act in all ``tasks`` side by side until each of them has given ``steps`` transitions.

    ``dist`` is the distribution the tasks were sampled from, ``steps`` at least 1, ``seed`` an integer in [0, 2**32),
    ``policy`` a ``Policy``; without one, ``RandomPolicy``. The result is a pure function of these arguments (and of the
    policy's state): starts and actions are drawn from the seed *and* the tasks' ids, so the same seed may serve every
    epoch. Episodes follow one another; the call at which Gymnasium starts the next one moves nothing and is left out.

    Raises TypeError or ValueError, naming the argument, before anything is simulated; ValueError when the policy
    returns something that the action space does not hold, or, naming environment, task and step, when a reward or an
    observation is not finite.

    >>> from eaml_ext import tasks
    >>> distribution = tasks.make_tasks("CartPole-v1")
    >>> trajectories = collect(distribution, distribution.sample(4), steps=100, seed=0)
    >>> trajectories.observations.shape, trajectories.actions.shape
    (torch.Size([4, 100, 4]), torch.Size([4, 100, 2]))
    >>> support, query = trajectories[:, :10], trajectories[:, 10:]
    >>> support.next_observations.shape
    torch.Size([4, 10, 4])
    """
    from gymnasium.vector import AutoresetMode

    if isinstance(dist, type) or not isinstance(dist, TaskDistribution):
        raise TypeError(f"collect: dist must be a task distribution as of make_tasks, got {type(dist).__name__}")
    check_tasks("collect", tasks, Task)
    steps = _check.positive("collect", "steps", steps, integer=True)
    seed = check_seed("collect", "seed", seed)
    if policy is not None and not callable(policy):
        raise TypeError(f"collect: policy must be callable, got {type(policy).__name__}")

    env_seed, policy_seed = (int(word) for word in collection_stream(tasks, seed).generate_state(2))
    generator = np.random.default_rng(policy_seed)
    env = dist.make_env(tasks)
    try:
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.NEXT_STEP:
            raise ValueError(f"collect: dist must make environments in autoreset mode NEXT_STEP, got {mode}")
        act = RandomPolicy(env.action_space) if policy is None else policy
        # Gymnasium annotates one seed, its environments that are stepped in turn take one each.
        seeds: Any = dist.reset_seeds(tasks, env_seed)
        current = env.reset(seed=seeds)[0]
        observations = [np.array(current, np.float32)]
        check_finite("collect", dist, tasks, np.zeros(len(tasks), int), observation=observations[0])
        actions, rewards, terminations, moved = [], [], [], []
        resets, done, counts = [np.ones(len(tasks), bool)], np.zeros(len(tasks), bool), np.zeros(len(tasks), int)
        while counts.min() < steps:
            action = _action(act(observations[-1], resets[-1], generator), env.action_space)
            current, reward, terminated, truncated, _ = env.step(action)
            observations.append(np.array(current, np.float32))
            actions.append(action)
            rewards.append(np.array(reward, np.float32))
            terminations.append(np.array(terminated, bool))
            # After the end of an episode the environment resets instead of moving: no transition, a start follows.
            moved.append(~done)
            resets.append(done)
            needed, counts = counts < steps, counts + moved[-1]
            numbers = {"reward": np.where(moved[-1], rewards[-1], 0.0), "observation": observations[-1]}
            check_finite("collect", dist, tasks, np.where(needed, counts, -1), **numbers)
            done = np.logical_or(terminated, truncated)
        single_action_space = env.single_action_space
    finally:
        env.close()

    # (tasks, steps): the calls at which each task made its first `steps` moves.
    calls = np.argsort(~np.array(moved), axis=0, kind="stable")[:steps].T
    rows = np.arange(len(tasks))[:, None]

    def gather(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.ascontiguousarray(np.array(values)[calls, rows])

    def flat(values: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(gather(values).reshape(len(tasks), steps, -1))

    return Trajectories(
        observations=flat(observations[:-1]),
        actions=encode_action(single_action_space, gather(actions)),
        next_observations=flat(observations[1:]),
        rewards=torch.from_numpy(gather(rewards)),
        resets=torch.from_numpy(gather(resets[:-1])),
        terminations=torch.from_numpy(gather(terminations)),
    )


def _action(action: Any, space: Space[Any]) -> np.ndarray:
    """The policy's answer as an array of ``space``; ValueError unless it is one."""
    array, dtype = np.asarray(action), np.dtype(space.dtype)
    if array.shape == space.shape and np.can_cast(array.dtype, dtype, "same_kind"):
        array = array.astype(dtype)
        if space.contains(array):
            return array
    raise ValueError(f"collect: policy must return actions of {space}, got {array.dtype} of shape {array.shape}")
