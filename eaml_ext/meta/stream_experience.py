"""A memory of past chunks along a stream: which of them to train on is learned through the outer loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext.experience import ExperienceBuffer
from eaml_ext.experience.experiences import check_temperature
from eaml_ext.meta._optimizer import finite
from eaml_ext.nn.submodule import reference_weight
from eaml_ext.ops import knn


class StreamExperience(nn.Module):
    """The experience of a stream: its past chunks, found by the squared distance of their context embeddings.

    In :class:`StreamMAML` each stream has a memory of its own: keys ``(streams, slots, dim)`` with a valid mask. After
    a chunk, :func:`eaml_ext.ops.knn` finds the ``k`` chunks nearest to it. Their loss from a state of zeros, weighted
    by ``softmax(-distance / temperature)``, joins the objective of the update::

        objective = (loss + weight · Σ_i softmax_i loss_i) / (1 + weight)

    Then the chunk replaces the oldest one in the memory. The encoder and ``weight`` are learned through the outer loss.
    At test time the object is the ``retriever`` of an :class:`eaml_ext.adaptation.Adapter`, and reads and writes an
    ExperienceBuffer with ``capacity=slots`` in the same way. A chunk shorter than the first one in the memory is not
    written, nor one that is not finite or whose mask leaves out a step.

    Args:
        encoder: maps chunks ``(n, time, ...)`` to embeddings ``(n, dim)``, or ``(n, time, dim)``, of which the mean
            over time is the embedding; :class:`eaml_ext.nn.SSMLayer` does the latter.
        slots: chunks in the memory.
        k: chunks that a search returns, or fewer while the memory has fewer.
        weight: the initial weight of their loss.
        temperature: of the softmax, in units of the squared distance.
        soft: False: the chunks found have equal weights, so the encoder gets no gradient.
        own_chunks: False: a stream's own chunks are not written, so that the memory keeps those given at the start
            (``past``, :meth:`fill`): they may have labels that the stream does not have.

    Attributes:
        log_weight: the logarithm of the weight, scalar, learned.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    >>> from eaml_ext import SSMLayer
    >>> experience = StreamExperience(SSMLayer(2, 8), slots=32, k=4)
    >>> experience.embedding(torch.randn(5, 16, 2)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        encoder: nn.Module,
        slots: int,
        k: int,
        weight: float = 1.0,
        temperature: float = 1.0,
        soft: bool = True,
        own_chunks: bool = True,
    ):
        super().__init__()
        where = "StreamExperience"
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"{where}: encoder must be a torch.nn.Module, got {type(encoder).__name__}")
        self.slots = _check.positive(where, "slots", slots, integer=True)
        self.k = _check.positive(where, "k", k, integer=True)
        if self.k > self.slots:
            raise ValueError(f"{where}: k must be at most slots, {self.slots}, got {self.k}")
        weight = _check.positive(where, "weight", weight)
        if math.isinf(weight):
            raise ValueError(f"{where}: weight must be finite, got {weight!r}")
        self.temperature = check_temperature(where, temperature)
        self.soft = _check.flag(where, "soft", soft)
        self.own_chunks = _check.flag(where, "own_chunks", own_chunks)
        self.encoder = encoder
        like = reference_weight(encoder)
        self.log_weight = nn.Parameter(torch.tensor(math.log(weight), dtype=like.dtype, device=like.device))

    @property
    def weight(self) -> Tensor:
        """The weight of the experience's loss, a scalar; ``float`` of it is an Adapter's ``experience_weight``."""
        return self.log_weight.exp()

    def embedding(self, x: Tensor) -> Tensor:
        """Return the context embeddings ``(n, dim)`` of chunks ``(n, time, ...)``.

        Raises:
            ValueError: the encoder returns another shape.
        """
        found = self.encoder(x)
        if not isinstance(found, Tensor) or found.dim() not in (2, 3) or len(found) != len(x):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            wanted = f"(n, dim) or (n, time, dim), n = {len(x)}"
            raise ValueError(f"StreamExperience: encoder must return {wanted}, got {got}")
        return found if found.dim() == 2 else found.mean(1)

    def begin(self, items: Tensor, past: int) -> Tensor:
        """Return the keys ``(streams, slots, dim)`` of a memory that holds the first ``past`` of ``items``.

        Args:
            items: ``(streams, n, time, ...)``, n at least 1.
            past: at most ``slots``.
        """
        chunks = items[:, : max(past, 1)]
        keys = self.embedding(chunks.flatten(0, 1)).unflatten(0, chunks.shape[:2])
        empty = keys.new_zeros(len(keys), self.slots - past, keys.shape[2])
        return torch.cat([keys[:, :past], empty], 1)

    def read(self, query: Tensor, keys: Tensor, written: int) -> tuple[Tensor, Tensor] | None:
        """Search the memory.

        Args:
            query: ``(streams, dim)``.
            keys: ``(streams, slots, dim)``.
            written: items that were written so far; item i is in slot ``i % slots``.

        Returns:
            The numbers of the items found ``(streams, n)``, int64, the nearest first, and their weights
            ``(streams, n)``; None if there are none.
        """
        count = min(self.k, written)
        if not count:
            return None
        slots = torch.arange(self.slots, device=keys.device)
        valid = (slots < written).expand(len(keys), -1)
        distances, found = (n[:, 0] for n in knn(query.unsqueeze(1), keys, count, valid=valid))
        weights = torch.full_like(distances, 1 / count)
        if self.soft:
            weights = torch.softmax(-distances / self.temperature, -1)
        last = slots + self.slots * ((written - 1 - slots) // self.slots)  # the newest item of each slot
        return last[found], weights

    def write(self, query: Tensor, keys: Tensor, written: int) -> Tensor:
        """Return the keys with the embedding of item ``written`` in its slot."""
        slot = written % self.slots
        return torch.cat([keys[:, :slot], query.unsqueeze(1), keys[:, slot + 1 :]], 1)

    @torch.no_grad()
    def fill(self, buffer: ExperienceBuffer, x: Tensor, y: Tensor) -> None:
        """Write past chunks to an Adapter's buffer, as ``past`` does in :meth:`StreamMAML.meta_update`.

        Args:
            buffer: the memory.
            x: ``(n, time, ...)``.
            y: ``(n, time, ...)``.

        Raises:
            TypeError: there is no buffer.
        """
        _check_buffer(buffer)
        buffer.add(x, y, context_embedding=self.embedding(x))

    @torch.no_grad()
    def forward(self, buffer: ExperienceBuffer, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Find experience for a batch of :meth:`eaml_ext.adaptation.Adapter.adapt_stream`, then write the batch.

        Args:
            buffer: the memory, whose items are chunks.
            batch: ``states`` and ``targets`` ``(1, time, ...)``, perhaps ``mask`` ``(1,)`` or ``(1, time)``.

        Returns:
            ``states`` and ``targets`` ``(n, time, ...)`` and ``weights`` ``(n,)``; None while the buffer is empty, and
            for a batch that is not finite, which is not written.

        Raises:
            TypeError: there is no buffer.
            ValueError: the batch has not one row.
        """
        _check_buffer(buffer)
        states, targets = batch["states"].detach(), batch["targets"].detach()
        if len(states) != 1:
            raise ValueError(f"StreamExperience: states must have shape (1, time, ...), got {tuple(states.shape)}")
        query = self.embedding(states)[0]
        if not finite(states, targets, query):
            return None
        result: dict[str, Tensor] | None = None
        with buffer.storage.lock:
            found = buffer.retrieve(query, self.k) if len(buffer) else None
            if found:
                count = len(found)
                weights = found.attention(self.temperature) if self.soft else query.new_full((count,), 1 / count)
                like = states if states.is_floating_point() else query  # tokens do not have the model's dtype
                result = {**found.batch(), "weights": weights.to(like)}
            mask = batch.get("mask")
            complete = mask is None or bool(mask.all())
            if self.own_chunks and complete and (result is None or result["states"].shape[1:] == states.shape[1:]):
                buffer.add(states[0], targets[0], context_embedding=query)
        return result


def _check_buffer(buffer: Any) -> None:
    if not isinstance(buffer, ExperienceBuffer):
        raise TypeError(f"StreamExperience: buffer must be an ExperienceBuffer, got {type(buffer).__name__}")
