"""The schema and the reference of ``eaml_ext::knn``: the specification of its results, in pure PyTorch."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from eaml_ext.ops._typed import register_fake
from eaml_ext.ops.fallback import reference_of

METRICS = ("sqeuclidean", "cosine", "inner_product")
SQEUCLIDEAN, COSINE, INNER_PRODUCT = range(3)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class KnnArgs(NamedTuple):
    """The arguments of ``eaml_ext::knn``, in the order of its schema.

    The leading sizes of ``keys``, ``valid`` and ``bias`` multiply to divisors of those of ``queries``: row b of the
    queries uses memory ``b // (rows / memories)``. ``panels`` and ``state`` belong to :class:`PackedKeys`: kernels that
    read them are faster and find the same neighbours.
    """

    queries: Tensor
    """``(*, Q, d)``"""
    keys: Tensor
    """``(*, M, d)``"""
    k: int
    metric: int
    """Index in METRICS."""
    valid: Tensor | None
    """``(*, M)``, bool"""
    bias: Tensor | None
    """``(*, M)``"""
    panels: Tensor | None = None
    state: Tensor | None = None


torch.library.define(
    "eaml_ext::knn",
    "(Tensor queries, Tensor keys, int k, int metric, Tensor? valid, Tensor? bias, Tensor? panels=None, "
    "Tensor? state=None) -> (Tensor values, Tensor indices)",
)

# ---- reference --------------------------------------------------------------------------------------------------

LANES = 8
"""The fixed order of a sum: lane l sums features l, l + 8, ...; then lanes l and l + 4, l + 2, l + 1 are added."""
WORKSPACE_ELEMENTS = 1 << 21
"""Elements of one float64 temporary."""


def _lane_sum(term: Callable[[slice], Tensor], features: int) -> Tensor:
    """Sum ``term(slice of features)`` over the features in the fixed order."""
    lanes = term(slice(0, LANES))
    for start in range(LANES, features, LANES):
        lanes = lanes + term(slice(start, start + LANES))
    for half in (4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes.squeeze(-1)


def _norm(x: Tensor) -> Tensor:
    square = _lane_sum(lambda s: x[..., s].square(), x.shape[-1])
    if square.device.type == "cpu":  # numpy rounds correctly; torch's square root does not on every CPU
        return torch.from_numpy(np.sqrt(square.numpy()))
    return square.sqrt()


def _scores(queries: Tensor, keys: Tensor, metric: int, bias: Tensor | None) -> Tensor:
    """Compute float64 values ``(q, M)`` of ``queries (q, d)`` and ``keys (M, d)``, negated where larger is better."""
    pad = (0, -keys.shape[-1] % LANES if keys.shape[-1] else LANES)
    q, key = F.pad(queries, pad)[:, None], F.pad(keys, pad)
    features = key.shape[-1]
    if metric == SQEUCLIDEAN:
        score = _lane_sum(lambda s: (q[..., s] - key[..., s]).square(), features)
        return score if bias is None else score - bias
    value = _lane_sum(lambda s: q[..., s] * key[..., s], features)
    if metric == COSINE:
        norm = _norm(q) * _norm(key)
        value = torch.where(norm == 0, 0.0, value / norm)
    return -value if bias is None else -(value + bias)


def reference(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: int,
    valid: Tensor | None,
    bias: Tensor | None,
    panels: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the op in pure PyTorch: the arguments are those of :class:`KnnArgs`."""
    values, indices = _empty(queries, keys, k, metric, valid, bias)
    sign = 1 if metric == SQEUCLIDEAN else -1
    values.fill_(sign * math.inf)
    indices.fill_(-1)
    rows, size = queries.shape[:-2].numel(), keys.shape[-2]
    if values.numel() == 0 or size == 0:
        return values, indices

    def flatten_batch(x: Tensor) -> Tensor:
        return x.flatten(0, -3) if x.dim() > 2 else x[None]

    q, memory, out_values, out_indices = map(flatten_batch, (queries, keys, values, indices))
    live = None if valid is None else valid.reshape(-1, size)
    weight = None if bias is None else bias.reshape(-1, size).double()
    step = max(1, WORKSPACE_ELEMENTS // (LANES * size))
    for b in range(rows):
        memory_b = memory[b * len(memory) // rows].double()
        live_b, weight_b = (None if x is None else x[b * len(x) // rows] for x in (live, weight))
        for start in range(0, queries.shape[-2], step):
            chunk = slice(start, start + step)
            score = _scores(q[b, chunk].double(), memory_b, metric, weight_b)
            score = score.to(torch.promote_types(keys.dtype, torch.float32))
            # NaN and zero get one sign each: torch's radix sort on CUDA, unlike its other sorts, orders by bits.
            score = torch.where(score.isnan(), math.nan, score + 0.0)
            score, order = score.sort(dim=-1, stable=True)
            if live_b is not None:  # a second stable sort moves invalid slots behind all valid ones, even NaN
                dead, rank = (~live_b)[order].byte().sort(dim=-1, stable=True)
                score = score.gather(-1, rank).masked_fill(dead.bool(), math.inf)
                order = order.gather(-1, rank).masked_fill(dead.bool(), -1)
            out_values[b, chunk, :size] = sign * score[:, :k]
            out_indices[b, chunk, :size] = order[:, :k]
    return values, indices


torch.library.impl("eaml_ext::knn", "CompositeExplicitAutograd", reference_of("knn")(reference))

# ---- shapes for the compiler, and operations for torch.utils.flop_counter ----------------------------------------


@register_fake("eaml_ext::knn")
def _empty(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: int,
    valid: Tensor | None,
    bias: Tensor | None,
    panels: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:-1], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


@register_flop_formula(torch.ops.eaml_ext.knn)
def _flops(queries: torch.Size, keys: torch.Size, *_: object, **__: object) -> int:
    """Count a product and a sum for every feature of every pair; the arguments are shapes."""
    return 2 * math.prod(queries) * keys[-2]
