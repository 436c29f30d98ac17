"""The one place where the buffer meets the kNN op: exact search of the stored context embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from eaml_ext.ops import PackedKeys


_WORTH = 1 << 15  # numbers in a memory from which packing its keys pays


class Index:
    """The keys of a memory, searched with a log-weight for each slot where there are weights.

    Keys are packed for the kernel when they are searched, those that are new since the last time: a memory that is
    never searched pays nothing. Small ones, and those that live on disk, are searched where they are stored.

    Args:
        keys: ``(slots, dim)``, the buffer's own field: what is written there is found.
        metric: ``"sqeuclidean"`` or ``"cosine"``.
        weighted: whether slots have log-weights.
        on_disk: whether a copy of the keys might not fit in memory.
    """

    def __init__(self, keys: Tensor, metric: str, *, weighted: bool, on_disk: bool = False):
        self._keys, self._metric = keys, metric
        self._packs = not on_disk and keys.device.type == "cpu" and keys.numel() >= _WORTH
        self._packed: PackedKeys | None = None
        self._seen = 0  # items that had been written when they were packed last
        self._bias, self._reweighed = None, False
        if weighted:
            with torch.inference_mode(False):
                self._bias = torch.zeros(len(keys), dtype=keys.dtype, device=keys.device)
                self._changed = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)

    def write(self, slots: Tensor | slice, bias: Tensor) -> None:
        """Give ``slots`` the log-weights ``bias``; the keys have been written already."""
        if self._bias is not None:
            self._bias[slots] = bias if isinstance(slots, slice) else bias.to(self._bias.dtype)
            self._changed[slots] = True
            self._reweighed = True

    def search(
        self, queries: Tensor, k: int, valid: Tensor | None, among: Tensor | slice, written: int
    ) -> tuple[Tensor, Tensor]:
        """Distances less log-weights, ascending, and slots, both ``(queries, k)``, differentiable in the queries.

        ``among`` are the slots to search, a slice from the first one on or any, of which ``valid`` says which count;
        ``written`` counts the items that were ever written, one after the other around the ring.
        """
        from eaml_ext.ops import knn  # here, because the ops bring the compiler along, seconds of import

        if self._packs and isinstance(among, slice):
            if valid is not None:
                valid = F.pad(valid, (0, len(self._keys) - len(valid)))
            values, found = self._pack(written).search(queries, k, valid)
        else:
            bias = None if self._bias is None else self._bias[among]
            keys = self._keys[among] if isinstance(among, slice) else self._keys.index_select(0, among)
            values, found = knn(queries, keys, k, metric=self._metric, valid=valid, bias=bias)
        if self._metric == "cosine":
            values = 1 - values
        return values, found if isinstance(among, slice) else among[found]

    @torch.no_grad()
    def _pack(self, written: int) -> PackedKeys:
        """The packed keys, brought up to date."""
        from eaml_ext.ops import PackedKeys

        size, dim = self._keys.shape
        if self._packed is not None and self._seen == written and not self._reweighed:
            return self._packed
        if self._packed is None:
            self._packed = PackedKeys(size, dim, metric=self._metric, dtype=self._keys.dtype)
        new = torch.arange(max(self._seen, written - size), written) % size
        if self._bias is not None:
            self._changed[new] = True
            new = self._changed.nonzero().squeeze(1)
            self._changed.zero_()
            self._reweighed = False
        if len(new):
            self._packed.write(new, self._keys[new], None if self._bias is None else self._bias[new])
        self._seen = written
        return self._packed
