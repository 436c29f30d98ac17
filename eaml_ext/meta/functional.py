"""model(*args) under other parameters and buffers, copies of models, and tensors that autograd accepts."""

import copy
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eaml_ext._torch_compat import own_buffers, own_parameters, plain_attributes, transforms_active, tree_map
from eaml_ext.meta._types import Params

T = TypeVar("T")
# Held while a model has substituted tensors, and by other threads while they read parameters.
SUBSTITUTION_LOCK = threading.RLock()
HOOKS_ERROR = "hooks of saved tensors (torch.utils.checkpoint) call the model again in the backward pass"


def functional_call(
    model: nn.Module, params_and_buffers: Mapping[str, Tensor], args: Any, kwargs: dict[str, Any] | None = None
) -> Any:
    """``model(*args, **kwargs)`` with the tensors of ``params_and_buffers`` in place of the model's own.

    ``torch.func.functional_call`` substitutes by name, so a submodule under two names keeps the substituted value.
    Here every tensor is substituted once, under whichever of its names it is given. The model is left as it was:
    in-place updates of buffers by ``forward`` are discarded. Tensors that it stores in plain attributes are too:
    attention maps, caches, the weights list of ``nn.GRU``. Attributes may hold tensors in containers at any depth:
    lists, dicts, sets, deques, namespaces, dataclasses. Calls of other threads wait meanwhile.

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
    if torch.compiler.is_compiling():  # Dynamo cannot trace a lock
        return _functional_call(model, params_and_buffers, args, kwargs)
    with SUBSTITUTION_LOCK:
        return _functional_call(model, params_and_buffers, args, kwargs)


def _functional_call(
    model: nn.Module, params_and_buffers: Mapping[str, Tensor], args: Any, kwargs: dict[str, Any] | None
) -> Any:
    modules = dict(model.named_modules())
    stores = [
        (prefix, store, dict(store))
        for prefix, module in modules.items()
        for store in (own_parameters(module), own_buffers(module))
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
    given = {b: b.clone() for module in modules.values() for b in own_buffers(module).values() if b is not None} | given
    values = {name: given[tensor] for name, tensor in named.items() if tensor in given}
    if torch.compiler.is_compiling():  # Dynamo can trace torch's own substitution
        return torch.func.functional_call(model, values, args, kwargs, tie_weights=False)
    args, kwargs = args if isinstance(args, tuple) else (args,), kwargs or {}
    python = [module for module in modules.values() if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [_Attributes(module) for module in python]
    try:
        if len(python) < len(modules):  # the tensors of a ScriptModule are in no dict
            stores = []
            return torch.func.functional_call(model, values, args, kwargs, tie_weights=False)
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
        for before in attributes:
            before.restore()
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
    with SUBSTITUTION_LOCK, _CopyWithoutHistory():
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
    if torch.compiler.is_compiling():  # Dynamo cannot trace Tensor.is_inference
        return value
    return tree_map(  # type: ignore[no-any-return]
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf, value
    )


def uses_tape() -> bool:
    """Return whether only autograd's tape records: no transform of torch.func, forward mode or compilation runs."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return not transforms_active()


def trainable_parameters(model: nn.Module) -> Params:
    """Return the parameters that require grad by name."""
    with SUBSTITUTION_LOCK:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}


def select_parameters(model: nn.Module, prefixes: Sequence[str]) -> list[str]:
    """Return the names of the parameters that require grad and have a name with one of the prefixes.

    A shared parameter has several names. The prefix "" selects all.
    """
    with SUBSTITUTION_LOCK:
        trainable = trainable_parameters(model)
        if "" in prefixes:
            return list(trainable)
        every_name = list(model.named_parameters(remove_duplicate=False))
    chosen = {id(p) for name, p in every_name if any(not x or f"{name}.".startswith(f"{x}.") for x in prefixes)}
    return [name for name, p in trainable.items() if id(p) in chosen]


def _aliases(model: nn.Module) -> dict[str, Tensor]:
    """Every name of every parameter and buffer."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


class _Attributes:
    """The plain attributes of a module and all containers that they hold, as they were before ``forward``."""

    def __init__(self, module: nn.Module):
        self.module, self.before = module, plain_attributes(module)
        walked = _walk(self.before.values())
        self.containers = [(value, content) for value, content in walked if isinstance(content, (list, dict))]

    def restore(self) -> None:
        """Restore all of them if one that holds tensors has changed: a cache and its key belong together."""
        attributes = plain_attributes(self.module)
        changed: list[Any] = []
        if not _same_items(attributes, self.before):
            pairs = [(attributes.get(name), self.before.get(name)) for name in {**self.before, **attributes}]
            changed = [part for now, before in pairs if now is not before for part in (now, before)]
        for value, content in self.containers:
            now = _content(value)
            if not _same_items(now, content):
                changed += [now, content]
        if not changed or not any(isinstance(value, Tensor) for value, _ in _walk(changed)):
            return
        for name in attributes:
            del vars(self.module)[name]
        vars(self.module).update(self.before)
        for value, content in self.containers:
            if not isinstance(value, (list, dict, set, deque)):
                value = vars(value)
            value.clear()
            value.extend(content) if isinstance(value, (list, deque)) else value.update(content)


def _content(value: Any) -> list[Any] | dict[Any, Any] | tuple[Any, ...] | None:
    """A copy of what a container holds directly; None for other values, among them modules and tensors."""
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        return None
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, tuple):
        return value
    if isinstance(value, (list, set, deque)):
        return list(value)
    if hasattr(value, "__dict__") and (type(value) is SimpleNamespace or is_dataclass(type(value))):
        return dict(vars(value))
    return None


def _walk(values: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Every value, the values inside containers included, each container once, with its content."""
    pending, seen = list(values), set()
    while pending:
        value = pending.pop()
        content = _content(value)
        if content is not None:
            if id(value) in seen:
                continue
            seen.add(id(value))
            pending += content.values() if isinstance(content, dict) else content
        yield value, content


def _same_items(a: Any, b: Any) -> bool:
    """Whether two lists, or two dicts, hold the same objects."""
    if isinstance(a, dict):
        return _same_items([*a, *a.values()], [*b, *b.values()])
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
