"""Convert the state of a buffer to and from a dict, a file, a directory and a pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eaml_ext import _check, checkpoint
from eaml_ext.experience import _ragged
from eaml_ext.experience._draws import Draws
from eaml_ext.experience._memmap import MemmapDirectory
from eaml_ext.experience._options import BufferOptions
from eaml_ext.experience._ring import RingStorage
from eaml_ext.experience._schema import SchemaRules, check_values, dtype_of_name, schema_of

KIND = "ExperienceBuffer"


# ------------------------------------------------------------------------------------------------ a dict


def state_dict(where: str, storage: RingStorage, draws: Draws) -> dict[str, Any]:
    """Return copies of items, counters and generator."""
    with storage.lock:
        storage.check_open(where)
        slots: Tensor | slice = slice(len(storage))
        if storage.num_slots != storage.capacity:
            slots = storage.from_memory_slots(torch.arange(len(storage)))
        return {
            **({"ragged": list(storage.ragged)} if storage.ragged else {}),
            "capacity": storage.capacity,
            "written": storage.written,
            "cleared": storage.cleared,
            "generator": draws.generator.get_state(),
            "stream": draws.worker_seed,
            "fields": {name: column[slots].clone() for name, column in storage.columns.items()},
        }


def load_state_dict(where: str, storage: RingStorage, draws: Draws, rules: SchemaRules, state: Any) -> None:
    """Replace the content of ``storage`` and ``draws``. Errors are those of the buffer's method of this name."""
    wanted = {"capacity", "written", "cleared", "generator", "fields"} | ({"ragged"} if storage.ragged else set())
    if not isinstance(state, dict) or set(state) - {"stream"} != wanted:  # files of 0.1 have no stream
        raise ValueError(f"{where}: state must be a dict with the entries {', '.join(sorted(wanted))}")
    capacity = storage.capacity
    if state["capacity"] != capacity:
        raise ValueError(f"{where}: the state is of capacity {state['capacity']}, the buffer of {capacity}")
    if list(state.get("ragged", [])) != list(storage.ragged):
        raise ValueError(f"{where}: the state has the ragged fields {state['ragged']}, wanted {[*storage.ragged]}")
    written, cleared = (_check.integer(where, name, state[name], 0, 2**62) for name in ("written", "cleared"))
    if cleared > written or cleared % capacity:
        raise ValueError(f"{where}: cleared must be a multiple of {capacity} up to {written}, got {cleared}")
    worker_seed = state.get("stream")
    if worker_seed is not None:
        worker_seed = _check.integer(where, "stream", worker_seed)
    count = min(written - cleared, capacity)
    fields: dict[str, Tensor] = state["fields"]
    _check_fields(where, fields, count, rules)
    _ragged.check_columns(where, fields, storage.ragged, None)
    if storage.max_length is not None:  # a state without one may have more steps than its longest item
        fields = _ragged.shortened(fields, storage.ragged, slice(None))
        _ragged.check_columns(where, fields, storage.ragged, storage.max_length)
    generator = torch.Generator()
    try:
        generator.set_state(state["generator"].cpu())
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: generator is not the state of a CPU generator ({error})") from None
    with storage.lock:
        storage.check_writable(where)
        schema = schema_of(fields)
        if fields and storage.max_length is not None:
            schema = _ragged.with_length(schema, storage.ragged, storage.max_length)
        storage.replace(storage.allocate(schema), written, cleared)
        slots = storage.from_memory_slots(torch.arange(count, device=storage.device))
        for name, value in fields.items():
            stored = _ragged.padded(value, schema[name].shape[0]) if name in storage.ragged else value
            storage.columns[name][slots] = stored.detach().to(storage.device)
        draws.generator, draws.worker_seed = generator, worker_seed
        if storage.files is not None:
            storage.flush()  # replaces the old files


