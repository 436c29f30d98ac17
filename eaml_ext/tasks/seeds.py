"""Any Gymnasium environment with a flat observation as a task distribution; a task is a seed."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eaml_ext._random import check_seed
from eaml_ext.tasks._checked_env import CheckedEnv
from eaml_ext.tasks._modules import import_user_module
from eaml_ext.tasks.base import SPLITS, SampledTasks, Task, action_width, check_tasks, task_stream

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv


EPISODE_STEPS = 1000
"""Steps after which episodes are truncated where the environment has no time limit."""

PROBE_STEPS = 10
"""Steps of the episode in which :meth:`SeedTasks.drawn_in_reset` compares attributes."""


@dataclass(frozen=True)
class SeedTask(Task):
    """An environment whose first reset has the seed ``seed``, in [0, 2**32); later episodes continue its stream."""

    seed: int


class SeedTasks(SampledTasks[SeedTask]):
    """The tasks of an environment without a registered distribution: the seeds of its episodes.

    The last two bits of a task's seed encode its split, so no seed is in two splits. Where the environment has no time
    limit, episodes are truncated after 1000 steps.

    Args:
        env_name: a Gymnasium id, or ``module:id`` of a module that registers it. Observations are of any space that
            ``gymnasium.spaces.flatten`` flattens; actions are Discrete or Box.

    Attributes:
        truncates: the environment has no time limit of its own.

    Raises:
        TypeError: ``env_name`` is no string.
        ValueError: Gymnasium cannot make the environment, or its spaces are others. The message contains Gymnasium's
            suggestion.

    >>> distribution = SeedTasks("Pendulum-v1")
    >>> distribution.obs_dim, distribution.action_dim
    (3, 1)
    >>> [task.seed % 4 for task in distribution.sample(3, split="test")]
    [2, 2, 2]
    >>> SeedTasks("FrozenLake-v1").obs_dim  # Discrete(16), one-hot
    16
    """

    def __init__(self, env_name: str) -> None:
        import gymnasium
        from gymnasium.spaces import Box, Discrete, flatdim

        where = "make_tasks"
        if not isinstance(env_name, str):
            raise TypeError(f"{where}: env_name must be a string, got {type(env_name).__name__}")
        module, colon, _ = env_name.partition(":")
        if colon:
            import_user_module(where, "env_name", module)
        try:
            environment = gymnasium.make(env_name)
        except (gymnasium.error.Error, ModuleNotFoundError) as error:
            raise ValueError(f"{where}: env_name {env_name!r} cannot be made by Gymnasium: {error}") from error
        observations, actions, spec = environment.observation_space, environment.action_space, environment.spec
        environment.close()
        try:
            self.obs_dim = int(flatdim(observations))
        except (NotImplementedError, ValueError):  # of a custom space, of a Sequence or Graph
            wanted = "observations that gymnasium.spaces.flatten flattens"
            raise ValueError(f"{where}: env_name {env_name!r} must have {wanted}, got {observations}") from None
        if not isinstance(actions, (Discrete, Box)):
            raise ValueError(f"{where}: env_name {env_name!r} must have Discrete or Box actions, got {actions}")
        self.env_name = env_name if spec is None else spec.id
        self.name = f"{self.env_name}-seeds-v1"
        self.action_dim = action_width(actions)
        self.action_space: Space[Any] = actions
        # The registered spec: that of the environment lists wrappers of its entry point, which make() compares with
        # those of a new environment, and functions in their arguments are then others.
        self._spec: Any = copy.copy(gymnasium.spec(self.env_name))
        limit = self._spec.max_episode_steps if spec is None else spec.max_episode_steps
        self.truncates = limit is None
        self._spec.max_episode_steps = EPISODE_STEPS if limit is None else limit

    def _draw_tasks(self, ids: Sequence[str], split: str, seed: int, epoch: int) -> list[SeedTask]:
        tasks = []
        for index, task_id in enumerate(ids):
            word = int(task_stream(split, seed, epoch, index).generate_state(1)[0])
            tasks.append(SeedTask(task_id, split, word & ~3 | SPLITS.index(split)))
        return tasks

    def make_env(self, tasks: Sequence[SeedTask]) -> VectorEnv[Any, Any, Any]:
        """Return one environment per task; a reset with :meth:`reset_seeds` makes them the tasks.

        Raises:
            TypeError, ValueError: ``tasks`` is no non-empty sequence of ``SeedTask``.
        """
        import gymnasium

        check_tasks("SeedTasks.make_env", tasks, SeedTask)
        return gymnasium.make_vec(self._spec, len(tasks), vectorization_mode="sync")

    def reset_seeds(self, tasks: Sequence[SeedTask], seed: int) -> list[int]:
        """Return the seeds of the tasks. The collection's ``seed`` affects actions only.

        Raises:
            TypeError, ValueError: ``tasks`` is no non-empty sequence of ``SeedTask``, or a seed is out of its range.
        """
        check_tasks("SeedTasks.reset_seeds", tasks, SeedTask)
        return [check_seed("SeedTasks.reset_seeds", f"tasks[{i}].seed", task.seed) for i, task in enumerate(tasks)]

    def drawn_in_reset(self) -> list[str]:
        """Return the names of attributes that ``reset`` seems to draw for each episode, such as a mass or a goal.

        A heuristic. It compares numbers and arrays among the attributes of the environment and its wrappers. One counts
        if it differs between two seeds of ``reset``, is the same after equal seeds, and is constant over the first
        steps of an episode. Attributes of nested objects are not compared, and a part of the state that rests in these
        steps counts, too.

        >>> SeedTasks("MountainCar-v0").drawn_in_reset()
        []
        """
        import gymnasium

        environment = gymnasium.make(self._spec)
        checked = CheckedEnv(environment, "make_tasks", self.env_name, environment.observation_space)
        try:
            checked.reset(seed=0)  # the first reset may set attributes that later ones keep
            snapshots = []
            for seed in (0, 1, 0):
                checked.reset(seed=seed)
                snapshots.append(_numbers(environment))
            environment.action_space.seed(0)
            for _ in range(PROBE_STEPS):
                _, _, terminated, truncated, _ = checked.step(environment.action_space.sample())
                snapshots.append(_numbers(environment))
                if terminated or truncated:
                    break
        finally:
            environment.close()
        first, other, *episode = snapshots
        return sorted(
            name
            for name, value in first.items()
            if name in other
            and not np.array_equal(value, other[name])
            and all(name in same and np.array_equal(value, same[name]) for same in episode)
        )


def _numbers(environment: Any) -> dict[str, np.ndarray]:
    """Return copies of the numbers and numeric arrays among the attributes of an environment and its wrappers."""
    from gymnasium import Wrapper

    found: dict[str, np.ndarray] = {}
    while environment is not None:
        for name, value in getattr(environment, "__dict__", {}).items():
            # Gymnasium stores the seed itself as _np_random_seed.
            if isinstance(value, (numbers.Number, np.generic, np.ndarray)) and not name.startswith("_np_random"):
                array = np.array(value)
                if array.dtype.kind in "biufc":
                    found.setdefault(name, array)
        environment = environment.env if isinstance(environment, Wrapper) else None
    return found
