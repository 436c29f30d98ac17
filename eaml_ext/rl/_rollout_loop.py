"""The loop that steps one environment per task; :func:`eaml_ext.rl.collect` and :func:`eaml_ext.rl.rollout` use it."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from eaml_ext._random import check_seed
from eaml_ext.rl._vector_env import CheckedVectorEnv
from eaml_ext.tasks.base import Task, TaskDistribution, check_tasks, collection_stream


class NonFiniteError(ValueError):
    """A reward or an observation of an environment, or the action distribution of a policy, is not finite."""


class Transitions(NamedTuple):
    """The transitions of all tasks, ``(tasks, time)`` each; tasks with fewer than the most are padded at the end.

    Attributes:
        calls: int64; the number of the environment call that made each transition. Arbitrary in the padding.
        mask: bool; False in the padding.
        rewards: float32, 0 in the padding.
        episode_starts, terminations, truncations: bool, False in the padding.
    """

    calls: np.ndarray
    mask: np.ndarray
    rewards: np.ndarray
    episode_starts: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray


class RolloutLoop:
    """Step one environment per task until each task has made its steps or its episodes.

    In Gymnasium's autoreset mode NEXT_STEP the call after the end of an episode resets the environment. Such a call is
    no transition: it is not recorded and its reward is 0. A ``with`` block closes the environments.

    Attributes:
        env: the Gymnasium vector environment.
        action_seed: seed of the actions, a function of ``seed`` and the tasks' ids.
        observation: ``(tasks, *observation shape)``, float32; the current observations; ``(tasks, obs_dim)`` of
            another space than Box, as ``gymnasium.spaces.flatten`` flattens them.
        reward: ``(tasks,)``, float32; the rewards of the last call, 0 where it was no transition.
        episode_starts: ``(tasks,)``, bool; an episode starts at the current observation.
        num_steps: ``(tasks,)``, int64; transitions that each task has made.

    Args:
        where: the name of the public function, for error messages.
        dist: the distribution of the tasks.
        tasks: one environment each.
        seed: in [0, 2**32); starting states and ``action_seed`` depend on it and on the tasks' ids.
        steps: transitions of each task; or
        episodes: episodes of each task. Exactly one of the two is given.
        max_episode_steps: bound on the length of an episode, for ``episodes`` only.

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range.
        ValueError: the vector environment lacks an attribute, is not in autoreset mode NEXT_STEP, or returned values
            that do not fit Gymnasium's interface or ``dist.obs_dim``.
        NonFiniteError: an initial observation is not finite.
    """

    def __init__(
        self,
        where: str,
        dist: TaskDistribution[Any],
        tasks: Sequence[Task],
        seed: int,
        *,
        steps: int | None = None,
        episodes: int | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        self._where, self._dist, self._tasks = where, dist, tasks
        self._steps, self._episodes, self._max_episode_steps = steps, episodes, max_episode_steps
        env_seed, self.action_seed = (int(word) for word in collection_stream(tasks, seed).generate_state(2))
        n = len(tasks)
        self._vector = CheckedVectorEnv(where, dist, tasks)
        self.env = self._vector.env
        try:
            self.observation = self._vector.reset(dist.reset_seeds(tasks, env_seed))
            if self.observation.size != n * dist.obs_dim:
                text = f"obs_dim must be the size of an observation, {self.observation.size // n}, got {dist.obs_dim}"
                raise ValueError(f"{where}: {text} in {dist.name}")
            check_finite(where, dist, tasks, np.zeros(n, int), observation=self.observation)
        except BaseException:
            self._vector.close()
            raise
        self.reward, self.episode_starts = np.zeros(n, np.float32), np.ones(n, bool)
        self.num_steps, self._num_episodes = np.zeros(n, int), np.zeros(n, int)
        self._done, self._episode_steps = np.zeros(n, bool), np.zeros(n, int)
        names = ("moved", "reward", "episode_start", "termination", "truncation")
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def __enter__(self) -> RolloutLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._vector.close()

    @property
    def active(self) -> np.ndarray:
        """``(tasks,)``, bool: the task has steps or episodes left. Other tasks are stepped and not recorded."""
        if self._steps is not None:
            return self.num_steps < self._steps
        assert self._episodes is not None
        return self._num_episodes < self._episodes

    def step(self, action: np.ndarray) -> None:
        """Step all environments by ``action``, an array of the vector environment's action space.

        Raises:
            NonFiniteError: a reward or an observation of an active task is not finite.
            ValueError: an environment returned values that do not fit Gymnasium's interface, or an episode has not
                ended within ``max_episode_steps``.
        """
        self.observation, reward, terminations, truncations = self._vector.step(action)
        active, resetting = self.active, self._done
        moved = active & ~resetting
        self._done = terminations | truncations
        self.num_steps = self.num_steps + moved
        self._num_episodes = self._num_episodes + (self._done & moved)
        self.reward = np.where(moved, reward, 0.0)
        steps = np.where(active, self.num_steps, -1)
        values = {"reward": self.reward, "observation": self.observation}
        check_finite(self._where, self._dist, self._tasks, steps, **values)
        columns = (moved, self.reward, self.episode_starts, terminations, truncations)
        for column, value in zip(self._columns.values(), columns, strict=True):
            column.append(value)
        self.episode_starts = resetting
        self._check_episode_steps(moved)

    def transitions(self) -> Transitions:
        """Return the transitions recorded so far."""
        columns = {name: np.array(column) for name, column in self._columns.items()}
        # A stable sort puts the calls that moved a task first, in their order.
        calls = np.argsort(~columns.pop("moved"), axis=0, kind="stable")[: self.num_steps.max()].T
        mask = np.arange(calls.shape[1]) < self.num_steps[:, None]
        rows = np.arange(len(self._tasks))[:, None]
        reward, *flags = (column[calls, rows] for column in columns.values())
        return Transitions(calls, mask, reward, *(flag & mask for flag in flags))

    def _check_episode_steps(self, moved: np.ndarray) -> None:
        self._episode_steps = np.where(self.episode_starts, 0, self._episode_steps + moved)
        if self._max_episode_steps is None:
            return
        endless = moved & ~self._done & (self._episode_steps >= self._max_episode_steps)
        if endless.any():
            i, most = int(endless.argmax()), self._max_episode_steps
            text = f"episodes must end within max_episode_steps, got {most} steps without an end"
            raise ValueError(f"{self._where}: {text} in tasks[{i}] of {self._dist.name}, {self._tasks[i].id}")


def check_dist(where: str, dist: TaskDistribution[Any]) -> None:
    """Raise TypeError unless ``dist`` is a task distribution."""
    if isinstance(dist, type) or not isinstance(dist, TaskDistribution):
        raise TypeError(f"{where}: dist must be a task distribution as of make_tasks, got {type(dist).__name__}")


def check_collection(where: str, dist: TaskDistribution[Any], tasks: Sequence[Task], seed: int) -> int:
    """Return ``seed`` as an int; raise TypeError or ValueError unless the arguments describe a collection of data."""
    check_dist(where, dist)
    check_tasks(where, tasks, Task)
    return check_seed(where, "seed", seed)


def check_finite(
    where: str, dist: TaskDistribution[Any], tasks: Sequence[Task], steps: np.ndarray, **values: np.ndarray
) -> None:
    """Raise NonFiniteError, which names the environment, the task and its step, unless all ``values`` are finite.

    Args:
        where: the name of the public function, for the message.
        dist, tasks: the origin of the values.
        steps: ``(tasks,)``, integers; the transitions that each task has made. Values of a task with a negative number
            are not checked.
        values: ``(tasks, ...)``, floating; by name.
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
