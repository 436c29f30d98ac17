"""The Python values and tensors that a model or a loss depends on, as the key of a captured graph."""

import functools
import inspect
import logging
import types
import weakref
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext._torch_compat import has_hooks, hooks, own_buffers, own_parameters, own_submodules, plain_attributes
from eaml_ext.meta.functional import SUBSTITUTION_LOCK

MAX_VALUES = 50_000  # a walk through more of them takes longer than the launches that a replay saves
MAX_BYTES = 1 << 20  # of one array, for the same reason

_BY_VALUE = frozenset((type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format))


class NoState:
    """Base of objects that a model or a loss may hold, but on which its results do not depend."""


_BY_IDENTITY = (
    types.ModuleType,
    type,
    logging.Logger,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    NoState,
)


class PythonState:
    """The values and tensors that functions and modules depend on, as a key and as tensors at fixed addresses.

    Modules contribute mode, hooks, parameters, buffers and attributes; functions code, closure and defaults; containers
    contents; other objects attributes. Numbers, strings and arrays enter the key by value, functions by code, objects
    by identity. Globals, attributes of classes and optimizers do not enter it.

    The key holds weak references, so that it keeps no model alive. A key of too many values equals no other.

    Args:
        roots: functions, modules, or other values.

    Attributes:
        key: hashable, equal if none of the values has changed.
        tensors: the tensors found.

    >>> layer = nn.Dropout(0.1)
    >>> before = PythonState(layer).key
    >>> layer.p = 0.2
    >>> PythonState(layer).key == before
    False
    """

    def __init__(self, *roots: Any) -> None:
        self.key: Hashable
        self.tensors: list[Tensor] = []
        self._values: list[Hashable] = []
        self._seen: dict[int, tuple[int, Any]] = {}  # by id: when it was found; keeps the value and so its id
        try:
            with SUBSTITUTION_LOCK:
                for root in roots:
                    self._add(root)
                for hook in hooks(None):
                    self._add(hook)
            self.key = tuple(self._values)
        except (_TooManyValues, RecursionError):
            self.key = object()
        del self._values, self._seen

    def _add(self, value: Any) -> None:
        kind, number = type(value), len(self._seen)
        if kind in _BY_VALUE:
            self._values.append((kind, value))
        elif kind is float:
            self._values.append(value.hex())  # 0.0 == -0.0, nan != nan
        elif kind is types.MethodType:  # each access makes a new one
            self._values.append(types.MethodType)
            self._add_all((value.__func__, value.__self__))
        elif self._seen.setdefault(id(value), (number, value))[0] < number:
            self._values.append((PythonState, self._seen[id(value)][0]))
        elif isinstance(value, Tensor):
            self.tensors.append(value)
            self._values.append((Tensor, value.requires_grad))
        elif len(self._values) > MAX_VALUES:
            raise _TooManyValues
        else:
            self._add_contents(value)

    def _add_contents(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._values += [_Identity(value), value.training]
            if has_hooks(value):
                self._add_all(hooks(value))
            for store in (own_parameters(value), own_buffers(value), own_submodules(value), plain_attributes(value)):
                if store:
                    self._add_named(store)
        elif isinstance(value, complex):
            self._values.append((type(value), repr(value)))
        elif isinstance(value, functools.partial):
            self._values.append(functools.partial)
            self._add_all((value.func, value.args, value.keywords))
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, (list, tuple, set, deque, dict, types.MappingProxyType)):
            content = [*value, *value.values()] if isinstance(value, (dict, types.MappingProxyType)) else [*value]
            if len(content) > MAX_VALUES:
                raise _TooManyValues
            self._values += [_Identity(type(value)), len(content)]
            self._add_all(content)
            if type(value) not in (list, tuple, set, dict):
                self._add_attributes(value)
        elif type(value) is types.SimpleNamespace or is_dataclass(type(value)):
            self._values.append(_Identity(type(value)))
            self._add_attributes(value)
        elif (numbers := _numbers(value)) is not None:
            self._values += numbers
        else:
            self._values.append(_Identity(value))
            # Private objects of torch, as those of torch.compile, hold caches and counters.
            if not isinstance(value, _BY_IDENTITY) and not _is_private_of_torch(type(value).__module__):
                self._add_attributes(value)

    def _add_function(self, value: types.FunctionType) -> None:
        # A function that is defined inside another is made again in each call.
        self._values += [_Identity(value.__code__), _Identity(value.__globals__)]
        if _is_private_of_torch(value.__globals__.get("__name__")):
            self._values.append(_Identity(value))  # compiled functions share their code
        else:
            for cell in value.__closure__ or ():
                try:
                    self._add(cell.cell_contents)
                except ValueError:  # the variable has no value yet
                    self._values.append(types.CellType)
            self._add_all((value.__defaults__, value.__kwdefaults__))
        self._add_named(vars(value))

    def _add_attributes(self, value: Any) -> None:
        slots = {name: slot.__get__(value) for name, slot in _slots(value.__class__) if hasattr(value, name)}
        self._add_named({**slots, **getattr(value, "__dict__", {})})

    def _add_named(self, values: Mapping[str, Any]) -> None:
        items = [*values.items()]  # a ScriptModule has no dicts, and no iterators of names
        self._values.append(tuple([name for name, _ in items]))
        for _, value in items:
            self._add(value)

    def _add_all(self, values: Any) -> None:
        for value in values:
            self._add(value)


class _TooManyValues(Exception):
    """The values are too many to compare them in every call."""


class _Identity:
    """A key that is equal for the same object alone, to which it has a weak reference where the object allows it."""

    __slots__ = ("_hash", "_reference")

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        try:
            self._reference: Any = weakref.ref(value)
        except TypeError:
            self._reference = lambda: value

    def __eq__(self, other: object) -> bool:
        value = self._reference()
        return value is not None and isinstance(other, _Identity) and other._reference() is value

    def __hash__(self) -> int:
        return self._hash


@functools.lru_cache(maxsize=1024)
def _slots(kind: Any) -> list[tuple[str, types.MemberDescriptorType]]:
    """The slots of a class and its bases."""
    members = [item for base in inspect.getmro(kind) for item in vars(base).items() if item[0] != "__dict__"]
    return [(name, member) for name, member in members if isinstance(member, types.MemberDescriptorType)]


def _numbers(value: Any) -> list[Hashable] | None:
    """The contents of an array of NumPy or another buffer; None for other values."""
    try:
        view = memoryview(value)
    except (TypeError, ValueError, BufferError):
        return None
    if view.nbytes > MAX_BYTES:
        raise _TooManyValues
    return [type(value), view.format, view.shape, view.tobytes()]


def _is_private_of_torch(module: Any) -> bool:
    return isinstance(module, str) and module.startswith("torch._")
