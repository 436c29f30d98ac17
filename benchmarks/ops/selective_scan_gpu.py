"""Selective scan on a GPU against its peers there, by the GPU's clock, with the rate of copying as a limit.

    python -m benchmarks.ops.selective_scan_gpu [--quick] [--out FOLDER]

Writes `selective_scan-<gpu>.json` after each row, and a plot. The tables list a peer that is absent, fails, or differs
from the reference in float64, with the reason. It takes minutes, `benchmarks.ops.scan_vs_mamba` seconds. Without a GPU
the command ends with one sentence.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eaml_ext
from benchmarks.common import save
from benchmarks.gpu import copy_rate, gpu_name, medians, start
from benchmarks.ops import scan_peers
from benchmarks.ops.scan_peers import PASSES, Peer, Problem, Torch, failures, problem
from eaml_ext.ops import selective_scan

Shape = tuple[int, int, int, int]  # (batch, length, dim, state)

WIDE = [(4096, 16, 256, 16), (4096, 64, 256, 16), (256, 128, 128, 16), (64, 1024, 256, 16)]  # meta-learning, RL
LONG = [(8, 128, 1536, 16), (8, 2048, 1536, 16), (8, 16384, 1536, 16), (1, 65536, 64, 16)]
SWEEP = [(8, length, 1536, 16) for length in (16, 64, 256, 1024, 4096, 16384)]
DTYPES = (torch.float32, torch.bfloat16)
BYTES = 24 * 2**30  # of a pass that is measured, as far as it can be foreseen


# --- peers -----------------------------------------------------------------------------------------------------------


def mamba_ssm() -> Peer:
    """Its CUDA kernel: exact to first order alone (its backward is not differentiable, in silence)."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
        u, delta, B, C = (x.contiguous() for x in (u, delta, B, C))
        return selective_scan_fn(u, delta, A, B, C, delta_softplus=True)

    return Torch(scan)


def accelerated_scan() -> Peer:
    """A linear recurrence over (batch * state, dim, length), of lengths that are powers of two."""
    from accelerated_scan.warp import scan as linear_scan

    def states(a: Tensor, x: Tensor) -> Tensor:
        batch, length, dim, state = a.shape

        def rows(v: Tensor) -> Tensor:
            return v.permute(0, 3, 2, 1).reshape(batch * state, dim, length).contiguous()

        return linear_scan(rows(a), rows(x)).view(batch, state, dim, length).permute(0, 3, 2, 1)

    return Torch(scan_peers.by_linear_scan(states))


PEERS: dict[str, Callable[[], Peer]] = {
    "ours": scan_peers.ours,
    "mamba_ssm": mamba_ssm,
    "accelerated_scan": accelerated_scan,
    "loop": scan_peers.loop,
    "assoc_scan": scan_peers.associative_scan,
}
MATERIAL = ("accelerated_scan", "assoc_scan")  # hold (batch, length, dim, state), several times over


# --- what is measured ------------------------------------------------------------------------------------------------


def on_gpu(p: Problem) -> Problem:
    return Problem([x.cuda() for x in p.arguments], [x.cuda() for x in p.tangents], p.grad.cuda())


def reason(name: str, task: str, shape: Shape, why: dict[tuple[str, str], str]) -> str | None:
    """Why a peer's pass is not measured."""
    length = shape[1]
    if (name, task) in why:
        return why[name, task]
    if name in MATERIAL and (4 if task == "forward" else 12) * 4 * math.prod(shape) > BYTES:
        return "skipped: more memory than this benchmark gives"
    if name == "loop" and length > 2048:
        return "skipped: seconds a call"
    if name == "accelerated_scan" and (length & (length - 1) or length < 32):
        return "none: takes powers of two from 32 on"
    return None


def measure(
    peers: dict[str, Peer], task: str, shape: Shape, dtype: torch.dtype, why: dict[tuple[str, str], str], seconds: float
) -> list[dict[str, Any]]:
    """A row for each peer: its time, or the reason for none."""
    p = on_gpu(problem(*shape, dtype=dtype))
    reasons = {name: reason(name, task, shape, why) for name in PEERS}
    able = {name: peers[name].prepare(task, p) for name in PEERS if not reasons[name]}
    for name in [n for n in able if n != "ours"]:
        try:
            able[name]()
        except Exception as failure:
            reasons[name] = f"none: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:100]}"
            del able[name]
            torch.cuda.empty_cache()
    took = medians(able, seconds)
    about = {"shape": shape, "pass": task, "dtype": str(dtype).removeprefix("torch.")}
    return [{**about, "peer": name, "seconds": took.get(name), "reason": reasons[name]} for name in PEERS]


