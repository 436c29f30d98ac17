"""The meta-gradient of state-space models through our scan, and through the usual pattern of fused scans.

    python -m benchmarks.gradient_figure [--quick] [--threads 1]

MAML (Finn et al. 2017, "Model-Agnostic Meta-Learning", eq. 1): the gradient of the query loss after 1 to 5 inner steps
of gradient descent, with respect to the initial weights. The truth is autograd through the reference loop in float64.
The compared ways are:

- ours: ``selective_scan`` in float32 and in float64.
- usual: an ``autograd.Function`` whose backward calls a kernel, as in mamba_ssm. Under ``create_graph=True`` the
  kernel's results enter the graph as constants. Forward, losses and first-order gradients equal ours to the last bit,
  and no warning appears. The dependence of the scan's gradients on the weights is lost. This way runs our own kernels,
  so the difference is autograd's alone. ``once_differentiable`` would make ``backward()`` raise an error, but
  ``torch.autograd.grad`` would still return the wrong gradient.
- first order: the gradient of the query loss at the adapted weights (FOMAML), which omits the same term on purpose.

There are three settings. In "scan" the weights are the scan's arguments, and ``usual`` equals first order. "SSM,
untrained" is a whole model, whose other layers keep their second order: ``usual`` is neither exact nor first order.
"SSM, meta-trained" is the same model after meta-training with exact gradients, when inner steps reduce the loss most.
The tasks are leaky integrators of white noise, each with its own time constant, gain and sign.
"""

import copy
import inspect
import statistics
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import RESULTS, flags, machine, save
from eaml_ext import SSM, MetaMAML
from eaml_ext.ops import selective_scan, selective_scan_reference
from eaml_ext.ops.selective_scan import ARGUMENTS

STEPS = (1, 2, 3, 4, 5)
INNER_LR = 0.02
TASKS, SEQUENCES, LENGTH = 4, 4, 48
DIM, STATES = 16, 8

Scan = Callable[..., Any]
Task = tuple[Tensor, Tensor, Tensor, Tensor]

_ops = torch.ops.eaml_ext


# ---- the usual pattern -------------------------------------------------------------------------------------------


