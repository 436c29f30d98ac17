"""The picture of the scan's benchmark: time against length, and the passes at one shape."""

import math
from pathlib import Path
from typing import Any

SWEPT = (4, 256, 16)  # batch, dim, state
SHAPE = (4, 512, 256, 16)  # of the bars
BARS = ("forward", "+backward", "+double backward")
COLORS = {
    "ours": "#0b3c8c",
    "loop": "#d95f02",
    "mambapy": "#1b9e77",
    "assoc_scan": "#e7298a",
    "torchlpc": "#7f7f7f",
    "jax": "#b8860b",
    "transformers": "#7a5195",
}
LABELS = {"ours": "eaml_ext", "loop": "PyTorch loop", "assoc_scan": "associative_scan", "jax": "JAX lax.scan"}
GRAY = "#555555"


def spread(values: list[float], gap: float) -> list[float]:
    """Positions on a log axis at least a factor ``gap`` apart, in the order of the values and close to them."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    logs = [math.log(values[i]) for i in order]
    for _ in range(200):
        for low in range(len(logs) - 1):
            lack = math.log(gap) - (logs[low + 1] - logs[low])
            if lack > 0:
                logs[low] -= lack / 2
                logs[low + 1] += lack / 2
    places = dict(zip(order, logs, strict=True))
    return [math.exp(places[i]) for i in range(len(values))]


def lines(axes: Any, rows: list[dict[str, Any]], task: str) -> None:
    """Time against length, each line named to its right."""
    ends = []
    for peer, color in COLORS.items():
        points = {
            row["shape"][1]: 1e3 * row["seconds"]
            for row in rows
            if (row["peer"], row["pass"], row["layout"]) == (peer, task, "channel-last")
            and (row["shape"][0], *row["shape"][2:]) == SWEPT
            and row["seconds"]
        }
        if points:
            lengths = sorted(points)
            bold = {"linewidth": 3.2, "zorder": 3} if peer == "ours" else {"linewidth": 1.4}
            axes.plot(lengths, [points[n] for n in lengths], color=color, marker="o", markersize=3.5, **bold)
            ends.append((peer, lengths[-1], points[lengths[-1]]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    longest = max(x for _, x, _ in ends)
    places = spread([y for _, _, y in ends], (high / low) ** 0.05)
    for (peer, x, _), place in zip(ends, places, strict=True):
        style = {"color": COLORS[peer], "fontsize": 9, "fontweight": "bold" if peer == "ours" else "normal"}
        name = LABELS.get(peer, peer) + ("" if x == longest else f" (to {x})")
        at = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(name, (longest, place), **at, **style)
    ticks = [length for length in (16, 64, 256, 1024, 4096) if length <= longest]
    axes.set_xticks(ticks, [str(length) for length in ticks])
    axes.minorticks_off()
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_xlabel("length (steps)")
    axes.set_ylabel("time (ms)")
    batch, dim, state = SWEPT
    axes.set_title(f"{task}, batch {batch}, dim {dim}, state {state}", loc="left", fontsize=10)


def bars(axes: Any, rows: list[dict[str, Any]], shape: tuple[int, int, int, int]) -> None:
    """The passes of all peers at one shape; a missing bar says why."""
    found = {(r["pass"], r["peer"]): r for r in rows if tuple(r["shape"]) == shape and r["layout"] == "channel-last"}
    place, ticks, names = 0.0, [], []
    least = min(1e3 * r["seconds"] for r in found.values() if r["seconds"]) / 2
    for task in BARS:
        axes.text(least, place + 0.3, task, fontsize=9, fontweight="bold", va="bottom", color=GRAY)
        for peer in COLORS:
            place += 1
            row = found[task, peer]
            end = 1e3 * row["seconds"] if row["seconds"] else least
            axes.barh(place, end - least, left=least, color=COLORS[peer], height=0.78)
            if row["seconds"]:
                text = f"{end:.0f}" if end >= 100 else f"{end:.2g}"
            else:
                kind = row["reason"].split(":")[0]
                text = f"no {task.removeprefix('+')}" if kind == "none" else kind
            axes.text(end, place, f" {text}", fontsize=7.5, va="center", color=GRAY)
            ticks.append(place)
            names.append(LABELS.get(peer, peer))
        place += 1.8
    axes.set_xscale("log")
    axes.set_xlim(left=least, right=axes.get_xlim()[1] * 2.5)
    axes.set_yticks(ticks, names, fontsize=8)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == LABELS["ours"] else "normal")
    axes.set_ylim(place - 1, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time (ms)")
    batch, length, dim, state = shape
    axes.set_title(f"batch {batch}, length {length}, dim {dim}, state {state}", loc="left", fontsize=10)


def plot(rows: list[dict[str, Any]], path: Path, shape: tuple[int, int, int, int] = SHAPE, threads: int = 1) -> Path:
    """The picture of measured rows, with bars at ``shape``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(16.5, 5.2), gridspec_kw={"width_ratios": [1, 1, 1.05], "wspace": 0.72}
    )
    lines(left, rows, "forward")
    lines(middle, rows, "+backward")
    bars(right, rows, shape)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    title = f"Selective scan on {threads} CPU thread{'s' if threads > 1 else ''}, float32"
    figure.suptitle(title, x=0.125, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return path
