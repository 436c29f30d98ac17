"""Robots of MuJoCo whose task is in the reward: a velocity or a direction that no observation shows."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._random import check_seed
from eaml_ext.tasks.base import Task, check_sample, check_tasks, task_stream

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv

EPISODE = 200
"""Steps of an episode, as in Finn et al. 2017."""

FASTEST = 2.0
"""Goal velocities are drawn from [0, FASTEST], m/s, as there."""


@dataclass(frozen=True)
class VelocityTask(Task):
    """Run at ``velocity``, m/s along x."""

    velocity: float


@dataclass(frozen=True)
class DirectionTask(Task):
    """Run towards ``angle``, rad in the plane: 0 is forward (x), pi backward."""

    angle: float


class _MuJoCoTasks(ABC):
    """One of Gymnasium's robots, in whose reward a goal takes the place of running forward."""

    name: str
    obs_dim: int
    action_dim: int
    _env: tuple[str, dict[str, Any]]  # id and options
    _kind: type[Task]
    _control_cost: float  # weight of the squared action in the reward
    _velocities: int  # so many entries at the end of an observation, the body's along x first

    def __init__(self) -> None:
        if find_spec("mujoco") is None:
            raise ImportError(f"{type(self).__name__}: needs MuJoCo, which pip install 'eaml_ext[mujoco]' brings")

    @property
    def action_space(self) -> Space[Any]:
        """Torques in [-1, 1], one for each joint."""
        from gymnasium.spaces import Box

        return Box(-1.0, 1.0, (self.action_dim,), np.float32)

    def sample(self, n: int, split: str = "train", seed: int = 0, epoch: int = 0) -> list[Any]:
        """The first ``n`` tasks of the stream (split, seed, epoch), a pure function of its arguments.

        ``split`` is "train", "valid" or "test"; ``seed`` and ``epoch`` are integers in [0, 2**32). Task i is the same
        whatever ``n``. Raises TypeError or ValueError naming the argument.
        """
        n, split, seed, epoch = check_sample(f"{type(self).__name__}.sample", n, split, seed, epoch)
        return [self._task(f"{self.name}/{split}/{seed}/{epoch}/{i}", split, seed, epoch, i) for i in range(n)]

    def make_env(self, tasks: Sequence[Any]) -> VectorEnv[Any, Any, Any]:
        """One robot per task, stepped in turn, in episodes of 200 steps; environment i has the reward of ``tasks[i]``.

        Raises TypeError or ValueError unless ``tasks`` is a non-empty sequence of this distribution's.
        """
        import gymnasium

        check_tasks(f"{type(self).__name__}.make_env", tasks, self._kind)
        name, options = self._env
        spec = copy.deepcopy(gymnasium.spec(name))
        spec.max_episode_steps = EPISODE
        env = gymnasium.make_vec(spec, len(tasks), vectorization_mode="sync", **options)
        rewarded: gymnasium.vector.VectorEnv[Any, Any, Any] = _goal_reward(env, self, tasks)
        return rewarded

    def reset_seeds(self, tasks: Sequence[Any], seed: int) -> int:
        """The collection's seed itself: all the starting states come from it, the tasks differ in the reward only."""
        return check_seed(f"{type(self).__name__}.reset_seeds", "seed", seed)

    def outcomes(self, tasks: Sequence[Any], obs: Tensor, action: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        """What a step is worth, and whether it ends the episode, as far as observations tell. For a planner.

        The velocity is the mean of those before and after the step, where the simulator's is the mean over it; the
        cost of contacts (Ant) is left out.

        Args:
            tasks: one for each row of the first dimension.
            obs, action, next_obs: ``(len(tasks), *, obs_dim)``, ``(len(tasks), *, action_dim)``.

        Returns:
            Rewards and terminations (bool), ``(len(tasks), *)``.

        Raises:
            TypeError, ValueError: ``tasks`` as for :meth:`make_env`, a tensor of another shape.
        """
        where = f"{type(self).__name__}.outcomes"
        check_tasks(where, tasks, self._kind)
        widths = (("obs", obs, self.obs_dim), ("action", action, self.action_dim), ("next_obs", next_obs, self.obs_dim))
        for name, value, width in widths:
            _check.tensor(where, name, value)
            if value.dim() < 2 or (len(value), value.shape[-1]) != (len(tasks), width):
                raise ValueError(
                    f"{where}: {name} must have shape ({len(tasks)}, *, {width}), got {tuple(value.shape)}"
                )
        first = self.obs_dim - self._velocities
        velocity = ((obs + next_obs) / 2)[..., first : first + 2]
        goals = obs.new_tensor(self._goals(tasks)).view(len(tasks), *[1] * (obs.dim() - 2), -1)
        reward = self._reward(velocity, goals) - self._control_cost * action.square().sum(-1)
        return self._survival(reward, next_obs)

    @abstractmethod
    def _task(self, name: str, split: str, seed: int, epoch: int, index: int) -> Task:
        """Task ``index`` of the stream."""

    @abstractmethod
    def _goals(self, tasks: Sequence[Any]) -> list[list[float]]:
        """What :meth:`_reward` takes, a row for each task."""

    @abstractmethod
    def _reward(self, velocity: Any, goals: Any) -> Any:
        """``(..., 2)`` velocities of the body, tensors or arrays, -> rewards. Of Ant they are those along x and y."""

    def _survival(self, reward: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        return reward, torch.zeros_like(reward, dtype=torch.bool)


def _goal_reward(environment: Any, dist: _MuJoCoTasks, tasks: Sequence[Any]) -> Any:
    """The vector environment with rewards of the tasks' goals."""
    import gymnasium
    from gymnasium.vector import VectorWrapper

    class GoalReward(VectorWrapper):
        goals = np.array(dist._goals(tasks))
        ended = np.zeros(len(tasks), bool)  # at the step before

        def step(self, actions: Any) -> Any:
            observation, reward, terminated, truncated, info = self.env.step(actions)
            moved = info.get("_reward_forward", np.zeros(len(reward), bool))
            if not (moved | self.ended).all():  # an environment moves unless this call starts its next episode
                text = f"gymnasium {gymnasium.__version__} does not report reward_forward, which the goal replaces"
                raise ValueError(f"{dist.name}: {text}: install a version that eaml_ext supports")
            if moved.any():
                x, y = info["x_velocity"], info.get("y_velocity", np.zeros(len(reward)))
                goal = dist._reward(np.stack([x, y], -1), self.goals)
                reward = np.where(moved, reward - info["reward_forward"] + goal, reward)
            self.ended = terminated | truncated
            return observation, reward, terminated, truncated, info

    return GoalReward(environment)


class _Directions(_MuJoCoTasks):
    _kind = DirectionTask

    def _goals(self, tasks: Sequence[DirectionTask]) -> list[list[float]]:
        return [[math.cos(task.angle), math.sin(task.angle)] for task in tasks]

    def _reward(self, velocity: Any, goals: Any) -> Any:
        return (velocity * goals).sum(-1)


class _Cheetah(_MuJoCoTasks):
    obs_dim, action_dim = 17, 6
    _env = ("HalfCheetah-v5", {})
    _control_cost = 0.1
    _velocities = 9


class HalfCheetahVelocityTasks(_Cheetah):
    """A half-cheetah that is to run at a velocity of its own, uniform in [0, 2] m/s (Finn et al. 2017, section 5.3).

    Gymnasium's HalfCheetah-v5 in episodes of 200 steps; the reward is ``-|v - velocity| - 0.1 |a|²``, so that no
    return is above 0 and one that stands still gets -200 · velocity. No observation shows the goal: it is to be found
    out from rewards. The version in ``name`` fixes all this and the seeding.

    Raises ImportError where MuJoCo is not installed.
    """

    name = "HalfCheetah-v5-velocity-v1"
    _kind = VelocityTask

    def _task(self, name: str, split: str, seed: int, epoch: int, index: int) -> VelocityTask:
        generator = np.random.default_rng(task_stream(split, seed, epoch, index))
        return VelocityTask(name, split, velocity=float(FASTEST * generator.random()))

    def _goals(self, tasks: Sequence[VelocityTask]) -> list[list[float]]:
        return [[task.velocity] for task in tasks]

    def _reward(self, velocity: Any, goals: Any) -> Any:
        return -abs(velocity[..., 0] - goals[..., 0])


class HalfCheetahDirectionTasks(_Cheetah, _Directions):
    """A half-cheetah that is to run forward in one task of each pair (2i, 2i+1), which one by a coin, else backward.

    Gymnasium's HalfCheetah-v5 in episodes of 200 steps; the reward is ``±v - 0.1 |a|²`` (Finn et al. 2017, section
    5.3). There are these two tasks and no more: what the splits do not share is their order and the starts.

    Raises ImportError where MuJoCo is not installed.
    """

    name = "HalfCheetah-v5-direction-v1"

    def _task(self, name: str, split: str, seed: int, epoch: int, index: int) -> DirectionTask:
        pair, second = divmod(index, 2)
        generator = np.random.default_rng(task_stream(split, seed, epoch, pair))
        return DirectionTask(name, split, angle=math.pi * (int(generator.integers(2)) ^ second))


class AntDirectionTasks(_Directions):
    """A four-legged robot that is to run towards a direction of its own, uniform in the plane.

    Gymnasium's Ant-v5 in episodes of 200 steps, without contact forces among the observations; the reward is the
    velocity's component in that direction, 1 for being upright, less 0.5 |a|² and the cost of contacts. An episode ends
    when the torso leaves [0.2, 1] m.

    Raises ImportError where MuJoCo is not installed.
    """

    name = "Ant-v5-direction-v1"
    obs_dim, action_dim = 27, 8
    _env = ("Ant-v5", {"include_cfrc_ext_in_observation": False})
    _control_cost = 0.5
    _velocities = 14

    def _task(self, name: str, split: str, seed: int, epoch: int, index: int) -> DirectionTask:
        generator = np.random.default_rng(task_stream(split, seed, epoch, index))
        return DirectionTask(name, split, angle=float(2 * math.pi * generator.random()))

    def _survival(self, reward: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        height = next_obs[..., 0]
        healthy = (height >= 0.2) & (height <= 1.0) & next_obs.isfinite().all(-1)
        return reward + healthy, ~healthy
