"""The state of an Adapter in a file: its checks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext.adaptation._flat_params import FlatParams
from eaml_ext.meta._optimizer import check_state


def check_adapter_state(
    where: str,
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    flat: FlatParams,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Raise ValueError unless ``state`` has the entries, names and shapes of ``own``, the adapter's present state."""
    if not isinstance(state, Mapping) or set(state) != set(own):
        raise ValueError(f"{where}: state must be a dict with the entries {', '.join(sorted(own))}")
    for entry in ("average", "snapshot"):
        if set(state[entry]) != set(flat.names):
            raise ValueError(f"{where}: {entry} has {', '.join(state[entry])}, wanted {', '.join(flat.names)}")
        for name, p in zip(flat.names, flat.params, strict=True):
            _check.tensor(where, f"{entry} of {name}", state[entry][name])
            _check.shape(where, f"{entry} of {name}", state[entry][name], p.shape, str(tuple(p.shape)))
    if (state["optimizer"] is None) != (optimizer is None):
        raise ValueError(f"{where}: one of the state and the adapter has an optimizer, the other has none")
    if optimizer is not None:
        check_state(where, state["optimizer"], optimizer)
    got, wanted = (_shapes(each["snapshot_buffers"]) for each in (state, own))
    if got != wanted:
        raise ValueError(f"{where}: snapshot_buffers has the shapes {got}, the model's buffers {wanted}")
    if set(state["statistics"]) != set(own["statistics"]):
        names = ", ".join(sorted(own["statistics"]))
        raise ValueError(f"{where}: statistics must be a dict with the entries {names}")


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]
