"""The vector environment of a rollout: a call returns arrays of known shapes and dtypes, or raises one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from eaml_ext.tasks._checked_env import CheckedEnv, IntegerRanges, described
from eaml_ext.tasks.base import Task, TaskDistribution

ATTRIBUTES = ("reset", "step", "close", "metadata", "single_observation_space", "action_space")
RESULTS = {
    "reset": ("observations", "infos"),
    "step": ("observations", "rewards", "terminations", "truncations", "infos"),
}


class CheckedVectorEnv:
    """The vector environment that ``dist`` makes for ``tasks``, with a check of all values that it returns.

    The environments of Gymnasium's ``SyncVectorEnv`` are checked one by one, so that an error names a task and a step.

    Attributes:
        env: the Gymnasium vector environment.

    Args:
        where: the name of the public function, for error messages.
        dist: the distribution of the tasks.
        tasks: one environment each.

    Raises:
        ValueError: the vector environment lacks an attribute, has another number of environments, or is not in
            autoreset mode NEXT_STEP.
    """

    def __init__(self, where: str, dist: TaskDistribution[Any], tasks: Sequence[Task]) -> None:
        self._where, self._dist, self._num_tasks, self._num_steps = where, dist, len(tasks), 0
        self._shape, self._checked = (len(tasks),), list[Any]()
        self.env = dist.make_env(tasks)
        try:
            self._check_attributes()
            self._ranges = IntegerRanges(self.env.single_observation_space)
            self._check_each(tasks)
        except BaseException:
            if hasattr(self.env, "close"):
                self.env.close()
            raise

    def _check_attributes(self) -> None:
        from gymnasium.spaces import Box
        from gymnasium.vector import AutoresetMode

        start, env = f"{self._where}: dist must make", self.env
        is_box = isinstance(getattr(env, "single_observation_space", None), Box)
        for name in ATTRIBUTES if is_box else (*ATTRIBUTES, "observation_space"):
            if not hasattr(env, name):
                text = f"vector environments with the attribute {name}, got {type(env).__name__} without it"
                raise ValueError(f"{start} {text} from {self._dist.name}")
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.NEXT_STEP:
            raise ValueError(f"{start} environments in autoreset mode NEXT_STEP, got {mode}")
        got = getattr(env, "num_envs", self._num_tasks)
        if got != self._num_tasks:
            raise ValueError(f"{start} one environment for each of {self._num_tasks} tasks, got {got}")

    def _check_each(self, tasks: Sequence[Task]) -> None:
        """Replace the environments of a SyncVectorEnv until :meth:`close`."""
        from gymnasium.vector import SyncVectorEnv

        vector: Any = getattr(self.env, "unwrapped", self.env)
        if not isinstance(vector, SyncVectorEnv):
            return
        self._vector = vector
        self._environments = vector.envs
        for i, (task, environment) in enumerate(zip(tasks, vector.envs, strict=True)):
            place = f"tasks[{i}] of {self._dist.name}, {task.id}"
            self._checked.append(CheckedEnv(environment, self._where, place, vector.single_observation_space))
        self._vector.envs = self._checked

    def close(self) -> None:
        """Close the environments."""
        if self._checked:
            self._vector.envs, self._checked = self._environments, []
        self.env.close()

    def reset(self, seed: int | list[int]) -> np.ndarray:
        """Return the initial observations, as :meth:`step` returns the others.

        Raises:
            ValueError: the environment returned other values.
        """
        # Gymnasium annotates one seed; its SyncVectorEnv takes a list of seeds, too.
        observations = self._as_array(self._call("reset", seed=seed)[0])
        self._observation_shape = observations.shape
        return observations

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Step all environments by ``action``, an array of the vector environment's action space.

        Returns:
            Observations ``(tasks, *observation shape)``, float32; ``(tasks, obs_dim)`` of another space than Box, as
            ``gymnasium.spaces.flatten`` flattens them. Rewards ``(tasks,)``, float32. Terminations and truncations
            ``(tasks,)``, bool. All arrays are new.

        Raises:
            ValueError: the environment returned other values.
        """
        self._num_steps += 1
        observations, rewards, terminations, truncations, _ = self._call("step", action)
        observations = self._as_array(observations)
        if observations.shape != self._observation_shape:
            wanted = f"have shape {self._observation_shape} as those of reset"
            self._refuse("observations", wanted, str(observations.shape))
        return (
            observations,
            self._column("rewards", rewards, np.float32),
            self._column("terminations", terminations, np.bool_),
            self._column("truncations", truncations, np.bool_),
        )

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Return the values that the method returns, if their number is right."""
        try:
            result = getattr(self.env, name)(*arguments, **options)
        except Exception:
            self._check_observations()
            raise
        if not isinstance(result, (tuple, list)) or len(result) != len(RESULTS[name]):
            got = f"{len(result)} values" if isinstance(result, (tuple, list)) else described(result)
            self._refuse(name, f"return ({', '.join(RESULTS[name])})", got)
        return result

    def _as_array(self, observations: Any) -> np.ndarray:
        """Return observations as a new float32 array, because vector environments may reuse what they return."""
        from gymnasium.spaces import Box, flatten
        from gymnasium.vector.utils import iterate

        single = self.env.single_observation_space
        try:
            if isinstance(single, Box):
                return np.array(observations, np.float32)
            if self._ranges.contain(observations):
                rows = iterate(self.env.observation_space, observations)
                return np.stack([np.asarray(flatten(single, row), np.float32) for row in rows])
        except Exception:  # of any kind: Gymnasium and custom spaces document none
            pass
        self._check_observations()
        self._refuse("observations", f"fit {self._num_tasks} of {single}", described(observations))

    def _column(self, name: str, value: Any, dtype: type[np.generic]) -> np.ndarray:
        try:
            array = np.asarray(value)
            if array.shape == self._shape and array.dtype.kind in "biuf":
                return array.astype(dtype)
        except Exception:  # of any kind: the value may be an object of any class
            pass
        self._refuse(name, f"be {self._num_tasks} numbers", described(value))

    def _check_observations(self) -> None:
        for environment in self._checked:
            environment.check_observation()

    def _refuse(self, name: str, wanted: str, got: str) -> NoReturn:
        text = f"{name} must {wanted}, got {got} at step {self._num_steps} of the vector environment"
        raise ValueError(f"{self._where}: {text} of {self._dist.name}") from None
