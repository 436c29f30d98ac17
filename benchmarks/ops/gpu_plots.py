"""Pictures of the GPU benchmarks, from the files that they wrote: python -m benchmarks.ops.gpu_plots [FOLDER].

A picture has a line for each row of a file, with a mark for each implementation and for each limit of the machine.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, load

MARKS = {"ours": "o", "packed": "o", "knn": "s", "mamba_ssm": "D", "copy": "|", "exp": "|", "read": "|"}
LABELS = {"ours": "eaml_ext", "packed": "PackedKeys", "copy": "limit: bytes at the rate of a copy"}
LABELS |= {"exp": "limit: exponentials", "read": "limit: read of the keys"}

Line = tuple[str, dict[str, float | None]]  # label; seconds by implementation or limit


def dots(lines: Sequence[Line], title: str, path: Path) -> Path:
    """Draw seconds on a logarithmic axis, one line of the picture for each line of the table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 0.24 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in dict.fromkeys(name for _, times in lines for name in times):
        points = [(1e3 * seconds, i) for i, (_, times) in enumerate(lines) if (seconds := times.get(name))]
        if points:
            axes.plot(*zip(*points, strict=True), MARKS.get(name, "x"), label=LABELS.get(name, name), markersize=6)
    axes.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=7)
    axes.set(xscale="log", xlabel="time (ms)", ylim=(len(lines) - 0.5, -0.5))
    figure.suptitle(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    return path


def scan(found: dict[str, Any], path: Path) -> Path:
    """The picture of ``scan_vs_mamba-<gpu>.json``."""
    lines: list[Line] = []
    for row in found["results"]["rows"]:
        gate = ", z" if row["gated"] else ""
        label = f"{tuple(row['shape'])} {row['pass']}, {row['dtype']}, {row['layout']}{gate}"
        lines.append((label, {name: row.get(name) for name in ("ours", "mamba_ssm", "copy", "exp")}))
    return dots(lines, f"Selective scan (batch, length, dim, state) on {found['machine']['gpu']}", path)


def knn(found: dict[str, Any], path: Path) -> Path:
    """The picture of ``knn-<gpu>.json``."""
    results = found["results"]
    by_shape: dict[tuple[int, ...], dict[str, float | None]] = {}
    for row in results["rows"]:
        by_shape.setdefault(tuple(row["shape"]), {})[row["peer"]] = row["seconds"]
    for (memories, _, size, features), times in by_shape.items():
        times["read"] = 4 * memories * size * features / results["copy"]
    lines = [(str(shape), times) for shape, times in by_shape.items()]
    return dots(lines, f"Exact 8 nearest (memories, Q, M, d) on {found['machine']['gpu']}", path)


def plots(folder: Path) -> list[Path]:
    """Draw each result file of the folder that has a picture."""
    return [
        draw(load(path), path.with_suffix(".png"))
        for pattern, draw in (("scan_vs_mamba-*.json", scan), ("knn-*.json", knn))
        for path in sorted(folder.glob(pattern))
        if "gpu" in load(path)["machine"]
    ]


if __name__ == "__main__":
    print(*plots(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS), sep="\n")
