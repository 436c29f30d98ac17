"""Any Gymnasium environment with Box observations as a distribution of tasks: its tasks are seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eaml_ext._random import check_seed
from eaml_ext.tasks.base import SPLITS, Task, action_width, check_sample, check_tasks, task_stream

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv


@dataclass(frozen=True)
class SeedTask(Task):
    """The environment whose first reset takes ``seed``, in [0, 2**32); later episodes go on with the same stream."""

    seed: int


class SeedTasks:
    """The tasks of an environment without a registered distribution: the seeds of its episodes.

    ``env_name`` is a Gymnasium id with Box observations (flattened for models) and Discrete or Box actions. The last
    two bits of a task's seed tell its split, so no seed serves two splits.

    Raises TypeError unless ``env_name`` is a string; ValueError when Gymnasium cannot make it, with Gymnasium's own
    suggestion, or when its spaces are others.

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

    def sample(self, n: int, split: str = "train", seed: int = 0, epoch: int = 0) -> list[SeedTask]:
        """The first ``n`` tasks of the stream (split, seed, epoch), a pure function of its arguments.

        ``split`` is "train", "valid" or "test"; ``seed`` and ``epoch`` are integers in [0, 2**32). Task i is the same
        whatever ``n``. Raises TypeError or ValueError naming the argument.
        """
        n, split, seed, epoch = check_sample("SeedTasks.sample", n, split, seed, epoch)
        tasks = []
        for index in range(n):
            word = int(task_stream(split, seed, epoch, index).generate_state(1)[0])
            tasks.append(
                SeedTask(f"{self.name}/{split}/{seed}/{epoch}/{index}", split, word & ~3 | SPLITS.index(split))
            )
        return tasks

    def make_env(self, tasks: Sequence[SeedTask]) -> VectorEnv[Any, Any, Any]:
        """One environment per task, stepped in turn; they become the tasks when reset with ``reset_seeds``.

        Raises TypeError or ValueError unless ``tasks`` is a non-empty sequence of ``SeedTask``.
        """
        import gymnasium

        check_tasks("SeedTasks.make_env", tasks, SeedTask)
        return gymnasium.make_vec(self._spec, len(tasks), vectorization_mode="sync")

    def reset_seeds(self, tasks: Sequence[SeedTask], seed: int) -> list[int]:
        """The tasks' own seeds, whatever the collection's ``seed``: that one decides the actions only."""
        check_tasks("SeedTasks.reset_seeds", tasks, SeedTask)
        return [check_seed("SeedTasks.reset_seeds", f"tasks[{i}].seed", task.seed) for i, task in enumerate(tasks)]
