"""CartPole with physics drawn per task and, in half of the tasks, the action's sign flipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eaml_ext.tasks.base import Task, check_sample, check_seed, check_tasks, task_stream

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv

RANGES = {
    "length": (0.25, 1.0),
    "masscart": (0.5, 2.0),
    "masspole": (0.05, 0.5),
    "force_mag": (5.0, 20.0),
    "gravity": (5.0, 20.0),
}
"""The log-uniform range of each physical parameter: around Gymnasium's 0.5 m, 1 kg, 0.1 kg, 10 N, 9.8 m/s²."""


@dataclass(frozen=True)
class CartPoleTask(Task):
    """One cart-pole: ``length`` is *half* the pole's (m), masses in kg, ``force_mag`` in N, ``gravity`` in m/s².

    ``flip``: action 0 pushes right and 1 pushes left, the other way round than in Gymnasium's CartPole.
    """

    length: float
    masscart: float
    masspole: float
    force_mag: float
    gravity: float
    flip: bool


class CartPoleTasks:
    """The cart-pole of Barto, Sutton & Anderson (1983), simulated by Gymnasium's CartPole-v1, with varied physics.

    Each parameter is drawn log-uniformly from ``RANGES`` and the action is flipped in one task of each pair (2i, 2i+1),
    which one by a coin: half of any even number of tasks is flipped. Physics alone hardly needs adaptation, since one
    model can be right on average; under a flip no single model can. Observations are (cart position m, velocity m/s,
    pole angle rad, velocity rad/s); actions 0 and 1, one-hot for models; an episode ends beyond 2.4 m or 12°, or is cut
    after 500 steps. The version in ``name`` fixes ranges and seeding.

    >>> distribution = CartPoleTasks()
    >>> tasks = distribution.sample(8, split="train", seed=0)
    >>> sum(task.flip for task in tasks), tasks == distribution.sample(8, split="train", seed=0)
    (4, True)
    >>> environment = distribution.make_env(tasks)
    >>> observations, _ = environment.reset(seed=0)
    >>> observations.shape
    (8, 4)
    """

    name = "CartPole-v1-physics-flip-v1"
    obs_dim = 4
    action_dim = 2

    @property
    def action_space(self) -> Space[Any]:
        """``Discrete(2)``."""
        from gymnasium.spaces import Discrete

        return Discrete(2)

    def sample(self, n: int, split: str = "train", seed: int = 0, epoch: int = 0) -> list[CartPoleTask]:
        """The first ``n`` tasks of the stream (split, seed, epoch), a pure function of its arguments.

        ``split`` is "train", "valid" or "test"; ``seed`` and ``epoch`` are integers in [0, 2**32). Task i is the same
        whatever ``n``. Raises TypeError or ValueError naming the argument.
        """
        check_sample("CartPoleTasks.sample", n, split, seed, epoch)
        low, high = np.array(list(RANGES.values())).T
        tasks = []
        for index in range(n):
            pair, second = divmod(index, 2)
            generator = np.random.default_rng(task_stream(split, seed, epoch, pair))
            flip = bool(generator.integers(2)) != bool(second)
            values = low * (high / low) ** generator.random((2, len(RANGES)))[second]
            physics = dict(zip(RANGES, values.tolist(), strict=True))
            tasks.append(CartPoleTask(f"{self.name}/{split}/{seed}/{epoch}/{index}", split, **physics, flip=flip))
        return tasks

    def make_env(self, tasks: Sequence[CartPoleTask]) -> VectorEnv[Any, Any, Any]:
        """Gymnasium's native vector CartPole in which environment i has the physics and the sign of ``tasks[i]``.

        Raises TypeError or ValueError unless ``tasks`` is a non-empty sequence of ``CartPoleTask``.
        """
        import gymnasium
        from gymnasium.wrappers.vector import TransformAction

        check_tasks("CartPoleTasks.make_env", tasks, CartPoleTask)
        environment = gymnasium.make_vec("CartPole-v1", len(tasks), vectorization_mode="vector_entry_point")
        physics: Any = environment.unwrapped
        for parameter in RANGES:
            setattr(physics, parameter, np.array([getattr(task, parameter) for task in tasks]))
        # The simulator reads these two products, not their factors.
        physics.total_mass = physics.masspole + physics.masscart
        physics.polemass_length = physics.masspole * physics.length
        flip = np.array([task.flip for task in tasks])
        return TransformAction(environment, lambda actions: np.where(flip, 1 - actions, actions))

    def reset_seeds(self, tasks: Sequence[CartPoleTask], seed: int) -> int:
        """The collection's seed itself: all the starting states come from it, the tasks differ in physics only.

        >>> distribution = CartPoleTasks()
        >>> distribution.reset_seeds(distribution.sample(2), seed=3)
        3
        """
        check_seed("CartPoleTasks.reset_seeds", "seed", seed)
        return seed