def line(rows: list[dict[str, Any]], limit: float) -> None:
    """Ours in ms and as a share of the copy limit, each peer in times ours or the kind of its reason."""
    ours = rows[0]
    batch, length, dim, state = ours["shape"]
    width = 2 if ours["dtype"] == "bfloat16" else 4
    moved = width * batch * length * (3 * dim + 2 * state) * (1 if ours["pass"] == "forward" else 2.7)
    cells = [
        r["reason"].split(":")[0] if r["seconds"] is None else f"{r['seconds'] / ours['seconds']:.1f}x" for r in rows
    ]
    share = f"{moved / limit / ours['seconds']:>7.0%}" if ours["pass"] in ("forward", "+backward") else f"{'':>7}"
    title = f"{ours['shape']!s:<24}{ours['pass']:<24}{ours['dtype']:<10}"
    print(f"{title}{1e3 * ours['seconds']:>10.3f}{share}" + "".join(f"{cell:>17}" for cell in cells[1:]), flush=True)


def per_task(seconds: float) -> list[dict[str, Any]]:
    """256 tasks, each with an A of its own, in one call: against one call a task."""
    p = on_gpu(problem(256, 128, 128, 16))
    u, delta, A, B, C = p.arguments
    each = A.repeat(256, 1, 1) * (1 + torch.rand(256, 1, 1, device="cuda"))

    def loop() -> Tensor:
        rows = zip(u, delta, each, B, C, strict=True)
        return torch.stack(
            [
                selective_scan(
                    *(x[None] if x.dim() == 2 and x is not a else x for x in (v, d, a, b, c)), delta_softplus=True
                )[0]
                for v, d, a, b, c in rows
            ]
        )

    def one() -> Any:
        return selective_scan(u, delta, each, B, C, delta_softplus=True)

    with torch.no_grad():
        assert (one() - loop()).abs().max() <= 1e-4 * one().abs().max()
        took = medians({"ours": one, "a call a task": loop}, seconds)
    print(
        f"\n256 tasks, length 128, dim 128: {1e3 * took['ours']:.3f} ms; each alone: {1e3 * took['a call a task']:.1f}"
    )
    return [{"tasks": 256, **took}]


