"""A vector environment with scripted episodes, rewards and faults."""

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from eaml_ext.tasks import Task


class ScriptedEnv(VectorEnv):
    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, script, tasks):
        self.script, self.num_envs, space = script, len(tasks), script.action_space
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (2,))
        self.observation_space = batch_space(self.single_observation_space, len(tasks))
        self.single_action_space, self.action_space = space, batch_space(space, len(tasks))

    def reset(self, *, seed=None, options=None):
        self.episode, self.time, self.moves = np.zeros((3, self.num_envs), int)
        self.done = np.zeros(self.num_envs, bool)
        return self._faulty("observation", self._observe()), {}

    def step(self, action):
        resets, script = self.done, self.script
        self.episode = self.episode + resets
        self.time = np.where(resets, 0, self.time + 1)
        self.moves = self.moves + ~resets
        returns = np.array(script.returns)[self.episode % len(script.returns)]
        self.done = ~resets & (self.time >= script.length)
        reward = self._faulty("reward", np.where(self.done, returns, 0.0))
        ends = (np.zeros_like(self.done), self.done) if script.truncates else (self.done, np.zeros_like(self.done))
        return self._faulty("observation", self._observe()), reward, *ends, {}

    def _observe(self):
        return np.stack([self.episode, self.time], axis=1).astype(np.float32)

    def _faulty(self, kind, values):
        if self.script.fault is not None:
            faulty, row, move, value = self.script.fault
            if faulty == kind and self.moves[row] == move:
                values[row] = value
        return values


class Script:
    """A task distribution whose episodes have ``length`` steps and the returns ``returns``, cyclically.

    Args:
        returns: the reward of the last step of each episode; other steps have reward 0.
        length: steps of an episode; inf: episodes do not end.
        truncates: episodes end by a time limit, not by a termination.
        continuous: actions are in a Box.
        fault: ("reward" or "observation", row, step of that row, value): the value replaces the scripted one.
    """

    name, obs_dim = "script-v1", 2

    def __init__(self, returns=(1.0,), length=1, *, truncates=False, continuous=False, fault=None):
        self.returns, self.length, self.truncates, self.fault = returns, length, truncates, fault
        self.action_space = spaces.Box(-1.0, 1.0, (1,)) if continuous else spaces.Discrete(3)
        self.action_dim = np.int64(1) if continuous else self.action_space.n

    def sample(self, n, split="train", seed=0, epoch=0):
        return [Task(f"script/{split}/{seed}/{epoch}/{i}", split) for i in range(n)]

    def make_env(self, tasks):
        return ScriptedEnv(self, tasks)

    def reset_seeds(self, tasks, seed):
        return seed
