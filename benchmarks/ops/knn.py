"""Exact nearest neighbours against their peers in Python: time, gradients, recall, and the machine's limits.

    python -m benchmarks.ops.knn [--quick] [--threads 1]

`pip install '.[bench]'` installs the peers. The tables list a peer that is absent, fails, or misses neighbours of
random keys, with the reason. "packed" is a PackedKeys written beforehand, and "knn" packs inside the call; the keys
of the other peers are prepared beforehand where possible. Times include the call from Python. The limits are float32
multiply-adds in registers and one read of the keys; a search with bfloat16 products may take less than the first.
"""

import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import brief_path, cpus, fastest, flags, medians, rates, result_path, write
from benchmarks.ops.knn_peers import (
    OURS,
    PACKAGES,
    PEERS,
    K,
    Prepare,
    failure,
    indices,
    nearest,
    offset_cluster,
    packed,
    recall,
    threads_of_packages,
)
from eaml_ext.ops import knn

Shape = tuple[int, int, int, int]  # (memories, queries, keys, features)
Row = dict[str, Any]

ONE = [(1, 1, 1000, 64), (1, 1, 50_000, 128), (1, 8, 50_000, 128), (1, 64, 50_000, 128), (1, 1024, 50_000, 128)]
LARGE = (1, 64, 1_000_000, 128)
MANY = [(64, 1, 1000, 64), (256, 1, 1024, 64), (16, 8, 10_000, 128), (64, 4, 4096, 64)]
GRADIENTS = (1, 64, 50_000, 128)
MASKED = [(1, 8, 50_000, 128), (1, 64, 50_000, 128), (64, 4, 4096, 64)]
NORMS = (0, 10, 118, 346)


class Bench:
    """The peers that load, why the others are left out, and the rows measured so far."""

    def __init__(self, quick: bool) -> None:
        self.seconds = 0.2 if quick else 2.0
        self.peers: dict[str, Prepare] = {}
        self.why: dict[str, str] = {}
        self.rows: list[Row] = []
        queries, keys = torch.randn(2, 5, 16), torch.randn(2, 200, 16)
        for name, load in PEERS.items():
            try:
                self.peers[name] = load()
            except ImportError as error:
                self.why[name] = f"absent: {error}"
                continue
            reason = failure(self.peers[name], queries, keys)
            if reason:
                self.why[name] = reason
                del self.peers[name]
        wrong = {name: why for name, why in self.why.items() if name in OURS}
        if wrong:
            raise SystemExit(f"knn is not brute force: {wrong}")

    def time(self, shape: Shape) -> dict[str, float]:
        memories, count, size, features = shape
        queries, keys = torch.randn(memories, count, features), torch.randn(memories, size, features)
        calls = {name: prepare(queries, keys) for name, prepare in self.peers.items()}
        with torch.no_grad():
            t = medians(calls, seconds=self.seconds)
        self.rows += [
            {"shape": shape, "peer": name, "seconds": t.get(name), "reason": self.why.get(name)} for name in PEERS
        ]
        return t


# --- limits ----------------------------------------------------------------------------------------------------------


def limits(threads: int) -> dict[str, Any]:
    """Multiply-adds per second in registers, and bytes per second that are read, by the size of what is read."""
    own = rates()
    sizes = (2**18, 2**22, 25_600_000, 2**26, 2**29)
    if own is None:
        wide = torch.ones(2**26)
        read = 4 * wide.numel() / fastest(wide.sum)
        return {"threads": threads, "fma": None, "read": {size: read for size in sizes}}
    found = {"threads": threads, "fma": own.fma_rate(), "read": {size: own.read_rate(size) for size in sizes}}
    each = ", ".join(f"{rate / 1e9:.0f} GB/s of {size / 1e6:.3g} MB" for size, rate in found["read"].items())
    print(f"\nlimits of one thread: {2 * found['fma'] / 1e9:.0f} GFLOP/s of multiply-adds; reading {each}")
    return found


def bound(shape: Shape, limit: dict[str, Any]) -> tuple[float, str]:
    """Seconds that a shape takes at the least, and of what: its products, or reading its keys once."""
    memories, count, size, features = shape
    held = 4 * memories * size * features
    read = held / limit["read"][min(limit["read"], key=lambda s: abs(math.log(s / held)))]
    products = memories * count * size * features / limit["fma"] if limit["fma"] else 0.0
    seconds, kind = max((products, "products"), (read, "reading"))
    return seconds / limit["threads"] if kind == "products" else seconds, kind


# --- tables ----------------------------------------------------------------------------------------------------------


