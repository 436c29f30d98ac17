"""Encode the items of a search as bytes to send between ranks: index, generation, then the fields sorted by name."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eaml_ext.experience import _ragged
from eaml_ext.experience._schema import FieldSpec, Schema
from eaml_ext.experience.experiences import Experiences

_HEADER = 16  # bytes of index and generation


def record_bytes(schema: Schema) -> int:
    """Return the size of one record."""
    return _HEADER + sum(_item_bytes(spec) for spec in schema.values())


def empty_records(queries: int, k: int, schema: Schema) -> Tensor:
    """Return empty records, which have index -1: uint8 ``(queries, k, bytes of a record)``."""
    records = torch.zeros(queries, k, record_bytes(schema), dtype=torch.uint8)
    records[..., :_HEADER] = to_bytes(torch.tensor([-1, 0]))
    return records


def encode(found: Experiences, indices: Tensor, schema: Schema) -> Tensor:
    """Return items as records: uint8 ``(queries, items, bytes of a record)``, on the CPU.

    Args:
        found: the items of several queries.
        indices: int64 ``(queries, items)``, slots over all shards; ``found.indices`` are slots of one shard.
        schema: the fields of ``found``.
    """
    header = torch.stack([indices, found.generations], dim=-1)
    columns = [header]
    for name in sorted(schema):
        value = found.fields[name]
        columns.append(_ragged.padded(value, schema[name].shape[0], dim=2) if name in found.ragged else value)
    flat = [column.reshape(*column.shape[:2], math.prod(column.shape[2:])) for column in columns]
    return torch.cat([to_bytes(column) for column in flat], dim=-1).cpu()


def decode(records: Tensor, schema: Schema, device: torch.device) -> Experiences:
    """Return records ``(queries, items, bytes of a record)`` as items, sorted by index; empty records are last."""
    shape = records.shape[:2]
    indices = from_bytes(records[..., :8], torch.int64, shape)
    order = torch.where(indices < 0, torch.iinfo(torch.int64).max, indices).argsort(dim=1)
    records = records.gather(1, order.unsqueeze(-1).expand_as(records)).to(device)
    header = from_bytes(records[..., :_HEADER], torch.int64, (*shape, 2))
    fields, start = {}, _HEADER
    for name, spec in sorted(schema.items()):
        stop = start + _item_bytes(spec)
        fields[name] = from_bytes(records[..., start:stop], spec.dtype, (*shape, *spec.shape))
        start = stop
    return Experiences({name: fields[name] for name in schema}, header[..., 0], header[..., 1])


def to_bytes(numbers: Tensor) -> Tensor:
    """Return numbers ``(..., n)`` as bytes ``(..., n * item size)``."""
    if numbers.numel():
        return numbers.contiguous().view(torch.uint8)
    return numbers.new_empty((*numbers.shape[:-1], numbers.shape[-1] * numbers.element_size()), dtype=torch.uint8)


def from_bytes(data: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return a copy of the bytes as numbers of this shape."""
    if not math.prod(shape):
        return torch.empty(*shape, dtype=dtype, device=data.device)
    return data.clone(memory_format=torch.contiguous_format).view(dtype).view(*shape)


def _item_bytes(spec: FieldSpec) -> int:
    return spec.dtype.itemsize * math.prod(spec.shape)
