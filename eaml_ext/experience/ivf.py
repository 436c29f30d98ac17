"""A coarse map of a buffer's embeddings: lists around k-means centroids, and which slots stand in each."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eaml_ext._random import Purpose, derive_seed
from eaml_ext.experience.buffer import ExperienceBuffer

_ITERATIONS = 8
_SAMPLE = 32  # embeddings per list that k-means looks at
_REFRESH = 0.1  # items that may wait for a list, as a share of the memory


@dataclass
class _Partition:
    """The lists of one buffer; ``slots`` lists its slots list by list, list c from ``ends[c]`` to ``ends[c + 1]``."""

    store: weakref.ref[Tensor]  # the buffer's embeddings, by which a replaced memory is recognised
    centroids: Tensor
    list_of: Tensor  # of each slot
    trained: int  # items numbered from here on came after the centroids
    size: int  # number of items when the centroids were made
    slots: Tensor = field(init=False)
    ends: Tensor = field(init=False)
    next: int = field(init=False)  # items numbered from here on are in no list


class InvertedLists:
    """Candidates for a search in any buffer: made at its first search, kept up to date from then on.

    Each buffer has its own partition, which lives as long as the buffer and which its lock guards. Copies and pickles
    start without partitions. See ``retrieval.ivf``.
    """

    def __init__(self, nprobe: int, nlist: int | None, seed: int):
        self._nprobe, self._nlist, self._seed = nprobe, nlist, seed
        self._partitions: weakref.WeakKeyDictionary[ExperienceBuffer, _Partition] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return InvertedLists, (self._nprobe, self._nlist, self._seed)

    def candidates(self, buffer: ExperienceBuffer, queries: Tensor) -> Tensor:
        """The live slots in the lists nearest to ``queries`` ``(dim,)`` or ``(n, dim)``, and those in no list yet."""
        from eaml_ext.ops import knn

        with buffer._lock:
            partition = self._update(buffer)
            queries = _points(queries.detach().reshape(-1, queries.shape[-1]), buffer.metric)
            nprobe = min(self._nprobe, len(partition.centroids))
            lists = knn(queries, partition.centroids, nprobe, metric=buffer.metric).indices.unique()
            bounds = zip(partition.ends[lists].tolist(), partition.ends[lists + 1].tolist(), strict=True)
            listed = torch.cat([partition.slots[a:b] for a, b in bounds])
            waiting = buffer._slots_since(partition.next)
            if not len(waiting):
                return listed
            # The slots of items written since the last assignment follow its last slot around the ring.
            replaced = (listed - partition.next) % buffer._slots < buffer._written - partition.next
            return torch.cat([listed[~replaced], waiting])

    def _update(self, buffer: ExperienceBuffer) -> _Partition:
        keys = buffer._column("retrieval.ivf", "context_embedding")
        partition = self._partitions.get(buffer)
        replaced = partition is None or partition.store() is not buffer._store["context_embedding"]
        if partition is None or replaced or buffer._first >= partition.trained or len(buffer) > 2 * partition.size:
            partition = self._partitions[buffer] = self._train(buffer, keys)
        elif buffer._written - partition.next > max(1, int(_REFRESH * len(buffer))):
            _assign(buffer, partition, buffer._slots_since(partition.next))
        return partition

    def _train(self, buffer: ExperienceBuffer, keys: Tensor) -> _Partition:
        """k-means (Lloyd 1982) on a sample; a list that has lost all its points starts anew at one of them."""
        slots = buffer._slots_since(0)
        count = min(self._nlist or math.ceil(math.sqrt(self._nprobe * len(slots))), len(slots))
        generator = torch.Generator().manual_seed(derive_seed(self._seed, Purpose.CENTROIDS))

        def draw(n: int) -> Tensor:
            return torch.randperm(len(slots), generator=generator)[:n].to(slots.device)

        sample = _points(keys[slots[draw(_SAMPLE * count)]], buffer.metric)
        centroids = sample[:count].clone()
        for _ in range(_ITERATIONS):
            list_ = _nearest(sample, centroids, buffer.metric)
            sums = torch.zeros_like(centroids).index_add_(0, list_, sample)
            sizes = torch.bincount(list_, minlength=count)
            again = torch.randint(len(sample), (count,), generator=generator).to(slots.device)
            means = sums / sizes.clamp(min=1).unsqueeze(1)
            centroids = torch.where((sizes > 0).unsqueeze(1), means, sample[again])
        store, list_of = weakref.ref(buffer._store["context_embedding"]), slots.new_full((buffer._slots,), -1)
        partition = _Partition(store, centroids, list_of, buffer._written, len(buffer))
        _assign(buffer, partition, slots)
        return partition


def _assign(buffer: ExperienceBuffer, partition: _Partition, slots: Tensor) -> None:
    """Put items into lists."""
    store = buffer._store["context_embedding"]
    for part in slots.split(1 << 16):
        points = _points(store[part], buffer.metric)
        partition.list_of[part] = _nearest(points, partition.centroids, buffer.metric)
    live = buffer._slots_since(0)
    list_, order = partition.list_of[live].sort(stable=True)
    partition.slots = live[order]
    edges = torch.arange(len(partition.centroids) + 1, device=list_.device)
    partition.ends = torch.searchsorted(list_, edges)
    partition.next = buffer._written


def _nearest(points: Tensor, centroids: Tensor, metric: str) -> Tensor:
    from eaml_ext.ops import knn

    return knn(points, centroids, 1, metric=metric).indices.squeeze(-1)


def _points(embeddings: Tensor, metric: str) -> Tensor:
    """Embeddings as k-means takes them: in float32 at least; directions, where only they count."""
    points = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return torch.nn.functional.normalize(points, dim=-1) if metric == "cosine" else points
