"""Checks that tests of knn and PackedKeys share: equality bit for bit, and a model of a memory in plain tensors."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from eaml_ext.ops import Neighbors, PackedKeys, knn_reference


def assert_same(got: Neighbors, want: Neighbors) -> None:
    """Assert equality bit for bit, up to the sign of zero and NaN payloads."""
    assert torch.equal(got.indices.cpu(), want.indices.cpu())
    torch.testing.assert_close(got.values.cpu(), want.values.cpu(), rtol=0, atol=0, equal_nan=True)


class Model:
    """A PackedKeys and its expected contents in plain tensors, updated together."""

    def __init__(self, capacity: int, dim: int, memories: int | None = None, **options: Any):
        self.memory = PackedKeys(capacity, dim, memories=memories, **options)
        lead = () if memories is None else (memories,)
        self.keys = torch.zeros(*lead, capacity, dim, dtype=self.memory.dtype)
        self.bias = torch.zeros(*lead, capacity, dtype=self.memory.dtype)
        self.live = torch.zeros(*lead, capacity, dtype=torch.bool)

    def write(self, slots: Tensor, keys: Tensor, bias: Tensor | None = None) -> "Model":
        self.memory.write(slots, keys, bias)
        for index in np.ndindex(slots.shape):  # in order, so that the last write to a slot wins
            slot = (*index[:-1], int(slots[index]))
            self.keys[slot] = keys[index]
            self.bias[slot] = 0 if bias is None else bias[index]
            self.live[slot] = True
        return self

    def erase(self, slots: Tensor) -> None:
        self.memory.erase(slots)
        self.live.scatter_(-1, slots, False)

    def check(self, queries: Tensor, k: int, valid: Tensor | None = None) -> Neighbors:
        live = self.live if valid is None else self.live & valid
        want = knn_reference(queries, self.keys, k, metric=self.memory.metric, valid=live, bias=self.bias)
        found = self.memory.search(queries, k, valid)
        assert_same(found, want)
        assert len(self.memory) == int(self.live.sum())
        return found


def filled(keys: Tensor, **options: Any) -> Model:
    """Return a model whose slots hold ``keys``: ``(M, d)`` or ``(memories, M, d)``."""
    memories = keys.shape[0] if keys.dim() == 3 else None
    model = Model(*keys.shape[-2:], memories, dtype=keys.dtype, **options)
    return model.write(torch.arange(keys.shape[-2]).expand(keys.shape[:-1]), keys)