def _check_fields(where: str, fields: Mapping[str, Tensor], count: int, rules: SchemaRules) -> None:
    for name, value in fields.items():
        _check.tensor(where, name, value)
        if value.dim() == 0 or len(value) != count:
            raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}, wanted {count} items")
    if count and not fields:
        raise ValueError(f"{where}: fields is empty, wanted {count} items")
    rules.check(where, schema_of(fields))
    for name in ("context_embedding", "priority"):
        if name in fields:
            check_values(where, name, fields[name])


# ------------------------------------------------------------------------------------------------ a file


def save(path: str | os.PathLike[str], state: dict[str, Any], options: BufferOptions) -> None:
    """Write a state to a safetensors file, atomically. Tensors are removed from ``state``."""
    fields = state.pop("fields")
    tensors = {"generator": state.pop("generator"), **{f"field.{name}": value for name, value in fields.items()}}
    checkpoint.save(path, tensors, {**state, "options": options._asdict(), "fields": list(fields)}, kind=KIND)


def from_file(tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> tuple[dict[str, Any], BufferOptions]:
    """Return state and options of a file. Raises LookupError if an entry is missing."""
    fields = {name: tensors[f"field.{name}"] for name in metadata.pop("fields")}
    options = BufferOptions.from_file(metadata.pop("options"))
    return {**metadata, "fields": fields, "generator": tensors["generator"]}, options


# ------------------------------------------------------------------------------------------------ a directory


def flush_state(draws: Draws, options: BufferOptions) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return generator and options, which a flush commits in addition to columns and counters."""
    return {"generator": draws.generator.get_state()}, {"options": options._asdict()}


def attach_directory(
    where: str,
    storage: RingStorage,
    draws: Draws,
    rules: SchemaRules,
    files: MemmapDirectory,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Fill a new buffer from its directory, whose tensors and metadata :meth:`MemmapDirectory.load` returned.

    Raises:
        ValueError: counters, fields and files do not fit together.
        LookupError: an entry is missing.
    """
    draws.generator.set_state(tensors["generator"])
    slots, written, cleared = (
        _check.integer(where, name, metadata[name], 0, 2**62) for name in ("slots", "written", "cleared")
    )
    shapes = {name: (dtype_of_name(where, dtype), tuple(shape)) for name, (dtype, shape) in metadata["fields"].items()}
    rows = {shape[0] for _, shape in shapes.values()}
    if slots <= storage.capacity or cleared > written or cleared % storage.capacity or rows - {slots}:
        text = f"{slots} slots, {sorted(rows)} in the fields, {written} written, {cleared} cleared"
        raise ValueError(f"{where}: {files.path} has numbers that do not go together: {text}")
    columns = files.attach(where, shapes)
    rules.check(where, schema_of(columns))
    _ragged.check_columns(where, columns, storage.ragged, storage.max_length, shortest=0)  # 0: a slot not yet used
    storage.attach(files, slots, columns, written, cleared)


# ------------------------------------------------------------------------------------------------ a pickle


def to_pickle(state: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return a state without tensors.

    For a spawned process, torch pickles a tensor as a handle to shared memory. The tensors of a state are temporary, so
    that their memory would be freed before the process opens the handle. Arrays are pickled with their data.
    """
    fields = {name: (value.dtype, value.shape, _to_array(value)) for name, value in state.pop("fields").items()}
    state["generator"] = state["generator"].numpy()
    return {"options": options, "state": state, "fields": fields}


def from_pickle(pickled: dict[str, Any]) -> dict[str, Any]:
    """Return the state that :func:`to_pickle` received."""
    fields = {name: _from_array(*spec) for name, spec in pickled["fields"].items()}
    return {**pickled["state"], "generator": torch.from_numpy(pickled["state"]["generator"]), "fields": fields}


def _to_array(value: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor."""
    array: NDArray[np.uint8] = value.cpu().reshape(-1).view(torch.uint8).numpy()
    return array


def _from_array(dtype: torch.dtype, shape: torch.Size, data: NDArray[np.uint8]) -> Tensor:
    if not data.size:  # torch cannot view an empty array as another dtype
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).view(shape)
