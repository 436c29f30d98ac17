"""Warnings, once per op, where a slow reference runs on a GPU or in place of a missing derivative."""

import functools
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")
_warned: set[str] = set()


def warn_once(op: str, device: torch.device) -> None:
    """Warn, once per process, that the reference of ``op`` runs on ``device``, if that is a GPU."""
    if device.type == "cuda":
        _warn(op, f"{op}: no CUDA kernel takes these tensors, the slow pure-PyTorch reference runs on {device}")


def warn_beyond_second_order(op: str) -> None:
    """Warn, once per process, that a derivative of ``op`` without a kernel is computed from its reference."""
    text = (
        f"{op}: no kernel computes derivatives above the second order, nor forward mode over forward mode; "
        "the slow pure-PyTorch reference is differentiated"
    )
    _warn(f"{op} beyond second order", text)


def _warn(key: str, text: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def reference_of(op: str) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Decorate the function that the dispatcher calls where ``op`` has no kernel: a call on a GPU warns."""

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        @functools.wraps(function)
        def run(first: Tensor, *args: object) -> _Result:
            warn_once(op, first.device)
            return function(first, *args)

        return run

    return decorate
