"""Submodules whose weights go to an op without a call: when that equals a call, and which dtype they take."""

from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from eaml_ext._torch_compat import has_hooks

Module = TypeVar("Module", bound=nn.Module)


def is_plain(module: Any, kind: type[Module]) -> TypeGuard[Module]:
    """Return whether a call of ``module`` runs ``kind.forward`` alone, so that an op may read its weights instead.

    Adapters, quantised and parametrised layers have another type. Pruning, weight norm and offloading attach hooks or
    replace ``forward``.
    """
    return type(module) is kind and "forward" not in module.__dict__ and not has_hooks(module)


def reference_weight(*modules: nn.Module) -> Tensor:
    """Return the first floating-point weight of ``modules``; inputs must have its dtype and device.

    A quantised layer has no floating-point weight, so the weight of the next module is used.
    """
    for module in modules:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight
    parameters = (p for module in modules for p in module.parameters())
    return next((p for p in parameters if p.is_floating_point()), torch.empty(0))
