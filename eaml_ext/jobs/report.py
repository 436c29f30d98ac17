"""What a run leaves behind: numbers as JSON, curves as PNG, a table to read."""

import json
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from eaml_ext import build_info


def summary(errors: Tensor) -> dict[str, float | None]:
    """Mean over tasks, half width of its 95 % interval (normal), and median, of ``(tasks,)``."""
    half = 1.96 * float(errors.std()) / math.sqrt(len(errors)) if len(errors) > 1 else None
    return {"mean": float(errors.mean()), "interval": half, "median": float(errors.median())}


def table(arms: dict[str, Any], returns: dict[str, Any], steps: int) -> str:
    """The arms as text; ``returns`` are those of a planner with each arm's model, in episodes of at most ``steps``."""
    lines = ["Prediction error on held-out tasks (mean squared, in variances of a step)"]
    head = f"{'arm':<16}{'mean':>10}{'95 % +-':>10}{'median':>10}"
    if returns:
        lines[0] += f", and return of a planner that acts on it, in {steps} steps"
        head += f"{'return':>10}{'95 % +-':>10}"
    lines = [lines[0] + ":", head]
    for name in [*(name for name in returns if name not in arms), *arms]:
        line = f"{name:<16}{_cells(arms.get(name), 4)}"
        line += f"{arms[name]['median']:>10.4f}" if name in arms else f"{'-':>10}"
        lines.append(line + (_cells(returns.get(name), 1) if returns else ""))
    return "\n".join(lines)


def _cells(row: dict[str, Any] | None, digits: int) -> str:
    if row is None:
        return f"{'-':>10}{'-':>10}"
    interval = "-" if row["interval"] is None else f"{row['interval']:.{digits}f}"
    return f"{row['mean']:>10.{digits}f}{interval:>10}"


def write_json(path: str | Path, results: dict[str, Any]) -> None:
    """Writes the results and what they were made with, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w") as file:
            file.write(json.dumps({**results, "build": build_info()}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def plot(path: str | Path, results: dict[str, Any]) -> None:
    """Meta-loss over epochs, and the error of each arm over adaptation steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(range(len(results["meta_loss"])), results["meta_loss"])
    left.set(xlabel="epoch", ylabel="query loss after adaptation", yscale="log", title="meta-training")
    for name, curve in results["curves"].items():
        if len(curve) == 1:
            style = ":" if name == "copy input" else "--"
            right.axhline(curve[0], color="0.4", linestyle=style, label=name)
        else:
            right.plot([5 * i for i in range(len(curve))], curve, label=name)
    right.set(
        xlabel="gradient steps",
        ylabel="prediction error (variances of a step)",
        yscale="log",
        title=f"held-out tasks of {results['settings']['env_name']}, seed {results['settings']['seed']}",
    )
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=120)
