"""BufferOptions, the checked arguments of a buffer that its files store, and checks of device and seed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from eaml_ext import _check
from eaml_ext.experience import _ragged

METRICS = ("sqeuclidean", "cosine")
_NOT_IN_0_1 = {"ragged", "max_length"}


class BufferOptions(NamedTuple):
    """Arguments of :class:`ExperienceBuffer`; the names are keys in files."""

    capacity: int
    state_dim: int | None
    action_dim: int | None
    metric: str
    age_half_life: float | None
    ragged: tuple[str, ...] = ()
    max_length: int | None = None

    @classmethod
    def checked(
        cls,
        where: str,
        capacity: Any,
        state_dim: Any,
        action_dim: Any,
        metric: Any,
        age_half_life: Any,
        ragged: Any,
        max_length: Any,
    ) -> BufferOptions:
        """Return the arguments as Python numbers. Raises TypeError or ValueError for one out of its range."""
        capacity = _check.positive(where, "capacity", capacity, integer=True)
        if state_dim is not None:
            state_dim = _check.positive(where, "state_dim", state_dim, integer=True)
        if action_dim is not None:
            action_dim = _check.positive(where, "action_dim", action_dim, integer=True)
        if metric not in METRICS:
            raise ValueError(f"{where}: metric must be {' or '.join(METRICS)}, got {metric!r}")
        if age_half_life is not None:
            age_half_life = _check.positive(where, "age_half_life", age_half_life)
            if math.isinf(age_half_life):
                raise ValueError(f"{where}: age_half_life must be finite, or None for no ageing, got {age_half_life!r}")
        ragged = _ragged.checked_names(where, ragged)
        if max_length is not None:
            max_length = _check.positive(where, "max_length", max_length, integer=True)
            if not ragged:
                raise ValueError(f"{where}: max_length is that of ragged fields, but ragged names none")
        return cls(capacity, state_dim, action_dim, metric, age_half_life, ragged, max_length)

    @classmethod
    def of(cls, buffer: Any) -> BufferOptions:
        """Return the options of a buffer."""
        return cls(*(getattr(buffer, name) for name in cls._fields))

    @classmethod
    def from_file(cls, options: Any) -> BufferOptions:
        """Return the options that a file holds.

        Raises:
            LookupError: the names differ. A file thus cannot set other arguments, such as a directory to write to.
        """
        if set(options) | _NOT_IN_0_1 != set(cls._fields):
            raise LookupError(f"options are {', '.join(map(str, options))}, not {', '.join(cls._fields)}")
        return cls(**options)


def checked_device(where: str, device: torch.device | str) -> torch.device:
    """Return the device as tensors name it ("cuda" becomes "cuda:0"). Raises ValueError if it cannot be used."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{where}: device {device!r} cannot be used: {reason}") from None


def checked_seed(where: str, seed: Any) -> int | None:
    """Return the seed as an int in [0, 2**128), or None. Raises TypeError or ValueError for any other value."""
    if seed is None:
        return None
    seed = _check.positive(where, "seed", seed, integer=True, zero=True)
    return _check.integer(where, "seed", seed, 0, 2**128)
