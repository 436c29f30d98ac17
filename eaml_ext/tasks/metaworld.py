"""Meta-World's robot arm: ML1 (goals of one environment) and ML10 (ten environments)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from eaml_ext.tasks.base import ControlTasks, Task, check_tasks, task_stream

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv

GOAL_SEED = 42
"""Seed of Meta-World's goals. It is fixed, because ML1 draws its test goals with the next seed."""

NUM_VALID_GOALS = 10
"""Number of training goals of an environment, out of 50, that form the split "valid" and are not in "train"."""


@dataclass(frozen=True)
class MetaWorldTask(Task):
    """One goal of one environment.

    Attributes:
        env_name: one of Meta-World's environments.
        goal: index of the goal in Meta-World's list for this environment and set.
    """

    env_name: str
    goal: int


class MetaWorldTasks(ControlTasks[MetaWorldTask]):
    """The tasks of Yu et al. 2019, "Meta-World"; observations do not contain the goal.

    "ML1-<environment>" (such as ``ML1-reach-v3``) has one environment with 50 goals for training and 50 for testing.
    "ML10" has 10 environments for training and 5 others for testing, with 50 goals each. The split "valid" holds ten
    goals of each training environment, which are not in "train". Tasks are drawn with replacement. The sets are those
    of ``metaworld.ML1`` and ``metaworld.ML10``; the environments ``ML1-train`` of Gymnasium's registry hold test tasks.

    Observations have 39 entries, with zeros for the goal. Actions have 4 entries in [-1, 1]: a displacement of the
    hand, and the grip. Episodes have 500 steps. The version in ``name`` fixes the goals and the seeding.

    Args:
        benchmark: "ML10", or "ML1-" and one of Meta-World's environments.

    Raises:
        TypeError, ValueError: ``benchmark`` is no string, or no such benchmark.
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
        made = metaworld.ML1(env_name, seed=GOAL_SEED) if kind == "ML1" else metaworld.ML10(seed=GOAL_SEED)
        self._classes = {"train": made.train_classes, "test": made.test_classes}
        self._goals = {split: _by_environment(getattr(made, f"{split}_tasks")) for split in ("train", "test")}

    @property
    def action_space(self) -> Space[Any]:
        """``Box(-1, 1, (4,))``: displacement of the hand along three axes, and grip."""
        from gymnasium.spaces import Box

        return Box(-1.0, 1.0, (4,), np.float32)

    def _draw_tasks(self, ids: Sequence[str], split: str, seed: int, epoch: int) -> list[MetaWorldTask]:
        num_goals = {name: len(goals) for name, goals in self._goals[_set(split)].items()}
        names, tasks = list(num_goals), []
        for index, task_id in enumerate(ids):
            generator = np.random.default_rng(task_stream(split, seed, epoch, index))
            env_name = names[int(generator.integers(len(names)))]
            last, valid = num_goals[env_name], num_goals[env_name] - NUM_VALID_GOALS
            low, high = {"train": (0, valid), "valid": (valid, last), "test": (0, last)}[split]
            tasks.append(MetaWorldTask(task_id, split, env_name, int(generator.integers(low, high))))
        return tasks

    def make_env(self, tasks: Sequence[MetaWorldTask]) -> VectorEnv[Any, Any, Any]:
        """Return one environment per task, with the goal of ``tasks[i]`` in all episodes of environment i.

        Raises:
            TypeError, ValueError: ``tasks`` is no non-empty sequence of tasks of this distribution.
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
        """Return one environment with its goal; Meta-World's environments cannot be reset without one."""
        environment = self._classes[_set(task.split)][task.env_name]()
        environment.set_task(self._goals[_set(task.split)][task.env_name][task.goal])
        return environment


def _set(split: str) -> str:
    """Return Meta-World's name of the set that holds the split."""
    return "test" if split == "test" else "train"


def _by_environment(tasks: Sequence[Any]) -> dict[str, list[Any]]:
    goals: dict[str, list[Any]] = {}
    for task in tasks:
        goals.setdefault(task.env_name, []).append(task)
    return goals
