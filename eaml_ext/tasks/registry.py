"""The registry from names of environments to task distributions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from eaml_ext.tasks.base import TaskDistribution
from eaml_ext.tasks.cartpole import CartPoleTasks
from eaml_ext.tasks.metaworld import MetaWorldTasks
from eaml_ext.tasks.mujoco import AntDirectionTasks, HalfCheetahDirectionTasks, HalfCheetahVelocityTasks
from eaml_ext.tasks.seeds import SeedTasks

_FACTORIES: dict[str, Callable[[], TaskDistribution[Any]]] = {
    "CartPole-v1": CartPoleTasks,
    "CartPole-hidden-velocity-v1": lambda: CartPoleTasks(hide_velocity=True),
    "HalfCheetah-Vel": HalfCheetahVelocityTasks,
    "HalfCheetah-Dir": HalfCheetahDirectionTasks,
    "Ant-Dir": AntDirectionTasks,
    "ML10": MetaWorldTasks,
}


def register(env_name: str, distribution_factory: Callable[[], TaskDistribution[Any]]) -> None:
    """Make ``make_tasks(env_name)`` return ``distribution_factory()``; a later registration replaces an earlier one.

    Args:
        env_name: a Gymnasium id with its version, or any other name.
        distribution_factory: called without arguments by each ``make_tasks(env_name)``.

    Raises:
        TypeError: ``env_name`` is no string, or ``distribution_factory`` is not callable.

    >>> register("Pendulum-v1", lambda: SeedTasks("Pendulum-v1"))
    """
    if not isinstance(env_name, str):
        raise TypeError(f"register: env_name must be a string, got {type(env_name).__name__}")
    if not callable(distribution_factory):
        got = type(distribution_factory).__name__
        raise TypeError(f"register: distribution_factory must be callable without arguments, got {got}")
    _FACTORIES[env_name] = distribution_factory


def make_tasks(env_name: str) -> TaskDistribution[Any]:
    """Return the task distribution registered for ``env_name``, else :class:`eaml_ext.tasks.SeedTasks` of it.

    Registered by default: ``CartPole-v1`` (:class:`eaml_ext.tasks.CartPoleTasks`) and ``CartPole-hidden-velocity-v1``
    (with ``hide_velocity``); with the extra ``mujoco``, ``HalfCheetah-Vel``, ``HalfCheetah-Dir`` and ``Ant-Dir``; with
    the extra ``metaworld``, ``ML10`` and ``ML1-<environment>``.

    Raises:
        TypeError: ``env_name`` is no string.
        ValueError: Gymnasium cannot make the environment or flatten its observations, its actions are neither Discrete
            nor Box, or an extra is missing.

    >>> make_tasks("CartPole-v1").name
    'CartPole-v1-physics-flip-v1'
    >>> make_tasks("MountainCar-v0").name
    'MountainCar-v0-seeds-v1'
    """
    if not isinstance(env_name, str):
        raise TypeError(f"make_tasks: env_name must be a string, got {type(env_name).__name__}")
    factory = _FACTORIES.get(env_name)
    if factory is None and env_name.startswith("ML1-"):
        factory = partial(MetaWorldTasks, env_name)
    if factory is None:
        seeds = SeedTasks(env_name)
        # Gymnasium resolves an id without a version, such as "CartPole", to the latest version.
        if seeds.env_name not in _FACTORIES:
            return seeds
        factory = _FACTORIES[seeds.env_name]
    try:
        return factory()
    except ImportError as error:
        raise ValueError(f"make_tasks: env_name {env_name!r} cannot be made: {error}") from error
