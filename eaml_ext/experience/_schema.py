"""Schema: the names, shapes and dtypes of an item's fields. Its rules decide whether ``add`` got one item or many."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext.experience.experiences import Experiences

_RESERVED = ("fields", "indices", "generations", "distances", "batch")  # attributes of Experiences
_INT64 = (-(2**63), 2**63)


class FieldSpec(NamedTuple):
    """Dtype of a field, and its shape in one item."""

    dtype: torch.dtype
    shape: tuple[int, ...]


Schema = dict[str, FieldSpec]  # one entry for each field, in the order of the first add


def schema_of(columns: Mapping[str, Tensor]) -> Schema:
    """Return the schema of tensors with a leading dimension of items."""
    return {name: FieldSpec(value.dtype, tuple(value.shape[1:])) for name, value in columns.items()}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of_name(where: str, name: object) -> torch.dtype:
    """Return the dtype with this name, as :func:`dtype_name` gives it. Raises ValueError for any other value."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{where}: the directory names a dtype {name!r} that torch does not know")
    return dtype


def as_field(where: str, name: str, value: Any, stored: torch.dtype | None, device: torch.device) -> Tensor:
    """Convert a value of :meth:`ExperienceBuffer.add` to a tensor.

    Args:
        value: a tensor, which must have the dtype and device wanted, or a number, list or array, which is converted.
        stored: the field's dtype; None at the first add.
        device: the buffer's device.

    Raises:
        TypeError: the value is no tensor, array or number, or has another dtype.
        ValueError: the tensor is on another device.
    """
    if isinstance(value, Tensor):
        if value.dtype == stored and value.device == device and value.layout == torch.strided:
            return value  # the usual case
        _check.device(where, name, value, device, "the buffer")
        if value.layout != torch.strided:
            raise TypeError(f"{where}: {name} must be a dense tensor, got layout {value.layout}")
        converted = value
    else:
        try:
            converted = torch.as_tensor(value, device=device)
        except (TypeError, ValueError, RuntimeError):
            kind = type(value).__name__
            raise TypeError(f"{where}: {name} must be a tensor, an array or a number, got {kind}") from None
        wanted = stored
        if stored is None and (converted.is_floating_point() or name in ("reward", "priority")):
            wanted = torch.get_default_dtype()
        elif stored is None and name == "task" and converted.dtype != torch.bool:
            wanted = torch.int64
        boolean_task = name == "task" and converted.dtype == torch.bool  # remains bool, so that a check raises
        if wanted is not None and torch.can_cast(converted.dtype, wanted) and not boolean_task:
            converted = converted.to(wanted)
    if stored is not None and converted.dtype != stored:
        raise TypeError(f"{where}: {name} has dtype {dtype_name(converted.dtype)}, wanted {dtype_name(stored)}")
    return converted


def check_values(where: str, name: str, values: Tensor) -> None:
    """Raise ValueError unless embeddings and priorities are finite, and priorities positive."""
    if not all_finite(values):
        why = "it is what retrieve searches" if name == "context_embedding" else "a weight"
        raise ValueError(f"{where}: {name} must be finite, {why}")
    if name == "priority" and values.numel() and not values.min() > 0:
        raise ValueError(f"{where}: priority must be > 0, got {values.min().item()}")


def all_finite(values: Tensor) -> bool:
    """Return whether all values are finite. If their sum is finite, no test of each value is needed."""
    return math.isfinite(values.sum()) or bool(torch.isfinite(values).all())


def check_task(where: str, task: Any) -> int:
    """Return the id of a task as an int. Raises TypeError or ValueError unless it is an integer of 64 bits."""
    return _check.integer(where, "task", task, *_INT64)


def task_ids(
    where: str, tasks: int | Tensor | Sequence[int], device: torch.device, name: str = "exclude_task"
) -> Tensor:
    """Convert ids of tasks to an int64 tensor; one number becomes a tensor of shape ``()``.

    Raises:
        TypeError: the ids are no integers.
        ValueError: the tensor is on another device, or a number has more than 64 bits.
    """
    if isinstance(tasks, Tensor):
        _check.device(where, name, tasks, device, "the buffer")
    elif hasattr(tasks, "__index__") and not isinstance(tasks, np.ndarray):
        tasks = _check.integer(where, name, tasks, *_INT64)
    try:
        ids = torch.as_tensor(tasks, device=device)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.zeros(1, dtype=torch.bool, device=device)  # raises the TypeError below
    if ids.numel() and (ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex()):
        raise TypeError(f"{where}: {name} must be an integer or a list or tensor of them, got {tasks!r}")
    return ids.to(torch.int64)


