"""Ragged fields: sequences whose length differs from item to item, stored with zeros after the last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eaml_ext.experience._schema import FieldSpec, Schema, as_field

LENGTHS = "lengths"  # the column of the items' lengths, int64
MASK = "mask"  # the field of Experiences that marks their steps
_FIXED = ("context_embedding", "task", "priority", LENGTHS, MASK)


def checked_names(where: str, ragged: Any) -> tuple[str, ...]:
    """Return the names of ragged fields. Raises TypeError or ValueError if they cannot be."""
    names = (ragged,) if isinstance(ragged, str) else ragged
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{where}: ragged must be names of fields, got {ragged!r}")
    for name in names:
        if name in _FIXED:
            raise ValueError(f"{where}: the field {name} cannot be ragged")
    return tuple(dict.fromkeys(names))


def convert(
    where: str, fields: Mapping[str, Any], ragged: Sequence[str], schema: Schema, device: torch.device
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Convert the values of :meth:`ExperienceBuffer.add`, and pad those that are lists of sequences.

    Args:
        fields: name to value.
        ragged: names of the ragged fields.
        schema: the stored fields; empty at the first add.
        device: the buffer's device.

    Returns:
        Tensors, and the lengths of the sequences, int64 ``(n,)``; None if no value is a list of sequences.

    Raises:
        TypeError, ValueError: as :func:`as_field`, or sequences do not fit together.
    """
    values, lengths = {}, {}
    for name, value in fields.items():
        stored = schema[name].dtype if name in schema else None
        if name not in ragged or not _is_list_of_arrays(value):
            values[name] = as_field(where, name, value, stored, device)
            continue
        rows: list[Tensor] = []
        for i, row in enumerate(value):
            rows.append(as_field(where, f"{name}[{i}]", row, rows[0].dtype if rows else stored, device))
            step_shape = schema[name].shape[1:] if name in schema else tuple(rows[0].shape[1:])
            if rows[i].dim() == 0 or rows[i].shape[1:] != step_shape:
                wanted = ", ".join(["time", *map(str, step_shape)])
                raise ValueError(f"{where}: {name}[{i}] has shape {tuple(rows[i].shape)}, wanted ({wanted})")
        values[name], lengths[name] = pad_sequence(rows, batch_first=True), [len(row) for row in rows]
    if not lengths:
        return values, None
    first = next(iter(lengths))
    for name in ragged:
        got = lengths.get(name)
        if got is None and name in values:  # a tensor in which all sequences have one length
            got = [values[name].shape[1] if values[name].dim() > 1 else 0] * len(lengths[first])
        if got is not None and got != lengths[first]:
            raise ValueError(f"{where}: {name} has sequences of lengths {got}, {first} of {lengths[first]}")
    return values, torch.tensor(lengths[first], device=device)


def with_lengths(
    where: str, items: dict[str, Tensor], lengths: Tensor | None, ragged: Sequence[str], max_length: int | None
) -> dict[str, Tensor]:
    """Return items with their lengths, checked; without ``lengths`` all have the same number of steps.

    Raises:
        ValueError: a ragged field is missing or has no time dimension, or sequences have no steps or too many. Or a
            field is called as one of those that ragged items have in addition.
    """
    for name in (LENGTHS, MASK):
        if name in items:
            raise ValueError(f"{where}: a field of a buffer with ragged fields cannot be called {name!r}")
    if lengths is None:
        value = next((items[name] for name in ragged if name in items and items[name].dim() > 1), None)
        some = next(iter(items.values()))
        lengths = torch.full((len(some),), 0 if value is None else value.shape[1], device=some.device)
    items = {**items, LENGTHS: lengths}
    check_columns(where, items, ragged, max_length)
    return items


def call_schema(schema: Schema, ragged: Sequence[str], values: Mapping[str, Tensor]) -> Schema:
    """Return the stored schema with the length of the sequences that a call adds, without the field of lengths."""
    if not ragged:
        return schema
    length = None
    for name in ragged:
        if name in schema and name in values:
            time = values[name].dim() - len(schema[name].shape)  # 0 for one item, 1 for many
            length = values[name].shape[time] if time in (0, 1) else None
            break
    known = {name: spec for name, spec in schema.items() if name != LENGTHS}
    return known if length is None else with_length(known, ragged, length)


