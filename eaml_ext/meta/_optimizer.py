"""The optimizers that take a step from gradients alone."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def make_optimizer(where: str, factory: Callable[..., Any], params: Iterable[Tensor], lr: float) -> Any:
    """``factory(params, lr=lr)``; ValueError where its ``step`` requires a closure that computes the loss again."""
    params = list(params)
    optimizer = factory(params, lr=lr)
    if _needs_closure(optimizer, params):
        kind = type(optimizer).__name__
        raise ValueError(f"{where}: optimizer must step from gradients alone, got {kind}, whose step needs a closure")
    return optimizer


def _needs_closure(optimizer: Any, params: list[Tensor]) -> bool:
    """Try ``step`` without and with a closure, on a copy that holds one number in place of each parameter."""
    small = [nn.Parameter(p.new_zeros((1,) * p.dim())) for p in params]
    memo = {id(p): s for p, s in zip(params, small, strict=True)}
    try:
        # By hand, because deepcopy of a torch optimizer loses the attributes of its subclass.
        trial = object.__new__(type(optimizer))
        vars(trial).update(copy.deepcopy(vars(optimizer), memo))
    except Exception:  # an optimizer that cannot be copied is accepted
        return False

    def closure() -> Tensor:
        for p in small:
            p.grad = torch.zeros_like(p)
        return torch.zeros((), device=small[0].device)

    closure()
    return not _runs(trial.step) and _runs(trial.step, closure)


def _runs(function: Callable[..., Any], *args: Any) -> bool:
    try:
        function(*args)
    except Exception:
        return False
    return True