def complex_states(seconds: float) -> list[dict[str, Any]]:
    """S4D-Lin with packed, varying B and C, against mamba_ssm and against a real scan of the same size."""
    p = on_gpu(problem(8, 2048, 768, 16))
    u, delta, A, B, C = p.arguments
    packed = [torch.stack((x, x.flip(-1)), -1).flatten(-2).contiguous() for x in (B, C)]
    spinning = torch.complex(A, math.pi * torch.arange(16.0, device="cuda").expand_as(A))
    real = on_gpu(problem(8, 2048, 768, 32)).arguments
    scans: dict[str, tuple[Any, list[Tensor]]] = {
        "ours": (selective_scan, [u, delta, spinning, *packed]),
        "ours, real, 32 states": (selective_scan, real),
    }
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        x = [u.contiguous(), delta.contiguous(), spinning, *packed]
        ours, theirs = (scan(*x, delta_softplus=True) for scan in (selective_scan, selective_scan_fn))
        assert (theirs - ours).abs().max() <= scan_peers.TOLERANCE * ours.abs().max(), "differs"
        scans["mamba_ssm"] = selective_scan_fn, x
    except Exception as failure:
        print(f"\nmamba_ssm, complex: {type(failure).__name__}: {failure}")

    def forward(scan: Any, x: list[Tensor]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return scan(*x, delta_softplus=True)

        return call

    def backward(scan: Any, x: list[Tensor]) -> Callable[[], Any]:
        x = [v.detach().requires_grad_() for v in x]
        return lambda: torch.autograd.grad(scan(*x, delta_softplus=True), x, p.grad)

    rows = []
    for task, make in (("forward", forward), ("+backward", backward)):
        took = medians({name: make(*about) for name, about in scans.items()}, seconds)
        rows.append({"pass": task, **took})
        figures = ", ".join(f"{name} {1e3 * t:.3f} ms" for name, t in took.items())
        print(f"\n(8, 2048, 768), 16 complex states, {task}: {figures}")
    return rows


def plot(rows: list[dict[str, Any]], gpu: str, path: Path) -> Path:
    """Time against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axes, task in zip(both, ("forward", "+backward"), strict=True):
        for peer in PEERS:
            points = {
                r["shape"][1]: 1e3 * r["seconds"]
                for r in rows
                if r["peer"] == peer
                and r["pass"] == task
                and r["seconds"]
                and r["dtype"] == "float32"
                and (r["shape"][0], *r["shape"][2:]) == (8, 1536, 16)
            }
            if points:
                lengths = sorted(points)
                label = "eaml_ext" if peer == "ours" else peer
                axes.plot(
                    lengths,
                    [points[n] for n in lengths],
                    marker="o",
                    label=label,
                    linewidth=3 if peer == "ours" else 1.4,
                )
        axes.set_xscale("log", base=2), axes.set_yscale("log")
        (
            axes.set_xlabel("length (steps)"),
            axes.set_title(f"{task}, batch 8, dim 1536, state 16", loc="left", fontsize=10),
        )
        axes.grid(True, color="#e6e6e6"), axes.spines[["top", "right"]].set_visible(False)
    both[0].set_ylabel("time (ms)"), both[1].legend(frameon=False)
    figure.suptitle(f"Selective scan on {gpu}, float32", x=0.07, ha="left", fontweight="bold")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return path


def main() -> None:
    arguments = start(__doc__, "selective_scan_gpu")
    quick, seconds = arguments.quick, 0.1 if arguments.quick else 0.3
    peers: dict[str, Peer] = {}
    why: dict[tuple[str, str], str] = {}
    tasks = PASSES[:3] if quick else PASSES
    for name, load in PEERS.items():
        try:
            peers[name] = load()
        except Exception as failure:  # an extension of another torch fails as it likes
            why |= {(name, task): f"absent: {type(failure).__name__}: {failure}" for task in PASSES}
    for task in tasks:
        found = failures(peers, task, on_gpu(problem(2, 64, 8, 16)))
        why |= {(name, task): text for name, text in found.items()}
    wrong = {task: text for (name, task), text in why.items() if name == "ours"}
    if wrong:
        raise SystemExit(f"selective_scan is not its reference: {wrong}")
    for (name, task), text in why.items():
        print(f"{name}, {task}: {text}")
    limit = copy_rate()
    print(f"{gpu_name()}; copy {limit / 1e12:.2f} TB/s\n")
    print(
        f"{'shape':<24}{'pass':<24}{'dtype':<10}{'ours ms':>10}{'of copy':>7}"
        + "".join(f"{n:>17}" for n in [*PEERS][1:])
    )
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "build": eaml_ext.build_info()}
    path = arguments.out / f"selective_scan-{gpu_name()}.json"
    rows: list[dict[str, Any]] = []
    jobs = [
        (task, shape, torch.float32) for shape in (WIDE + LONG if not quick else WIDE[:1] + LONG[:1]) for task in tasks
    ]
    jobs += [(task, shape, torch.bfloat16) for shape in (*WIDE[-2:], LONG[1]) for task in tasks[:2]]
    if not quick:
        jobs += [(task, shape, torch.float32) for shape in SWEEP for task in tasks[:2] if shape not in LONG]
    for task, shape, dtype in jobs:
        try:
            found_rows = measure(peers, task, shape, dtype, why, seconds)
        except torch.cuda.OutOfMemoryError:
            print(f"{shape!s:<24}{task:<24}does not fit")
            continue
        line(found_rows, limit)
        rows += found_rows
        torch.cuda.empty_cache()
        if not quick:
            save(path, {"machine": machine, "results": {"copy": limit, "rows": rows}})
    tasks_rows, complex_rows = per_task(seconds), complex_states(seconds)
    if quick:
        return
    results = {"copy": limit, "rows": rows, "per task": tasks_rows, "complex": complex_rows}
    save(path, {"machine": machine, "results": results})
    print(path, plot(rows, torch.cuda.get_device_name(), path.with_suffix(".png")))


if __name__ == "__main__":
    main()
