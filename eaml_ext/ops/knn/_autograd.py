"""Derivatives of knn in every mode: the selection is constant, and values are recomputed differentiably from it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eaml_ext.ops._typed import Function, allow_in_graph
from eaml_ext.ops.fallback import warn_once
from eaml_ext.ops.knn._reference import COSINE, SQEUCLIDEAN, KnnArgs, reference

MAX_CUDA_NEIGHBORS = 1024  # kMaxNeighbors of csrc/knn/cuda/launch.h


def call_op(args: KnnArgs) -> tuple[Tensor, Tensor]:
    """Call the op, or the reference for more neighbours than the CUDA kernels compute."""
    queries, keys, k = args[:3]
    if queries.is_cuda and min(k, keys.shape[-2]) > MAX_CUDA_NEIGHBORS:
        warn_once(f"knn of more than {MAX_CUDA_NEIGHBORS} neighbours", queries.device)
        return reference(*args)
    try:
        found: tuple[Tensor, Tensor] = torch.ops.eaml_ext.knn.default(*args)
    except RuntimeError:
        # A failed allocation in a kernel has no message; the same allocation here raises torch's message.
        queries.new_empty((*queries.shape[:-1], k), dtype=torch.int64)
        raise
    return found


def _batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Move the mapped dimension to the front; expand a tensor that is not mapped."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _merge(x: Tensor) -> Tensor:
    """Merge the first two dimensions."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


class _Select(Function):
    """The op under vmap, without gradients.

    Tensors have one leading size: queries ``(rows, Q, d)``, keys ``(memories, M, d)``, valid and bias
    ``(memories, M)``. The last argument selects the reference.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        *args, use_reference = inputs
        return reference(*args) if use_reference else call_op(KnnArgs(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None,) * (len(KnnArgs._fields) + 1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        args, size = KnnArgs(*inputs[:-1]), info.batch_size
        dims = dict(zip(KnnArgs._fields, in_dims, strict=False))
        queries = _batch_first(args.queries, dims["queries"], size)
        rows = queries.shape[1]
        if dims["keys"] is not None:  # mapped memories: the mapped dimension becomes the outer one of the rows

            def fold(x: Tensor | None, dim: int | None) -> Tensor | None:
                return x if x is None or (dim is None and len(x) == 1) else _merge(_batch_first(x, dim, size))

            args = args._replace(keys=_merge(_batch_first(args.keys, dims["keys"], size)), panels=None, state=None)
            queries = _merge(queries)
        else:  # the same memories: it becomes the inner one, so that keys are not copied

            def fold(x: Tensor | None, dim: int | None) -> Tensor | None:
                if x is None or dim is None:
                    return x
                x = x.movedim(dim, 1)
                each = rows // max(1, len(x))
                return _merge(_merge(x[:, None].expand(len(x), each, *x.shape[1:])))

            queries = _merge(queries.transpose(0, 1))
        args = args._replace(queries=queries, valid=fold(args.valid, dims["valid"]), bias=fold(args.bias, dims["bias"]))
        found: tuple[Tensor, Tensor] = _Select.apply(*args, inputs[-1])
        if dims["keys"] is not None:
            return tuple(x.reshape(size, rows, *x.shape[1:]) for x in found), (0, 0)
        return tuple(x.reshape(rows, size, *x.shape[1:]) for x in found), (1, 1)


class _WithDerivativesOf(Function):
    """``exact`` with the derivatives of ``recomputed``: the values stay those of the op, bit for bit."""

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
        mapped = (_batch_first(x, dim, info.batch_size) for x, dim in zip((exact, recomputed), in_dims, strict=True))
        return _WithDerivativesOf.apply(*mapped), 0


def _gather(memory: Tensor, rows: int, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Read ``memory (memories, M, *)`` at ``indices (rows, Q, k)`` in ``dtype``; its backward is deterministic."""
    each = max(1, rows // max(1, memory.shape[0]))  # len() would be a constant to the compiler
    first = torch.arange(rows, device=memory.device) // each * memory.shape[1]
    flat = (first[:, None, None] + indices).reshape(indices.numel())
    slots = memory.reshape(memory.shape[0] * memory.shape[1], *memory.shape[2:])
    if slots.requires_grad and slots.element_size() < 4:  # the gradient sums over queries and must not be rounded
        slots = slots.to(dtype)
    # On CUDA the backward of index_select adds atomically and that of indexing sorts, so its sums have a fixed order.
    found = slots[flat] if slots.is_cuda else slots.index_select(0, flat)
    return found.reshape(*indices.shape, *memory.shape[2:]).to(dtype)


def _recompute(queries: Tensor, keys: Tensor, metric: int, bias: Tensor | None, indices: Tensor) -> Tensor:
    """Compute the values at ``indices`` by differentiable operations, O(Q k d); 0 where there is no neighbour."""
    rows, live, indices = queries.shape[0], indices >= 0, indices.clamp(min=0)
    if keys.shape[1] == 0:  # one slot to gather from keeps every argument in the graph
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
def differentiable(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: int,
    valid: Tensor | None,
    bias: Tensor | None,
    panels: Tensor | None,
    state: Tensor | None,
    use_reference: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the op with derivatives. The arguments are flat, for ``allow_in_graph``."""

    def merge_batch(x: Tensor, tail: int) -> Tensor:
        return x.reshape(math.prod(x.shape[:-tail]), *x.shape[x.dim() - tail :])

    shape = (*queries.shape[:-1], k)
    queries, keys = merge_batch(queries, 2), merge_batch(keys, 2)
    valid, bias = None if valid is None else merge_batch(valid, 1), None if bias is None else merge_batch(bias, 1)
    detached = None if bias is None else bias.detach()
    args = KnnArgs(queries.detach(), keys.detach(), k, metric, valid, detached, panels, state)
    values, indices = _Select.apply(*args, use_reference)
    values = _WithDerivativesOf.apply(values, _recompute(queries, keys, metric, bias, indices))
    return values.reshape(shape), indices.reshape(shape)
