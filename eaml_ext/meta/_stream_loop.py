"""phi_{k+1} = phi_k - lr dl_k(phi_k)/dphi_k: the updates along a stream, and the gradient of the losses before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eaml_ext._torch_compat import tree_flatten, tree_leaves, tree_map, tree_unflatten
from eaml_ext.meta._batching import Map, generator_states
from eaml_ext.meta._hessian_vector_products import check_repeated
from eaml_ext.meta._inner_loop import combined_objective
from eaml_ext.meta._streams import Streams, check_pair, is_recurrent
from eaml_ext.meta._types import LossFn, Params
from eaml_ext.meta._validation import check_scalar
from eaml_ext.meta.functional import functional_call
from eaml_ext.meta.masked_loss import apply_loss
from eaml_ext.meta.stream_experience import StreamExperience

Carry = dict[str, Any]
"""Tensors from chunk to chunk, each with the leading dimension ``streams``.

- ``fast``: the fast weights by name.
- ``state``: ``{"state": ...}`` of the model, empty before the first chunk of a model that makes its own.
- ``starts``: the states before each of the last ``label_delay`` chunks, the oldest first.
- ``keys``: the embeddings in the memory, with experience.
"""


class Evaluation(NamedTuple):
    """A chunk under fast weights: inner and outer loss ``(streams,)``, prediction, and the state after it."""

    inner: Tensor
    outer: Tensor
    prediction: Tensor
    state: dict[str, Any]


class StreamedCall(nn.Module):
    """A model's ``scan``, or its ``forward`` where it has no state, as a module for ``functional_call``."""

    def __init__(self, where: str, model: nn.Module):
        super().__init__()
        self.where, self.model = where, model

    def forward(self, x: Tensor, state: Any = None, **options: Tensor) -> tuple[Tensor, Any]:
        if is_recurrent(self.model):
            return check_pair(self.where, self.model, self.model.scan(x, state, **options))  # type: ignore[operator]
        return self.model(x, **options), None