@dataclass(frozen=True)
class SchemaRules:
    """The checks of a schema, and of the values that :meth:`ExperienceBuffer.add` gets.

    Attributes:
        state_dim: size of the last dimension of a state or observation; None: any.
        action_dim: size of the last dimension of an action; None: any.
        ragged: names of the ragged fields, whose first dimension in an item is time.
    """

    state_dim: int | None
    action_dim: int | None
    ragged: tuple[str, ...] = ()

    def items(self, where: str, values: Mapping[str, Tensor], schema: Schema, many: bool = False) -> dict[str, Tensor]:
        """Return the values with a leading dimension of items, checked against the schema.

        Args:
            values: the fields that one call of ``add`` got, each of one item or of many; a scalar applies to all items.
            schema: the stored fields. At the first add it is empty, and :meth:`check` checks the schema of the values.
            many: the values of a first add are those of many items; otherwise their shapes decide.

        Raises:
            TypeError, ValueError: as :meth:`ExperienceBuffer.add`.
        """
        if schema:
            if values.keys() != schema.keys():
                raise ValueError(f"{where}: {_wrong_field(values, schema)}, the buffer stores {', '.join(schema)}")
            deciding, wanted_fields = _deciding_field(schema, values), schema
            extra = values[deciding].dim() - len(schema[deciding].shape)
            if extra not in (0, 1):
                got, one = tuple(values[deciding].shape), schema[deciding].shape
                many_text = ", ".join(map(str, ("n", *one)))
                raise ValueError(f"{where}: {deciding} has shape {got}, wanted {one} or ({many_text})")
            many = extra == 1
        else:
            self._check_names(where, values)
            many = many or self._first_is_many(where, values)
            wanted_fields = _item_schema(values, many)
            self.check(where, wanted_fields)
            deciding = _deciding_field(_item_schema(values, many=False), values)
        lead = tuple(values[deciding].shape[:1]) if many else ()
        items = {}
        for name, value in values.items():
            shape = wanted_fields[name].shape
            wanted = lead + shape
            if value.shape != wanted:
                if value.dim() or shape:
                    known = schema or "context_embedding" in values
                    hint = "" if known else " (one item needs a leading dimension of 1 in every field)"
                    raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}, wanted {wanted}{hint}")
                value = value.expand(wanted)
            items[name] = value if many else value.unsqueeze(0)
        for name in ("context_embedding", "priority"):
            if name in items:
                check_values(where, name, items[name])
        return items

    def check(self, where: str, schema: Schema) -> None:
        """Raise TypeError or ValueError unless the fields with a meaning (see ``add``) have valid shapes and dtypes."""

        def raise_shape_error(name: str, wanted: str) -> None:
            raise ValueError(f"{where}: {name} has shape {schema[name].shape} per item, wanted {wanted}")

        for name in schema:
            if name in _RESERVED or name.startswith("__"):
                raise ValueError(f"{where}: a field cannot be called {name!r}")
        for name in ("state", "observation"):
            if name in schema and self.state_dim is not None and schema[name].shape[-1:] != (self.state_dim,):
                raise_shape_error(name, f"({self.state_dim},) or (time, {self.state_dim})")
            if name in schema and self.state_dim is not None and name in self.ragged and len(schema[name].shape) != 2:
                raise_shape_error(name, f"(time, {self.state_dim}), because it is ragged")
        steps = self._steps(schema) if "state" in schema else ()
        for name in ("action", "reward"):
            if name in schema and schema[name].shape[: len(steps)] != steps:
                raise_shape_error(name, f"one per step of state, which has shape {schema['state'].shape}")
        if "action" in schema and self.action_dim is not None:
            action = schema["action"]
            is_index = not action.dtype.is_floating_point and action.shape == steps
            if not is_index and action.shape != (*steps, self.action_dim):
                raise_shape_error("action", str((*steps, self.action_dim)))
        if "task" in schema and schema["task"].dtype != torch.int64:
            raise TypeError(f"{where}: task must be int64, got {dtype_name(schema['task'].dtype)}")
        for name in ("task", "priority"):
            if name in schema and schema[name].shape:
                raise_shape_error(name, "() (one number)")
        if "context_embedding" in schema and len(schema["context_embedding"].shape) != 1:
            raise_shape_error("context_embedding", "(dim,)")
        for name in ("context_embedding", "priority"):
            if name in schema and not schema[name].dtype.is_floating_point:
                raise TypeError(f"{where}: {name} has dtype {dtype_name(schema[name].dtype)}, wanted a floating one")

    def _steps(self, schema: Schema) -> tuple[int, ...]:
        """Return the time dimensions of ``state``, found by ``state_dim`` or the actions; () if it is no sequence."""
        state = schema["state"].shape
        if self.state_dim is not None:
            return state[:-1]
        if self.action_dim is None or "action" not in schema or not schema["action"].shape:
            return ()
        dtype, action = schema["action"]
        steps = action[:-1] if action[-1] == self.action_dim or dtype.is_floating_point else action
        return steps if state[: len(steps)] == steps else ()

    def _first_is_many(self, where: str, values: Mapping[str, Tensor]) -> bool:
        """Return whether the values of a first add are many items, by the rules of :meth:`ExperienceBuffer.add`."""
        if "context_embedding" in values:  # rule 1
            return values["context_embedding"].dim() > 1
        if self.ragged:
            sequences = (values[n] for n in ("state", "observation") if n in self.ragged and n in values)
            many = self.state_dim is not None and any(value.dim() == 3 for value in sequences)
            return many or any(values[name].dim() for name in ("task", "priority") if name in values)
        arrays = {name: value for name, value in values.items() if value.dim()}
        vectors = {name: value for name, value in arrays.items() if value.dim() == 1}
        scalars = values.keys() - arrays.keys() - {"task", "priority"}
        only_vectors, one_size = len(vectors) == len(arrays), len({len(value) for value in arrays.values()}) == 1
        fits_one, fits_many = self._fits(where, values, False), one_size and self._fits(where, values, True)
        if not (fits_one and fits_many):  # rules 2, 3 and 8, or values that fit neither and fail in check
            matrices = sum(value.dim() == 2 for value in arrays.values())
            return fits_many or not (only_vectors or (fits_one and (one_size or (scalars and matrices < 2))))
        if only_vectors and "reward" not in vectors:  # rule 3
            return False
        if not only_vectors:
            integer_actions = "action" in vectors and not vectors["action"].is_floating_point()
            dims = max(value.dim() for value in arrays.values())
            # Rules 4, 5 and 6, in this order.
            if not scalars or (integer_actions and "reward" not in vectors) or (dims == 2 and "action" not in scalars):
                return True
            # The exception of rule 6, and rule 7.
            if len({value.shape for value in arrays.values()}) == 1 and self.state_dim is None and dims <= 3:
                return False
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in arrays.items())
        text = f"{shapes} can be one item or {len(next(iter(arrays.values())))}"
        raise ValueError(f"{where}: {text}, add one item first or give every field a leading dimension")

    def _fits(self, where: str, values: Mapping[str, Tensor], many: bool) -> bool:
        """Return whether the values of a first add, read as one item or many, pass :meth:`check`."""
        try:
            self.check(where, _item_schema(values, many))
        except (TypeError, ValueError):
            return False
        return True

    def _check_names(self, where: str, names: Collection[str]) -> None:
        """Raise ValueError for a name that hides an attribute, or is probably a misspelt name with a meaning."""
        wanted = ["context_embedding", "task", "priority"]
        wanted += ["state", "observation"] if self.state_dim is not None else []
        wanted += ["action"] if self.action_dim is not None else []
        for name in names:
            if hasattr(Experiences, name):  # the attribute would hide the field
                raise ValueError(f"{where}: a field cannot be called {name!r}")
            for meant in wanted:
                if name != meant and meant not in names and _resembles(name, meant):
                    raise ValueError(f"{where}: a field cannot be called {name!r}, which is nearly {meant!r}")


