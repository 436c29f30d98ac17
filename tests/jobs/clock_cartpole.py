"""CartPole with further observations, and trajectories of one observation: inputs of the main job's tests."""

import gymnasium
import numpy as np
import torch

from eaml_ext.rl import Trajectories
from eaml_ext.tasks import SPLITS

EXTRA_OBSERVATIONS = {
    "clock": lambda t, noise: t,
    "clock in seconds": lambda t, noise: 0.02 * t,
    "constant": lambda t, noise: 5.0,
    "zero": lambda t, noise: 0.0,
    "rounding": lambda t, noise: 1 + 1e-7 * noise,
    "rounding of zero": lambda t, noise: 1e-16 * noise,
    "large clock": lambda t, noise: 1e6 + t,
    "large constant": lambda t, noise: 1e9,
    "large rounding": lambda t, noise: 1e6 + 0.05 * noise,
}


class ClockCartPole(gymnasium.Wrapper):
    """CartPole with observations appended that move by a constant, by rounding errors, or not at all."""

    def __init__(self, extra):
        super().__init__(gymnasium.make("CartPole-v1").unwrapped)
        self.extra, self.generator, self.t = extra, np.random.default_rng(0), 0
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4 + len(extra),), np.float32)

    def observe(self, observation):
        noise = self.generator.normal()
        return np.array([*observation, *(EXTRA_OBSERVATIONS[name](self.t, noise) for name in self.extra)], np.float32)

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        self.t = 0
        return self.observe(observation), info

    def step(self, action):
        observation, *rest = self.env.step(action)
        self.t += 1
        return (self.observe(observation), *rest)


class FaultyCartPole(ClockCartPole):
    """CartPole whose third step returns what is not finite, in the tasks of one split."""

    def __init__(self, split, reward, observation):
        super().__init__(())
        self.split, self.fault = split, {"reward": reward, "observation": observation}
        self.faulty = False

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.faulty = seed % 4 == SPLITS.index(self.split)  # the last two bits of a SeedTask's seed
        return super().reset(seed=seed, options=options)

    def step(self, action):
        observation, reward, *rest = super().step(action)
        if self.faulty and self.t == 3:
            observation[1] += self.fault["observation"]
            reward += self.fault["reward"]
        return (observation, reward, *rest)


def clock_tasks(*extra):
    """The registered name of a :class:`ClockCartPole`."""
    name = f"EamlClock{len(extra)}-v0"
    gymnasium.register(name, lambda: ClockCartPole(extra), max_episode_steps=500)
    return name


def transitions(column):
    """Trajectories of one task with a single observation, ``(time,)``."""
    column = torch.as_tensor(column, dtype=torch.float32).view(1, -1, 1)
    flags = torch.zeros(1, column.shape[1] - 1, dtype=torch.bool)
    return Trajectories(column[:, :-1], torch.zeros(*flags.shape, 1), column[:, 1:], flags.float(), flags, flags)
