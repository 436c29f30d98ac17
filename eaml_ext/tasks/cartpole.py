"""CartPole with physics drawn per task, the action's sign flipped in half of them, and observations that hide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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

RANGES = {
    "length": (0.25, 1.0),
    "masscart": (0.5, 2.0),
    "masspole": (0.05, 0.5),
    "force_mag": (5.0, 20.0),
    "gravity": (5.0, 20.0),
}
"""The log-uniform range of each physical parameter: around ``NOMINAL``."""

X_LIMIT, ANGLE_LIMIT = 2.4, math.radians(12)
"""Beyond them an episode ends: m, rad."""

NOMINAL = {"length": 0.5, "masscart": 1.0, "masspole": 0.1, "force_mag": 10.0, "gravity": 9.8}
"""Gymnasium's physics: m, kg, kg, N, m/s²."""


@dataclass(frozen=True)
class CartPoleTask(Task):
    """One cart-pole: ``length`` is *half* the pole's (m), masses in kg, ``force_mag`` in N, ``gravity`` in m/s².

    ``flip``: action 0 pushes right and 1 pushes left, the other way round than in Gymnasium's CartPole.
    ``projection``: rows of the matrix by which the observation is multiplied; None leaves it as it is.
    """

    length: float
    masscart: float
    masspole: float
    force_mag: float
    gravity: float
    flip: bool
    projection: tuple[tuple[float, ...], ...] | None = None


