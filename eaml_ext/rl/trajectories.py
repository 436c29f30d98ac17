"""Collect transitions from many tasks at once, one environment of a Gymnasium vector environment per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext.rl._rollout_loop import RolloutLoop, check_collection
from eaml_ext.tasks.base import Task, TaskDistribution, encode_action

if TYPE_CHECKING:
    from gymnasium.spaces import Space


@dataclass(frozen=True)
class Trajectories:
    """Transitions in the order in which they were made, equally many of every task, contiguous and on the CPU.

    An index applies to all tensors: ``trajectories[:, :10]`` holds the first ten transitions of each task.

    Attributes:
        observations: ``(tasks, steps, obs_dim)``, float32.
        actions: ``(tasks, steps, action_dim)``, float32; the policy's actions, as ``tasks.encode_action`` encodes them.
        next_observations: ``(tasks, steps, obs_dim)``, float32. At the end of an episode this is the episode's final
            observation, never the first one of the next episode.
        rewards: ``(tasks, steps)``, float32.
        resets: ``(tasks, steps)``, bool; an episode starts at this step. True at step 0. Elsewhere
            ``observations[:, t]`` equals ``next_observations[:, t - 1]``.
        terminations: ``(tasks, steps)``, bool; the episode terminated at this step. An episode that a time limit
            truncated has no flag here; the next step has ``resets``.
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
    """A callable ``policy(observations, resets, generator) -> actions`` for all tasks at once."""

    def __call__(self, observations: np.ndarray, resets: np.ndarray, generator: np.random.Generator) -> Any:
        """Return one action per task.

        Args:
            observations: ``(tasks, *observation shape)``, float32; ``(tasks, obs_dim)`` of another space than Box.
            resets: ``(tasks,)``, bool; an episode starts here, so that a policy with a state zeroes it.
            generator: the source of all randomness.

        Returns:
            An array of the vector environment's action space: ``(tasks,)`` integers or ``(tasks, *shape)`` floats.
        """


class RandomPolicy:
    """Repeat the last action with probability ``hold``, else draw a new one at random ("sticky actions").

    Gymnasium draws the actions: uniformly where the space is bounded, standard normal where it is not. They do not
    depend on observations, so they carry no information about the task, such as a flipped sign. Repeated actions reach
    higher velocities than independent ones, which average out. CartPole's episodes get shorter: 19 steps instead of
    21, and 17 with ``hold=0.5``. The default is that of Machado et al. (2018), "Revisiting the Arcade Learning
    Environment".

    Args:
        action_space: the Gymnasium action space of the vector environment.
        hold: in [0, 1).

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range.

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
        self._last: np.ndarray | None = None

    def __call__(self, observations: np.ndarray, resets: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        if self._last is None:
            # Gymnasium's spaces draw from a generator of their own.
            self._space.seed(int(generator.integers(2**31)))
            self._last = self._space.sample()
        else:
            hold = generator.random(len(self._last)) < self._hold
            hold = hold.reshape(-1, *(1,) * (self._last.ndim - 1))
            self._last = np.where(hold, self._last, self._space.sample())
        return self._last


def collect(
    dist: TaskDistribution[Any], tasks: Sequence[Task], steps: int, seed: int, policy: Policy | None = None
) -> Trajectories:
    """Act in all ``tasks`` at the same time until each has made ``steps`` transitions.

    The result is a pure function of the arguments and the policy's state. Starting states and actions depend on the
    seed *and* the tasks' ids, so one seed may serve every epoch. Episodes follow one another; the call in which
    Gymnasium resets an environment is no transition.

    Args:
        dist: the distribution of the tasks.
        tasks: one environment each.
        steps: transitions of each task, at least 1.
        seed: in [0, 2**32).
        policy: default: :class:`RandomPolicy`.

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range, before any environment is made; or
            the policy returned an array that the action space does not contain.
        ValueError: an environment returned values that do not fit Gymnasium's interface, such as an observation that
            does not fit its space.
        NonFiniteError: a reward or an observation is not finite. This ValueError names the environment, the task and
            the step.

    >>> from eaml_ext import tasks
    >>> distribution = tasks.make_tasks("CartPole-v1")
    >>> trajectories = collect(distribution, distribution.sample(4), steps=100, seed=0)
    >>> trajectories.observations.shape, trajectories.actions.shape
    (torch.Size([4, 100, 4]), torch.Size([4, 100, 2]))
    >>> support, query = trajectories[:, :10], trajectories[:, 10:]
    >>> support.next_observations.shape
    torch.Size([4, 10, 4])
    """
    seed = check_collection("collect", dist, tasks, seed)
    steps = _check.positive("collect", "steps", steps, integer=True)
    if policy is not None and not callable(policy):
        raise TypeError(f"collect: policy must be callable, got {type(policy).__name__}")

    with RolloutLoop("collect", dist, tasks, seed, steps=steps) as loop:
        generator = np.random.default_rng(loop.action_seed)
        act = RandomPolicy(loop.env.action_space) if policy is None else policy
        observations, actions = [loop.observation], []
        while loop.active.any():
            action = act(loop.observation, loop.episode_starts, generator)
            actions.append(_as_action(action, loop.env.action_space))
            loop.step(actions[-1])
            observations.append(loop.observation)
        action_space = getattr(loop.env, "single_action_space", dist.action_space)

    done = loop.transitions()
    rows = np.arange(len(tasks))[:, None]

    def gather(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.ascontiguousarray(np.array(values)[done.calls, rows])

    def flat(values: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(gather(values).reshape(len(tasks), steps, -1))

    return Trajectories(
        observations=flat(observations[:-1]),
        actions=encode_action(action_space, gather(actions)),
        next_observations=flat(observations[1:]),
        rewards=torch.from_numpy(np.ascontiguousarray(done.rewards)),
        resets=torch.from_numpy(np.ascontiguousarray(done.episode_starts)),
        terminations=torch.from_numpy(np.ascontiguousarray(done.terminations)),
    )


def _as_action(action: Any, space: Space[Any]) -> np.ndarray:
    """Return a policy's action as an array of ``space``; raise ValueError unless the space contains it."""
    array, dtype = np.asarray(action), np.dtype(space.dtype)
    if array.shape == space.shape and np.can_cast(array.dtype, dtype, "same_kind"):
        array = array.astype(dtype)
        if space.contains(array):
            return array
    raise ValueError(f"collect: policy must return actions of {space}, got {array.dtype} of shape {array.shape}")