class RawBackward(torch.autograd.Function):
    """Backward returns what a kernel computed, under no graph."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        y, last, saved = _ops.selective_scan(*args, True)
        *ctx.options, ctx.saved = *args[9:], saved
        ctx.save_for_backward(*args[:9])
        return y, last

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors
        with torch.no_grad():  # a kernel behind pybind sees no graph either
            grads = _ops.selective_scan_backward(grad_y, grad_state, *x, *ctx.options, ctx.saved)
        return *(None if v is None else g for g, v in zip(grads, x, strict=True)), None, None, None, None


SIGNATURE = inspect.signature(selective_scan)  # before `usual` is put in its place


def usual(*args: Any, **kwargs: Any) -> Any:
    """selective_scan, differentiated as other fused scans are."""
    call = SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    x = call.arguments
    options = (x["reset"], x["delta_softplus"], x["B"].dim() == 2, x["C"].dim() == 2)
    y, last = RawBackward.apply(*(x[name] for name in ARGUMENTS), *options)
    return (y, last) if x["return_last_state"] else y


# Name -> scan, dtype, first order.
WAYS: dict[str, tuple[Scan, torch.dtype, bool]] = {
    "first order": (selective_scan, torch.float64, True),
    "usual, float32": (usual, torch.float32, False),
    "usual, float64": (usual, torch.float64, False),
    "ours, float32": (selective_scan, torch.float32, False),
    "ours, float64": (selective_scan, torch.float64, False),
}

# ---- models and tasks --------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """(batch, time, 1) -> the same: DIM channels of x through a scan, summed. The weights are the scan's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Parameter(torch.randn(DIM, 1))  # u
        self.modulate = nn.Parameter(0.3 * torch.randn(DIM, 1))  # delta
        self.A_log = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(DIM, 1))
        self.B = nn.Parameter(torch.randn(DIM, STATES) / STATES**0.5)
        self.C = nn.Parameter(torch.randn(DIM, STATES) / (DIM * STATES) ** 0.5)
        self.D = nn.Parameter(torch.randn(DIM) / DIM)
        self.delta_bias = nn.Parameter(0.5 * torch.randn(DIM) - 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        A, bias = -self.A_log.exp(), self.delta_bias
        y = selective_scan(self.expand * x, self.modulate * x, A, self.B, self.C, self.D, None, bias, True)
        return y.sum(1).unsqueeze(-1)  # type: ignore[union-attr]


def make_tasks(count: int) -> list[Task]:
    """h_t = r h_{t-1} + sqrt(1 - r^2) x_t, y = gain h: support_x, support_y, query_x, query_y; float32 holds them."""
    tasks = []
    for _ in range(count):
        x = torch.randn(2 * SEQUENCES, LENGTH, 1)
        r = 0.98 - 0.5 * torch.rand(()) ** 2
        gain = torch.randn(()).sign() * (1 + torch.rand(()))
        h, hs = torch.zeros_like(x[:, 0]), []
        for x_t in x.unbind(1):
            h = r * h + (1 - r**2).sqrt() * x_t
            hs.append(h)
        y = gain * torch.stack(hs, dim=1)
        tasks.append((x[:SEQUENCES], y[:SEQUENCES], x[SEQUENCES:], y[SEQUENCES:]))
    return tasks


def meta_train(model: SSM, updates: int) -> SSM:
    """A copy, meta-trained with exact gradients over three inner steps."""
    model = copy.deepcopy(model)
    maml = MetaMAML(model, inner_lr=INNER_LR, outer_lr=3e-3, inner_steps=3)
    for _ in range(updates):
        maml.meta_update(make_tasks(2 * TASKS), F.mse_loss)
    return model


# ---- measuring ---------------------------------------------------------------------------------------------------


def meta_gradient(
    model: nn.Module, tasks: list[Task], scan: Scan, steps: int, dtype: torch.dtype, first_order: bool = False
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """The outer gradient in float64; the mean query loss before and after adaptation."""
    start = {n: p.detach().to(dtype).requires_grad_() for n, p in model.named_parameters()}
    before, after = [], []

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(torch.func.functional_call(model, params, (x,)), y)

    with mock.patch("eaml_ext.nn.cores.s6.selective_scan", scan), mock.patch(f"{__name__}.selective_scan", scan):
        for task in tasks:
            support_x, support_y, query_x, query_y = (x.to(dtype) for x in task)
            params = dict(start)
            before.append(loss(params, query_x, query_y).item())
            for _ in range(steps):
                inner = loss(params, support_x, support_y)
                grads = torch.autograd.grad(inner, list(params.values()), create_graph=not first_order)
                params = {n: p - INNER_LR * g for (n, p), g in zip(params.items(), grads, strict=True)}
            after.append(loss(params, query_x, query_y))
        outer = torch.stack(after).mean()
        grads = torch.autograd.grad(outer, list(start.values()))
    return {n: g.double() for n, g in zip(start, grads, strict=True)}, (statistics.mean(before), outer.item())


def compare(got: Tensor, want: Tensor) -> dict[str, float]:
    """Relative error, cosine and ratio of norms."""
    return {
        "error": ((got - want).norm() / want.norm()).item(),
        "cosine": F.cosine_similarity(got, want, dim=0).item(),
        "norm": (got.norm() / want.norm()).item(),
    }


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])


def measure(model: nn.Module, tasks: list[Task], steps: int) -> dict[str, Any]:
    """All ways to the gradient of one model on one batch of tasks."""
    want, (before, after) = meta_gradient(model, tasks, selective_scan_reference, steps, torch.float64)
    row: dict[str, Any] = {"steps": steps, "loss before": before, "loss after": after, "ways": {}}
    losses = {}
    for name, (scan, dtype, first_order) in WAYS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the usual pattern is silent; prove it
            got, losses[name] = meta_gradient(model, tasks, scan, steps, dtype, first_order)
        row["ways"][name] = compare(flat(got), flat(want))
        if name == "usual, float64":
            row["usual by parameter"] = {n: compare(got[n].flatten(), want[n].flatten())["error"] for n in want}
    for dtype in ("float32", "float64"):
        assert losses[f"usual, {dtype}"] == losses[f"ours, {dtype}"], "the usual way has other first-order gradients"
    return row


def spread(rows: list[dict[str, Any]], way: str, steps: int, measure: str = "error") -> tuple[float, float, float]:
    """Median, least and largest over seeds."""
    values = [row["ways"][way][measure] for row in rows if row["steps"] == steps]
    return statistics.median(values), min(values), max(values)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of steps: losses, and each way's median, least and largest error and cosine over seeds."""
    table = []
    for steps in sorted({row["steps"] for row in rows}):
        of = [row for row in rows if row["steps"] == steps]
        losses = {name: statistics.median(row[name] for row in of) for name in ("loss before", "loss after")}
        ways = {f"{way}, {m}": spread(rows, way, steps, m) for way in of[0]["ways"] for m in ("error", "cosine")}
        table.append({"steps": steps, "seeds": len(of), **losses, **ways})
    return table


