"""Submodules whose weights are read past their ``forward``: where that equals a call, and which dtype they take."""

from typing import TypeGuard, TypeVar

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[Module]) -> TypeGuard[Module]:
    """Whether a call of ``module`` does no more than ``kind.forward``.

    Adapters, quantised and parametrised layers have another type; pruning, weight norm and offloading attach hooks or
    replace ``forward``. Such a module must be called.
    """
    return type(module) is kind and "forward" not in module.__dict__ and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs hooks, its own or those of all modules: the test of ``nn.Module.__call__``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def reference_weight(*modules: nn.Module) -> Tensor:
    """The first floating-point weight of ``modules``, whose dtype and device the input of the first must have.

    The weights of quantised layers are no floating-point tensors, so another module's weight is read instead.
    """
    for module in modules:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight
    parameters = (p for module in modules for p in module.parameters())
    return next((p for p in parameters if p.is_floating_point()), torch.empty(0))
