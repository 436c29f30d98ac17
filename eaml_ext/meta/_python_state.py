"""The Python values and tensors that a model or a loss depends on, as the key of a captured graph."""

import contextlib
import functools
import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext._torch_compat import has_hooks, own_buffers, own_parameters, plain_attributes
from eaml_ext.meta.functional import SUBSTITUTION_LOCK


class PythonState:
    """The values and tensors that functions and modules depend on, as a key and as tensors at fixed addresses.

    Modules contribute mode, hooks, parameters, buffers and attributes; functions their closures and defaults. Numbers,
    strings and booleans enter the key by value, other objects by identity. Globals and contents of containers do not.

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
        self._values: list[Hashable] = []
        self.tensors: list[Tensor] = []
        self._seen: set[int] = set()
        with SUBSTITUTION_LOCK:
            for root in roots:
                self._add(root)
        self.key = tuple(self._values)

    def _add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype)):
            self._values.append((type(value), value))
        elif isinstance(value, types.MethodType):  # each access makes a new one
            self._add(value.__func__)
            self._add(value.__self__)
        elif isinstance(value, functools.partial):
            self._values.append((*value.keywords, len(value.args)))
            for part in (value.func, *value.args, *value.keywords.values()):
                self._add(part)
        else:
            self._values.append(_Identity(value))
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self._add_contents(value)

    def _add_contents(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            for module in value.modules():
                self._values += [_Identity(module), module.training, has_hooks(module)]
                self.tensors += [t for t in own_parameters(module).values() if t is not None]
                self.tensors += [t for t in own_buffers(module).values() if t is not None]
                for attribute in plain_attributes(module).values():
                    self._add(attribute)
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty cell: the variable has no value yet
                    self._add(cell.cell_contents)
            for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                self._add(default)


class _Identity:
    """A key that is equal for the same object alone, which it keeps alive."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
