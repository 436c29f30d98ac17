"""A coarse map of a buffer's embeddings: cells around k-means centroids, and which slots stand in each."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from eaml_ext.experience.buffer import ExperienceBuffer

_ITERATIONS = 8
_SAMPLE = 32  # embeddings per cell that k-means looks at
_REFRESH = 0.1  # items that may wait for a cell, as a share of the memory


class Cells:
    """Candidates for a search; made at the first call, kept up to date from then on. See ``retrieval.hierarchical``."""

    def __init__(self, probes: int, cells: int | None, seed: int):
        self._probes, self._count, self._seed = probes, cells, seed
        self._buffer: Any = lambda: None
        self._store: Any = None
        self._next = 0  # items numbered from here on are in no cell yet
        self._trained = self._size = 0  # the items before, so many, were there when the centroids were made

    def candidates(self, buffer: ExperienceBuffer, queries: Tensor) -> Tensor:
        """The live slots in the cells nearest to ``queries`` ``(dim,)`` or ``(n, dim)``, and those in no cell yet."""
        from eaml_ext.ops import knn

        self._update(buffer)
        queries = _points(queries.detach().reshape(-1, queries.shape[-1]), buffer.metric)
        probes = min(self._probes, len(self._centroids))
        cells = knn(queries, self._centroids, probes, metric=buffer.metric).indices.unique()
        stretches = zip(self._ends[cells].tolist(), self._ends[cells + 1].tolist(), strict=True)
        listed = torch.cat([self._slots[a:b] for a, b in stretches])
        waiting = buffer._slots_since(self._next)
        if not len(waiting):
            return listed
        # What has been overwritten since stands in a ring's stretch behind the last item that has a cell.
        replaced = (listed - self._next) % buffer._slots < buffer._written - self._next
        return torch.cat([listed[~replaced], waiting])

    def _update(self, buffer: ExperienceBuffer) -> None:
        keys = buffer._column("retrieval.hierarchical", "context_embedding")
        store = buffer._store["context_embedding"]
        known = self._buffer() is buffer and self._store is store
        if not known or buffer._first >= self._trained or len(buffer) > 2 * self._size:
            self._buffer, self._store = weakref.ref(buffer), store
            self._train(buffer, keys)
        elif buffer._written - self._next > max(1, int(_REFRESH * len(buffer))):
            self._assign(buffer, buffer._slots_since(self._next))

    def _train(self, buffer: ExperienceBuffer, keys: Tensor) -> None:
        """k-means (Lloyd 1982) on a sample; a cell that has lost all its points starts anew at one of them."""
        slots = buffer._slots_since(0)
        count = min(self._count or math.ceil(math.sqrt(self._probes * len(slots))), len(slots))
        generator = torch.Generator().manual_seed(self._seed)

        def draw(n: int) -> Tensor:
            return torch.randperm(len(slots), generator=generator)[:n].to(slots.device)

        sample = _points(keys[slots[draw(_SAMPLE * count)]], buffer.metric)
        self._centroids = sample[:count].clone()
        for _ in range(_ITERATIONS):
            cell = self._nearest(sample, buffer.metric)
            sums = torch.zeros_like(self._centroids).index_add_(0, cell, sample)
            sizes = torch.bincount(cell, minlength=count)
            again = torch.randint(len(sample), (count,), generator=generator).to(slots.device)
            means = sums / sizes.clamp(min=1).unsqueeze(1)
            self._centroids = torch.where((sizes > 0).unsqueeze(1), means, sample[again])
        self._trained, self._size = buffer._written, len(buffer)
        self._cell_of = torch.full((buffer._slots,), -1, device=slots.device)
        self._assign(buffer, slots)

    def _assign(self, buffer: ExperienceBuffer, slots: Tensor) -> None:
        """Put items into cells; ``_slots`` then lists all slots cell by cell, the c-th from ``_ends[c]``."""
        for part in slots.split(1 << 16):
            self._cell_of[part] = self._nearest(_points(self._store[part], buffer.metric), buffer.metric)
        live = buffer._slots_since(0)
        cell, order = self._cell_of[live].sort(stable=True)
        self._slots = live[order]
        edges = torch.arange(len(self._centroids) + 1, device=cell.device)
        self._ends = torch.searchsorted(cell, edges)
        self._next = buffer._written

    def _nearest(self, points: Tensor, metric: str) -> Tensor:
        from eaml_ext.ops import knn

        return knn(points, self._centroids, 1, metric=metric).indices.squeeze(-1)


def _points(embeddings: Tensor, metric: str) -> Tensor:
    """Embeddings as k-means takes them: in float32 at least; directions, where only they count."""
    points = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return torch.nn.functional.normalize(points, dim=-1) if metric == "cosine" else points
