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
_POINTS_PER_CENTROID = 32  # k-means runs on a sample of this many embeddings per centroid
_MAX_UNASSIGNED = 0.1  # fraction of the items that may be in no list


@dataclass
class _InvertedLists:
    """The lists of one buffer. List i holds ``slots[offsets[i] : offsets[i + 1]]``."""

    keys: weakref.ref[Tensor]  # the buffer's embeddings; another tensor means that its content was replaced
    centroids: Tensor  # (nlist, dim), the coarse quantizer
    list_ids: Tensor  # (num_slots,), the list of the item in each slot
    trained_until: int  # items with this number or a larger one were added after the training
    num_trained: int  # number of items at the training
    slots: Tensor = field(init=False)
    offsets: Tensor = field(init=False)
    assigned_until: int = field(init=False)  # items with this number or a larger one are in no list


class InvertedFile:
    """Returns candidates for a search. The first search of a buffer makes its lists, and later ones update them.

    Each buffer has its own lists, which are freed with the buffer and guarded by its lock. Copies and pickles
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
            lists = self._updated_lists(buffer)
            points = _points(queries.detach().reshape(-1, queries.shape[-1]), buffer.metric)
            probed = _assign(points, lists.centroids, buffer.metric, self._nprobe).unique()
            bounds = zip(lists.offsets[probed].tolist(), lists.offsets[probed + 1].tolist(), strict=True)
            listed = torch.cat([lists.slots[start:stop] for start, stop in bounds])
            unassigned = storage.slots_since(lists.assigned_until)
            if not len(unassigned):
                return listed
            # Items added since the last assignment have overwritten the slots from assigned_until % num_slots on.
            added = storage.written - lists.assigned_until
            overwritten = (listed - lists.assigned_until) % storage.num_slots < added
            return torch.cat([listed[~overwritten], unassigned])

    def _updated_lists(self, buffer: ExperienceBuffer) -> _InvertedLists:
        """Return the buffer's lists, with at most the fraction ``_MAX_UNASSIGNED`` of its items in no list.

        Centroids are trained again if all items of the last training are gone, or the number of items has doubled.
        """
        storage = buffer.storage
        storage.column("retrieval.ivf", "context_embedding")
        lists = self._lists.get(buffer)
        replaced = lists is None or lists.keys() is not storage.columns["context_embedding"]
        if lists is None or replaced or storage.first >= lists.trained_until or len(storage) > 2 * lists.num_trained:
            lists = self._lists[buffer] = self._train(storage, buffer.metric)
        elif storage.written - lists.assigned_until > max(1, int(_MAX_UNASSIGNED * len(storage))):
            _add(lists, storage, storage.slots_since(lists.assigned_until), buffer.metric)
        return lists

    def _train(self, storage: RingStorage, metric: str) -> _InvertedLists:
        """Make lists by k-means (Lloyd 1982) on a sample. The centroid of an empty list moves to a random point."""
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
    lists.assigned_until = storage.written


def _assign(points: Tensor, centroids: Tensor, metric: str, nprobe: int = 1) -> Tensor:
    """Return the lists nearest to each point, int64 ``(points, min(nprobe, nlist))``."""
    from eaml_ext.ops import knn  # here, because importing the ops takes seconds

    return knn(points, centroids, min(nprobe, len(centroids)), metric=metric).indices


def _points(embeddings: Tensor, metric: str) -> Tensor:
    """Return embeddings in float32 at least; for cosine, normalised, because k-means averages them."""
    points = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return torch.nn.functional.normalize(points, dim=-1) if metric == "cosine" else points
