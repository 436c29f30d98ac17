"""A check of the values that ``reset`` and ``step`` of an environment return, in every call; rollouts use it."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from gymnasium.spaces import Space

CALLS = {
    "reset": "take seed and options and return (observation, info)",
    "step": "take an action and return (observation, reward, terminated, truncated, info)",
}

GYMNASIUM = ("gymnasium.core", "gymnasium.wrappers.", "gymnasium.utils.", "numpy")


class CheckedEnv:
    """An environment whose ``reset`` and ``step`` raise one sentence where a returned value has a wrong type.

    Other attributes are those of the environment, for reading and for assignments. Each call checks the number of
    values, reward, flags and info. The observation is checked by :meth:`check_observation` alone, after a vector
    environment could not batch it, because that check takes as long as a step of a fast environment.

    Args:
        environment: a Gymnasium environment.
        where: the name of the public function, for error messages.
        place: the task or the name of the environment, for error messages.
        space: of its observations.
    """

    def __init__(self, environment: Any, where: str, place: str, space: Space[Any]) -> None:
        own = {"_environment": environment, "_where": where, "_place": place, "_space": space, "_num_steps": 0}
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        # object's method raises AttributeError, not endless recursion, in a copy that has no attributes yet.
        return getattr(object.__getattribute__(self, "_environment"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._environment, name, value)

    def reset(self, **options: Any) -> Any:
        """Return observation and info of a reset; raise ValueError where it returns other values."""
        try:
            result = self._environment.reset(**options)
        except Exception as error:
            self._check_error("reset", error)
            raise
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            self._refuse_result("reset", result)
        self.__dict__["_observation"], info = result
        if not isinstance(info, (dict, Mapping)):
            self._refuse("info", "be a dict", described(info))
        return result

    def step(self, action: Any) -> Any:
        """Return observation, reward, terminated, truncated and info; raise ValueError where it returns others."""
        own = self.__dict__
        own["_num_steps"] += 1
        try:
            result = self._environment.step(action)
        except Exception as error:
            self._check_error("step", error)
            raise
        if not isinstance(result, (tuple, list)) or len(result) != 5:
            self._refuse_result("step", result)
        own["_observation"], reward, terminated, truncated, info = result
        if not isinstance(reward, (float, int, np.floating)) and not _is_number(reward):
            self._refuse("reward", "be a number", described(reward))
        if not isinstance(terminated, (bool, np.bool_)) and not _is_number(terminated, size_one=True):
            self._refuse("terminated", "be True or False", described(terminated))
        if not isinstance(truncated, (bool, np.bool_)) and not _is_number(truncated, size_one=True):
            self._refuse("truncated", "be True or False", described(truncated))
        if not isinstance(info, (dict, Mapping)):
            self._refuse("info", "be a dict", described(info))
        return result

    def check_observation(self) -> None:
        """Raise ValueError unless Gymnasium can batch the last observation in its space and flatten it.

        Numbers out of the bounds of a Box are accepted.
        """
        if "_observation" in self.__dict__ and not _fits(self._space, self._observation):
            self._refuse("observation", f"fit {self._space}", described(self._observation))

    def _check_error(self, call: str, error: Exception) -> None:
        """Raise ValueError unless the environment's own code has a part in the error.

        It has none where Python cannot call it with the arguments, and where Gymnasium's wrappers cannot read a result.
        """
        assert error.__traceback__ is not None
        trace, modules = error.__traceback__.tb_next, []
        while trace is not None:
            modules.append(str(trace.tb_frame.f_globals.get("__name__", "")))
            trace = trace.tb_next
        if all(name.startswith(GYMNASIUM) for name in modules):
            self._refuse(call, CALLS[call], f"{type(error).__name__}: {error}")

    def _refuse_result(self, call: str, result: Any) -> NoReturn:
        got = f"{len(result)} values" if isinstance(result, (tuple, list)) else described(result)
        self._refuse(call, CALLS[call], got)

    def _refuse(self, name: str, wanted: str, got: str) -> NoReturn:
        text = f"{name} must {wanted}, got {got} at step {self._num_steps} of {self._place}"
        raise ValueError(f"{self._where}: {text}") from None


def described(value: Any) -> str:
    """Return a value in words: arrays by their shape and dtype, other leaves by their value."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {described(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(described, value)) + ")"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return reprlib.repr(value)


def _fits(space: Space[Any], observation: Any) -> bool:
    from gymnasium.spaces import flatten
    from gymnasium.vector.utils import concatenate, create_empty_array

    try:
        out: Any = create_empty_array(space, 1)
        concatenate(space, [observation], out)
        flatten(space, observation)
        return IntegerRanges(space).contain(observation)
    except Exception:  # of any kind: Gymnasium and custom spaces document none
        return False


def _is_number(value: Any, size_one: bool = False) -> bool:
    """Return whether NumPy stores ``value`` as one real number; strings of digits do not count."""
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biufO" or array.size != 1 or (array.ndim and not size_one):
            return False
        float(array.item())
    except Exception:  # of any kind: the value may be an object of any class
        return False
    return True


class IntegerRanges:
    """The ranges of the Discrete and MultiDiscrete in a space.

    Gymnasium's ``flatten`` raises no error for integers out of range, but sets another entry of the one-hot vector.
    """

    def __init__(self, space: Space[Any]) -> None:
        self._leaves = list(_integer_leaves(space, ()))

    def contain(self, observation: Any) -> bool:
        """Return whether the integers of an observation, or of a batch of observations, are in their ranges."""
        for keys, low, high in self._leaves:
            value = observation
            for key in keys:
                value = value[key]
            value = np.asarray(value)
            if not ((value >= low) & (value < high)).all():
                return False
        return True


def _integer_leaves(space: Any, keys: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Yield for each Discrete and MultiDiscrete the keys that lead to it, its least integer and its greatest plus 1."""
    from gymnasium.spaces import Dict, Discrete, MultiDiscrete, Tuple

    if isinstance(space, (Dict, Tuple)):
        for key, part in space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces):
            yield from _integer_leaves(part, (*keys, key))
    elif isinstance(space, (Discrete, MultiDiscrete)):
        yield keys, space.start, space.start + (space.n if isinstance(space, Discrete) else space.nvec)
