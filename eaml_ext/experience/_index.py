"""Exact kNN search of the stored context embeddings, in ascending order of ``distance - log(weight)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eaml_ext import _check
from eaml_ext.experience._ring import RingStorage
from eaml_ext.experience._schema import all_finite, task_ids
from eaml_ext.experience._weights import age_cost, has_weights, log_weights
from eaml_ext.experience.experiences import Experiences

if TYPE_CHECKING:
    from eaml_ext.ops import PackedKeys

_MIN_PACKED = 1 << 15  # elements; packing the keys of a smaller column costs more than it saves


def check_query(where: str, query: Any, k: Any, keys: Tensor, device: torch.device) -> int:
    """Check a query against the keys ``(n, dim)``, and return ``k`` as an int.

    Raises:
        TypeError: the query is no tensor or has another dtype, or ``k`` is no integer.
        ValueError: the query has another shape or device or is not finite, or ``k`` is not positive.
    """
    _check.tensor(where, "query_embedding", query)
    if query.dim() not in (1, 2) or query.shape[-1] != keys.shape[1]:
        wanted = f"({keys.shape[1]},) or (queries, {keys.shape[1]})"
        raise ValueError(f"{where}: query_embedding has shape {tuple(query.shape)}, wanted {wanted}")
    _check.dtype(where, "query_embedding", query, (keys.dtype,))
    _check.device(where, "query_embedding", query, device, "the buffer")
    if not all_finite(query.detach()):
        raise ValueError(f"{where}: query_embedding must be finite")
    return _check.positive(where, "k", k, integer=True)


class KeyIndex:
    """The search over the column ``context_embedding`` of a storage.

    Each search updates log-weights and packed keys, so that a buffer without searches pays nothing for them. Only keys
    in CPU memory are packed, into a second copy in the kernel's layout. All other keys are searched in their column:
    keys on a GPU, keys on disk (a copy might not fit in memory), and keys with fewer than ``_MIN_PACKED`` elements.

    Args:
        storage: holds the keys. The caller holds its lock during every call.
        metric: ``"sqeuclidean"`` or ``"cosine"``.
        age_half_life: number of later items that halve a weight; None: age does not count.
    """

    def __init__(self, storage: RingStorage, metric: str, age_half_life: float | None):
        self._storage, self._metric, self._age_half_life = storage, metric, age_half_life
        self.reset()

    def reset(self) -> None:
        """Free everything that was computed from the columns. The next search starts from the stored items."""
        self._keys: Tensor | None = None
        self._packed: PackedKeys | None = None
        self._bias: Tensor | None = None  # log-weights by slot, (num_slots,)

    def _reset_for(self, keys: Tensor) -> None:
        """Start to index another key column."""
        self.reset()
        storage = self._storage
        self._keys = keys
        self._use_packed = storage.files is None and keys.device.type == "cpu" and keys.numel() >= _MIN_PACKED
        self._packed_until = self._bias_until = 0  # items with smaller numbers are packed; are in _bias
        self._origin = 0  # item number, subtracted from all item numbers in log-weights
        if has_weights(storage.columns, self._age_half_life):
            with torch.inference_mode(False):
                self._bias = torch.zeros(len(keys), dtype=keys.dtype, device=keys.device)
                self._changed = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)  # since the last packing
                self._any_changed = False

    def retrieve(
        self,
        where: str,
        query: Tensor,
        k: int,
        exclude_task: int | Tensor | Sequence[int] | None,
        among: Tensor | None,
    ) -> Experiences:
        """Return the k nearest items. Arguments and errors are those of :meth:`ExperienceBuffer.retrieve`."""
        storage = self._storage
        keys = storage.column(where, "context_embedding")
        k = check_query(where, query, k, keys, storage.device)
        slots: Tensor | slice = slice(len(keys))
        if among is None:
            size, valid = len(keys), storage.live_mask()
        else:
            valid = storage.are_live(where, among, None, name="among")
            _check.shape(where, "among", among, (None,), "(n,)")
            slots, size = among.clamp(0, storage.num_slots - 1), len(among)
        if exclude_task is not None:
            storage.column(where, "task")
            tasks, ids = storage.columns["task"][slots], task_ids(where, exclude_task, storage.device)
            others = ~torch.isin(tasks, ids) if ids.dim() else tasks != ids
            valid = others if valid is None else valid & others
        k = min(k, size if valid is None else int(valid.sum()))
        queries = query if query.dim() == 2 else query.unsqueeze(0)
        if k == 0:
            distances = queries.new_zeros((len(queries), 0))
            indices = torch.zeros_like(distances, dtype=torch.int64)
        else:
            distances, indices = self._search(queries, k, valid, slots)
        if query.dim() == 1:
            distances, indices = distances[0], indices[0]
        return storage.gather(indices, distances)

    def log_weights(self, slots: Tensor | slice, numbers: Tensor, origin: int) -> Tensor:
        """Return the log-weights of items, float64 ``(n,)``, up to a constant that all items share.

        Args:
            slots: of the items.
            numbers: item numbers, int64 ``(n,)``.
            origin: item number that is subtracted from ``numbers``; it changes the constant.
        """
        storage = self._storage
        priority = storage.columns["priority"][slots] if "priority" in storage.columns else None
        return log_weights(priority, (numbers - origin) * storage.stride + storage.offset, self._age_half_life)

    def update_priorities(self, slots: Tensor) -> None:
        """Recompute the log-weights of live items whose priorities have changed."""
        if self._bias is not None and self._keys is self._storage.columns.get("context_embedding"):
            self._write_bias(slots, self._storage.item_numbers(slots))

    def _search(self, queries: Tensor, k: int, valid: Tensor | None, among: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return distances minus log-weights, ascending, and slots of the k nearest items: both ``(queries, k)``.

        Args:
            queries: ``(queries, dim)``, in the dtype of the keys.
            k: at most the number of valid slots.
            valid: which slots of ``among`` count, bool; None: all.
            among: slots to search: a slice that starts at slot 0, or int64 ``(n,)``.
        """
        from eaml_ext.ops import knn  # here, because importing the ops takes seconds

        storage = self._storage
        keys = storage.columns["context_embedding"]
        if keys is not self._keys:
            self._reset_for(keys)
        if self._bias is not None:
            self._update_weights()
        if self._use_packed and isinstance(among, slice):
            if valid is None and storage.cleared and among.stop < len(keys):
                # Packed keys from before a clear remain in the slots past among.stop: the padding below excludes them.
                valid = torch.ones(among.stop, dtype=torch.bool)
            if valid is not None:
                valid = F.pad(valid, (0, len(keys) - len(valid)))
            values, found = self._pack(keys).search(queries, k, valid)
        else:
            bias = None if self._bias is None else self._bias[among]
            chosen = keys[among] if isinstance(among, slice) else keys.index_select(0, among)
            values, found = knn(queries, chosen, k, metric=self._metric, valid=valid, bias=bias)
        if self._metric == "cosine":
            values = 1 - values  # knn returns similarity + log-weight
        if self._age_half_life is not None:  # add the constant that log-weights leave out: the newest item has age 0
            values = values + age_cost(storage.written - 1 - self._origin, self._age_half_life)
        return values, found if isinstance(among, slice) else among[found]

    @torch.no_grad()
    def _update_weights(self) -> None:
        """Compute the log-weights of items added since the last search."""
        storage = self._storage
        if self._bias_until == storage.written:
            return
        # The origin moves once per pass around the ring, so that log-weights stay small and keep their precision.
        origin = storage.written - storage.written % storage.capacity
        if self._age_half_life is not None and self._origin != origin:
            self._bias_until = 0
        if self._bias_until == 0:
            self._origin = origin
        for slots, numbers in storage.runs_since(self._bias_until):
            self._write_bias(slots, numbers)
        self._bias_until = storage.written

    def _write_bias(self, slots: Tensor | slice, numbers: Tensor) -> None:
        assert self._bias is not None
        weights = self.log_weights(slots, numbers, self._origin)
        self._bias[slots] = weights if isinstance(slots, slice) else weights.to(self._bias.dtype)
        self._changed[slots] = True
        self._any_changed = True

    @torch.no_grad()
    def _pack(self, keys: Tensor) -> PackedKeys:
        """Write the keys and log-weights that have changed to the packed keys, and return these."""
        from eaml_ext.ops import PackedKeys

        written = self._storage.written
        if self._packed is None:
            self._packed = PackedKeys(*keys.shape, metric=self._metric, dtype=keys.dtype)
        elif self._packed_until == written and not (self._bias is not None and self._any_changed):
            return self._packed
        if self._bias is None:
            new = self._storage.slots_since(self._packed_until)
        else:  # new items are among those whose log-weights have changed
            new = self._changed.nonzero().squeeze(1)
            self._changed.zero_()
            self._any_changed = False
        if len(new):
            self._packed.write(new, keys[new], None if self._bias is None else self._bias[new])
        self._packed_until = written
        return self._packed
