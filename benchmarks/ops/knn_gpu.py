"""Exact nearest neighbours on a GPU against its peers there, by the GPU's clock, with its limits.

    python -m benchmarks.ops.knn_gpu [--quick] [--out FOLDER]

Writes `knn-<gpu>.json` after each row. "packed" is a PackedKeys written beforehand, and "knn" packs inside the call;
peers prepare their keys beforehand where possible. The tables list a peer that is absent, fails, or misses neighbours
of random keys, with the reason. Products are float32, not TF32, except those of flashlib, whose recall is stated. The
limits are one read of the keys at the rate of a copy, and the products of all pairs at the rate of a float32 matrix
product. A search with bfloat16 products on tensor cores may take less than the second. Without a GPU the command ends
with one sentence.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import eaml_ext
from benchmarks.common import save
from benchmarks.gpu import copy_rate, elapsed, gpu_name, medians, start
from benchmarks.ops import knn_peers
from benchmarks.ops.knn_peers import OURS, Call, K, Prepare, failure, indices, nearest, offset_cluster, recall
from eaml_ext.ops import Neighbors

Shape = tuple[int, int, int, int]  # (memories, queries, keys, features)

SHAPES = [(1, 1, 50_000, 128), (1, 64, 1_000_000, 128), (1, 1024, 1_000_000, 128), (256, 1, 1024, 64)]
FEW = [(1, queries, 1_000_000, 128) for queries in (1, 2, 4, 8, 16)]
MORE = [*FEW, (1, 8, 50_000, 128), (1, 1024, 50_000, 128), (16, 8, 10_000, 128), (64, 4, 4096, 64)]
NORMS = (0, 10, 118, 346)


# --- peers -----------------------------------------------------------------------------------------------------------


def by_memory(build: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> Prepare:
    """From a search of one memory, ``build(keys)(queries)``, which returns the indices."""

    def prepare(queries: Tensor, keys: Tensor) -> Call:
        searches = [(build(memory.contiguous()), q.contiguous()) for q, memory in zip(queries, keys, strict=True)]
        return lambda: Neighbors(queries, torch.stack([search(rows) for search, rows in searches]))

    return prepare


def faiss() -> Prepare:
    """A flat index on the GPU, given tensors that are there."""
    import faiss as package
    import faiss.contrib.torch_utils

    resources = package.StandardGpuResources()

    def build(keys: Tensor) -> Callable[[Tensor], Tensor]:
        memory = package.GpuIndexFlatL2(resources, keys.shape[1])
        memory.add(keys)
        return lambda queries: memory.search(queries, K)[1]

    return by_memory(build)


def cuvs() -> Prepare:
    from cuvs.common import Resources
    from cuvs.neighbors import brute_force

    def build(keys: Tensor) -> Callable[[Tensor], Tensor]:
        memory = brute_force.build(keys, metric="sqeuclidean")

        def search(queries: Tensor) -> Tensor:
            resources = Resources(stream=torch.cuda.current_stream().cuda_stream)
            return torch.as_tensor(brute_force.search(memory, queries, K, resources=resources)[1], device="cuda")

        return search

    return by_memory(build)


def flashlib() -> Prepare:
    """Brute force in Triton, with products in TF32."""
    from flashlib import flash_knn

    def prepare(queries: Tensor, keys: Tensor) -> Call:
        return lambda: Neighbors(*flash_knn(queries, keys, K))

    return prepare


ROUNDED = ("flashlib",)  # measured although rounding makes them miss neighbours
PEERS: dict[str, Callable[[], Prepare]] = {
    "packed": knn_peers.ours,
    "knn": knn_peers.functional,
    "addmm": knn_peers.addmm,
    "cdist": knn_peers.cdist,
    "faiss": faiss,
    "cuvs": cuvs,
    "flashlib": flashlib,
}


# --- what is measured ------------------------------------------------------------------------------------------------


def product_rate(size: int = 4096) -> float:
    """Multiply-adds a second of a float32 matrix product."""
    a, b = torch.randn(2, size, size, device="cuda")
    return size**3 / min(elapsed(lambda: a @ b, 5) for _ in range(5))


def measure(peers: dict[str, Prepare], why: dict[str, str], shape: Shape, seconds: float) -> list[dict[str, Any]]:
    """A row for each peer: its time, or the reason for none."""
    memories, count, size, features = shape
    queries = torch.randn(memories, count, features, device="cuda")
    keys = torch.randn(memories, size, features, device="cuda")
    able: dict[str, Call] = {}
    reasons: dict[str, str | None] = dict(why)
    for name, prepare in peers.items():
        try:
            able[name] = prepare(queries, keys)
            able[name]()
        except Exception as error:  # whatever a package raises, the table says it
            reasons[name] = f"none: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
            able.pop(name, None)
            torch.cuda.empty_cache()
    with torch.no_grad():
        took = medians(able, seconds)
    return [{"shape": shape, "peer": n, "seconds": took.get(n), "reason": reasons.get(n)} for n in PEERS]


def line(rows: list[dict[str, Any]], copy: float, product: float) -> None:
    """Ours in µs, and every peer in times the time of "knn" or the kind of its reason."""
    memories, count, size, features = rows[0]["shape"]
    seconds = {row["peer"]: row["seconds"] for row in rows}
    reading = 4 * memories * size * features / copy
    products = memories * count * size * features / product
    cells = [
        f"{row['seconds'] / seconds['knn']:.2f}x" if row["seconds"] else str(row["reason"]).split(":")[0]
        for row in rows
        if row["peer"] not in OURS
    ]
    ours = "".join(f"{1e6 * seconds[name]:>12.1f}" for name in OURS)
    limits = f"{1e6 * reading:>12.1f}{1e6 * products:>12.1f}"
    print(f"{rows[0]['shape']!s:<26}{ours}{limits}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def recalls(peers: dict[str, Prepare]) -> list[dict[str, Any]]:
    """The share of the true neighbours found where differences are small and numbers large."""
    rows = []
    for norm in NORMS:
        queries, keys = (x.cuda() for x in offset_cluster(norm, size=20_000))
        want = nearest(queries, keys)
        found = {name: recall(indices(prepare(queries, keys)(), 1), want) for name, prepare in peers.items()}
        rows.append({"norm": norm, **found})
        print(f"centre of norm {norm:<4}" + "".join(f"  {name} {share:.3f}" for name, share in found.items()))
    return rows


def main() -> None:
    arguments = start(__doc__, "knn_gpu")
    quick = arguments.quick
    torch.backends.cuda.matmul.allow_tf32 = False
    seconds = 0.1 if quick else 0.25
    peers: dict[str, Prepare] = {}
    why: dict[str, str] = {}
    small = torch.randn(2, 5, 16, device="cuda"), torch.randn(2, 2000, 16, device="cuda")
    for name, load in PEERS.items():
        try:
            peers[name] = load()
        except Exception as error:  # an extension of another torch fails as it likes
            why[name] = f"absent: {type(error).__name__}: {error}"
            continue
        reason = failure(peers[name], *small)
        if reason:
            why[name] = reason
            if not (name in ROUNDED and reason.startswith("wrong: recall")):
                del peers[name]
    wrong = {name: text for name, text in why.items() if name in OURS}
    if wrong:
        raise SystemExit(f"knn is not brute force: {wrong}")
    for name, text in why.items():
        print(f"{name}: {text}")
    copy, product = copy_rate(), product_rate()
    print(f"{gpu_name()}; copy {copy / 1e12:.2f} TB/s, float32 products {product / 1e12:.1f} multiply-adds/ps\n")
    others = [name for name in PEERS if name not in OURS]
    columns = "".join(f"{name:>12}" for name in ("packed µs", "knn µs", "read µs", "product µs"))
    print(f"{'(memories, Q, M, d)':<26}{columns}" + "".join(f"{name:>10}" for name in others))
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "build": eaml_ext.build_info()}
    results: dict[str, Any] = {"copy": copy, "product": product, "rows": [], "recall": []}
    path = arguments.out / f"knn-{gpu_name()}.json"
    for shape in SHAPES[:1] + SHAPES[-1:] if quick else SHAPES + MORE:
        found = measure(peers, why, shape, seconds)
        line(found, copy, product)
        results["rows"] += found
        torch.cuda.empty_cache()
        if not quick:
            save(path, {"machine": machine, "results": results})
    print()
    results["recall"] = recalls(peers)
    if not quick:
        save(path, {"machine": machine, "results": results})
        print(path)


if __name__ == "__main__":
    main()