@dataclass(frozen=True)
class StreamLoop:
    """Predictions, losses and updates of fast weights along a batch of streams.

    Args:
        where: begins errors.
        model: the model.
        params: its learned parameters by name; those in ``names`` are where the fast weights start.
        names: the fast weights.
        rates: step size of each, a tensor that broadcasts to the weight.
        steps: gradient steps after a chunk.
        first_order: treat their gradients as constants.
        delay: chunks until the targets of a chunk are known.
        loss_fn: the loss of the updates.
        outer_loss_fn: the loss of the predictions; None: ``loss_fn``.
        experience: the memory of past chunks; None: none.
    """

    where: str
    model: nn.Module
    params: Params
    names: tuple[str, ...]
    rates: Params
    steps: int
    first_order: bool
    delay: int
    loss_fn: LossFn
    outer_loss_fn: LossFn | None
    experience: StreamExperience | None

    def begin(self, streams: Streams) -> Carry:
        """Return the carry before the first chunk, connected to the learned parameters."""
        count = len(streams.chunks[0]["x"])
        carry: Carry = {
            "fast": {name: self.params[name].expand(count, *self.params[name].shape) for name in self.names},
            "state": streams.state,
            "starts": [],
        }
        if self.experience is not None:
            carry["keys"] = self.experience.begin(streams.items["x"], streams.past)
        return carry

    def advance(self, batch: Map, streams: Streams, k: int, carry: Carry) -> tuple[Carry, Tensor, Tensor]:
        """Predict chunk k, then update the fast weights for the next one.

        Args:
            batch: maps over streams.
            streams: all chunks.
            k: index of the chunk.
            carry: the carry before chunk k.

        Returns:
            The carry before the next chunk, the outer loss ``(streams,)`` and the prediction
            ``(streams, 1, time, ...)``. They are connected to ``carry`` and the learned parameters where gradients are
            recorded.
        """
        recorded, due = torch.is_grad_enabled(), k - self.delay
        fast = _differentiable(carry["fast"], recorded)
        chunk, state = streams.chunks[k], carry["state"]
        with torch.set_grad_enabled(recorded or not self.delay):
            first = self._evaluate(batch, fast, chunk, state, recorded)
        starts = [*carry["starts"], state]
        after: Carry = {"fast": fast, "state": first.state, "starts": starts[1:] if due >= 0 else starts}
        if due >= 0 and k + 1 < len(streams.chunks):  # nothing follows the last chunk
            found, after_keys = self._read_and_write(streams, due, carry)
            after |= after_keys
            for index in range(self.steps):
                with torch.enable_grad():
                    if index or self.delay:
                        inner = self._evaluate(batch, fast, streams.chunks[due], starts[0], recorded).inner
                    else:
                        inner = first.inner
                    objective = self._objective(batch, fast, inner, found, recorded)
                    grads = self._gradient(objective, fast, recorded)
                fast = _differentiable({n: p - self.rates[n] * grads[n] for n, p in fast.items()}, recorded)
            after["fast"] = fast
        elif "keys" in carry:
            after["keys"] = carry["keys"]
        if not recorded:
            after = tree_map(_detached, after)
        outer, prediction = (t if recorded else t.detach() for t in (first.outer, first.prediction))
        return after, outer, prediction

    def _evaluate(
        self, batch: Map, fast: Params, chunk: dict[str, Tensor], state: dict[str, Any], recorded: bool
    ) -> Evaluation:
        """Run the model on a chunk of every stream."""

        def one(fast: Params, chunk: dict[str, Tensor], carried: dict[str, Any]) -> tuple[Any, ...]:
            options = {"reset": chunk["reset"]} if "reset" in chunk else {}
            mask = chunk.get("mask")
            if mask is not None:
                options["lengths"] = mask.sum(1)
            prediction, state = self._call(fast, recorded, chunk["x"], carried.get("state"), **options)
            _check_output(self.where, prediction, state)
            inner = self._loss(self.loss_fn, prediction, chunk["y"], mask)
            outer = inner
            if self.outer_loss_fn is not None:
                outer = self._loss(self.outer_loss_fn, prediction, chunk["y"], mask)
            return inner, outer, prediction, {} if state is None else {"state": state}

        return Evaluation(*batch(one)(fast, chunk, state))

    def _call(self, fast: Params, recorded: bool, x: Tensor, state: Any = None, **options: Tensor) -> tuple[Any, Any]:
        params = {f"model.{n}": p if recorded else p.detach() for n, p in self.params.items() if n not in fast}
        params |= {f"model.{name}": p for name, p in fast.items()}
        result: tuple[Any, Any] = functional_call(StreamedCall(self.where, self.model), params, (x, state), options)
        return result

    def _loss(self, loss_fn: LossFn, prediction: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """The loss of a chunk, a scalar; 0 where the stream has ended."""
        if mask is None:
            return check_scalar(self.where, loss_fn(prediction, y))
        alive = mask.any()
        # A mean over no steps would be NaN, so the first step of a chunk without data counts, times 0.
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        value = check_scalar(self.where, apply_loss(loss_fn, prediction, y, mask | (first & ~alive)))
        return torch.where(alive, value, 0)

    def _read_and_write(self, streams: Streams, due: int, carry: Carry) -> tuple[dict[str, Tensor] | None, Carry]:
        """Search the memory for chunk ``due``; return the chunks found, and the keys with its own embedding."""
        if self.experience is None:
            return None, {}
        own = self.experience.own_chunks
        written = streams.past + (due if own else 0)
        query = self.experience.embedding(streams.chunks[due]["x"][:, 0])
        found = self.experience.read(query, carry["keys"], written)
        keys = {"keys": self.experience.write(query, carry["keys"], written) if own else carry["keys"]}
        if found is None:
            return None, keys
        numbers, weights = found
        return {"weights": weights, **{n: _take_rows(x, numbers) for n, x in streams.items.items()}}, keys

    def _objective(
        self, batch: Map, fast: Params, inner: Tensor, found: dict[str, Tensor] | None, recorded: bool
    ) -> Tensor:
        """The objective of a step, ``(streams,)``."""
        if found is None:
            return inner
        assert self.experience is not None

        def one(fast: Params, found: dict[str, Tensor]) -> Tensor:
            prediction, _ = self._call(fast, recorded, found["x"])
            items = zip(prediction, found["y"], strict=True)
            losses = [self._loss(self.loss_fn, p.unsqueeze(0), y.unsqueeze(0), None) for p, y in items]
            return (found["weights"].to(losses[0].dtype) * torch.stack(losses)).sum()

        weight = self.experience.weight if recorded else self.experience.weight.detach()
        return combined_objective(inner, batch(one)(fast, found), weight.to(inner.dtype))

    def _gradient(self, objective: Tensor, fast: Params, recorded: bool) -> Params:
        """The gradient of every stream's objective with respect to its own fast weights."""
        if not objective.requires_grad:
            raise ValueError(f"{self.where}: loss_fn does not depend on the fast weights, {', '.join(self.names)}")
        grads = torch.autograd.grad(
            objective.sum(),
            list(fast.values()),
            create_graph=recorded and not self.first_order,
            retain_graph=recorded,
            materialize_grads=True,
        )
        return dict(zip(fast, grads, strict=True))

    # ----------------------------------------------------------------------------------------------- meta-gradient

    def losses(self, batch: Map, streams: Streams) -> tuple[Tensor, Tensor]:
        """Return the outer losses ``(streams, chunks)`` and the predictions ``(streams, 1, time, ...)``."""
        carry, losses, predictions = self.begin(streams), [], []
        for k in range(len(streams.chunks)):
            carry, loss, prediction = self.advance(batch, streams, k, carry)
            wanted = streams.chunks[k]["x"].shape[:3]
            if prediction.shape[:3] != wanted:
                got, text = tuple(prediction.shape[1:]), ", ".join(map(str, wanted[1:]))
                raise ValueError(f"{self.where}: the model must predict a tensor ({text}, ...), got {got}")
            losses.append(loss)
            predictions.append(prediction)
        return torch.stack(losses, 1), torch.cat(predictions, 2)

    def gradient(
        self, batch: Map, streams: Streams, weights: Tensor, leaves: Sequence[Tensor], window: int
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the outer losses and the gradient of their weighted sum, from the graph of each window.

        Args:
            batch: maps over streams.
            streams: the streams.
            weights: ``(streams, chunks)``, floating.
            leaves: the learned tensors.
            window: chunks through which the gradient flows back.
        """
        total: list[Tensor | None] = [None] * len(leaves)
        losses: list[Tensor] = []
        carry = self.begin(streams)
        for start in range(0, len(streams.chunks), window):
            chunks = range(start, min(start + window, len(streams.chunks)))
            some = []
            for k in chunks:
                carry, loss, _ = self.advance(batch, streams, k, carry)
                some.append(loss)
            stacked = torch.stack(some, 1)
            value = (stacked * weights[:, start : chunks.stop].to(stacked)).sum()
            if value.requires_grad:
                total = _add(total, torch.autograd.grad(value, leaves, allow_unused=True))
            losses.append(stacked.detach())
            carry = tree_map(_detached, carry)
        return torch.cat(losses, 1), total

    def recomputed_gradient(
        self, batch: Map, streams: Streams, weights: Tensor, leaves: Sequence[Tensor], window: int
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the result of :meth:`gradient`, from the graph of one chunk at a time; keep only the carries."""
        device = weights.device
        restart = generator_states(device)
        with torch.no_grad():
            carry, saved, first = self.begin(streams), [], []
            for k in range(len(streams.chunks)):
                saved.append((carry, generator_states(device)))
                carry, loss, _ = self.advance(batch, streams, k, carry)
                first.append(loss)
        after, second = generator_states(device), []
        total: list[Tensor | None] = [None] * len(leaves)
        cotangents: list[Tensor | None] = [None] * len(tree_leaves(carry))
        for k in reversed(range(len(streams.chunks))):
            if (k + 1) % window == 0:
                cotangents = [None] * len(cotangents)
            carry, restore = saved.pop()
            restore()
            values, spec = tree_flatten(carry)
            values = [v.detach().requires_grad_(v.is_floating_point() or v.is_complex()) for v in values]
            following, loss, _ = self.advance(batch, streams, k, tree_unflatten(values, spec))
            second.append(loss.detach())
            outputs = [(v, g) for v, g in zip(tree_leaves(following), cotangents, strict=True) if g is not None]
            outputs = [(v, g) for v, g in [*outputs, (loss, weights[:, k].to(loss))] if v.requires_grad]
            inputs = [v for v in values if v.requires_grad]
            found = torch.autograd.grad(
                [v for v, _ in outputs], [*inputs, *leaves], [g for _, g in outputs], allow_unused=True
            )
            own = iter(found)
            cotangents = [next(own) if v.requires_grad else None for v in values]
            total = _add(total, list(own))
        restart()
        starts = tree_leaves(self.begin(streams))
        after()
        check_repeated(self.where, torch.stack(first), torch.stack(second[::-1]))
        pairs = [(v, g) for v, g in zip(starts, cotangents, strict=True) if g is not None and v.requires_grad]
        if pairs:
            outputs_, given = zip(*pairs, strict=True)
            total = _add(total, torch.autograd.grad(outputs_, leaves, given, allow_unused=True))
        return torch.stack(first, 1), total


def _check_output(where: str, prediction: Any, state: Any) -> None:
    """Raise TypeError unless a model returned a tensor, and a state that is None or a nest of tensors."""
    if not isinstance(prediction, Tensor):
        raise TypeError(f"{where}: the model must predict one tensor, got {type(prediction).__name__}")
    for leaf in [] if state is None else tree_leaves(state):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where}: the model's state must consist of tensors, got {type(leaf).__name__}")


def _differentiable(fast: Params, recorded: bool) -> Params:
    """The fast weights as tensors that require grad; without a history unless gradients are recorded."""
    return {n: p if recorded and p.requires_grad else p.detach().requires_grad_() for n, p in fast.items()}


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _take_rows(items: Tensor, numbers: Tensor) -> Tensor:
    """Return the items ``numbers`` ``(streams, k)`` of ``items`` ``(streams, n, ...)``: ``(streams, k, ...)``."""
    return items[torch.arange(len(items), device=items.device).unsqueeze(1), numbers]


def _add(total: list[Tensor | None], parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the sums, where None is zero."""
    return [p if t is None else t if p is None else t + p for t, p in zip(total, parts, strict=True)]
