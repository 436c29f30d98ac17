"""The selective scan on a GPU beside mamba_ssm's CUDA kernel, at the sizes of layers and of meta-learning.

    python -m benchmarks.ops.scan_vs_mamba [--quick] [--out FOLDER]

Both get the same inputs, D included, by the arguments that they share. Times are medians of interleaved calls by the
GPU's clock. The limits of a forward pass are measured in the same run: its bytes at the rate of a copy, and one
exponential for each state and step. `scan_vs_mamba-<gpu>.json` is written after each row. mamba_ssm makes contiguous
copies of channel-last inputs, as its users do. Without it, the rows have our time alone. Its main branch compiles this
kernel only with MAMBA_KEEP_CUDA_BUILD=TRUE.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import eaml_ext
from benchmarks.common import save
from benchmarks.gpu import copy_rate, exp_rate, gpu_name, medians, start
from benchmarks.ops.scan_peers import TOLERANCE, error, problem
from eaml_ext.ops import selective_scan

Shape = tuple[int, int, int, int]  # (batch, length, dim, state)
Job = tuple[str, Shape, torch.dtype, str, bool]  # pass, shape, dtype, layout, whether z is given
Scan = Callable[..., Any]
Call = Callable[[], Any]

FLOAT, HALF = torch.float32, torch.bfloat16
FIRST, LAST = "channel-first", "channel-last"
MAIN: Shape = (8, 2048, 1536, 16)
JOBS: list[Job] = [("forward", MAIN, dtype, layout, False) for dtype in (FLOAT, HALF) for layout in (FIRST, LAST)]
JOBS += [
    (task, MAIN, dtype, layout, True)
    for task in ("forward", "+backward")
    for dtype in (FLOAT, HALF)
    for layout in (FIRST, LAST)
]
JOBS += [
    ("forward", shape, dtype, FIRST, True)
    for shape in ((1, 8192, 4096, 16), (8, 4096, 2048, 64), (4, 512, 256, 16), (256, 128, 128, 16))
    for dtype in (FLOAT, HALF)
]
JOBS += [
    (task, shape, FLOAT, FIRST, True)
    for shape in ((4096, 64, 512, 16), (1, 65536, 64, 16))
    for task in ("forward", "+backward")
]
JOBS += [(task, (1, 2048, 1536, 16), FLOAT, FIRST, True) for task in ("forward", "+backward", "double backward alone")]
SECOND_ORDER = "double backward alone"  # ours alone: mamba_ssm's backward is not differentiable


def mamba_ssm() -> Scan:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn


def prepare(scan: Scan, task: str, x: list[Tensor], grad: Tensor) -> Call:
    """A pass over u, delta, A, B, C, D and perhaps z, ready to be timed. It returns tensors."""

    def call() -> Tensor:
        return scan(*x, delta_softplus=True)

    if task == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [call()]

        return forward
    x = [v.detach().requires_grad_() for v in x]
    if task == "+backward":
        return lambda: torch.autograd.grad(call(), x, grad)
    grads = torch.autograd.grad(call(), x, grad, create_graph=True)
    cotangents = [g.detach() for g in grads]
    return lambda: torch.autograd.grad(grads, x, cotangents, retain_graph=True)


def limits(job: Job, copy: float, exp: float | None) -> dict[str, float | None]:
    """Seconds of a forward pass if it only moved its bytes, or only took its exponentials."""
    task, (batch, length, dim, state), dtype, _, gated = job
    if task != "forward":
        return {"copy": None, "exp": None}
    moved = dtype.itemsize * batch * length * (dim * (4 if gated else 3) + 2 * state)
    return {"copy": moved / copy, "exp": exp and batch * length * dim * state / exp}


def measure(scans: dict[str, Scan], job: Job, seconds: float, device: str = "cuda") -> dict[str, Any]:
    """Seconds of each scan, and the differences of their results, relative to the largest entry of each."""
    task, shape, dtype, layout, gated = job
    with torch.device(device):  # a CPU would take seconds to draw the numbers
        p = problem(*shape, channel_last=layout == LAST, dtype=dtype)
        x = [*p.arguments, torch.randn(shape[2]), *([torch.randn_like(p.grad)] if gated else [])]
    grad, reason, difference = p.grad, None, None
    calls = {"ours": prepare(scans["ours"], task, x, grad)}
    if "mamba_ssm" in scans and task != SECOND_ORDER:
        try:
            theirs = prepare(scans["mamba_ssm"], task, x, grad)
            pairs = zip(theirs(), calls["ours"](), strict=True)
            difference = [error([a], [b.double()]) for a, b in pairs]
            calls["mamba_ssm"] = theirs
        except Exception as failure:  # whatever a package raises, the file says it
            reason = f"none: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:100]}"
    return {"ours": None, "mamba_ssm": None, **medians(calls, seconds), "difference": difference, "reason": reason}


def line(row: dict[str, Any]) -> str:
    ours, theirs = row["ours"], row["mamba_ssm"]
    ratio = f"{theirs / ours:>9.2f}x" if theirs else f"{'':>10}"
    shares = "".join(f"{row[n] / ours:>9.0%}" if row[n] else f"{'':>9}" for n in ("copy", "exp"))
    title = (
        f"{row['shape']!s:<23}{row['pass']:<23}{row['dtype']:<10}{row['layout']:<15}{'z' if row['gated'] else '':<3}"
    )
    return f"{title}{1e3 * ours:>9.3f}{ratio}{shares}"


def main() -> None:
    arguments = start(__doc__, "scan_vs_mamba")
    scans: dict[str, Scan] = {"ours": selective_scan}
    try:
        scans["mamba_ssm"] = mamba_ssm()
    except Exception as reason:  # an extension of another torch fails as it likes
        print(f"mamba_ssm: absent: {type(reason).__name__}: {reason}")
    copy, exp = copy_rate(), exp_rate()
    print(f"{gpu_name()}; copy {copy / 1e12:.2f} TB/s, exponentials {exp / 1e12 if exp else math.nan:.2f}e12 a second")
    print(
        f"{'shape':<23}{'pass':<23}{'dtype':<10}{'layout':<15}z  {'ours ms':>9}{'mamba_ssm':>10}{'copy':>9}{'exp':>9}"
    )
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "build": eaml_ext.build_info()}
    rows: list[dict[str, Any]] = []
    for job in JOBS[:2] if arguments.quick else JOBS:
        task, shape, dtype, layout, gated = job
        about = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "layout": layout, "gated": gated}
        try:
            found = measure(scans, job, 0.25)
        except torch.cuda.OutOfMemoryError:
            print(f"{shape!s:<23}{task:<23}does not fit")
            continue
        rows.append({**about, "pass": task, **found, **limits(job, copy, exp)})
        print(line(rows[-1]), flush=True)
        torch.cuda.empty_cache()
        if not arguments.quick:
            results = {"copy": copy, "exp": exp, "rows": rows}
            save(arguments.out / f"scan_vs_mamba-{gpu_name()}.json", {"machine": machine, "results": results})
    by_pass = {row["pass"]: row["ours"] for row in rows if row["shape"] == (1, 2048, 1536, 16)}
    if SECOND_ORDER in by_pass:
        print(
            f"double backward at (1, 2048, 1536, 16): {by_pass[SECOND_ORDER] / by_pass['forward']:.1f} forward passes"
        )
    apart = [row for row in rows if row["dtype"] == "float32" and max(row["difference"] or [0.0]) > TOLERANCE]
    if apart:
        raise SystemExit(f"scan_vs_mamba: float32 results differ: {apart}")


if __name__ == "__main__":
    main()
