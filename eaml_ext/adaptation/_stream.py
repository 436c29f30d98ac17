"""A model along a stream: the hidden state between batches, and the prediction of each batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext._torch_compat import tree_leaves, tree_map


class StreamedModel:
    """Calls a model for each batch of a stream; a recurrent model, with ``scan`` and ``step``, continues its state.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._recurrent = hasattr(model, "scan") and hasattr(model, "step")
        self._hidden: Any = None
        self._rows = 0
        self._first: tuple[Tensor, Any] | None = None

    def begin(self, given: Mapping[str, Any], batch: dict[str, Any]) -> None:
        """Set the hidden state of a batch: its own one if ``given`` has an entry, zero where the row count changes."""
        self._first = None
        if self._recurrent:
            if "hidden_state" in given or self._rows != len(batch["states"]):
                self._hidden, self._rows = batch.get("hidden_state"), len(batch["states"])
            batch["hidden_state"] = self._hidden

    def __call__(self, x: Tensor, state: Any = None) -> Any:
        if self._recurrent:
            y, state = (self._model.scan if x.dim() == 3 else self._model.step)(x, state)  # type: ignore[operator]
        else:
            y = self._model(x) if state is None else self._model(x, state)
        if self._first is None:
            self._first = y, state
        return y

    def end(self) -> Tensor:
        """Return the first prediction for the batch; continue with the state after it, if that is finite."""
        assert self._first is not None
        (prediction, state), self._first = self._first, None
        if self._recurrent and all(bool(torch.isfinite(leaf).all()) for leaf in tree_leaves(state)):
            self._hidden = tree_map(Tensor.detach, state)
        return prediction.detach()
