"""Submodules whose weights are read past their ``forward``: where that equals a call, and which dtype they take."""

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from eaml_ext._torch_compat import has_hooks

Module = TypeVar("Module", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[Module]) -> TypeGuard[Module]:
    """Whether a call of ``module`` does no more than ``kind.forward``.

    Adapters, quantised and parametrised layers have another type; pruning, weight norm and offloading attach hooks or
    replace ``forward``. Such a module must be called.
    """
    return type(module) is kind and "forward" not in module.__dict__ and not has_hooks(module)


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