def show(setting: str, rows: list[dict[str, Any]]) -> None:
    """The console table of one setting."""
    print(f"\n{setting}: relative error of the meta-gradient, median over seeds (cosine to the truth)")
    print(f"{'steps':<6}{'query loss':<15}" + "".join(f"{way:>18}" for way in WAYS))
    for steps in STEPS:
        of = [row for row in rows if row["steps"] == steps]
        before, after = (statistics.median(row[f"loss {when}"] for row in of) for when in ("before", "after"))
        cells = []
        for way in WAYS:
            error, cosine = (spread(rows, way, steps, m)[0] for m in ("error", "cosine"))
            cells.append(f"{error:>10.2g} ({cosine:>5.2f})")
        print(f"{steps:<6}{f'{before:.2f} -> {after:.2f}':<15}" + "".join(cells))
    last = [row["usual by parameter"] for row in rows if row["steps"] == STEPS[-1]]
    medians = {name: statistics.median(errors[name] for errors in last) for name in last[0]}
    print(f"usual, by parameter, {STEPS[-1]} steps: " + ", ".join(f"{n} {e:.0%}" for n, e in medians.items()))


# ---- figure ------------------------------------------------------------------------------------------------------

TITLES = {
    "scan": "One scan: its arguments are the weights",
    "SSM, untrained": "An SSM, untrained",
    "SSM, meta-trained": "The same SSM, meta-trained",
}
# Way -> label, colour, line style.
STYLES = {
    "first order": ("first order (FOMAML)", "0.25", (0, (2, 2))),
    "usual, float32": ("usual fused backward (no warning)", "#c8321f", "-"),
    "ours, float32": ("ours, float32", "#3b83c4", "-"),
    "ours, float64": ("ours, float64", "#123a68", "-"),
}


def plot(path: Any, settings: dict[str, list[dict[str, Any]]]) -> None:
    """A panel per setting: relative error over inner steps, median and range over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(settings), sharey=True)
    for axis, (setting, rows) in zip(axes, settings.items(), strict=True):
        for way, (label, color, style) in STYLES.items():
            middle, low, high = zip(*(spread(rows, way, steps) for steps in STEPS), strict=True)
            if way == "first order":  # on top: in the first panel it covers the usual way
                axis.plot(STEPS, middle, color=color, linestyle=style, lw=1.4, label=label, zorder=3)
                continue
            axis.fill_between(STEPS, low, high, color=color, alpha=0.18, linewidth=0)
            axis.plot(STEPS, middle, color=color, linestyle=style, marker="o", markersize=4, lw=1.8, label=label)
        axis.axhline(1, color="0.8", lw=0.8, zorder=0)
        first, last = ([row for row in rows if row["steps"] == s] for s in (STEPS[0], STEPS[-1]))
        before, after = (
            statistics.median(row[f"loss {when}"] for row in of) for when, of in (("before", first), ("after", last))
        )
        axis.set_title(TITLES[setting], fontsize=10.5, loc="left")
        note = f"query loss {before:.2f} → {after:.2f} in {STEPS[-1]} steps"
        axis.text(0.03, 0.31, note, transform=axis.transAxes, fontsize=8.5, color="0.35")
        worst = spread(rows, "usual, float32", STEPS[-1])[0]
        axis.annotate(
            f"{worst:.0%} off",
            (STEPS[-1], worst),
            xytext=(-2, -15),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=STYLES["usual, float32"][1],
        )
        axis.set(xlabel="inner steps", xticks=STEPS, xlim=(0.7, 5.5), yscale="log", ylim=(1e-16, 30))
        axis.set_yticks([1e-16, 1e-12, 1e-8, 1e-4, 1])
        axis.grid(axis="y", color="0.92", lw=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("relative error of the MAML outer gradient")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=200)


def main() -> None:
    arguments = flags(__doc__)
    seeds, updates = (1, 30) if arguments.quick else (5, 300)
    settings: dict[str, list[dict[str, Any]]] = {"scan": [], "SSM, untrained": [], "SSM, meta-trained": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        untrained = SSM(1, DIM, 1, state_size=STATES)
        models = (Layer(), untrained, meta_train(untrained, updates))
        tasks = make_tasks(TASKS)
        for rows, model in zip(settings.values(), models, strict=True):
            rows += [{"seed": seed, **measure(model, tasks, steps)} for steps in STEPS]
    for setting, rows in settings.items():
        show(setting, rows)
    if arguments.quick:
        return
    path = RESULTS / "gradient_figure.json"
    options = {"inner_lr": INNER_LR, "tasks": TASKS, "sequences": SEQUENCES, "length": LENGTH, "meta-updates": updates}
    save(path, {"machine": machine(), "options": options, "settings": {k: summary(v) for k, v in settings.items()}})
    plot(path.with_suffix(".png"), settings)
    print(f"\n{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