def with_length(schema: Schema, ragged: Sequence[str], length: int) -> Schema:
    """Return the schema with another number of steps in the ragged fields."""
    return {
        name: FieldSpec(spec.dtype, (length, *spec.shape[1:])) if name in ragged else spec
        for name, spec in schema.items()
    }


def length_of(schema: Schema, ragged: Sequence[str]) -> int:
    """Return the number of steps in the ragged fields."""
    return schema[ragged[0]].shape[0]


def check_columns(
    where: str, columns: Mapping[str, Tensor], ragged: Sequence[str], max_length: int | None, shortest: int = 1
) -> None:
    """Raise ValueError unless ragged fields have one number of steps, which no length exceeds.

    Args:
        columns: fields ``(n, *item shape)``, with lengths.
        ragged: names of the ragged fields; empty: there is nothing to check.
        max_length: the most steps; None: any number.
        shortest: the least length.
    """
    if not ragged or not columns:
        return
    for name in (*ragged, LENGTHS):
        if name not in columns:
            raise ValueError(f"{where}: the ragged field {name} is missing, the fields are {', '.join(columns)}")
        if name != LENGTHS and columns[name].dim() < 2:
            raise ValueError(f"{where}: the ragged field {name} has no time dimension, it is one number per item")
    steps = columns[ragged[0]].shape[1]
    for name in ragged:
        if columns[name].shape[1] != steps:
            raise ValueError(f"{where}: {name} has {columns[name].shape[1]} steps, {ragged[0]} has {steps}")
    if max_length is not None and steps > max_length:
        raise ValueError(f"{where}: {ragged[0]} has {steps} steps, max_length is {max_length}")
    lengths = columns[LENGTHS]
    if lengths.dtype != torch.int64 or lengths.dim() != 1:
        raise ValueError(f"{where}: lengths must be one int64 number per item, got {lengths.dtype}")
    if len(lengths) and not (shortest <= int(lengths.min()) and int(lengths.max()) <= steps):
        text = f"{int(lengths.min())} to {int(lengths.max())}"
        raise ValueError(f"{where}: sequences must have {shortest} to {max(shortest, steps)} steps, got {text}")


def padded(value: Tensor, length: int, dim: int = 1) -> Tensor:
    """Return the sequences with zeros up to ``length`` steps; ``dim`` is the dimension of time."""
    missing = length - value.shape[dim]
    return F.pad(value, [0, 0] * (value.dim() - dim - 1) + [0, missing]) if missing else value


def gather(columns: Mapping[str, Tensor], ragged: Sequence[str], slots: Tensor) -> dict[str, Tensor]:
    """Return copies of the items in ``slots``, int64 of any shape, as :func:`trimmed` returns them.

    Steps after the longest of these items are not read, which may be far fewer than the columns have.
    """
    return trimmed({n: column[slots] for n, column in shortened(columns, ragged, slots).items()}, ragged)


def shortened(columns: Mapping[str, Tensor], ragged: Sequence[str], slots: Tensor | slice) -> dict[str, Tensor]:
    """Return views of the columns, ragged ones without the steps after the longest item in ``slots``."""
    if not ragged or not columns:
        return {**columns}
    longest = _longest(columns[LENGTHS][slots])
    return {name: column[:, :longest] if name in ragged else column for name, column in columns.items()}


def trimmed(fields: Mapping[str, Tensor], ragged: Sequence[str]) -> dict[str, Tensor]:
    """Return the fields of items, ragged ones without the steps after the longest, and the mask of steps."""
    lengths = fields[LENGTHS]
    longest, time = _longest(lengths), lengths.dim()
    result = {name: value.narrow(time, 0, longest) if name in ragged else value for name, value in fields.items()}
    return {**result, MASK: torch.arange(longest, device=lengths.device) < lengths.unsqueeze(-1)}


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


def _is_list_of_arrays(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(row, (Tensor, np.ndarray)) and row.ndim > 0 for row in value)
