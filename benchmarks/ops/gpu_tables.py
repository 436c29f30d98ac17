"""Print the tables of the GPU benchmarks that docs/figures.md has: python -m benchmarks.ops.gpu_tables [FOLDER]."""

import sys
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, load
from benchmarks.results_page import table

Rows = list[dict[str, Any]]


def scan(rows: Rows) -> str:
    """A line for each shape, layout and gate of ``scan_vs_mamba-<gpu>.json``; × is mamba_ssm's time over ours."""
    passes = [(dtype, task) for dtype in ("float32", "bfloat16") for task in ("forward", "+backward")]
    lines: dict[tuple[Any, ...], dict[tuple[str, str], str]] = {}
    for row in rows:
        ours, theirs = row["ours"], row["mamba_ssm"]
        cell = f"{1e3 * ours:.3g} ms" + (f" · {theirs / ours:.2f}×" if theirs else "")
        line = lines.setdefault((tuple(row["shape"]), row["layout"], row["gated"]), {})
        line[row["dtype"], row["pass"]] = cell
    head = ["(batch, length, dim, state)", "layout", *(f"{d}, {t.replace('+', '+ ')}" for d, t in passes)]
    body = [
        [f"{shape}{', z' if gated else ''}", layout, *(cells.get(key, "") for key in passes)]
        for (shape, layout, gated), cells in lines.items()
        if cells.keys() & set(passes)
    ]
    return table(head, body)


def knn(results: dict[str, Any]) -> str:
    """A line for each shape of ``knn-<gpu>.json``; × is the peer's time over that of PackedKeys, and over knn's."""
    by_shape: dict[tuple[int, ...], dict[str, float | None]] = {}
    for row in results["rows"]:
        by_shape.setdefault(tuple(row["shape"]), {})[row["peer"]] = row["seconds"]
    peers = [p for p in by_shape[min(by_shape)] if p not in ("packed", "knn") and any(t[p] for t in by_shape.values())]
    body = []
    for (memories, count, size, features), times in by_shape.items():
        packed, plain = times["packed"], times["knn"]
        assert packed and plain
        reading = 4 * memories * size * features / results["copy"]
        cells = [f"{1e6 * t:.0f} µs · {t / packed:.2f}× · {t / plain:.2f}×" if (t := times[p]) else "" for p in peers]
        ours = [f"{1e6 * seconds:.0f} µs" for seconds in (packed, plain, reading)]
        body.append([str((memories, count, size, features)), *ours, *cells])
    names = [f"{peer} + topk" if peer in ("addmm", "cdist") else peer for peer in peers]
    return table(["(memories, Q, M, d)", "`PackedKeys`", "`knn`", "read of the keys", *names], body)


def tables(folder: Path) -> list[str]:
    """The tables of the result files in a folder."""
    found = [scan(load(path)["results"]["rows"]) for path in sorted(folder.glob("scan_vs_mamba-*.json"))]
    searches = [load(path) for path in sorted(folder.glob("knn-*.json"))]
    return found + [knn(search["results"]) for search in searches if "gpu" in search["machine"]]


if __name__ == "__main__":
    print("\n\n".join(tables(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)))
