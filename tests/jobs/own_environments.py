"""Environments of a user: each has one property that a job must cope with or name. The import registers them."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Point(gymnasium.Env):
    """A point on a line that the actions push to either side; the base of the other environments."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self):
        self.position, self.velocity, self.t, self.gain = 0.0, 0.0, 0, 1.0

    def observe(self):
        return np.array([self.position, self.velocity], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.velocity, self.t = float(self.np_random.normal()), 0.0, 0
        return self.observe(), {}

    def step(self, action):
        self.velocity = 0.9 * self.velocity + 0.1 * self.gain * (2 * int(action) - 1)
        self.position += self.velocity
        self.t += 1
        return self.observe(), -abs(self.position), False, False, {}


class Dict(Point):
    observation_space = spaces.Dict(
        {
            "motion": spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "side": spaces.Discrete(2, start=-1),
            "flags": spaces.MultiBinary(2),
            "pair": spaces.Tuple([spaces.Discrete(3), spaces.Box(0, 1, (), np.float32)]),
        }
    )

    def observe(self):
        flags = np.array([self.t % 2, self.t > 3], np.int8)
        pair = (np.int64(self.t % 3), np.array(0.5, np.float32))
        side = np.int64(-1 if self.position < 0 else 0)
        return {"motion": np.array([self.position, self.velocity]), "side": side, "flags": flags, "pair": pair}


class MultiDiscrete(Point):
    observation_space = spaces.MultiDiscrete([3, 4])

    def observe(self):
        return np.array([np.clip(self.position + 1, 0, 2), self.t % 4], np.int64)


class Pixels(Point):
    """An Atari-sized screen on which the point is a bright column."""

    observation_space = spaces.Box(0, 255, (210, 160, 3), np.uint8)

    def observe(self):
        screen = np.zeros((210, 160, 3), np.uint8)
        screen[:, int(np.clip(80 + 20 * self.position, 0, 159))] = 255
        return screen


class NotANumber(Point):
    def observe(self):
        return np.array([self.position, np.nan if self.t == 3 else 0.0], np.float32)


class Grows(Point):
    def observe(self):
        return np.array([self.position, self.velocity, 0.0][: 2 + (self.t >= 5)], np.float32)


class Unrewarded(Point):
    def step(self, action):
        observation, _, *others = super().step(action)
        return observation, None, *others


class FourValues(Point):
    """Follows the interface of Gym before 0.26."""

    def step(self, action):
        observation, reward, done, _, info = super().step(action)
        return observation, reward, done, info


class ResetAlone(Point):
    """Follows the interface of Gym before 0.26."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class Raises(Point):
    def step(self, action):
        if self.t == 3:
            raise RuntimeError("the simulator has crashed")
        return super().step(action)


class OneStep(Point):
    """A bandit with two arms."""

    observation_space = spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        gymnasium.Env.reset(self, seed=seed)
        return self.observe(), {}

    def observe(self):
        return np.int64(0)

    def step(self, action):
        return self.observe(), float(action), True, False, {}


class Constant(Point):
    def observe(self):
        return np.array([5.0, 0.0], np.float32)


class Clock(Point):
    def observe(self):
        return np.array([self.position, self.t], np.float32)


class PhysicsInReset(Point):
    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.gain = float(self.np_random.uniform(-2, 2))
        return result


class Buttons(Point):
    action_space = spaces.MultiDiscrete([2, 2])


class Words(Point):
    observation_space = spaces.Sequence(spaces.Discrete(3))


LIMITED = (Dict, MultiDiscrete, Pixels, NotANumber, Raises, OneStep, Constant, Clock, PhysicsInReset, Buttons, Words)
MISTAKEN = (Grows, Unrewarded, FourValues, ResetAlone)
for kind in (*LIMITED, *MISTAKEN):
    gymnasium.register(f"Own{kind.__name__}-v0", kind, max_episode_steps=20)
gymnasium.register("OwnEndless-v0", Point)
