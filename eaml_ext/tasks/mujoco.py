"""Robots of MuJoCo whose task is in the reward: a goal velocity or direction that observations do not contain."""

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

from eaml_ext.tasks.base import ControlTasks, Task, check_rows, check_tasks, task_stream

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv

EPISODE_STEPS = 200
"""Steps of an episode, as in Finn et al. 2017."""

MAX_VELOCITY = 2.0
"""Goal velocities are uniform in [0, MAX_VELOCITY], m/s, as in Finn et al. 2017."""


@dataclass(frozen=True)
class VelocityTask(Task):
    """Run along x at ``velocity``, m/s."""

    velocity: float


@dataclass(frozen=True)
class DirectionTask(Task):
    """Run in the direction ``angle``, rad in the plane; 0 is forward (x), pi backward."""

    angle: float


class _MuJoCoTasks(ControlTasks[Any], ABC):
    """One of Gymnasium's robots; the reward of a goal replaces the reward of running forward."""

    obs_dim: int
    action_dim: int
    _env: tuple[str, dict[str, Any]]  # Gymnasium id and options
    _kind: type[Task]
    _control_cost: float  # weight of the squared action in the reward
    _num_velocities: int  # velocities are the last entries of an observation, the body's along x first

    def __init__(self) -> None:
        if find_spec("mujoco") is None:
            raise ImportError(f"{type(self).__name__}: needs MuJoCo, which pip install 'eaml_ext[mujoco]' brings")

    @property
    def action_space(self) -> Space[Any]:
        """``Box(-1, 1, (action_dim,))``: one torque for each joint."""
        from gymnasium.spaces import Box

        return Box(-1.0, 1.0, (self.action_dim,), np.float32)

    def _draw_tasks(self, ids: Sequence[str], split: str, seed: int, epoch: int) -> list[Any]:
        return [self._draw_task(task_id, split, seed, epoch, index) for index, task_id in enumerate(ids)]

    def make_env(self, tasks: Sequence[Any]) -> VectorEnv[Any, Any, Any]:
        """Return one robot per task, in episodes of 200 steps; environment i has the reward of ``tasks[i]``.

        Raises:
            TypeError, ValueError: ``tasks`` is no non-empty sequence of tasks of this distribution.
        """
        import gymnasium

        check_tasks(f"{type(self).__name__}.make_env", tasks, self._kind)
        name, options = self._env
        spec = copy.deepcopy(gymnasium.spec(name))
        spec.max_episode_steps = EPISODE_STEPS
        env = gymnasium.make_vec(spec, len(tasks), vectorization_mode="sync", **options)
        rewarded: gymnasium.vector.VectorEnv[Any, Any, Any] = _goal_reward(env, self, tasks)
        return rewarded

    def outcomes(self, tasks: Sequence[Any], obs: Tensor, action: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return rewards and terminations of transitions, as far as they are functions of the observations.

        A planner passes predicted observations. The velocity is the mean of those before and after the step, where the
        simulator has the mean over the step. Ant's cost of contacts is left out.

        Args:
            tasks: one for each row of the first dimension.
            obs: ``(len(tasks), *, obs_dim)``, floating; before the step.
            action: ``(len(tasks), *, action_dim)``, floating.
            next_obs: ``(len(tasks), *, obs_dim)``, floating; after the step.

        Returns:
            Rewards ``(len(tasks), *)``, floating, and terminations ``(len(tasks), *)``, bool.

        Raises:
            TypeError, ValueError: ``tasks`` as for :meth:`make_env`, or a tensor has another shape.
        """
        where = f"{type(self).__name__}.outcomes"
        check_tasks(where, tasks, self._kind)
        widths = (("obs", obs, self.obs_dim), ("action", action, self.action_dim), ("next_obs", next_obs, self.obs_dim))
        for name, value, width in widths:
            check_rows(where, name, value, tasks, width)
        first = self.obs_dim - self._num_velocities
        velocity = ((obs + next_obs) / 2)[..., first : first + 2]
        goals = obs.new_tensor(self._goals(tasks)).view(len(tasks), *[1] * (obs.dim() - 2), -1)
        reward = self._reward(velocity, goals) - self._control_cost * action.square().sum(-1)
        return self._add_survival(reward, next_obs)

    @abstractmethod
    def _draw_task(self, task_id: str, split: str, seed: int, epoch: int, index: int) -> Task:
        """Return task ``index`` of the stream."""

    @abstractmethod
    def _goals(self, tasks: Sequence[Any]) -> list[list[float]]:
        """Return the argument ``goals`` of :meth:`_reward`, one row for each task."""

    @abstractmethod
    def _reward(self, velocity: Any, goals: Any) -> Any:
        """Return the rewards ``(...)`` of body velocities ``(..., 2)``, tensors or arrays: along x, for Ant x and y."""

    def _add_survival(self, reward: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``reward`` plus the reward of survival, and terminations."""
        return reward, torch.zeros_like(reward, dtype=torch.bool)


def _goal_reward(environment: Any, dist: _MuJoCoTasks, tasks: Sequence[Any]) -> Any:
    """Wrap the vector environment so that its rewards are those of the tasks' goals."""
    import gymnasium
    from gymnasium.vector import VectorWrapper

    class GoalReward(VectorWrapper):
        goals = np.array(dist._goals(tasks))
        ended = np.zeros(len(tasks), bool)  # by the last step

        def step(self, actions: Any) -> Any:
            observation, reward, terminated, truncated, info = self.env.step(actions)
            moved = info.get("_reward_forward", np.zeros(len(reward), bool))
            if not (moved | self.ended).all():  # all environments move, except those that this call resets
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
    _num_velocities = 9


class HalfCheetahVelocityTasks(_Cheetah):
    """A half-cheetah with a goal velocity, uniform in [0, 2] m/s (Finn et al. 2017, section 5.3).

    Gymnasium's HalfCheetah-v5 in episodes of 200 steps. The reward is ``-|v - velocity| - 0.1 |a|²``, so no return is
    above 0, and standing still returns -200 · velocity. Observations do not contain the goal; only rewards depend on
    it. The version in ``name`` fixes the tasks and the seeding.

    Raises:
        ImportError: MuJoCo is not installed.
    """

    name = "HalfCheetah-v5-velocity-v1"
    _kind = VelocityTask

    def _draw_task(self, task_id: str, split: str, seed: int, epoch: int, index: int) -> VelocityTask:
        generator = np.random.default_rng(task_stream(split, seed, epoch, index))
        return VelocityTask(task_id, split, velocity=float(MAX_VELOCITY * generator.random()))

    def _goals(self, tasks: Sequence[VelocityTask]) -> list[list[float]]:
        return [[task.velocity] for task in tasks]

    def _reward(self, velocity: Any, goals: Any) -> Any:
        return -abs(velocity[..., 0] - goals[..., 0])


class HalfCheetahDirectionTasks(_Cheetah, _Directions):
    """A half-cheetah that runs forward in one random task of each pair (2i, 2i+1), and backward in the other.

    Gymnasium's HalfCheetah-v5 in episodes of 200 steps; the reward is ``±v - 0.1 |a|²`` (Finn et al. 2017, section
    5.3). There are only these two tasks. The splits differ in the order of the tasks and in the starting states.

    Raises:
        ImportError: MuJoCo is not installed.
    """

    name = "HalfCheetah-v5-direction-v1"

    def _draw_task(self, task_id: str, split: str, seed: int, epoch: int, index: int) -> DirectionTask:
        pair, second = divmod(index, 2)
        generator = np.random.default_rng(task_stream(split, seed, epoch, pair))
        return DirectionTask(task_id, split, angle=math.pi * (int(generator.integers(2)) ^ second))


class AntDirectionTasks(_Directions):
    """A four-legged robot with a goal direction, uniform in the plane.

    Gymnasium's Ant-v5 in episodes of 200 steps; observations do not contain contact forces. The reward is the
    velocity's component in the goal direction, plus 1 for survival, minus 0.5 |a|² and the cost of contacts. An
    episode terminates when the torso leaves [0.2, 1] m.

    Raises:
        ImportError: MuJoCo is not installed.
    """

    name = "Ant-v5-direction-v1"
    obs_dim, action_dim = 27, 8
    _env = ("Ant-v5", {"include_cfrc_ext_in_observation": False})
    _control_cost = 0.5
    _num_velocities = 14

    def _draw_task(self, task_id: str, split: str, seed: int, epoch: int, index: int) -> DirectionTask:
        generator = np.random.default_rng(task_stream(split, seed, epoch, index))
        return DirectionTask(task_id, split, angle=float(2 * math.pi * generator.random()))

    def _add_survival(self, reward: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        height = next_obs[..., 0]
        healthy = (height >= 0.2) & (height <= 1.0) & next_obs.isfinite().all(-1)
        return reward + healthy, ~healthy
