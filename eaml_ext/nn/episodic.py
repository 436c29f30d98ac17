"""read(q) = sum_i w_i v_i over the k keys nearest to q, found exactly: layers that read from a learned memory."""

import math

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext.ops import knn
from eaml_ext.ops._sizes import check_size


class EpisodicRead(nn.Module):
    """A differentiable neural dictionary: the mean of the values of the k nearest keys, by inverse distance.

    ``read(q) = sum_i w_i v_i / sum_i w_i`` with ``w_i = 1 / (‖q − key_i‖² + delta)`` over the k nearest keys. Keys and
    values are parameters, and only those that were read get gradients, so a slot specialises on a region of queries.
    Gradients are exact to second order, also with respect to queries and keys; the choice of keys is a constant.

    Keys start from a unit normal distribution, so queries should have about that scale. Values start at zero.

    Args:
        slots: number of keys and values.
        key_dim, value_dim: their sizes.
        k: number of slots that a query reads, at most ``slots``.
        delta: added to the squared distance, so that the weight of a key equal to the query is finite.

    Raises:
        TypeError, ValueError: an argument is out of its range.

    Source: Pritzel et al., "Neural episodic control", 2017, equations 3 to 5.

    >>> memory = EpisodicRead(slots=1000, key_dim=8, value_dim=3, k=16)
    >>> memory(torch.randn(8)).shape, memory(torch.randn(2, 5, 8)).shape
    (torch.Size([3]), torch.Size([2, 5, 3]))
    """

    def __init__(self, slots: int, key_dim: int, value_dim: int, k: int = 32, *, delta: float = 1e-3):
        super().__init__()
        where = "EpisodicRead"
        key_dim, value_dim = check_size(where, "key_dim", key_dim), check_size(where, "value_dim", value_dim)
        slots, self.k = _slots(where, slots, k)
        self.delta = float(_check.positive(where, "delta", delta))
        if math.isinf(self.delta):
            raise ValueError(f"{where}: delta must be finite, got {delta!r}")
        self.keys = nn.Parameter(torch.randn(slots, key_dim))
        self.values = nn.Parameter(torch.zeros(slots, value_dim))

    def forward(self, queries: Tensor) -> Tensor:
        """Read from the memory.

        Args:
            queries: ``(*, key_dim)``, of the parameters' dtype.

        Returns:
            ``(*, value_dim)``.

        Raises:
            TypeError, ValueError: the queries have another last size, dtype or device than the keys.
        """
        queries = _checked("EpisodicRead", "queries", queries, self.keys.shape[-1], self.keys)
        flat = queries.reshape(math.prod(queries.shape[:-1]), queries.shape[-1])
        distances, slots = knn(flat, self.keys, self.k)
        weights = 1 / (distances + self.delta)
        weights = weights / weights.sum(-1, keepdim=True)
        near = self.values.index_select(0, slots.flatten()).unflatten(0, slots.shape)
        read: Tensor = (weights.unsqueeze(-2) @ near).reshape(*queries.shape[:-1], self.values.shape[-1])
        return read

    def extra_repr(self) -> str:
        slots, key_dim = self.keys.shape
        return f"{slots}, {key_dim}, {self.values.shape[-1]}, k={self.k}, delta={self.delta}"


class KNNAttention(nn.Module):
    """Attention of the input to a learned memory; each head reads the k slots with the largest logits.

    Each head has a query q = W_q x, keys and values, and weights ``softmax_i(q · key_i / sqrt(head_dim))`` over its k
    largest logits; ``k = slots`` is full attention. An output projection joins the heads. The caller adds a residual,
    ``x + attention(x)``, or a gate. Gradients are exact to second order; the choice of slots is a constant.

    Args:
        embed_dim: size of input and output.
        slots: number of keys and values per head.
        num_heads: divides ``embed_dim``.
        k: number of slots that each head reads, at most ``slots``.

    Raises:
        TypeError, ValueError: an argument is out of its range.

    Source: the kNN attention of Wu et al., "Memorizing transformers", 2022. Learned slots replace its past activations,
    as in Lample et al., "Large memory layers with product keys", 2019.

    >>> attention = KNNAttention(embed_dim=32, slots=4096, num_heads=4)
    >>> attention(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, embed_dim: int, slots: int, num_heads: int = 1, k: int = 32):
        super().__init__()
        where = "KNNAttention"
        embed_dim, num_heads = check_size(where, "embed_dim", embed_dim), check_size(where, "num_heads", num_heads)
        slots, self.k = _slots(where, slots, k)
        if embed_dim % num_heads:
            raise ValueError(f"{where}: num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        head_dim = embed_dim // num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.keys = nn.Parameter(torch.randn(num_heads, slots, head_dim))
        self.values = nn.Parameter(torch.randn(num_heads, slots, head_dim) / math.sqrt(head_dim))
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Read from the memory.

        Args:
            x: ``(*, embed_dim)``, of the parameters' dtype.

        Returns:
            ``(*, embed_dim)``.

        Raises:
            TypeError, ValueError: x has another last size, dtype or device than the parameters.
        """
        heads, slots, head_dim = self.keys.shape
        x = _checked("KNNAttention", "x", x, heads * head_dim, self.keys)
        flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        queries = self.query(flat).to(self.keys.dtype)  # under autocast the projection is bfloat16 or float16
        queries = queries.unflatten(-1, (heads, head_dim)).transpose(0, 1)
        logits, found = knn(queries, self.keys, self.k, metric="inner_product")  # (heads, queries, k)
        weights = torch.softmax(logits / math.sqrt(head_dim), dim=-1)
        found = found + slots * torch.arange(heads, device=found.device)[:, None, None]
        near = self.values.flatten(0, 1).index_select(0, found.flatten()).unflatten(0, found.shape)
        read = (weights.unsqueeze(-2) @ near).squeeze(-2)  # (heads, queries, head_dim)
        out: Tensor = self.out(read.transpose(0, 1).flatten(1)).reshape(x.shape)
        return out

    def extra_repr(self) -> str:
        heads, slots, head_dim = self.keys.shape
        return f"{heads * head_dim}, {slots}, num_heads={heads}, k={self.k}"


def _slots(where: str, slots: int, k: int) -> tuple[int, int]:
    """Return both as ints; raise unless ``1 <= k <= slots``."""
    slots, k = check_size(where, "slots", slots), check_size(where, "k", k)
    if k > slots:
        raise ValueError(f"{where}: k must be at most slots, {slots}, got {k}")
    return slots, k


def _checked(where: str, name: str, value: Tensor, width: int, like: Tensor) -> Tensor:
    """Return ``value`` ``(*, width)`` in the dtype of ``like``; only autocast allows another floating dtype."""
    _check.tensor(where, name, value)
    if value.dim() == 0 or value.shape[-1] != width:
        raise ValueError(f"{where}: {name} must have shape (*, {width}), got {tuple(value.shape)}")
    _check.device(where, name, value, like.device, "the layer")
    if value.is_floating_point() and torch.is_autocast_enabled(like.device.type):
        return value.to(like.dtype)
    _check.dtype(where, name, value, (like.dtype,))
    return value
