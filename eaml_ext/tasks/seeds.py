"""Any Gymnasium environment with Box observations as a task distribution; a task is a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eaml_ext._random import check_seed
from eaml_ext.tasks.base import SPLITS, SampledTasks, Task, action_width, check_tasks, task_stream

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv


@dataclass(frozen=True)
class SeedTask(Task):
    """An environment whose first reset has the seed ``seed``, in [0, 2**32); later episodes continue its stream."""

    seed: int


class SeedTasks(SampledTasks[SeedTask]):
    """The tasks of an environment without a registered distribution: the seeds of its episodes.

    The last two bits of a task's seed encode its split, so no seed is in two splits.

    Args:
        env_name: a Gymnasium id, of an environment with Box observations and Discrete or Box actions.

    Raises:
        TypeError: ``env_name`` is no string.
        ValueError: Gymnasium cannot make the environment, or its spaces are others. The message contains Gymnasium's
            suggestion.

    >>> distribution = SeedTasks("Pendulum-v1")
    >>> distribution.obs_dim, distribution.action_dim
    (3, 1)
    >>> [task.seed % 4 for task in distribution.sample(3, split="test")]
    [2, 2, 2]
    """

    def __init__(self, env_name: str) -> None:
        import gymnasium
        from gymnasium.spaces import Box, Discrete

        if not isinstance(env_name, str):
            raise TypeError(f"make_tasks: env_name must be a string, got {type(env_name).__name__}")
        try:
            environment = gymnasium.make(env_name)
        except (gymnasium.error.Error, ImportError) as error:
            raise ValueError(f"make_tasks: env_name {env_name!r} cannot be made by Gymnasium: {error}") from error
        observations, actions, spec = environment.observation_space, environment.action_space, environment.spec
        environment.close()
        if not isinstance(observations, Box):
            raise ValueError(f"make_tasks: env_name {env_name!r} must have Box observations, got {observations}")
        if not isinstance(actions, (Discrete, Box)):
            raise ValueError(f"make_tasks: env_name {env_name!r} must have Discrete or Box actions, got {actions}")
        self.env_name = env_name if spec is None else spec.id
        self.name = f"{self.env_name}-seeds-v1"
        self.obs_dim = int(math.prod(observations.shape))
        self.action_dim = action_width(actions)
        self.action_space: Space[Any] = actions
        self._spec: Any = env_name if spec is None else spec

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
