"""What every task distribution shares: the protocol, the derivation of seeds, the encoding of actions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from eaml_ext._random import Purpose, check_seed, collection_sequence, seed_sequence

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv

SPLITS = ("train", "valid", "test")
"""The disjoint splits of every distribution: ``valid`` is for tuning, ``test`` for reporting."""


@dataclass(frozen=True)
class Task:
    """One task of a distribution; subclasses add what makes it this task.

    ``id`` names it for good: distribution with version, split, seed, epoch, index. ``split`` is one of ``SPLITS``.
    """

    id: str
    split: str


T = TypeVar("T", bound=Task)


@runtime_checkable
class TaskDistribution(Protocol[T]):
    """What a distribution of control tasks offers; ``register`` one to use it by its environment's name.

    ``name`` carries a version, because results are comparable only if the tasks are the same. ``obs_dim`` is the length
    of a flattened observation, ``action_dim`` that of an action as ``encode_action`` writes it, ``action_space`` the
    Gymnasium space of one task's actions (``Discrete`` or ``Box``).
    """

    name: str
    obs_dim: int
    action_dim: int

    @property
    def action_space(self) -> Space[Any]:
        """The space of one action of one task."""

    def sample(self, n: int, split: str = "train", seed: int = 0, epoch: int = 0) -> list[T]:
        """The first ``n`` tasks of the stream (split, seed, epoch): a pure function, no task of two splits alike."""

    def make_env(self, tasks: Sequence[T]) -> VectorEnv[Any, Any, Any]:
        """A vector environment in autoreset mode NEXT_STEP, in which environment i is ``tasks[i]``."""

    def reset_seeds(self, tasks: Sequence[T], seed: int) -> int | list[int]:
        """What to pass as ``seed`` to the first ``reset`` of that environment, for the collection ``seed``."""


def check_sample(where: str, n: Any, split: Any, seed: Any, epoch: Any) -> tuple[int, str, int, int]:
    """Return the arguments of ``TaskDistribution.sample`` as ints and a str. Raises TypeError or ValueError."""
    n = check_seed(where, "n", n)  # the same range
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


def task_stream(split: str, seed: int, epoch: int, index: int) -> np.random.SeedSequence:
    """The seed sequence of task ``index``: the split is a word of its own, so no two splits share a stream."""
    return seed_sequence(seed, Purpose(SPLITS.index(split)), epoch, index)


def collection_stream(tasks: Sequence[Task], seed: int) -> np.random.SeedSequence:
    """The seed sequence of one collection from ``tasks``: other tasks meet other starts and actions."""
    return collection_sequence(seed, [task.id for task in tasks])


def action_width(space: Space[Any]) -> int:
    """The length of an action of ``space`` as ``encode_action`` writes it: choices of a Discrete, numbers of a Box.

    Raises TypeError for any other space.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.Box):
        return int(math.prod(space.shape))
    raise TypeError(f"encode_action: space must be Discrete or Box, got {space}")


def encode_action(space: Space[Any], action: Any) -> Tensor:
    """Actions as a model reads them: one-hot for a Discrete space, flat numbers for a Box.

    ``space`` is the space of *one* action; ``action`` one or many of them (array, tensor or number): ``(*)`` integers
    for Discrete, ``(*, *space.shape)`` for Box. Returns float32 ``(*, action_dim)`` on the CPU, unscaled.

    Raises TypeError for another space or for non-integer Discrete actions, ValueError for a wrong shape or an action
    that the Discrete space does not hold.

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
