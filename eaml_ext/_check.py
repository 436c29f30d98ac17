"""Argument checks: one sentence that names the argument, what came and what was wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def tensor(where: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a dense tensor."""
    from torch import Tensor, strided  # here, because the command line checks its numbers before torch is loaded

    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not strided:
        raise TypeError(f"{where}: {name} must be a dense tensor, got layout {value.layout}")


def flag(where: str, name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be True or False, got {type(value).__name__}")


def shape(where: str, name: str, value: Tensor, wanted: Sequence[int | None], text: str) -> None:
    """Raise ValueError unless ``value`` has the shape ``wanted`` (None: any size); ``text`` words it for the user."""
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


def positive(where: str, name: str, value: float, *, zero: bool = False, integer: bool = False) -> None:
    """Raise TypeError or ValueError unless ``value`` is a positive number (``zero`` lets 0 pass, ``integer``: int)."""
    kind = "an integer" if integer else "a number"
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise TypeError(f"{where}: {name} must be {kind}, got {value!r}")
    if not (value > 0 or (zero and value == 0)):
        raise ValueError(f"{where}: {name} must be {'>= 0' if zero else '> 0'}, got {value!r}")
