"""Reports of a run: numbers as JSON, curves as PNG, tables as text."""

import io
import json
import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from eaml_ext import __version__, _terminal, build_info
from eaml_ext._files import atomic_write
from eaml_ext._statistics import half_width
from eaml_ext.checkpoint import deferred_interrupt
from eaml_ext.jobs.config import STEPS_PER_CALL, algo_of, stored


def header(settings: Any, started: float) -> dict[str, Any]:
    """Return the entries with which the report of every job begins.

    Args:
        settings: ``DynamicsConfig`` or ``RLConfig``.
        started: ``time.monotonic()`` at the start of the run.

    Returns:
        ``version`` of the package, ``algo``, ``date`` (UTC, ISO 8601), ``duration`` in seconds, and ``settings``.
    """
    return {
        "version": __version__,
        "algo": algo_of(settings),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "duration": round(time.monotonic() - started, 3),
        "settings": stored(settings),
    }


def summary(errors: Tensor) -> dict[str, float | None]:
    """Return the mean over tasks, the half width of its 95 % interval (Student's t), and the median.

    Args:
        errors: ``(tasks,)``, floating.

    >>> import torch
    >>> summary(torch.tensor([1.0, 2.0, 6.0]))["median"]
    2.0
    """
    half = half_width(float(errors.std()), len(errors)) if len(errors) > 1 else None
    return {"mean": float(errors.mean()), "interval": half, "median": float(errors.median())}


def table(variants: dict[str, Any], returns: dict[str, Any], steps: int) -> str:
    """Return the table of the variants.

    Args:
        variants: :func:`summary` of the errors by variant.
        returns: :func:`summary` of the planner's returns by variant; may be empty.
        steps: most steps of the planner's episodes.
    """
    title = "Prediction error on held-out tasks (mean squared, in mean squares of a step)"
    rows = [["variant", "mean", "95 % +-", "median"]]
    if returns:
        title += f", and return of a planner that acts on it, in {steps} steps"
        rows[0] += ["return", "95 % +-"]
    for name in [*(name for name in returns if name not in variants), *variants]:
        rows.append([name, *cells(variants.get(name), 4)])
        if returns:
            rows[-1] += cells(returns.get(name), 1)[:2]
    return "\n".join([f"{title}:", *_terminal.table(rows, first=16, width=10)])


def cells(row: dict[str, Any] | None, digits: int) -> list[str]:
    """Return mean, interval and median of a :func:`summary` as text: "-" for None, exponents from a million on.

    >>> cells({"mean": 0.5, "interval": None, "median": 6e8}, 2)
    ['0.50', '-', '6.00e+08']
    """
    values = [None if row is None else row[key] for key in ("mean", "interval", "median")]
    return ["-" if v is None else f"{v:.{digits}{'f' if abs(v) < 1e6 else 'e'}}" for v in values]


def write_json(path: str | Path, results: dict[str, Any]) -> None:
    """Write the results and :func:`eaml_ext.build_info` to a JSON file, whole or not at all.

    Numbers that are not finite become null, because JSON has none.
    """
    text = json.dumps(_finite({**results, "build": build_info()}), indent=1, allow_nan=False)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_band(
    axes: Any,
    x: Sequence[float],
    mean: Sequence[float],
    half: Sequence[float | None],
    label: str,
    **line_options: Any,
) -> None:
    """Draw a curve and its 95 % interval, ``mean +- half``, on axes of matplotlib.

    Args:
        axes: the axes.
        x, mean: of the curve.
        half: half widths, as :func:`summary` returns them; None: no interval at this point.
        label: of the curve in the legend.
        line_options: of ``axes.plot``.
    """
    (line,) = axes.plot(x, mean, label=label, **line_options)
    if any(h is not None for h in half):
        bounds = [(m - h, m + h) if h is not None else (math.nan, math.nan) for m, h in zip(mean, half, strict=True)]
        low, high = zip(*bounds, strict=True)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def plot(path: str | Path, results: dict[str, Any]) -> None:
    """Plot the meta-loss over epochs and the error of each variant over adaptation steps: see :func:`save_figure`."""
    save_figure(path, lambda left, right: _draw(left, right, results))


def save_figure(path: str | Path, draw: Callable[[Any, Any], None]) -> None:
    """Write a figure of two axes, whole or not at all.

    Without matplotlib a printed line names the extra, and an earlier plot at ``path`` is removed.

    Args:
        path: of the PNG file.
        draw: called with the left and the right axes of matplotlib.
    """
    with deferred_interrupt() as interrupted:  # Python reports one inside __set_name__ as a RuntimeError
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            Path(path).unlink(missing_ok=True)
            print("Plot left out: it needs matplotlib, which pip install 'eaml_ext[plot]' installs.")
            return
    if interrupted:
        raise KeyboardInterrupt

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    draw(*figure.subplots(1, 2))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    with atomic_write(path) as temporary:
        Path(temporary).write_bytes(image.getvalue())


def _draw(left: Any, right: Any, results: dict[str, Any]) -> None:
    epochs = range(len(results["meta_loss"]))
    draw_band(left, epochs, results["meta_loss"], results["meta_loss_intervals"], "mean of an epoch's updates")
    left.set(xlabel="epoch", ylabel="query loss after adaptation (95 % bands)", yscale="log", title="meta-training")
    for name, curve in results["curves"].items():
        if len(curve) == 1:
            style = ":" if name == "copy input" else "--"
            right.axhline(curve[0], color="0.4", linestyle=style, label=name)
        else:
            steps = [STEPS_PER_CALL * i for i in range(len(curve))]
            draw_band(right, steps, curve, results["curve_intervals"][name], name)
    right.set(
        xlabel="gradient steps",
        ylabel="prediction error (mean squares of a step, 95 % bands)",
        yscale="log",
        title=f"held-out tasks of {results['settings']['env_name']}, seed {results['settings']['seed']}",
    )
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