class CartPoleTasks:
    """The cart-pole of Barto, Sutton & Anderson (1983), simulated by Gymnasium's CartPole-v1, with varied physics.

    Each parameter is drawn log-uniformly from ``RANGES`` and the action is flipped in one task of each pair (2i, 2i+1),
    which one by a coin: half of any even number of tasks is flipped. Physics alone hardly needs adaptation, since one
    model can be right on average; under a flip no single model can. Observations are (cart position m, velocity m/s,
    pole angle rad, velocity rad/s); actions 0 and 1, one-hot for models; an episode ends beyond 2.4 m or 12°, or is cut
    after 500 steps. The version in ``name`` fixes ranges and seeding.

    Args:
        physics: draw the parameters; without, all tasks have Gymnasium's. The tasks are the same in all else.
        flip: flip the action in half of the tasks.
        hide_velocity: observations are (cart position, pole angle) alone.
        projection: multiply the observation, per task, by a matrix of this many rows whose columns are orthonormal,
            drawn uniformly (Haar), so that no entry means the same in two tasks; at least the length of an observation.

    Raises TypeError unless the first three are booleans and ``projection`` an integer or None, ValueError when it is
    too small.

    >>> distribution = CartPoleTasks()
    >>> tasks = distribution.sample(8, split="train", seed=0)
    >>> sum(task.flip for task in tasks), tasks == distribution.sample(8, split="train", seed=0)
    (4, True)
    >>> environment = distribution.make_env(tasks)
    >>> observations, _ = environment.reset(seed=0)
    >>> observations.shape
    (8, 4)
    >>> hidden = CartPoleTasks(hide_velocity=True, projection=6)
    >>> hidden.name, hidden.obs_dim
    ('CartPole-v1-physics-flip-position-project6-v1', 6)
    """

    name = "CartPole-v1-physics-flip-v1"
    obs_dim = 4
    action_dim = 2

    def __init__(
        self, *, physics: bool = True, flip: bool = True, hide_velocity: bool = False, projection: int | None = None
    ) -> None:
        for option, value in (("physics", physics), ("flip", flip), ("hide_velocity", hide_velocity)):
            _check.flag("CartPoleTasks", option, value)
        physics, flip, hide_velocity = bool(physics), bool(flip), bool(hide_velocity)
        seen = 2 if hide_velocity else 4
        if projection is not None:
            projection = _check.positive("CartPoleTasks", "projection", projection, integer=True)
            if projection < seen:
                raise ValueError(
                    f"CartPoleTasks: projection must be >= {seen}, got {projection}: it would lose entries"
                )
        self.physics, self.flip, self.hide_velocity, self.projection = physics, flip, hide_velocity, projection
        parts = {"physics": physics, "flip": flip, "position": hide_velocity, f"project{projection}": projection}
        on = [part for part, option in parts.items() if option]
        if on != ["physics", "flip"]:  # a subclass may have a name of its own
            self.name = "-".join(["CartPole-v1", *on, "v1"])
            self.obs_dim = projection or seen

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
        n, split, seed, epoch = check_sample("CartPoleTasks.sample", n, split, seed, epoch)
        low, high = np.array(list(RANGES.values())).T
        tasks = []
        for index in range(n):
            pair, second = divmod(index, 2)
            generator = np.random.default_rng(task_stream(split, seed, epoch, pair))
            flip = bool(generator.integers(2)) != bool(second)
            values = low * (high / low) ** generator.random((2, len(RANGES)))[second]
            physics = dict(zip(RANGES, values.tolist(), strict=True)) if self.physics else NOMINAL
            # Drawn last and for both of the pair, so that no option changes what another one draws.
            size = (2, self.projection or 0, 4)
            matrix = self._projection(generator.standard_normal(size)[second]) if self.projection else None
            name = f"{self.name}/{split}/{seed}/{epoch}/{index}"
            tasks.append(CartPoleTask(name, split, **physics, flip=flip and self.flip, projection=matrix))
        return tasks

    def _projection(self, normal: np.ndarray) -> tuple[tuple[float, ...], ...]:
        q, r = np.linalg.qr(normal[:, : 2 if self.hide_velocity else 4])
        # A positive diagonal of r makes the decomposition unique and q uniform (Mezzadri 2007, section 5).
        return tuple(map(tuple, (q * np.sign(np.diag(r))).tolist()))

    def make_env(self, tasks: Sequence[CartPoleTask]) -> VectorEnv[Any, Any, Any]:
        """Gymnasium's native vector CartPole in which environment i has physics, sign and projection of ``tasks[i]``.

        Raises TypeError or ValueError unless ``tasks`` is a non-empty sequence of ``CartPoleTask``, of this ``obs_dim``
        where they have a projection.
        """
        import gymnasium
        from gymnasium.spaces import Box
        from gymnasium.wrappers.vector import TransformAction, TransformObservation

        check_tasks("CartPoleTasks.make_env", tasks, CartPoleTask)
        matrices = self._matrices(tasks, "CartPoleTasks.make_env")
        environment = gymnasium.make_vec("CartPole-v1", len(tasks), vectorization_mode="vector_entry_point")
        physics: Any = environment.unwrapped
        unknown = [name for name in (*RANGES, "total_mass", "polemass_length") if not hasattr(physics, name)]
        if unknown:  # setting it would have no effect
            environment.close()
            text = f"the CartPole-v1 of gymnasium {gymnasium.__version__} has no attribute {unknown[0]}"
            raise ValueError(f"CartPoleTasks.make_env: {text}: install a version that eaml_ext supports")
        for parameter in RANGES:
            setattr(physics, parameter, np.array([getattr(task, parameter) for task in tasks]))
        # The simulator reads these two products, not their factors.
        physics.total_mass = physics.masspole + physics.masscart
        physics.polemass_length = physics.masspole * physics.length
        flip = np.array([task.flip for task in tasks])
        flipped = TransformAction(environment, lambda actions: np.where(flip, 1 - actions, actions))
        if matrices is None:
            return flipped
        unbounded = [Box(-np.inf, np.inf, shape, np.float32) for shape in ((len(tasks), self.obs_dim), (self.obs_dim,))]
        return TransformObservation(flipped, lambda seen: np.einsum("tij,tj->ti", matrices, seen), *unbounded)

    def _matrices(self, tasks: Sequence[CartPoleTask], where: str) -> np.ndarray | None:
        """From Gymnasium's observations to the tasks', ``(tasks, obs_dim, 4)``; None where they are the same."""
        seen = np.eye(4, dtype=np.float32)[:: 2 if self.hide_velocity else 1]
        shape = (self.projection, len(seen))
        for i, task in enumerate(tasks):
            got = None if task.projection is None else np.shape(task.projection)
            if got != (None if self.projection is None else shape):
                wanted = "no projection" if self.projection is None else f"a projection of shape {shape}"
                raise ValueError(f"{where}: tasks[{i}] must have {wanted}, got {got}")
        if self.projection is not None:
            return np.array([task.projection for task in tasks], np.float32) @ seen
        return np.broadcast_to(seen, (len(tasks), *seen.shape)) if self.hide_velocity else None

    def outcomes(
        self, tasks: Sequence[CartPoleTask], obs: Tensor, action: Tensor, next_obs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a step is worth, and whether it ends the episode, as Gymnasium would say of these observations.

        For a planner, whose observations are a model's predictions: one that is not finite ends the episode.

        Args:
            tasks: one for each row of the first dimension.
            obs, next_obs: before and after the step, ``(len(tasks), *, obs_dim)``.
            action: not asked for; as ``encode_action`` writes it.

        Returns:
            Rewards, 1 for each step, and terminations, bool: beyond 2.4 m or 12°; both ``(len(tasks), *)``.

        Raises:
            TypeError, ValueError: ``tasks`` as for :meth:`make_env`, ``next_obs`` of another shape.

        >>> import torch
        >>> distribution = CartPoleTasks(hide_velocity=True)
        >>> following = torch.tensor([[[0.0, 0.1], [0.0, 0.3], [-2.5, 0.0]]])
        >>> distribution.outcomes(distribution.sample(1), following, following, following)
        (tensor([[1., 1., 1.]]), tensor([[False,  True,  True]]))
        """
        where = "CartPoleTasks.outcomes"
        check_tasks(where, tasks, CartPoleTask)
        _check.tensor(where, "next_obs", next_obs)
        if next_obs.dim() < 2 or (len(next_obs), next_obs.shape[-1]) != (len(tasks), self.obs_dim):
            wanted = f"({len(tasks)}, *, {self.obs_dim})"
            raise ValueError(f"{where}: next_obs must have shape {wanted}, got {tuple(next_obs.shape)}")
        matrices = None if self.projection is None else self._matrices(tasks, where)
        if matrices is None:
            x, angle = next_obs[..., 0], next_obs[..., -1 if self.hide_velocity else 2]
        else:  # its columns are orthonormal: the transposed is its inverse
            back = next_obs.new_tensor(matrices[..., [0, 2]])
            x, angle = torch.einsum("t...i,tij->t...j", next_obs, back).unbind(-1)
        ends = ~((x.abs() <= X_LIMIT) & (angle.abs() <= ANGLE_LIMIT))
        return torch.ones_like(x), ends

    def reset_seeds(self, tasks: Sequence[CartPoleTask], seed: int) -> int:
        """The collection's seed itself: all the starting states come from it, the tasks differ in physics only.

        >>> distribution = CartPoleTasks()
        >>> distribution.reset_seeds(distribution.sample(2), seed=3)
        3
        """
        return check_seed("CartPoleTasks.reset_seeds", "seed", seed)
