"""The one place where the buffer meets the kNN op: exact search of the stored context embeddings."""

import torch
from torch import Tensor


class Index:
    """The keys of a memory, searched where they are stored, with a log-weight for each slot where there are weights.

    Args:
        keys: ``(slots, dim)``, the buffer's own field: what is written there is found without a copy.
        metric: ``"sqeuclidean"`` or ``"cosine"``.
        weighted: whether slots have log-weights.
    """

    def __init__(self, keys: Tensor, metric: str, *, weighted: bool):
        self._keys, self._metric = keys, metric
        self._bias = None
        if weighted:
            with torch.inference_mode(False):
                self._bias = torch.zeros(len(keys), dtype=keys.dtype, device=keys.device)

    def write(self, slots: Tensor | slice, bias: Tensor) -> None:
        """Give ``slots`` the log-weights ``bias``; the keys have been written already."""
        if self._bias is not None:
            self._bias[slots] = bias if isinstance(slots, slice) else bias.to(self._bias.dtype)

    def search(self, queries: Tensor, k: int, valid: Tensor | None, among: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Distances less log-weights, ascending, and slots, both ``(queries, k)``, differentiable in the queries.

        ``among`` are the slots to search, of which ``valid`` says which count.
        """
        from eaml_ext.ops import knn  # here, because the ops bring the compiler along, seconds of import

        bias = None if self._bias is None else self._bias[among]
        keys = self._keys[among] if isinstance(among, slice) else self._keys.index_select(0, among)
        values, found = knn(queries, keys, k, metric=self._metric, valid=valid, bias=bias)
        if self._metric == "cosine":
            values = 1 - values
        return values, found if isinstance(among, slice) else among[found]