def describe(bench: Bench) -> list[Row]:
    described = []
    print(f"\n{'peer':<14}{'version':<14}left out")
    for name in PEERS:
        version = None
        if name in bench.peers:
            version = importlib.metadata.version(PACKAGES.get(name, name if name not in OURS else "eaml_ext"))
        print(f"{name:<14}{version or 'absent':<14}{bench.why.get(name, '')}")
        described.append({"peer": name, "version": version, "left out": bench.why.get(name)})
    return described


def times(bench: Bench, shapes: list[Shape], limit: dict[str, Any]) -> list[Row]:
    """A line of markdown per shape: ours, the limit, and the peers as times ours."""
    others = [name for name in PEERS if name not in OURS]
    print("\n| (memories, Q, M, d) | packed | of the limit | knn | " + " | ".join(others) + " | best peer |")
    print("|---" * (len(others) + 5) + "|")
    shares = []
    for shape in shapes:
        t = bench.time(shape)
        least, kind = bound(shape, limit)
        present = {name: t[name] for name in others if name in t}
        best = min(present, key=lambda name: present[name])
        cells = [f"{t[name] / t['packed']:.1f}×" if name in t else bench.why[name].split(":")[0] for name in others]
        share = f"{least / t['packed']:.0%} ({kind})"
        ratios = f"{best} {present[best] / t['packed']:.2f}×, knn {present[best] / t['knn']:.2f}×"
        text = f"{1e3 * t['packed']:.3g} ms | {share} | {1e3 * t['knn']:.3g} ms | " + " | ".join(cells)
        print(f"| {shape} | {text} | {ratios} |", flush=True)
        shares.append({"shape": shape, "limit": least, "of": kind, "packed": least / t["packed"], "best peer": best})
    return shares


def gradients(bench: Bench, shape: Shape) -> Row:
    """Forward and backward: gradients of the queries alone, and of queries and keys."""
    _, count, size, features = shape
    queries, keys = torch.randn(count, features), torch.randn(size, features)
    memory = packed(keys[None])

    def run(search: Callable[[Tensor, Tensor], Tensor], both: bool) -> Callable[[], Any]:
        x = [queries.clone().requires_grad_(), keys.clone().requires_grad_(both)]
        return lambda: torch.autograd.grad(search(*x).sum(), x if both else x[:1])

    calls = {
        "packed, queries": run(lambda q, _: memory.search(q, K).values, False),
        "knn, queries": run(lambda q, x: knn(q, x, K).values, False),
        "cdist, queries": run(lambda q, x: torch.cdist(q, x).topk(K, largest=False).values, False),
        "knn, all": run(lambda q, x: knn(q, x, K).values, True),
        "cdist, all": run(lambda q, x: torch.cdist(q, x).topk(K, largest=False).values, True),
    }
    t = medians(calls, seconds=bench.seconds)
    print(f"\nforward + backward at {shape}")
    for name, seconds in t.items():
        cdist = t["cdist, " + name.split(", ")[1]]
        print(f"  {name:<20}{1e3 * seconds:>9.2f} ms" + ("" if "cdist" in name else f"   cdist {cdist / seconds:.1f}×"))
    return {"shape": shape, **t}


def masked(bench: Bench, shapes: list[Shape]) -> list[Row]:
    """Half of the slots excluded at random."""
    rows = []
    print("\nmasking half of the slots, packed")
    for shape in shapes:
        memories, count, size, features = shape
        memory = packed(torch.randn(memories, size, features))
        lead = () if memories == 1 else (memories,)
        queries, valid = torch.randn(*lead, count, features), torch.rand(*lead, size) < 0.5
        calls = {
            "all": lambda m=memory, q=queries: m.search(q, K),
            "half": lambda m=memory, q=queries, v=valid: m.search(q, K, v),
        }
        with torch.no_grad():
            t = medians(calls, seconds=bench.seconds)
        print(
            f"  {shape!s:<26}{1e3 * t['all']:>9.3f} ms, masked {1e3 * t['half']:>9.3f} ms, {t['half'] / t['all']:.2f}×"
        )
        rows.append({"shape": shape, **t})
    return rows


