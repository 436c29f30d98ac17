"""Meta-World's robot variant: ML1 (other goals of one environment) and ML10 (other environments)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from eaml_ext._random import check_seed
from eaml_ext.tasks.base import Task, check_sample, check_tasks, task_stream

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv

SEED = 42
"""Of Meta-World's goals. ML1 draws those of its test set with the next one, which would bring them to training."""

VALID = 10
"""So many of the 50 training goals of an environment are the split "valid" and not in "train"."""


@dataclass(frozen=True)
class MetaWorldTask(Task):
    """The goal number ``goal`` of ``env_name``, in the order Meta-World drew them for this set."""

    env_name: str
    goal: int


class MetaWorldTasks:
    """The tasks of Yu et al. 2019, "Meta-World", with goals that no observation shows.

    "ML1-<environment>" (as ``ML1-reach-v3``) has one environment, 50 goals to train on and 50 to test on; "ML10" has 10
    environments to train on and 5 others to test on, 50 goals each. The split "valid" is ten goals of each training
    environment, which "train" leaves out. Tasks are drawn with replacement. The sets are those of ``metaworld.ML1`` and
    ``metaworld.ML10``: the environments that Meta-World registers with Gymnasium as ``ML1-train`` serve test tasks.

    Observations have 39 entries, with zeros for the goal; actions 4 in [-1, 1]: a displacement of the hand, and the
    grip; episodes have 500 steps. The version in ``name`` fixes the goals and the seeding.

    Args:
        benchmark: "ML10", or "ML1-" and one of Meta-World's environments.

    Raises:
        TypeError, ValueError: ``benchmark`` is no string, or names none of these.
        ImportError: Meta-World is not installed.
    """

    obs_dim = 39
    action_dim = 4

    def __init__(self, benchmark: str = "ML10") -> None:
        if not isinstance(benchmark, str):
            raise TypeError(f"MetaWorldTasks: benchmark must be a string, got {type(benchmark).__name__}")
        kind, _, env_name = benchmark.partition("-")
        if kind not in ("ML1", "ML10") or (kind == "ML1") != bool(env_name):
            wanted = "'ML10' or 'ML1-<environment>'"
            raise ValueError(f"MetaWorldTasks: benchmark must be {wanted}, got {benchmark!r}")
        if find_spec("metaworld") is None:
            raise ImportError("MetaWorldTasks: needs Meta-World, which pip install 'eaml_ext[metaworld]' brings")
        import metaworld

        if kind == "ML1" and env_name not in metaworld.ML1.ENV_NAMES:
            some = ", ".join(sorted(metaworld.ML1.ENV_NAMES)[:3])
            raise ValueError(f"MetaWorldTasks: benchmark must name an environment such as {some}, got {env_name!r}")
        self.name = f"{benchmark}-v1"
        made = metaworld.ML1(env_name, seed=SEED) if kind == "ML1" else metaworld.ML10(seed=SEED)
        self._classes = {"train": made.train_classes, "test": made.test_classes}
        self._goals = {split: _by_environment(getattr(made, f"{split}_tasks")) for split in ("train", "test")}

    @property
    def action_space(self) -> Space[Any]:
        """Displacement of the hand along three axes, and grip."""
        from gymnasium.spaces import Box

        return Box(-1.0, 1.0, (4,), np.float32)

    def sample(self, n: int, split: str = "train", seed: int = 0, epoch: int = 0) -> list[MetaWorldTask]:
        """The first ``n`` tasks of the stream (split, seed, epoch), a pure function of its arguments.

        ``split`` is "train", "valid" or "test"; ``seed`` and ``epoch`` are integers in [0, 2**32). Task i is the same
        whatever ``n``. Raises TypeError or ValueError naming the argument.
        """
        n, split, seed, epoch = check_sample("MetaWorldTasks.sample", n, split, seed, epoch)
        names = list(self._goals[_set(split)])
        tasks = []
        for index in range(n):
            generator = np.random.default_rng(task_stream(split, seed, epoch, index))
            env_name = names[int(generator.integers(len(names)))]
            goals = len(self._goals[_set(split)][env_name])
            first, last = {"train": (0, goals - VALID), "valid": (goals - VALID, goals), "test": (0, goals)}[split]
            goal = int(generator.integers(first, last))
            tasks.append(MetaWorldTask(f"{self.name}/{split}/{seed}/{epoch}/{index}", split, env_name, goal))
        return tasks

    def make_env(self, tasks: Sequence[MetaWorldTask]) -> VectorEnv[Any, Any, Any]:
        """One variant per task, stepped in turn, with the goal of ``tasks[i]`` in all its episodes.

        Raises TypeError or ValueError unless ``tasks`` is a non-empty sequence of tasks of this distribution.
        """
        from gymnasium.vector import SyncVectorEnv

        where = "MetaWorldTasks.make_env"
        check_tasks(where, tasks, MetaWorldTask)
        for i, task in enumerate(tasks):
            known = self._goals[_set(task.split)]
            if task.env_name not in known or not 0 <= task.goal < len(known[task.env_name]):
                got = f"goal {task.goal} of {task.env_name!r}"
                raise ValueError(f"{where}: tasks[{i}] must be of {self.name}, got {got}")
        return SyncVectorEnv([partial(self._make, task) for task in tasks])

    def _make(self, task: MetaWorldTask) -> Any:
        """One environment, whose goal was set: only then can Meta-World's be reset."""
        environment = self._classes[_set(task.split)][task.env_name]()
        environment.set_task(self._goals[_set(task.split)][task.env_name][task.goal])
        return environment

    def reset_seeds(self, tasks: Sequence[MetaWorldTask], seed: int) -> int:
        """The collection's seed itself; the goals are the tasks' own."""
        return check_seed("MetaWorldTasks.reset_seeds", "seed", seed)


def _set(split: str) -> str:
    return "test" if split == "test" else "train"


def _by_environment(tasks: Sequence[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for task in tasks:
        found.setdefault(task.env_name, []).append(task)
    return found
