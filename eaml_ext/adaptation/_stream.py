"""A model along a stream: the hidden state between batches, and the prediction of each batch."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext._torch_compat import tree_leaves, tree_map
from eaml_ext.adaptation._flat_params import ModelBuffers
from eaml_ext.meta._streams import check_pair, is_recurrent, takes
from eaml_ext.meta.functional import recordable
from eaml_ext.nn._mamba_layer import MambaLayer
from eaml_ext.nn.cores import Core


class StreamedModel:
    """Calls a model for each batch of a stream; a recurrent model, with ``scan`` and ``step``, continues its state.

    Args:
        where: the beginning of messages.
        model: the model.
    """

    def __init__(self, where: str, model: nn.Module):
        self._where, self._model, self._recurrent = where, model, is_recurrent(model)
        self._buffers = ModelBuffers(model)
        self._hidden: Any = None
        self._rows = 0
        self._first: tuple[Tensor, Any] | None = None

    def begin(self, given: Mapping[str, Any]) -> Any:
        """Return the state before a batch: its own one if it has an entry, None (zero) where the row count changes.

        Raises:
            TypeError, ValueError: ``reset`` does not fit the batch or the model.
        """
        self._first = None
        reset = given.get("reset")
        if reset is not None:
            shape = given["states"].shape[:2]
            _check.tensor(self._where, "reset", reset)
            if not self._recurrent or not _is_sequence(given["states"]):
                got = f"{type(self._model).__name__} and states {tuple(given['states'].shape)}"
                raise ValueError(f"{self._where}: reset needs a model with scan and step and sequences, got {got}")
            if not takes(self._model, "reset"):
                kind = type(self._model).__name__
                raise TypeError(f"{self._where}: reset needs a model that takes reset, got {kind}")
            _check.dtype(self._where, "reset", reset, (torch.bool,))
            _check.shape(self._where, "reset", reset, shape, str(tuple(shape)))
            _check.device(self._where, "reset", reset, given["states"].device, "states")
        if not self._recurrent:
            return None
        if "hidden_state" in given or self._rows != len(given["states"]):
            self._hidden = recordable(tree_map(_detached, given.get("hidden_state")))
            self._rows = len(given["states"])
        return self._hidden

    def bind(self, batch: Mapping[str, Any], start: Any) -> Callable[..., Any]:
        """Return the model as a function of one batch, whose states it runs from ``start``, and of experience."""
        states, reset = batch["states"], batch.get("reset")

        def call(x: Tensor, state: Any = None) -> Any:
            if not self._recurrent:
                y = self._model(x) if state is None else self._model(x, state)
            else:
                options = {"reset": reset} if x is states and reset is not None else {}
                y, state = self._continue(x, start if x is states else None, **options)
            if self._first is None:
                self._first = y, state
            return y

        return call

    def _continue(self, x: Tensor, state: Any, **options: Tensor) -> tuple[Any, Any]:
        """Run a recurrent model on sequences or on one step, from a state or from zero."""
        scan: Callable[..., Any] = self._model.scan  # type: ignore[assignment]
        if _is_sequence(x):
            return check_pair(self._where, self._model, scan(x, state, **options))
        if isinstance(self._model, (Core, MambaLayer)):  # their step does not begin from None
            y, state = scan(x.unsqueeze(1), state)
            return y.squeeze(1), state
        return check_pair(self._where, self._model, self._model.step(x, state))  # type: ignore[operator]

    def predict(self, given: Mapping[str, Any], start: Any) -> Tensor:
        """Predict a batch and continue with the state after it; the steps on the batch will update buffers."""
        batch = recordable({name: given.get(name) for name in ("states", "hidden_state", "reset")})
        with torch.no_grad():
            buffers = self._buffers.copy()
            try:
                self.bind(batch, start)(batch["states"], None if self._recurrent else batch["hidden_state"])
            finally:
                self._buffers.write(buffers)
        return self.end()

    def end(self) -> Tensor:
        """Return the first prediction for the batch; continue with the state after it, if that is finite."""
        assert self._first is not None
        (prediction, state), self._first = self._first, None
        leaves = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
        if self._recurrent and all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
            self._hidden = tree_map(_detached, state)
        return prediction.detach()


def _is_sequence(states: Tensor) -> bool:
    """Return whether states are sequences: ``(n, time, features)``, or integers ``(n, time)``, which are tokens."""
    integers = not (states.is_floating_point() or states.is_complex() or states.dtype == torch.bool)
    return states.dim() == 3 or (states.dim() == 2 and integers)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
