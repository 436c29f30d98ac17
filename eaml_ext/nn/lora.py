"""W + scale·B A: low-rank factors beside the weights of linear layers, as the parameters that adapt."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eaml_ext import _check
from eaml_ext._torch_compat import own_parameters
from eaml_ext.ops._sizes import check_size

LORA_FACTORS = re.compile(r"\.lora_[AB]$")
"""The names of all factors: ``parameters`` of an Adapter or a StreamMAML that adapts them alone."""


class LowRank(nn.Module):
    """The parametrization ``W -> W + scale·lora_B lora_A`` of a weight ``(out, in)``; lora_B starts at zero."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty_like(weight[:1].expand(rank, -1)).contiguous())
        self.lora_B = nn.Parameter(weight.new_zeros(len(weight), rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum, ``(out, in)``."""
        return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scale)


def add_lora(model: nn.Module, layers: str | Sequence[str], rank: int, scale: float = 1.0) -> list[str]:
    """Add low-rank factors to linear layers of a model in place, without a change of its outputs.

    The names of weights change: ``head.weight`` becomes ``head.parametrizations.weight.original``. Save the model after
    :func:`merge_lora`, or load its ``state_dict`` into a model with the same factors.

    Args:
        model: the model.
        layers: names of submodules, one or several; a ``torch.nn.Linear``, or a module all of whose linear layers are
            meant.
        rank: of the factors.
        scale: their factor, alpha / rank in the paper.

    Returns:
        The names of the factors.

    Raises:
        TypeError, ValueError: a layer does not exist or holds no linear layer, one has factors already, or rank or
            scale is out of its range.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.

    >>> from eaml_ext import SSM, StreamMAML
    >>> model = SSM(2, 16, 2)
    >>> add_lora(model, "head", rank=1)
    ['head.parametrizations.weight.0.lora_A', 'head.parametrizations.weight.0.lora_B']
    >>> maml = StreamMAML(model, 0.1, 1e-3, chunk_size=16, parameters=LORA_FACTORS)
    >>> len(maml.step_sizes)
    2
    """
    where = "add_lora"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    rank = check_size(where, "rank", rank)
    scale = _check.number(where, "scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"{where}: scale must be finite, got {scale!r}")
    chosen = [layers] if isinstance(layers, str) else layers
    if not isinstance(chosen, Sequence) or not all(isinstance(layer, str) for layer in chosen) or not chosen:
        raise TypeError(f"{where}: layers must be a name of a layer or several, got {layers!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {id(m): n for n, m in model.named_modules()}  # a layer with several names has its first one
    linears: dict[str, nn.Linear] = {}
    for layer in chosen:
        parts = {n: m for n, m in modules.items() if not layer or f"{n}.".startswith(f"{layer}.")}
        found = {names[id(m)]: m for m in parts.values() if isinstance(m, nn.Linear)}
        if layer not in modules or not found:
            kind = type(modules[layer]).__name__ if layer in modules else "none"
            raise ValueError(f"{where}: layers must name linear layers of the model, got {layer!r}, which is {kind}")
        linears |= found
    for name, linear in linears.items():
        if parametrize.is_parametrized(linear, "weight"):
            raise ValueError(f"{where}: {name} has a parametrization already")
    for linear in linears.values():
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank, scale))
    prefixes = [f"{name}." if name else "" for name in linears]
    return [f"{prefix}parametrizations.weight.0.lora_{factor}" for prefix in prefixes for factor in "AB"]


def merge_lora(model: nn.Module) -> None:
    """Replace every weight that has low-rank factors by their sum, under its old name, in place.

    A weight that was tied to another one, such as an embedding, is not tied to it any more.

    >>> layer = nn.Sequential(nn.Linear(3, 2))
    >>> _ = add_lora(layer, "0", rank=1)
    >>> merge_lora(layer)
    >>> sorted(layer.state_dict())
    ['0.bias', '0.weight']
    """
    users = Counter(id(p) for module in model.modules() for p in own_parameters(module).values())
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            own: Any = module.parametrizations["weight"]  # type: ignore[index]
            if any(isinstance(p, LowRank) for p in own):
                if users[id(own.original)] > 1:  # the sum is written to the original
                    own.original = nn.Parameter(own.original.detach().clone(), own.original.requires_grad)
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
