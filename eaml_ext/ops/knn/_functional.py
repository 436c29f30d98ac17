"""The k nearest neighbours as functions: argument checks, :func:`knn` and :func:`knn_reference`."""

from typing import NamedTuple

import torch
from torch import Tensor

from eaml_ext import _check
from eaml_ext._torch_compat import transforms_active
from eaml_ext.ops._sizes import check_size
from eaml_ext.ops.knn._autograd import call_op, differentiable
from eaml_ext.ops.knn._reference import DTYPES, METRICS, KnnArgs


class Neighbors(NamedTuple):
    """The k best neighbours of every query, best first.

    ``values``: ``(*, Q, k)``; ``indices``: ``(*, Q, k)``, int64, -1 where there is no neighbour.
    """

    values: Tensor
    indices: Tensor


def search(args: KnnArgs) -> Neighbors:
    """Call the op, with autograd only where a derivative, a transform or a graph needs it."""
    queries, keys, bias = args.queries, args.keys, args.bias
    tracked = torch.is_grad_enabled() and (
        queries.requires_grad or keys.requires_grad or (bias is not None and bias.requires_grad)
    )
    if tracked or torch.compiler.is_compiling() or transforms_active():
        return Neighbors(*differentiable(*args, False))
    return Neighbors(*call_op(args))


def _check_arguments(
    queries: Tensor, keys: Tensor, k: int, metric: str, valid: Tensor | None, bias: Tensor | None
) -> KnnArgs:
    """Check the arguments of :func:`knn` and return those of the op."""
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
    for name, given, dtype in (("valid", valid, torch.bool), ("bias", bias, keys.dtype)):
        if given is None:
            continue
        _check.tensor("knn", name, given)
        _check.dtype("knn", name, given, (dtype,))
        _check.device("knn", name, given, queries.device, "queries")
        if given.dim() == 0 or given.shape[-1] != size or (given.dim() > 1 and given.shape[:-1] != batch):
            wanted = f"{(size,)} or {(*batch, size)}" if batch else f"{(size,)}"
            raise ValueError(f"knn: {name} must have shape {wanted}, got {tuple(given.shape)}")
    k = check_size("knn", "k", k)
    if metric not in METRICS:
        raise ValueError(f"knn: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    return KnnArgs(queries, keys, k, METRICS.index(metric), valid, bias)


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
        queries: ``(*, Q, d)``, float32, float64, bfloat16 or float16.
        keys: ``(*, M, d)``, a memory for each batch entry of ``queries``, or ``(M, d)``, one memory for all; the dtype
            and device of ``queries``.
        k: the number of neighbours; it may exceed M.
        metric: ``"sqeuclidean"`` (‖q − key‖², ascending), ``"cosine"`` or ``"inner_product"`` (descending). The cosine
            with a zero vector is 0, and its gradient is 0.
        valid: ``(*, M)`` or ``(M,)``, bool; False excludes a slot, whatever its key.
        bias: ``(*, M)`` or ``(M,)``, the dtype of ``keys``; a log-weight, subtracted from squared distances and added
            to similarities: a larger one makes a key nearer.

    Returns:
        ``Neighbors(values, indices)``: ``values``: ``(*, Q, k)``, the dtype of ``keys``; ``indices``: ``(*, Q, k)``,
        int64. Neighbours are ordered by value, then by index; NaN comes last. If fewer than ``k`` slots are valid, the
        rest has index -1, value +inf (sqeuclidean) or -inf, and gradient 0.

        Values are summed in float64 and rounded to the dtype of ``keys``. Neighbours are ordered by the rounded value;
        reduced precision is rounded to float32 for the order. So all cosines of a narrow cluster far from the origin
        may be equal. Values are twice differentiable with respect to ``queries``, ``keys`` and ``bias``; the selection
        is not differentiable.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, ``k`` is not in [1, 2^31), ``metric`` is unknown.

    Sources:
        Johnson, Douze and Jégou, *Billion-scale similarity search with GPUs* (2017), §2: exhaustive search.
        Pritzel et al., *Neural Episodic Control* (2017), §3: the search as the read of a differentiable memory.

    >>> keys = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    >>> found = knn(torch.zeros(1, 2), keys, k=2)
    >>> found.values.tolist(), found.indices.tolist()
    ([[0.0, 1.0]], [[0, 2]])
    >>> knn(torch.zeros(1, 2), keys, k=2, valid=torch.tensor([False, True, False])).indices.tolist()
    [[1, -1]]
    """
    return search(_check_arguments(queries, keys, k, metric, valid, bias))


def knn_reference(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    metric: str = "sqeuclidean",
    valid: Tensor | None = None,
    bias: Tensor | None = None,
) -> Neighbors:
    """Compute :func:`knn` by the slow pure-PyTorch reference, which specifies the results of all kernels.

    Args:
        queries: ``(*, Q, d)``, float32, float64, bfloat16 or float16.
        keys: ``(*, M, d)`` or ``(M, d)``, the dtype and device of ``queries``.
        k: the number of neighbours.
        metric: ``"sqeuclidean"``, ``"cosine"`` or ``"inner_product"``.
        valid: ``(*, M)`` or ``(M,)``, bool.
        bias: ``(*, M)`` or ``(M,)``, the dtype of ``keys``.

    Returns:
        ``Neighbors(values, indices)``: ``values``: ``(*, Q, k)``; ``indices``: ``(*, Q, k)``, int64.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, ``k`` is not in [1, 2^31), ``metric`` is unknown.

    >>> knn_reference(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [1.0, 0.0]]), k=1).indices.tolist()
    [[1]]
    """
    return Neighbors(*differentiable(*_check_arguments(queries, keys, k, metric, valid, bias), True))
