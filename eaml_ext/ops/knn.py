"""Nearest neighbours: value[q, j] = ‖query_q − key_j‖² − bias_j, or similarity(query_q, key_j) + bias_j; the k best j.

Exactly: a value is summed from direct differences (or products) in float64 in one fixed order and rounded once, and
neighbours are ordered by (value, index). So the same query and memory give the same bits whatever the number of
queries, the batch, the threads or the kernel.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from eaml_ext import _check
from eaml_ext._torch_compat import transforms_active
from eaml_ext.ops._sizes import check_size
from eaml_ext.ops._typed import Function, allow_in_graph, register_fake
from eaml_ext.ops.fallback import reference_of, warn_once

METRICS = ("sqeuclidean", "cosine", "inner_product")
SQEUCLIDEAN, COSINE, INNER_PRODUCT = range(3)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Neighbors(NamedTuple):
    """The k best of every query, best first: ``values (*, Q, k)`` and int64 ``indices (*, Q, k)``, -1 where none is."""

    values: Tensor
    indices: Tensor


# ---- schema -----------------------------------------------------------------------------------------------------

# queries (*, Q, d), keys (*, M, d), valid (*, M), bias (*, M). The number of memories (the product of the leading
# sizes) of keys, of valid and of bias each divides that of queries: row b uses memory b // (rows / memories). Panels
# and state are what packed_keys.py keeps beside keys and bias: a kernel that reads them is faster and finds the same.
torch.library.define(
    "eaml_ext::knn",
    "(Tensor queries, Tensor keys, int k, int metric, Tensor? valid, Tensor? bias, Tensor? panels=None, "
    "Tensor? state=None) -> (Tensor values, Tensor indices)",
)

# ---- reference --------------------------------------------------------------------------------------------------

LANES = 8  # the fixed order of summation: lane l sums features l, l + 8, ...; then lanes l and l + 4, l + 2, l + 1 join
CHUNK = 1 << 21  # elements of one float64 temporary


def _lane_sum(term: Callable[[slice], Tensor], features: int) -> Tensor:
    lanes = term(slice(0, LANES))
    for start in range(LANES, features, LANES):
        lanes = lanes + term(slice(start, start + LANES))
    for half in (4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes.squeeze(-1)


def _norm(x: Tensor) -> Tensor:
    square = _lane_sum(lambda s: x[..., s].square(), x.shape[-1])
    if square.device.type == "cpu":  # numpy rounds correctly, torch's own root does not on every CPU
        return torch.from_numpy(np.sqrt(square.numpy()))
    return square.sqrt()


def _scores(queries: Tensor, keys: Tensor, metric: int, bias: Tensor | None) -> Tensor:
    """Values of float64 ``queries (q, d)`` against ``keys (M, d)``, negated where larger is better."""
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


def _reference(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: int,
    valid: Tensor | None,
    bias: Tensor | None,
    panels: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    values, indices = _empty(queries, keys, k, metric, valid, bias)
    sign = 1 if metric == SQEUCLIDEAN else -1
    values.fill_(sign * math.inf)
    indices.fill_(-1)
    rows, size = queries.shape[:-2].numel(), keys.shape[-2]
    if values.numel() == 0 or size == 0:
        return values, indices

    def per_row(x: Tensor) -> Tensor:
        return x.flatten(0, -3) if x.dim() > 2 else x[None]

    q, memory, out_values, out_indices = map(per_row, (queries, keys, values, indices))
    live = None if valid is None else valid.reshape(-1, size)
    weight = None if bias is None else bias.reshape(-1, size).double()
    step = max(1, CHUNK // (LANES * size))
    for b in range(rows):
        memory_b = memory[b * len(memory) // rows].double()
        live_b, weight_b = (None if x is None else x[b * len(x) // rows] for x in (live, weight))
        for start in range(0, queries.shape[-2], step):
            chunk = slice(start, start + step)
            score = _scores(q[b, chunk].double(), memory_b, metric, weight_b)
            score, order = score.to(torch.promote_types(keys.dtype, torch.float32)).sort(dim=-1, stable=True)
            if live_b is not None:  # a second stable sort puts dead slots behind the live ones, NaN included
                dead, rank = (~live_b)[order].byte().sort(dim=-1, stable=True)
                score = score.gather(-1, rank).masked_fill(dead.bool(), math.inf)
                order = order.gather(-1, rank).masked_fill(dead.bool(), -1)
            out_values[b, chunk, :size] = sign * score[:, :k]
            out_indices[b, chunk, :size] = order[:, :k]
    return values, indices


torch.library.impl("eaml_ext::knn", "CompositeExplicitAutograd", reference_of("knn")(_reference))

MOST = 1024  # neighbours that the CUDA kernels find: csrc/knn/cuda/launch.h


def _raw(queries: Tensor, keys: Tensor, k: int, *others: Any) -> tuple[Tensor, Tensor]:
    """The op, or the reference where its kernel does not go so far."""
    if queries.is_cuda and min(k, keys.shape[-2]) > MOST:
        warn_once(f"knn of more than {MOST} neighbours", queries.device)
        return _reference(queries, keys, k, *others)
    try:
        found: tuple[Tensor, Tensor] = torch.ops.eaml_ext.knn.default(queries, keys, k, *others)
    except RuntimeError:
        # A failed allocation in a kernel has no message of its own; the same allocation here raises torch's.
        queries.new_empty((*queries.shape[:-1], k), dtype=torch.int64)
        raise
    return found


# ---- fake -------------------------------------------------------------------------------------------------------


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


# ---- operation count for torch.utils.flop_counter ---------------------------------------------------------------


@register_flop_formula(torch.ops.eaml_ext.knn)
def _count(queries: Any, keys: Any, *_: Any, **__: Any) -> int:
    """A product and a sum for every feature of every pair."""
    return int(2 * math.prod(queries) * keys[-2])


# ---- autograd ---------------------------------------------------------------------------------------------------


def _front(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _merge(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


class _Select(Function):
    """The raw op for vmap's sake: its outputs carry no gradient. Leading sizes are one: (rows, Q, d), (memories, M)."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *given, reference = args
        return (_reference if reference else _raw)(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None,) * 9

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        queries, keys, k, metric, valid, bias, panels, state, reference = args
        size, (q_dim, keys_dim, _, _, valid_dim, bias_dim, *_) = info.batch_size, in_dims
        queries = _front(queries, q_dim, size)
        rows = queries.shape[1]
        if keys_dim is not None:  # mapped memories: the mapped dimension is the outer one of the rows

            def fold(x: Tensor | None, dim: int | None) -> Tensor | None:
                return x if x is None or (dim is None and len(x) == 1) else _merge(_front(x, dim, size))

            keys, queries = _merge(_front(keys, keys_dim, size)), _merge(queries)
            panels = state = None
        else:  # the same memories: it is the inner one, and keys are not copied

            def fold(x: Tensor | None, dim: int | None) -> Tensor | None:
                if x is None or dim is None:
                    return x
                x = x.movedim(dim, 1)
                each = rows // max(1, len(x))
                return _merge(_merge(x[:, None].expand(len(x), each, *x.shape[1:])))

            queries = _merge(queries.transpose(0, 1))
        valid, bias = fold(valid, valid_dim), fold(bias, bias_dim)
        found = _Select.apply(queries, keys, k, metric, valid, bias, panels, state, reference)
        if keys_dim is not None:
            return tuple(x.reshape(size, rows, *x.shape[1:]) for x in found), (0, 0)
        return tuple(x.reshape(rows, size, *x.shape[1:]) for x in found), (1, 1)