def _wrong_field(names: Collection[str], schema: Schema) -> str:
    missing = [f"{name} is missing" for name in schema if name not in names]
    return (missing + [f"{name} is not a field" for name in names if name not in schema])[0]


def _item_schema(values: Mapping[str, Tensor], many: bool) -> Schema:
    """Return the schema of one item; a scalar that applies to all items has no leading dimension."""
    shapes = {name: value.shape[1:] if many and value.dim() else value.shape for name, value in values.items()}
    return {name: FieldSpec(value.dtype, tuple(shapes[name])) for name, value in values.items()}


def _deciding_field(schema: Schema, values: Mapping[str, Tensor]) -> str:
    """Return the field whose number of dimensions decides between one item and many: never a shared scalar."""
    for name in ("context_embedding", "state", "observation"):
        if name in schema and schema[name].shape:
            return name
    return max(schema, key=lambda name: (len(schema[name].shape), values[name].dim()))


def _resembles(name: str, meant: str) -> bool:
    """Return whether ``name`` differs from ``meant`` by case, underscores, a plural or, in a long word, one letter."""
    name, meant = name.lower().replace("_", ""), meant.replace("_", "")
    if name in (meant, f"{meant}s", f"{meant[:-1]}ies"):
        return True
    return len(meant) >= 8 and meant not in name and bool(get_close_matches(name, [meant], cutoff=0.875))