def scaling(bench: Bench, shapes: list[Shape]) -> list[Row]:
    """Packed, on one thread and on two."""
    print("\npacked, one thread and two")
    if cpus() < 2:
        print("  absent: one core")
        return [{"reason": "absent: one core"}]
    rows, before = [], torch.get_num_threads()
    for shape in shapes:
        memories, count, size, features = shape
        memory = packed(torch.randn(memories, size, features))
        queries = torch.randn(*(() if memories == 1 else (memories,)), count, features)

        def run(m: Any = memory, q: Tensor = queries) -> Any:
            return m.search(q, K)

        def switch(threads: str, run: Any = run) -> None:
            torch.set_num_threads(int(threads))
            run()

        with torch.no_grad():
            t = medians({"1": run, "2": run}, seconds=bench.seconds, before=switch)
        print(f"  {shape!s:<26}{1e3 * t['1']:>9.2f} ms, {1e3 * t['2']:>9.2f} ms, {t['1'] / t['2']:.2f}×")
        rows.append({"shape": shape, **t})
    torch.set_num_threads(before)
    return rows


def recalls(bench: Bench) -> list[Row]:
    """The share of the K nearest that each peer finds among keys around a centre."""
    print(f"\nrecall@{K}, keys of spread 0.05 around a centre of norm" + "".join(f"{norm:>9}" for norm in NORMS))
    drawn = [offset_cluster(norm) for norm in NORMS]
    want = [nearest(queries, keys) for queries, keys in drawn]
    rows = []
    for name, prepare in bench.peers.items():
        shares = [recall(indices(prepare(q, x)(), 1), w) for (q, x), w in zip(drawn, want, strict=True)]
        print(f"  {name:<51}" + "".join(f"{share:>9.3f}" for share in shares))
        rows.append({"peer": name, "recall": dict(zip(NORMS, shares, strict=True))})
    missed = [row for row in rows if row["peer"] in OURS and min(row["recall"].values()) < 1]
    assert not missed, f"neighbours were missed: {missed}"
    return rows


def plot(rows: list[Row], shares: list[Row], path: Path, threads: int = 1) -> Path:
    """Time of every peer at every shape over the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5))
    shapes = [tuple(row["shape"]) for row in shares]
    colors = ["#0b3c8c", "#5b8bd9", "#d95f02", "#e7a26a", "#1b9e77", "#7f7f7f", "#b8860b", "#7a5195"]
    present = [name for name in PEERS if any(row["peer"] == name and row["seconds"] for row in rows)]
    for i, name in enumerate(present):
        found = {tuple(row["shape"]): row["seconds"] for row in rows if row["peer"] == name and row["seconds"]}
        places = [x + (i - (len(present) - 1) / 2) * 0.1 for x, shape in enumerate(shapes) if shape in found]
        heights = [found[s] / row["limit"] for s, row in zip(shapes, shares, strict=True) if s in found]
        axes.bar(places, heights, 0.1, label=name, color=colors[list(PEERS).index(name)])
    axes.axhline(1, color="#555555", linewidth=0.8)
    axes.set_yscale("log")
    count = [
        f"{m // 1_000_000}M" if m >= 1_000_000 else f"{m // 1000}k" if m > 9999 else f"{m}" for _, _, m, _ in shapes
    ]
    names = [
        f"{q} of {m}\n{d} features" + (f"\n{b} memories" if b > 1 else "")
        for (b, q, _, d), m in zip(shapes, count, strict=True)
    ]
    axes.set_xticks(range(len(shapes)), names, fontsize=7.5)
    axes.set_ylabel("time over the machine's limit for float32")
    axes.set_title(
        f"Exact {K} nearest neighbours on {threads} CPU thread{'s' if threads > 1 else ''}, float32",
        loc="left",
        fontsize=11,
    )
    axes.legend(frameon=False, fontsize=8, ncols=4)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return path


def main() -> None:
    arguments = flags(__doc__)
    quick, threads = arguments.quick, arguments.threads
    threads_of_packages(threads)
    bench = Bench(quick)
    results: Row = {"threads": threads, "k": K, "peers": describe(bench), "limits": limits(threads)}
    shapes = [ONE[0], ONE[3], MANY[0]] if quick else [*ONE, LARGE, *MANY]
    results["shares"] = times(bench, shapes, results["limits"])
    results["gradients"] = gradients(bench, GRADIENTS)
    results["masked"] = masked(bench, MASKED[1:2] if quick else MASKED)
    results["recall"] = recalls(bench)
    if quick:
        print(plot(bench.rows, results["shares"], brief_path("knn"), threads))
    else:
        results["scaling"] = scaling(bench, [GRADIENTS, LARGE])
        results["rows"] = bench.rows
        print(write(f"knn-{threads}-thread", results))
        if threads == 1:
            print(plot(bench.rows, results["shares"], result_path("knn", ".png")))


if __name__ == "__main__":
    main()
