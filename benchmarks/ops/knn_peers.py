"""The nearest-neighbour searches that the benchmark compares: one or many memories, prepared once, then queried.

A peer's ``prepare(queries, keys)`` takes queries ``(memories, Q, d)`` and keys ``(memories, M, d)`` and returns the
timed call, whose result :func:`indices` reads. Packages that search one memory loop over them. Preparation copies the
keys (faiss), builds an index (scann) or computes norms (torch). Packages are imported with their peer.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eaml_ext.ops import PackedKeys, knn

K = 8
RECALL = 0.999  # of random keys, where rounding decides nothing: a peer below it is not measured

Call = Callable[[], Any]
Prepare = Callable[[Tensor, Tensor], Call]


def packed(keys: Tensor) -> PackedKeys:
    """Keys in one memory or many, as the shape says."""
    memories, size, features = keys.shape
    one = memories == 1
    memory = PackedKeys(size, features, memories=None if one else memories, device=keys.device)
    slots = torch.arange(size, device=keys.device)
    memory.write(slots if one else slots.expand(memories, size), keys[0] if one else keys)
    return memory


def alone(x: Tensor) -> Tensor:
    """Without the dimension of memories where there is one."""
    return x[0] if len(x) == 1 else x


def ours() -> Prepare:
    def prepare(queries: Tensor, keys: Tensor) -> Call:
        memory, queries = packed(keys), alone(queries)
        return lambda: memory.search(queries, K)

    return prepare


def functional() -> Prepare:
    """Packing inside the call."""

    def prepare(queries: Tensor, keys: Tensor) -> Call:
        queries, keys = alone(queries), alone(keys)
        return lambda: knn(queries, keys, K)

    return prepare


def by_memory(build: Callable[[np.ndarray], Callable[[np.ndarray], Any]]) -> Prepare:
    """From a search of one memory, ``build(keys)(queries)``."""

    def prepare(queries: Tensor, keys: Tensor) -> Call:
        searches = [(build(memory), q) for q, memory in zip(queries.numpy(), keys.numpy(), strict=True)]
        if len(searches) == 1:
            ((search, rows),) = searches
            return lambda: search(rows)
        return lambda: [search(rows) for search, rows in searches]

    return prepare


def faiss(blas: bool) -> Prepare:
    """IndexFlatL2; by its own loops, or by a matrix product of its BLAS whatever the number of queries."""
    import faiss as package

    package.omp_set_num_threads(torch.get_num_threads())
    threshold = 1 if blas else package.cvar.distance_compute_blas_threshold

    def build(keys: np.ndarray) -> Callable[[np.ndarray], Any]:
        memory = package.IndexFlatL2(keys.shape[1])
        memory.add(keys)

        def search(queries: np.ndarray) -> Any:
            package.cvar.distance_compute_blas_threshold = threshold
            return memory.search(queries, K)[1]

        return search

    return by_memory(build)


def scann() -> Prepare:
    from scann.scann_ops.py import scann_ops_pybind

    def build(keys: np.ndarray) -> Callable[[np.ndarray], Any]:
        memory = scann_ops_pybind.builder(keys, K, "squared_l2").score_brute_force().build()
        parallel = torch.get_num_threads() > 1
        return lambda queries: (
            memory.search_batched_parallel if parallel and len(queries) > 1 else memory.search_batched
        )(queries)[0]

    return by_memory(build)


def addmm() -> Prepare:
    """Squared distances less the query's norm from one matrix product, and topk."""

    def prepare(queries: Tensor, keys: Tensor) -> Call:
        product = torch.addmm if len(keys) == 1 else torch.baddbmm
        squares = alone(keys.square().sum(-1).unsqueeze(1))
        queries, keys = alone(queries), alone(keys)
        return lambda: product(squares, queries, keys.mT, alpha=-2).topk(K, dim=-1, largest=False)

    return prepare


def cdist() -> Prepare:
    return lambda queries, keys: lambda: torch.cdist(queries, keys).topk(K, dim=-1, largest=False)


def sklearn() -> Prepare:
    from sklearn.neighbors import NearestNeighbors

    def build(keys: np.ndarray) -> Callable[[np.ndarray], Any]:
        memory = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(keys)
        return lambda queries: memory.kneighbors(queries, return_distance=False)

    return by_memory(build)


OURS = ("packed", "knn")
PEERS: dict[str, Callable[[], Prepare]] = {
    "packed": ours,
    "knn": functional,
    "faiss": lambda: faiss(blas=False),
    "faiss BLAS": lambda: faiss(blas=True),
    "scann": scann,
    "addmm": addmm,
    "cdist": cdist,
    "sklearn": sklearn,
}
PACKAGES = {
    "faiss": "faiss-cpu",
    "faiss BLAS": "faiss-cpu",
    "sklearn": "scikit-learn",
    "addmm": "torch",
    "cdist": "torch",
}


def threads_of_packages(threads: int) -> None:
    """Limit the thread pools of packages to torch's number of threads, before they are imported."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))


# --- checks ----------------------------------------------------------------------------------------------------------


def indices(result: Any, memories: int) -> Tensor:
    """``(memories, Q, K)`` of what a call returned."""
    found = result.indices if hasattr(result, "indices") else torch.from_numpy(np.asarray(result).astype(np.int64))
    return found.reshape(memories, -1, K)


def nearest(queries: Tensor, keys: Tensor) -> Tensor:
    """By brute force in float64, direct differences."""
    rows = [
        (q.double() - memory.double()).square().sum(-1) for qs, memory in zip(queries, keys, strict=True) for q in qs
    ]
    return torch.stack([row.topk(K, largest=False).indices for row in rows]).view(*queries.shape[:2], K)


def recall(found: Tensor, want: Tensor) -> float:
    """The share of the K nearest that were found."""
    return float((found[..., :, None] == want[..., None, :]).any(-1).double().mean())


def offset_cluster(norm: float, size: int = 5000, queries: int = 64, features: int = 128) -> tuple[Tensor, Tensor]:
    """Queries and keys around a centre of a norm, spread 0.05: the small difference of large numbers."""
    centre = torch.nn.functional.normalize(torch.randn(features), dim=0) * norm
    return (centre + 0.05 * torch.randn(queries, features))[None], (centre + 0.05 * torch.randn(size, features))[None]


def failure(prepare: Prepare, queries: Tensor, keys: Tensor) -> str | None:
    """Why a peer cannot be measured."""
    try:
        share = recall(indices(prepare(queries, keys)(), len(keys)), nearest(queries, keys))
    except Exception as error:  # whatever a package raises, the table says it
        return f"none: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    return None if share >= RECALL else f"wrong: recall {share:.3f}"
