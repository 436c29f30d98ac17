"""Inverted lists over a buffer's embeddings: a coarse quantizer of k-means centroids, and the slots in each list."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eaml_ext._random import Purpose, derive_seed
from eaml_ext.experience._ring import RingStorage
from eaml_ext.experience.buffer import ExperienceBuffer

_NITER = 8  # iterations of k-means
_POINTS_PER_CENTROID = 32  # size of its sample
_MAX_UNASSIGNED = 0.1  # share of the memory that may be in no list


@dataclass
class _InvertedLists:
    """The lists of one buffer. List i holds ``slots[offsets[i] : offsets[i + 1]]``."""

    keys: weakref.ref[Tensor]  # the buffer's embeddings; another tensor means that its content was replaced
    centroids: Tensor  # (nlist, dim), the coarse quantizer
    list_ids: Tensor  # (num_slots,), the list of the item in each slot
    trained: int  # items numbered from here on were added after the training
    num_items: int  # at the training
    slots: Tensor = field(init=False)
    offsets: Tensor = field(init=False)
    assigned: int = field(init=False)  # items numbered from here on are in no list


class InvertedFile:
    """Candidates for a search in any buffer. Lists are made at its first search and then kept up to date.

    Each buffer has its own lists, which live as long as the buffer and are guarded by its lock. Copies and pickles
    start without lists. See ``retrieval.ivf`` for the arguments.
    """

    def __init__(self, nprobe: int, nlist: int | None, seed: int):
        self._nprobe, self._nlist, self._seed = nprobe, nlist, seed
        self._lists: weakref.WeakKeyDictionary[ExperienceBuffer, _InvertedLists] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return InvertedFile, (self._nprobe, self._nlist, self._seed)

    def candidates(self, buffer: ExperienceBuffer, queries: Tensor) -> Tensor:
        """Return the live slots in the ``nprobe`` lists nearest to each query, and those in no list yet.

        Args:
            buffer: holds the embeddings.
            queries: ``(dim,)`` or ``(n, dim)``, floating.

        Returns:
            int64 ``(candidates,)``, each slot once.
        """
        storage = buffer.storage
        with storage.lock:
            lists = self._updated(buffer)
            points = _points(queries.detach().reshape(-1, queries.shape[-1]), buffer.metric)
            probed = _assign(points, lists.centroids, buffer.metric, self._nprobe).unique()
            bounds = zip(lists.offsets[probed].tolist(), lists.offsets[probed + 1].tolist(), strict=True)
            listed = torch.cat([lists.slots[start:stop] for start, stop in bounds])
            unassigned = storage.slots_since(lists.assigned)
            if not len(unassigned):
                return listed
            # Items added since the last assignment occupy the slots that follow its last slot around the ring.
            overwritten = (listed - lists.assigned) % storage.num_slots < storage.written - lists.assigned
            return torch.cat([listed[~overwritten], unassigned])

    def _updated(self, buffer: ExperienceBuffer) -> _InvertedLists:
        """Return the buffer's lists, trained again if they have gone stale, with few items in no list."""
        storage = buffer.storage
        storage.column("retrieval.ivf", "context_embedding")
        lists = self._lists.get(buffer)
        replaced = lists is None or lists.keys() is not storage.columns["context_embedding"]
        if lists is None or replaced or storage.first >= lists.trained or len(storage) > 2 * lists.num_items:
            lists = self._lists[buffer] = self._train(storage, buffer.metric)
        elif storage.written - lists.assigned > max(1, int(_MAX_UNASSIGNED * len(storage))):
            _add(lists, storage, storage.slots_since(lists.assigned), buffer.metric)
        return lists

    def _train(self, storage: RingStorage, metric: str) -> _InvertedLists:
        """Make lists by k-means (Lloyd 1982) on a sample. A list without points restarts at one of them."""
        keys, slots = storage.columns["context_embedding"], storage.slots_since(0)
        nlist = min(self._nlist or math.ceil(math.sqrt(self._nprobe * len(slots))), len(slots))
        generator = torch.Generator().manual_seed(derive_seed(self._seed, Purpose.CENTROIDS))
        chosen = torch.randperm(len(slots), generator=generator)[: _POINTS_PER_CENTROID * nlist].to(slots.device)
        sample = _points(keys[slots[chosen]], metric)
        centroids = sample[:nlist].clone()
        for _ in range(_NITER):
            ids = _assign(sample, centroids, metric).squeeze(-1)
            sums = torch.zeros_like(centroids).index_add_(0, ids, sample)
            sizes = torch.bincount(ids, minlength=nlist)
            restarts = torch.randint(len(sample), (nlist,), generator=generator).to(slots.device)
            means = sums / sizes.clamp(min=1).unsqueeze(1)
            centroids = torch.where((sizes > 0).unsqueeze(1), means, sample[restarts])
        list_ids = slots.new_full((storage.num_slots,), -1)
        lists = _InvertedLists(weakref.ref(keys), centroids, list_ids, storage.written, len(storage))
        _add(lists, storage, slots, metric)
        return lists


def _add(lists: _InvertedLists, storage: RingStorage, slots: Tensor, metric: str) -> None:
    """Assign the items in ``slots`` to lists, and drop items that are no longer live."""
    keys = storage.columns["context_embedding"]
    for part in slots.split(1 << 16):
        lists.list_ids[part] = _assign(_points(keys[part], metric), lists.centroids, metric).squeeze(-1)
    live = storage.slots_since(0)
    ids, order = lists.list_ids[live].sort(stable=True)
    lists.slots = live[order]
    lists.offsets = torch.searchsorted(ids, torch.arange(len(lists.centroids) + 1, device=ids.device))
    lists.assigned = storage.written


def _assign(points: Tensor, centroids: Tensor, metric: str, nprobe: int = 1) -> Tensor:
    """Return the lists nearest to each point, int64 ``(points, nprobe)``, at most all lists."""
    from eaml_ext.ops import knn  # here, because importing the ops takes seconds

    return knn(points, centroids, min(nprobe, len(centroids)), metric=metric).indices


def _points(embeddings: Tensor, metric: str) -> Tensor:
    """Return embeddings in float32 at least; for cosine, normalised, because k-means averages them."""
    points = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return torch.nn.functional.normalize(points, dim=-1) if metric == "cosine" else points
