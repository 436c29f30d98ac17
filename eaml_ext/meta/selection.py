"""The choice of the parameters that adapt, of the model that meta-learning or an Adapter moves."""

import re
from collections.abc import Callable, Sequence

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from eaml_ext._torch_compat import RUNNING_STATISTICS_NORMS, own_parameters

ParameterFilter = str | Sequence[str] | re.Pattern[str] | Callable[[str, nn.Parameter], bool]
"""Prefixes of names at module boundaries, a pattern searched in names, or ``(name, parameter) -> bool``."""

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *RUNNING_STATISTICS_NORMS)


def norm_parameters(model: nn.Module) -> list[str]:
    """Return the names of all parameters of normalisation layers: layer, RMS, group, batch, instance.

    The result is for ``parameters=``. These few parameters shift and scale features, so adapting them can destroy
    little; Wang et al., "Tent", 2021, adapt them.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: ``model`` has no such parameters.

    >>> from eaml_ext import SSM
    >>> norm_parameters(SSM(4))
    ['norms.0.weight', 'norm.weight']
    """
    names = [name for name, module in _modules("norm_parameters", model) if isinstance(module, _NORMS)]
    found = _own_parameters(model, names)
    if not found:
        raise ValueError(f"norm_parameters: model has no normalisation layer with parameters, {type(model).__name__}")
    return found


def output_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters of the output layer, for ``parameters=``.

    The output layer is the last module, in the order in which they are defined, that has parameters of its own. The
    parameters of a parametrization, as :func:`eaml_ext.nn.add_lora` adds, belong to the layer.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: ``model`` has no parameters.

    >>> from eaml_ext import SSM
    >>> output_parameters(SSM(4))
    ['head.weight', 'head.bias']
    """
    names = [
        name
        for name, module in _modules("output_parameters", model)
        if any(p is not None for p in own_parameters(module).values())
    ]
    if not names:
        raise ValueError(f"output_parameters: model has no parameters, {type(model).__name__}")
    return _own_parameters(model, [name for name in names if _layer(name) == _layer(names[-1])])


def _layer(name: str) -> str:
    """Return the name of the layer of a module that may be part of a parametrization."""
    return re.split(r"(?:^|\.)parametrizations\.", name)[0]


def _modules(where: str, model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def _own_parameters(model: nn.Module, names: Sequence[str]) -> list[str]:
    known = {
        id(p): name for name, p in model.named_parameters()
    }  # a tied parameter has the name under which select returns it
    own = (p for name in names for p in own_parameters(model.get_submodule(name)).values() if p is not None)
    return list(dict.fromkeys(known[id(p)] for p in own))


def last_block_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters of the last residual block and of all that follows it, for ``parameters=``.

    The longest ``torch.nn.ModuleList`` or ``Sequential``, or several of equal length, are lists of blocks. The last
    block is their last entries. Modules that are defined after the last of these lists follow it.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: ``model`` has no such list.

    >>> from eaml_ext import SSM
    >>> names = last_block_parameters(SSM(4, num_layers=2))
    >>> names[0], names[-3:], any(name.startswith("cores.0") for name in names)
    ('norms.1.weight', ['norm.weight', 'head.weight', 'head.bias'], False)
    """
    modules = _modules("last_block_parameters", model)
    kinds = nn.ModuleList, nn.Sequential
    lists = {n: m for n, m in modules if isinstance(m, kinds) and len(m) and not isinstance(m, ParametrizationList)}
    if not lists:
        raise ValueError(f"last_block_parameters: model has no ModuleList or Sequential, {type(model).__name__}")
    depth = max(map(len, lists.values()))
    lists = {name: m for name, m in lists.items() if len(m) == depth}
    prefixes = [f"{name}." if name else "" for name in lists]
    ends = [f"{prefix}{depth - 1}" for prefix in prefixes]
    last = max(i for i, (name, _) in enumerate(modules) if name.startswith(tuple(prefixes)))
    following = [name for name, _ in modules[last + 1 :]]
    chosen = [n for n, _ in modules if n in following or any(f"{n}.".startswith(f"{end}.") for end in ends)]
    return _own_parameters(model, chosen)


def select(where: str, model: nn.Module, choice: ParameterFilter | None) -> dict[str, nn.Parameter]:
    """Return the parameters that adapt, by name; any name of a shared parameter selects it."""
    matches = _matcher(where, choice)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    every_name = model.named_parameters(remove_duplicate=False)
    chosen = {id(p) for name, p in every_name if p.requires_grad and matches(name, p)}
    selected = {name: p for name, p in trainable.items() if id(p) in chosen}
    if not selected:
        names = ", ".join(trainable) or "none that require a gradient"
        raise ValueError(f"{where}: parameters selects nothing from the model, which has {names}")
    return selected


def _matcher(where: str, choice: ParameterFilter | None) -> Callable[[str, nn.Parameter], object]:
    """Return the function ``(name, parameter) -> whether the parameter is chosen``."""
    if choice is None:
        return lambda *_: True
    if isinstance(choice, re.Pattern):
        return lambda name, _: choice.search(name)
    if callable(choice):
        return choice
    prefixes = [choice] if isinstance(choice, str) else list(choice)
    if not all(isinstance(prefix, str) for prefix in prefixes):
        raise TypeError(f"{where}: parameters must be prefixes, a pattern or a function, got {choice!r}")
    return lambda name, _: any(f"{name}.".startswith(f"{prefix.rstrip('.')}.") for prefix in prefixes)
