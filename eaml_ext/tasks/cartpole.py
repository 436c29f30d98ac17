"""CartPole with random physics per task; optionally flipped actions, hidden velocities, projected observations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext.tasks.base import ControlTasks, Task, check_rows, check_tasks, task_stream

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
"""The log-uniform range of each physical parameter, around ``NOMINAL``."""

X_LIMIT, ANGLE_LIMIT = 2.4, math.radians(12)
"""Bounds of cart position, m, and pole angle, rad, beyond which an episode terminates."""

NOMINAL = {"length": 0.5, "masscart": 1.0, "masspole": 0.1, "force_mag": 10.0, "gravity": 9.8}
"""Gymnasium's physics: m, kg, kg, N, m/s²."""


@dataclass(frozen=True)
class CartPoleTask(Task):
    """One cart-pole.

    Attributes:
        length: *half* the length of the pole, m.
        masscart, masspole: kg.
        force_mag: N.
        gravity: m/s².
        flip: action 0 pushes right and 1 left, the opposite of Gymnasium's CartPole.
        projection: rows of the matrix that multiplies the observation; None: no projection.
    """

    length: float
    masscart: float
    masspole: float
    force_mag: float
    gravity: float
    flip: bool
    projection: tuple[tuple[float, ...], ...] | None = None


