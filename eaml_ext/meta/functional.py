"""model(*args) under other parameters and buffers, copies of models, and tensors that autograd accepts."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from eaml_ext.meta._inner_loop import uses_tape

T = TypeVar("T")
HOOKS_ERROR = "hooks of saved tensors (torch.utils.checkpoint) call the model again in the backward pass"

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def functional_call(
    model: nn.Module, params_and_buffers: Mapping[str, Tensor], args: Any, kwargs: dict[str, Any] | None = None
) -> Any:
    """``model(*args, **kwargs)`` with the tensors of ``params_and_buffers`` in place of the model's own.

    ``torch.func.functional_call`` substitutes by name, so a submodule under two names keeps the substituted value.
    Here every tensor is substituted once, under whichever of its names it is given. The model is left as it was: what
    ``forward`` does to buffers in place is discarded, and so are tensors that it stores in plain attributes (attention
    maps, caches, the weights list of ``nn.GRU``).

    Args:
        model: any module whose ``forward`` is Python.
        params_and_buffers: name to tensor, names as in ``named_parameters`` and ``named_buffers``. A tied tensor is
            given under one of its names, or under several with the same value.
        args: positional arguments, a tuple; anything else is the only argument.
        kwargs: keyword arguments.

    Returns:
        The return value of the model.

    Raises:
        TypeError: the model is compiled by ``torch.jit`` or wrapped in ``nn.DataParallel``.
        ValueError: the model has no tensor of a given name, or one tensor is given two values. The model is not called.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> twice = nn.Sequential(layer, layer)
    >>> functional_call(twice, {"0.weight": 3 * torch.eye(2)}, torch.ones(1, 2))
    tensor([[9., 9.]])
    """
    if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel)):
        raise TypeError(f"functional_call: model must be a module of Python, got {type(model).__name__}")
    modules = dict(model.named_modules())
    stores = [
        (prefix, store, dict(store))
        for prefix, module in modules.items()
        for store in (module._parameters, module._buffers)
    ]
    named = {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, _, content in stores
        for name, tensor in content.items()
    }
    every_name = named if all(name in named for name in params_and_buffers) else {**named, **_aliases(model)}
    given: dict[Tensor | None, Tensor] = {}
    for name, value in params_and_buffers.items():
        if every_name.get(name) is None:
            raise ValueError(f"functional_call: params_and_buffers has {name}, the model has no such tensor")
        if given.setdefault(every_name[name], value) is not value:
            raise ValueError(f"functional_call: params_and_buffers has two values for the tied tensor {name}")
    # In-place updates of buffers by forward go to copies.
    given = {b: b.clone() for module in modules.values() for b in module._buffers.values() if b is not None} | given
    if torch.compiler.is_compiling():  # Dynamo can trace torch's own substitution
        values = {name: given[tensor] for name, tensor in named.items() if tensor in given}
        return torch.func.functional_call(model, values, args, kwargs, tie_weights=False)
    args, kwargs = args if isinstance(args, tuple) else (args,), kwargs or {}
    attributes = [(module, _plain_attributes(module)) for module in modules.values()]
    try:
        for _, store, content in stores:
            store.update({name: given[tensor] for name, tensor in content.items() if tensor in given})
        with without_saved_tensor_hooks() if uses_tape() and torch.is_grad_enabled() else nullcontext():
            return model(*args, **kwargs)
    except RuntimeError as error:
        if str(error) != HOOKS_ERROR:
            raise
    finally:
        for _, store, content in stores:
            store.clear()
            store.update(content)
        for module, before in attributes:
            _restore(module, before)
    # Activation checkpointing calls submodules again in the backward pass, so the values must stay in a copy.
    kept = {id(t): given.get(t, t) for t in named.values() if t is not None}
    return detached_copy(model, kept)(*args, **kwargs)


@contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Make hooks of saved tensors (``torch.utils.checkpoint``) raise RuntimeError with the text ``HOOKS_ERROR``."""
    context = torch.autograd.graph.disable_saved_tensors_hooks(HOOKS_ERROR)
    try:
        context.__enter__()
    except RuntimeError:  # the caller has hooks of its own (save_on_cpu)
        yield
        return
    try:
        yield
    finally:
        context.__exit__(None, None, None)


def detached_copy(value: T, memo: dict[int, Any] | None = None) -> T:
    """``copy.deepcopy``; a tensor with a history (an attention map kept by ``forward``) is copied without it.

    >>> layer = nn.Linear(2, 2)
    >>> layer.last = layer(torch.ones(1, 2))
    >>> detached_copy(layer).last.requires_grad
    False
    """
    with _CopyWithoutHistory():
        return copy.deepcopy(value, memo)


class _CopyWithoutHistory(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone()
        return memo[id(tensor)]


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode`` for ``torch.no_grad``, where gradients can be taken on demand; else do nothing."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def recordable(value: T) -> T:
    """A nest with its inference tensors cloned, so that autograd can save them; call it outside inference mode."""
    return tree_map(  # type: ignore[no-any-return]
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf, value
    )


def check_model(where: str, model: Any) -> None:
    """Raise unless ``model`` is a module that autograd can train."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_inference():
            raise ValueError(f"{where}: model must be made outside torch.inference_mode, got {name} made inside")


def check_buffers_constant(where: str, model: nn.Module) -> None:
    """Raise ValueError if ``forward`` would update running statistics: the updates would be lost."""
    for name, module in model.named_modules():
        if isinstance(module, _NORMS) and module.training and module.running_mean is not None:
            kind = f"{name or 'model'} ({type(module).__name__})"
            raise ValueError(f"{where}: {kind} must be in eval mode, got training mode, which updates its statistics")


def check_parameters(where: str, owner: str, model: nn.Module, known: Iterable[Tensor]) -> None:
    """Raise ValueError if a parameter that requires grad is not among those with which ``owner`` was made."""
    known_ids = set(map(id, known))
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in known_ids:
            raise ValueError(
                f"{where}: {name} was unfrozen or replaced after this {owner} was made: make a new {owner}"
            )


def _aliases(model: nn.Module) -> dict[str, Tensor]:
    """Every name of every parameter and buffer."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _plain_attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Attributes beside those of every module: name to the value and, for a list or dict, a copy of it."""
    return {
        name: (value, value.copy() if type(value) in (list, dict) else None)
        for name, value in vars(module).items()
        if name not in _MODULE_ATTRIBUTES
    }


def _restore(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> None:
    """Restore all plain attributes if one that holds tensors has changed: a cache and its key belong together."""
    attributes = vars(module)
    changed: list[Any] = []
    for name in {**before, **attributes}:
        if name not in _MODULE_ATTRIBUTES:
            now, (value, content) = attributes.get(name), before.get(name, (None, None))
            if now is not value or (content is not None and not _same_items(value, content)):
                changed += [now, value, content]
    if not changed or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(changed)):
        return
    for name in [name for name in attributes if name not in before and name not in _MODULE_ATTRIBUTES]:
        del attributes[name]
    for name, (value, content) in before.items():
        attributes[name] = value
        if content is not None:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)


def _same_items(a: Any, b: Any) -> bool:
    """Whether two lists, or two dicts, hold the same objects."""
    if isinstance(a, dict):
        return list(a) == list(b) and _same_items([*a.values()], [*b.values()])
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
