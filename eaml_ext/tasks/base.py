"""The protocol and the base classes of task distributions, the seeds of their streams, the encoding of actions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._random import Purpose, check_seed, collection_sequence, seed_sequence

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv

SPLITS = ("train", "valid", "test")
"""The disjoint splits of every distribution: ``valid`` is for tuning, ``test`` for reporting."""


@dataclass(frozen=True)
class Task:
    """One task of a distribution; subclasses add its parameters.

    Attributes:
        id: unique name: distribution with its version, split, seed, epoch, index.
        split: one of ``SPLITS``.
    """

    id: str
    split: str


T = TypeVar("T", bound=Task)


@runtime_checkable
class TaskDistribution(Protocol[T]):
    """The interface of a distribution of control tasks; :func:`eaml_ext.tasks.register` binds one to a name.

    Attributes:
        name: name with a version. Results are comparable only between equal names, because only then the tasks are the
            same.
        obs_dim: size of a flattened observation.
        action_dim: size of an action as :func:`encode_action` encodes it: the number of choices of a ``Discrete``
            space, the number of entries of a ``Box``.
    """

    name: str
    obs_dim: int
    action_dim: int

    @property
    def action_space(self) -> Space[Any]:
        """The Gymnasium space of one action of one task, ``Discrete`` or ``Box``."""

    def sample(self, n: int, split: str = "train", seed: int = 0, epoch: int = 0) -> list[T]:
        """Return the first ``n`` tasks of the stream (split, seed, epoch).

        A pure function; task i does not depend on ``n``, and no task is in two splits.

        Args:
            n: number of tasks, at least 0.
            split: one of ``SPLITS``.
            seed, epoch: in [0, 2**32).
        """

    def make_env(self, tasks: Sequence[T]) -> VectorEnv[Any, Any, Any]:
        """Return a vector environment in autoreset mode NEXT_STEP whose environment i is ``tasks[i]``.

        An observation of its ``single_observation_space`` has ``obs_dim`` entries after ``gymnasium.spaces.flatten``;
        actions of its ``action_space`` are ``(len(tasks), *action_space.shape)``.
        """

    def reset_seeds(self, tasks: Sequence[T], seed: int) -> int | list[int]:
        """Return the argument ``seed`` of the first ``reset`` of that environment.

        Args:
            tasks: the tasks of the environment.
            seed: of the collection of data, in [0, 2**32).
        """


class SampledTasks(Generic[T]):
    """Base class of distributions that draw tasks from one random stream for each (split, seed, epoch)."""

    name: str

    def sample(self, n: int, split: str = "train", seed: int = 0, epoch: int = 0) -> list[T]:
        """Return the first ``n`` tasks of the stream (split, seed, epoch), a pure function of its arguments.

        Args:
            n: number of tasks, at least 0; task i does not depend on it.
            split: "train", "valid" or "test".
            seed, epoch: in [0, 2**32).

        Raises:
            TypeError, ValueError: an argument has another type or is out of its range.

        >>> from eaml_ext.tasks import LDSTasks
        >>> LDSTasks().sample(2, "test") == LDSTasks().sample(3, "test")[:2]
        True
        """
        n, split, seed, epoch = check_sample(f"{type(self).__name__}.sample", n, split, seed, epoch)
        ids = [f"{self.name}/{split}/{seed}/{epoch}/{index}" for index in range(n)]
        return self._draw_tasks(ids, split, seed, epoch)

    def _draw_tasks(self, ids: Sequence[str], split: str, seed: int, epoch: int) -> list[T]:
        """Return the first ``len(ids)`` tasks of the stream, named by ``ids``."""
        raise NotImplementedError(f"{type(self).__name__}: _draw_tasks is not defined")


class ControlTasks(SampledTasks[T]):
    """Base class of control tasks whose starting states depend on the seed of a collection, not on the task."""

    def reset_seeds(self, tasks: Sequence[T], seed: int) -> int:
        """Return ``seed``, from which the vector environment draws all starting states.

        Args:
            tasks: the tasks of the environment.
            seed: in [0, 2**32).

        Raises:
            TypeError, ValueError: ``seed`` is no integer or out of its range.

        >>> from eaml_ext.tasks import CartPoleTasks
        >>> CartPoleTasks().reset_seeds(CartPoleTasks().sample(2), seed=3)
        3
        """
        return check_seed(f"{type(self).__name__}.reset_seeds", "seed", seed)


def check_sample(where: str, n: Any, split: Any, seed: Any, epoch: Any) -> tuple[int, str, int, int]:
    """Return the arguments of ``TaskDistribution.sample`` as ints and a str. Raises TypeError or ValueError."""
    n = check_seed(where, "n", n)  # n has the range of a seed
    if not isinstance(split, str) or split not in SPLITS:
        raise ValueError(f"{where}: split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
    return n, str(split), check_seed(where, "seed", seed), check_seed(where, "epoch", epoch)


def check_tasks(where: str, tasks: Any, kind: type[Task]) -> None:
    """Raise TypeError or ValueError unless ``tasks`` is a non-empty sequence of ``kind``."""
    if not isinstance(tasks, Sequence) or isinstance(tasks, str):
        raise TypeError(f"{where}: tasks must be a list of {kind.__name__}, got {type(tasks).__name__}")
    if not tasks:
        raise ValueError(f"{where}: tasks must hold at least one {kind.__name__}, got none")
    for i, task in enumerate(tasks):
        if not isinstance(task, kind):
            raise TypeError(f"{where}: tasks[{i}] must be a {kind.__name__}, got {type(task).__name__}")


def check_rows(where: str, name: str, value: Any, tasks: Sequence[Task], width: int) -> None:
    """Raise TypeError or ValueError unless ``value`` is a tensor ``(len(tasks), *, width)``."""
    _check.tensor(where, name, value)
    if value.dim() < 2 or (len(value), value.shape[-1]) != (len(tasks), width):
        raise ValueError(f"{where}: {name} must have shape ({len(tasks)}, *, {width}), got {tuple(value.shape)}")


def task_stream(split: str, seed: int, epoch: int, index: int) -> np.random.SeedSequence:
    """Return the seed sequence of task ``index``; the split is a word of its key, so no two splits share one."""
    return seed_sequence(seed, Purpose(SPLITS.index(split)), epoch, index)


def collection_stream(tasks: Sequence[Task], seed: int) -> np.random.SeedSequence:
    """Return the seed sequence of one collection; it depends on the tasks' ids, so other tasks have other starts."""
    return collection_sequence(seed, [task.id for task in tasks])