class _Attach(Function):
    """``exact``, with the derivatives of ``recomputed``: the values returned stay those of the raw op, bit for bit."""

    @staticmethod
    def forward(exact: Tensor, recomputed: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return None, grad

    @staticmethod
    def jvp(ctx: Any, _: Any, tangent: Any) -> Any:
        return None if tangent is None else tangent.clone()

    @staticmethod
    def vmap(info: Any, in_dims: Any, exact: Tensor, recomputed: Tensor) -> Any:
        fronted = (_front(x, dim, info.batch_size) for x, dim in zip((exact, recomputed), in_dims, strict=True))
        return _Attach.apply(*fronted), 0


def _gather(memory: Tensor, rows: int, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """``memory (memories, M, *)`` at ``indices (rows, Q, k)`` in ``dtype``; its backward is deterministic."""
    each = max(1, rows // max(1, memory.shape[0]))  # len() would be a constant to the compiler
    first = torch.arange(rows, device=memory.device) // each * memory.shape[1]
    flat = (first[:, None, None] + indices).reshape(indices.numel())
    slots = memory.reshape(memory.shape[0] * memory.shape[1], *memory.shape[2:])
    if (
        slots.requires_grad and slots.element_size() < 4
    ):  # the gradient is a sum over queries, which must not be rounded
        slots = slots.to(dtype)
    return slots.index_select(0, flat).reshape(*indices.shape, *memory.shape[2:]).to(dtype)


def _recompute(queries: Tensor, keys: Tensor, metric: int, bias: Tensor | None, indices: Tensor) -> Tensor:
    """The values at ``indices`` from plain differentiable operations, O(Q k d); 0 where there is no neighbour."""
    rows, live, indices = queries.shape[0], indices >= 0, indices.clamp(min=0)
    if keys.shape[1] == 0:  # a slot to gather from keeps every argument connected
        keys, bias = F.pad(keys, (0, 0, 0, 1)), None if bias is None else F.pad(bias, (0, 1))
    dtype = torch.float64 if metric == COSINE else torch.promote_types(keys.dtype, torch.float32)  # norms may overflow
    query, near = queries[:, :, None].to(dtype), _gather(keys, rows, indices, dtype)
    if metric == SQEUCLIDEAN:
        value = torch.where(live[..., None], query - near, 0).square().sum(-1)
    else:
        near = torch.where(live[..., None], near, 0)
        value = (query * near).sum(-1)
    if metric == COSINE:
        q_square, square = query.square().sum(-1), near.square().sum(-1)
        nonzero = (q_square > 0) & (square > 0)
        scale = torch.where(nonzero, q_square, 1).rsqrt() * torch.where(nonzero, square, 1).rsqrt()
        value = torch.where(nonzero, value * scale, 0)
    if bias is not None:
        weight = torch.where(live, _gather(bias, rows, indices, dtype), 0)
        value = value - weight if metric == SQEUCLIDEAN else value + weight
    return value.to(keys.dtype)


@allow_in_graph
def _differentiable(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: int,
    valid: Tensor | None,
    bias: Tensor | None,
    panels: Tensor | None,
    state: Tensor | None,
    reference: bool,
) -> tuple[Tensor, Tensor]:
    def rows(x: Tensor, tail: int) -> Tensor:
        return x.reshape(math.prod(x.shape[:-tail]), *x.shape[x.dim() - tail :])

    shape = (*queries.shape[:-1], k)
    queries, keys = rows(queries, 2), rows(keys, 2)
    valid, bias = None if valid is None else rows(valid, 1), None if bias is None else rows(bias, 1)
    detached = None if bias is None else bias.detach()
    given = (queries.detach(), keys.detach(), k, metric, valid, detached, panels, state, reference)
    values, indices = _Select.apply(*given)
    values = _Attach.apply(values, _recompute(queries, keys, metric, bias, indices))
    return values.reshape(shape), indices.reshape(shape)


def _search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: int,
    valid: Tensor | None,
    bias: Tensor | None,
    panels: Tensor | None = None,
    state: Tensor | None = None,
) -> Neighbors:
    """The raw op where nothing asks for a derivative, a transform or a graph."""
    tracked = torch.is_grad_enabled() and (
        queries.requires_grad or keys.requires_grad or (bias is not None and bias.requires_grad)
    )
    if tracked or torch.compiler.is_compiling() or transforms_active():
        return Neighbors(*_differentiable(queries, keys, k, metric, valid, bias, panels, state, False))
    return Neighbors(*_raw(queries, keys, k, metric, valid, bias, panels, state))


# ---- public -----------------------------------------------------------------------------------------------------


def _check_arguments(queries: Any, keys: Any, k: Any, metric: Any, valid: Any, bias: Any) -> tuple[int, int]:
    """Raises on bad input; returns ``k`` and the metric's number."""
    _check.tensor("knn", "queries", queries)
    _check.tensor("knn", "keys", keys)
    for name, x in (("queries", queries), ("keys", keys)):
        if x.dim() < 2:
            wanted = "(*, Q, d)" if x is queries else "(*, M, d) or (M, d)"
            raise ValueError(f"knn: {name} must have shape {wanted}, got {tuple(x.shape)}")
    _check.dtype("knn", "queries", queries, DTYPES)
    if keys.dtype != queries.dtype:
        _check.dtype("knn", "keys", keys, (queries.dtype,), f"{queries.dtype} as queries".removeprefix("torch."))
    _check.device("knn", "keys", keys, queries.device, "queries")
    batch, (size, features) = queries.shape[:-2], keys.shape[-2:]
    if features != queries.shape[-1]:
        raise ValueError(f"knn: keys has {features} features, queries has {queries.shape[-1]}")
    if keys.dim() > 2 and keys.shape[:-2] != batch:
        raise ValueError(f"knn: keys has batch shape {tuple(keys.shape[:-2])}, queries has {tuple(batch)}")
    for name, x, dtype in (("valid", valid, torch.bool), ("bias", bias, keys.dtype)):
        if x is None:
            continue
        _check.tensor("knn", name, x)
        _check.dtype("knn", name, x, (dtype,))
        _check.device("knn", name, x, queries.device, "queries")
        if x.dim() == 0 or x.shape[-1] != size or (x.dim() > 1 and x.shape[:-1] != batch):
            wanted = f"{(size,)} or {(*batch, size)}" if batch else f"{(size,)}"
            raise ValueError(f"knn: {name} must have shape {wanted}, got {tuple(x.shape)}")
    k = check_size("knn", "k", k)
    if metric not in METRICS:
        raise ValueError(f"knn: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    return k, METRICS.index(metric)


def knn(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    metric: str = "sqeuclidean",
    valid: Tensor | None = None,
    bias: Tensor | None = None,
) -> Neighbors:
    """The ``k`` keys nearest to every query, exactly, in one or many memories, with gradients.

    Args:
        queries: ``(*, Q, d)``; float32, float64, bfloat16 or float16.
        keys: ``(*, M, d)``, a memory for each batch entry of ``queries``, or ``(M, d)``, one for all; the dtype and
            device of ``queries``.
        k: how many neighbours; may exceed M.
        metric: ``"sqeuclidean"`` (‖q − key‖², ascending), ``"cosine"`` or ``"inner_product"`` (descending). The cosine
            with a zero vector is 0, and so is its gradient.
        valid: ``(*, M)`` or ``(M,)`` bool; False excludes a slot, whatever it holds.
        bias: ``(*, M)`` or ``(M,)``, the dtype of ``keys``; a log-weight: the larger, the nearer. It is subtracted from
            squared distances and added to similarities.

    Returns:
        ``Neighbors(values, indices)``, both ``(*, Q, k)``, best first; equal values are ordered by index, NaN comes
        last. Where fewer than ``k`` slots are valid: index -1, value +inf (sqeuclidean) or -inf, gradient 0.

        Values are summed in float64, rounded to the dtype of ``keys`` (half types: to float32 for the order), and twice
        differentiable with respect to ``queries``, ``keys`` and ``bias``; the selection is not. Neighbours are ordered
        by the rounded value, then by index: cosines of a narrow cluster far from the origin may all round to one value.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, ``k`` is not in [1, 2^31), ``metric`` is unknown.

    Source: exhaustive k-nearest-neighbour search, as in Johnson, Douze and Jégou, *Billion-scale similarity search with
    GPUs* (2017), §2; as the read of a differentiable memory: Pritzel et al., *Neural Episodic Control* (2017), §3.

    >>> keys = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    >>> found = knn(torch.zeros(1, 2), keys, k=2)
    >>> found.values.tolist(), found.indices.tolist()
    ([[0.0, 1.0]], [[0, 2]])
    >>> knn(torch.zeros(1, 2), keys, k=2, valid=torch.tensor([False, True, False])).indices.tolist()
    [[1, -1]]
    """
    k, code = _check_arguments(queries, keys, k, metric, valid, bias)
    return _search(queries, keys, k, code, valid, bias)


def knn_reference(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    metric: str = "sqeuclidean",
    valid: Tensor | None = None,
    bias: Tensor | None = None,
) -> Neighbors:
    """:func:`knn` by the pure PyTorch reference, whatever kernels are installed: the specification, and slow."""
    k, code = _check_arguments(queries, keys, k, metric, valid, bias)
    return Neighbors(*_differentiable(queries, keys, k, code, valid, bias, None, None, True))