class CartPoleTasks(ControlTasks[CartPoleTask]):
    """The cart-pole of Barto, Sutton & Anderson (1983), simulated by Gymnasium's CartPole-v1, with varied physics.

    Each parameter is drawn log-uniformly from ``RANGES``. The action is flipped in one random task of each pair
    (2i, 2i+1), so in half of any even number of tasks. Varied physics alone hardly requires adaptation, because one
    model can be right on average; with flips no single model can.

    Observations are cart position, m; velocity, m/s; pole angle, rad; angular velocity, rad/s. Actions are 0 and 1,
    one-hot for models. An episode terminates beyond 2.4 m or 12° and is truncated after 500 steps. The version in
    ``name`` fixes ranges and seeding.

    Args:
        physics: draw the parameters. False: all tasks have Gymnasium's; flips and projections stay the same.
        flip: flip the action in half of the tasks.
        hide_velocity: observations are (cart position, pole angle) alone.
        projection: number of rows of a random matrix per task that multiplies the observation. Its columns are
            orthonormal and uniform (Haar), so that an entry has another meaning in each task. At least the size of an
            observation.

    Raises:
        TypeError, ValueError: an argument has another type, or ``projection`` is too small.

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
        observed = 2 if hide_velocity else 4
        if projection is not None:
            projection = _check.positive("CartPoleTasks", "projection", projection, integer=True)
            if projection < observed:
                text = f"projection must be >= {observed}, got {projection}: it would lose entries"
                raise ValueError(f"CartPoleTasks: {text}")
        self.physics, self.flip, self.hide_velocity, self.projection = physics, flip, hide_velocity, projection
        options = {"physics": physics, "flip": flip, "position": hide_velocity, f"project{projection}": projection}
        on = [name for name, option in options.items() if option]
        if on != ["physics", "flip"]:  # the default keeps the class attribute, which a subclass may replace
            self.name = "-".join(["CartPole-v1", *on, "v1"])
            self.obs_dim = projection or observed

    @property
    def action_space(self) -> Space[Any]:
        """``Discrete(2)``."""
        from gymnasium.spaces import Discrete

        return Discrete(2)

    def _draw_tasks(self, ids: Sequence[str], split: str, seed: int, epoch: int) -> list[CartPoleTask]:
        low, high = np.array(list(RANGES.values())).T
        tasks = []
        for index, task_id in enumerate(ids):
            pair, second = divmod(index, 2)
            generator = np.random.default_rng(task_stream(split, seed, epoch, pair))
            flip = bool(generator.integers(2)) != bool(second)
            values = low * (high / low) ** generator.random((2, len(RANGES)))[second]
            physics = dict(zip(RANGES, values.tolist(), strict=True)) if self.physics else NOMINAL
            # The projection is drawn last and for both of the pair, so that it does not change the other draws.
            size = (2, self.projection or 0, 4)
            matrix = self._projection(generator.standard_normal(size)[second]) if self.projection else None
            tasks.append(CartPoleTask(task_id, split, **physics, flip=flip and self.flip, projection=matrix))
        return tasks

    def _projection(self, normal: np.ndarray) -> tuple[tuple[float, ...], ...]:
        q, r = np.linalg.qr(normal[:, : 2 if self.hide_velocity else 4])
        # A positive diagonal of r makes the decomposition unique and q uniform (Mezzadri 2007, section 5).
        return tuple(map(tuple, (q * np.sign(np.diag(r))).tolist()))

    def make_env(self, tasks: Sequence[CartPoleTask]) -> VectorEnv[Any, Any, Any]:
        """Return Gymnasium's vector CartPole with physics, flip and projection of ``tasks[i]`` in environment i.

        Raises:
            TypeError, ValueError: ``tasks`` is no non-empty sequence of ``CartPoleTask``, or a projection has another
                shape than this distribution's.
        """
        import gymnasium
        from gymnasium.spaces import Box
        from gymnasium.wrappers.vector import TransformAction, TransformObservation

        check_tasks("CartPoleTasks.make_env", tasks, CartPoleTask)
        matrices = self._matrices(tasks, "CartPoleTasks.make_env")
        environment = gymnasium.make_vec("CartPole-v1", len(tasks), vectorization_mode="vector_entry_point")
        physics: Any = environment.unwrapped
        unknown = [name for name in (*RANGES, "total_mass", "polemass_length") if not hasattr(physics, name)]
        if unknown:  # setting an unknown attribute would have no effect
            environment.close()
            text = f"the CartPole-v1 of gymnasium {gymnasium.__version__} has no attribute {unknown[0]}"
            raise ValueError(f"CartPoleTasks.make_env: {text}: install a version that eaml_ext supports")
        for parameter in RANGES:
            setattr(physics, parameter, np.array([getattr(task, parameter) for task in tasks]))
        # The simulator reads these two derived values, not the masses.
        physics.total_mass = physics.masspole + physics.masscart
        physics.polemass_length = physics.masspole * physics.length
        flip = np.array([task.flip for task in tasks])
        flipped = TransformAction(environment, lambda actions: np.where(flip, 1 - actions, actions))
        if matrices is None:
            return flipped
        unbounded = [Box(-np.inf, np.inf, shape, np.float32) for shape in ((len(tasks), self.obs_dim), (self.obs_dim,))]
        return TransformObservation(flipped, lambda obs: np.einsum("tij,tj->ti", matrices, obs), *unbounded)

    def _matrices(self, tasks: Sequence[CartPoleTask], where: str) -> np.ndarray | None:
        """Return the matrices from Gymnasium's observations to the tasks', ``(tasks, obs_dim, 4)``; None: identity."""
        observed = np.eye(4, dtype=np.float32)[:: 2 if self.hide_velocity else 1]
        shape = (self.projection, len(observed))
        for i, task in enumerate(tasks):
            got = None if task.projection is None else np.shape(task.projection)
            if got != (None if self.projection is None else shape):
                wanted = "no projection" if self.projection is None else f"a projection of shape {shape}"
                raise ValueError(f"{where}: tasks[{i}] must have {wanted}, got {got}")
        if self.projection is not None:
            return np.array([task.projection for task in tasks], np.float32) @ observed
        return np.broadcast_to(observed, (len(tasks), *observed.shape)) if self.hide_velocity else None

    def outcomes(
        self, tasks: Sequence[CartPoleTask], obs: Tensor, action: Tensor, next_obs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return rewards and terminations of transitions, by the rules of Gymnasium's CartPole.

        A planner passes predicted observations. An observation that is not finite terminates the episode.

        Args:
            tasks: one for each row of the first dimension.
            obs: ``(len(tasks), *, obs_dim)``, floating; before the step. Not used.
            action: ``(len(tasks), *, action_dim)``, floating, as ``encode_action`` encodes it. Not used.
            next_obs: ``(len(tasks), *, obs_dim)``, floating; after the step.

        Returns:
            Rewards ``(len(tasks), *)``, 1 each, and terminations ``(len(tasks), *)``, bool: beyond 2.4 m or 12°.

        Raises:
            TypeError, ValueError: ``tasks`` as for :meth:`make_env`, or ``next_obs`` has another shape.

        >>> import torch
        >>> distribution = CartPoleTasks(hide_velocity=True)
        >>> following = torch.tensor([[[0.0, 0.1], [0.0, 0.3], [-2.5, 0.0]]])
        >>> distribution.outcomes(distribution.sample(1), following, following, following)
        (tensor([[1., 1., 1.]]), tensor([[False,  True,  True]]))
        """
        where = "CartPoleTasks.outcomes"
        check_tasks(where, tasks, CartPoleTask)
        check_rows(where, "next_obs", next_obs, tasks, self.obs_dim)
        matrices = None if self.projection is None else self._matrices(tasks, where)
        if matrices is None:
            x, angle = next_obs[..., 0], next_obs[..., -1 if self.hide_velocity else 2]
        else:  # columns are orthonormal, so the transposed matrix inverts the projection
            inverse = next_obs.new_tensor(matrices[..., [0, 2]])
            x, angle = torch.einsum("t...i,tij->t...j", next_obs, inverse).unbind(-1)
        return torch.ones_like(x), ~((x.abs() <= X_LIMIT) & (angle.abs() <= ANGLE_LIMIT))
