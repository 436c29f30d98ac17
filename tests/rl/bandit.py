"""Bandits, which are identified only by acting: episodes have one step; one arm has reward ``scale``, the others 0."""

from dataclasses import dataclass

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from eaml_ext.tasks import Task


@dataclass(frozen=True)
class Arm(Task):
    arm: float


class BanditEnv(VectorEnv):
    """Continuous arms are in [-1, 1]; the reward is ``scale`` times 1 minus the squared distance of the action."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, tasks, space, scale):
        self.scale = scale
        self.num_envs, self.arms = len(tasks), np.array([task.arm for task in tasks])
        self.single_observation_space = spaces.Box(0, 1, (1,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, len(tasks))
        self.single_action_space, self.action_space = space, batch_space(space, len(tasks))

    def reset(self, *, seed=None, options=None):
        self.done = np.zeros(self.num_envs, bool)
        return np.zeros((self.num_envs, 1), np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        action = action.reshape(self.num_envs)
        continuous = isinstance(self.single_action_space, spaces.Box)
        reward = 1 - (action - self.arms) ** 2 if continuous else (action == self.arms).astype(float)
        reward, done = np.where(self.done, 0.0, self.scale * reward), ~self.done
        self.done = done
        return done[:, None].astype(np.float32), reward, done, np.zeros_like(done), {}


class Bandit:
    obs_dim = 1

    def __init__(self, arms=4, continuous=False, scale=1.0):
        self.scale = scale
        self.arms, self.continuous, self.name = arms, continuous, "bandit-v1"
        self.action_dim = 1 if continuous else arms
        # The first arm is not action 0, because a Discrete space may start anywhere.
        self.action_space = spaces.Box(-1.0, 1.0, (1,)) if continuous else spaces.Discrete(arms, start=5)

    def sample(self, n, split="train", seed=0, epoch=0):
        generator = np.random.default_rng([("train", "valid", "test").index(split), seed, epoch])
        arms = generator.uniform(-1, 1, n) if self.continuous else 5 + generator.integers(self.arms, size=n)
        return [Arm(f"bandit/{split}/{seed}/{epoch}/{i}", split, float(arm)) for i, arm in enumerate(arms)]

    def make_env(self, tasks):
        return BanditEnv(tasks, self.action_space, self.scale)

    def reset_seeds(self, tasks, seed):
        return seed