def action_width(space: Space[Any]) -> int:
    """Return the size of an encoded action: the number of choices of a Discrete, the number of entries of a Box.

    Raises TypeError for any other space.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.Box):
        return int(math.prod(space.shape))
    raise TypeError(f"encode_action: space must be Discrete or Box, got {space}")


def encode_action(space: Space[Any], action: Any) -> Tensor:
    """Encode actions as inputs of a model: one-hot for a Discrete space, flattened and unscaled for a Box.

    Args:
        space: the space of *one* action.
        action: ``(*)`` integers for Discrete, ``(*, *space.shape)`` numbers for Box; array, tensor or number.

    Returns:
        ``(*, action_dim)``, float32, on the CPU.

    Raises:
        TypeError: another space, or actions of a Discrete space that are no integers.
        ValueError: another shape, or an action that the Discrete space does not contain.

    >>> from gymnasium.spaces import Box, Discrete
    >>> encode_action(Discrete(3), [2, 0])
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    >>> encode_action(Box(-2.0, 2.0, (2,)), [[0.5, -1.0]])
    tensor([[ 0.5000, -1.0000]])
    """
    from gymnasium import spaces

    width = action_width(space)
    value = torch.as_tensor(action).detach().cpu()
    if isinstance(space, spaces.Discrete):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"encode_action: action must be integers for {space}, got {value.dtype}")
        index = value.long() - int(space.start)
        if ((index < 0) | (index >= width)).any():
            raise ValueError(f"encode_action: action must lie in {space}, got {value.min()} to {value.max()}")
        return torch.nn.functional.one_hot(index, width).float()
    shape = tuple(space.shape or ())
    batch = value.dim() - len(shape)
    if batch < 0 or tuple(value.shape[batch:]) != shape:
        raise ValueError(f"encode_action: action must have shape (*, *{shape}), got {tuple(value.shape)}")
    return value.float().reshape(*value.shape[:batch], width)
