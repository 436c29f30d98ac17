"""Argument checks. Their errors are one sentence with the function, the argument, the wanted and the passed value."""

from __future__ import annotations

import contextlib
import numbers
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def tensor(where: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a dense tensor."""
    from torch import Tensor, strided  # not at the top: the command line checks numbers without torch

    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not strided:
        raise TypeError(f"{where}: {name} must be a dense tensor, got layout {value.layout}")


def flag(where: str, name: str, value: Any) -> bool:
    """Return ``value`` as a bool. Raise TypeError unless it is True or False, of Python or of NumPy."""
    if not (isinstance(value, bool) or (_is_boolean(value) and getattr(value, "shape", None) == ())):
        raise TypeError(f"{where}: {name} must be True or False, got {type(value).__name__}")
    return bool(value)


def shape(where: str, name: str, value: Tensor, wanted: Sequence[int | None], text: str) -> None:
    """Raise ValueError unless ``value`` has the shape ``wanted`` (None: any size); ``text`` is the shape in words."""
    if value.dim() != len(wanted) or any(w is not None and s != w for s, w in zip(value.shape, wanted, strict=True)):
        raise ValueError(f"{where}: {name} must have shape {text}, got {tuple(value.shape)}")


def dtype(where: str, name: str, value: Tensor, wanted: Sequence[torch.dtype], text: str = "") -> None:
    """Raise TypeError unless ``value`` has one of the dtypes ``wanted``."""
    if value.dtype not in wanted:
        text = text or " or ".join(str(w).removeprefix("torch.") for w in wanted)
        raise TypeError(f"{where}: {name} must be {text}, got {str(value.dtype).removeprefix('torch.')}")


def device(where: str, name: str, value: Tensor, wanted: torch.device, owner: str) -> None:
    """Raise ValueError unless ``value`` lives on ``wanted``, the device of argument ``owner``."""
    if value.device != wanted:
        raise ValueError(f"{where}: {name} is on {value.device}, {owner} is on {wanted}")


def integer(where: str, name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """Return ``value`` as an int: an int, a NumPy integer or an integer tensor of one element.

    Raises TypeError for everything else, booleans included, and ValueError outside [low, high).
    """
    try:
        if _is_boolean(value):
            raise TypeError
        number = operator.index(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{where}: {name} must be an integer, got {value!r}") from None
    if (low is not None and number < low) or (high is not None and number >= high):
        wanted = f">= {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"{where}: {name} must be {wanted}, got {number}")
    return number


def number(where: str, name: str, value: Any) -> float:
    """Return ``value`` as a Python number: an int stays an int, every other ``numbers.Real`` becomes a float.

    Arrays and tensors without dimensions count as their number. Raises TypeError for everything else, booleans and
    strings included.
    """
    if not isinstance(value, numbers.Real) and getattr(value, "shape", None) == () and not _is_boolean(value):
        with contextlib.suppress(AttributeError, RuntimeError):  # no item(), or none without data or under vmap
            value = value.item()
    if _is_boolean(value) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}: {name} must be a number, got {value!r}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


@overload
def positive(where: str, name: str, value: Any, *, zero: bool = ..., integer: Literal[True]) -> int: ...
@overload
def positive(where: str, name: str, value: Any, *, zero: bool = ..., integer: bool = ...) -> float: ...
def positive(where: str, name: str, value: Any, *, zero: bool = False, integer: bool = False) -> float:
    """Return ``value`` as a positive Python number (``zero``: 0 is accepted; ``integer``: it must be integral).

    Raises TypeError for another type, ValueError for a negative number, zero or NaN.
    """
    result = _integer(where, name, value) if integer else number(where, name, value)
    if not (result > 0 or (zero and result == 0)):
        raise ValueError(f"{where}: {name} must be {'>= 0' if zero else '> 0'}, got {result!r}")
    return result


_integer = integer  # the flag of ``positive`` has the same name


def _is_boolean(value: Any) -> bool:
    """True for bool, NumPy booleans and boolean tensors: all of them convert to integers without an error."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
