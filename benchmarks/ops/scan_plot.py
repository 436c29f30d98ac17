"""The picture of the scan's benchmark: time against length, and the passes at one shape."""

import math
from pathlib import Path
from typing import Any

SWEPT = (4, 256, 16)  # batch, dim, state
SHAPE = (4, 512, 256, 16)
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
    """Time against length, each line named at its end."""
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
    places = spread([y for _, x, y in ends if x == longest], (high / low) ** 0.05)
    for peer, x, y in ends:
        style = {"color": COLORS[peer], "fontsize": 9, "fontweight": "bold" if peer == "ours" else "normal"}
        whole = x == longest
        place, offset = (places.pop(0), (7, 0)) if whole else (y, (0, 5))
        style |= {"va": "center", "ha": "left"} if whole else {"va": "bottom", "ha": "center"}
        name = LABELS.get(peer, peer)
        axes.annotate(name, (x, place), xytext=offset, textcoords="offset points", annotation_clip=False, **style)
    axes.set_xticks([16, 64, 256, 1024, 4096], ["16", "64", "256", "1024", "4096"])
    axes.minorticks_off()
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_xlabel("length (steps)")
    axes.set_ylabel("time (ms)")
    axes.set_title(f"{task}, batch 4, dim 256, state 16", loc="left", fontsize=10)


def bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The passes of all peers at one shape; a missing bar says why."""
    found = {(r["pass"], r["peer"]): r for r in rows if r["shape"] == SHAPE and r["layout"] == "channel-last"}
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
    axes.set_title("batch 4, length 512, dim 256, state 16", loc="left", fontsize=10)


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(16.5, 5.2), gridspec_kw={"width_ratios": [1, 1, 1.05], "wspace": 0.72}
    )
    lines(left, rows, "forward")
    lines(middle, rows, "+backward")
    bars(right, rows)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Selective scan on one CPU thread, float32", x=0.125, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return path
