"""Selective scan against its peers in PyTorch and JAX: time, memory, and the machine's limits.

    python -m benchmarks.ops.selective_scan [--quick] [--threads 1] [--shape BATCH LENGTH DIM STATE]
            [--peers loop jax ...]

`pip install '.[bench]'` installs the peers. The tables list a peer that is absent, fails, or differs from the reference
in float64, with the reason. Each pass starts from scratch: "+double backward" is forward, backward and double backward
together. Only "double backward alone" uses a kept graph.
"""

import importlib.metadata
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    brief_path,
    copy_rate,
    cores,
    cpus,
    exp_rates,
    flags,
    in_fresh_process,
    l2_bytes,
    medians,
    peak_bytes,
    rates,
    result_path,
    wall_time,
    write,
)
from benchmarks.ops.scan_peers import PASSES, PEERS, Peer, failures, problem
from benchmarks.ops.scan_plot import plot
from eaml_ext.ops import selective_scan, selective_scan_step
from eaml_ext.ops.selective_scan import CHUNK_SIZE

Shape = tuple[int, int, int, int]  # (batch, length, dim, state)
Row = dict[str, Any]

SHAPES = [(8, 128, 64, 16), (32, 64, 64, 16), (4, 512, 256, 16), (256, 32, 64, 16), (1, 2048, 1536, 16)]
LONG = (1, 65536, 16, 16)
SWEEP = [(4, length, 256, 16) for length in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)]
STEPS = [(1, 1, 64, 16), (64, 1, 256, 16)]
SCALING = [(4, 512, 256, 16), LONG, (32, 64, 64, 16)]
BOUNDED = [(4, 512, 256, 16), (4, 4096, 512, 16)]
BOUND = 1.5  # of our peak memory over forward and backward, times inputs + outputs + gradients
SCRATCH = [name for name in PASSES if name != "double backward alone"]  # the passes that keep nothing from before
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Bench:
    """The peers that load, why the others or passes of theirs are left out, and the rows measured so far."""

    def __init__(self, threads: int, quick: bool) -> None:
        self.threads, self.seconds, self.patience = threads, 0.1 if quick else 0.5, 1.0 if quick else 5.0
        self.passes = PASSES[:3] if quick else PASSES
        self.peers: dict[str, Peer] = {}
        self.why: dict[tuple[str, str], str] = {}  # (peer, pass)
        self.rows: list[Row] = []
        self.setup_seconds: dict[tuple[str, str, Shape], float] = {}
        for name, load in PEERS.items():
            try:
                self.peers[name] = load()
            except ImportError as failure:
                self.why |= {(name, task): f"absent: {failure}" for task in (*PASSES, "step")}
        for length in (64,) if quick else (64, 37):  # a power of two, and one that is none
            for task in (*self.passes, "step"):
                found = failures(self.peers, task, problem(2, length, 8, 16))
                self.why |= {(name, task): why for name, why in found.items()}
        wrong = {task: why for (name, task), why in self.why.items() if name == "ours"}
        if wrong:
            raise SystemExit(f"selective_scan is not its reference: {wrong}")

    def estimate(self, name: str, task: str, shape: Shape) -> float:
        """Seconds of a call, from one over at most 64 steps."""
        growth = self.peers[name].growth
        batch, length, dim, state = shape
        if not growth or length <= 64:
            return 0.0
        key = (name, task, (batch, 64, dim, state))
        if key not in self.setup_seconds:
            self.setup_seconds[key] = wall_time(self.peers[name].prepare(task, problem(*key[2])))
        return self.setup_seconds[key] * (length / 64) ** (1 if task == "forward" else growth)

    def reason(self, name: str, task: str, shape: Shape) -> str | None:
        """Why a peer's pass is not measured."""
        if (name, task) in self.why:
            return self.why[name, task]
        seconds = self.estimate(name, task, shape)
        return f"skipped: about {seconds:.0f} s a call" if seconds > self.patience else None

    def measure(self, task: str, shape: Shape, layout: str = "channel-last") -> dict[str, Row]:
        """A row for each peer: its time, or the reason for none."""
        p = problem(*shape, channel_last=layout == "channel-last")
        why = {name: self.reason(name, task, shape) for name in PEERS}
        if task == "forward":
            why |= failures({name: self.peers[name] for name in PEERS if not why[name]}, task, p)
        able = [name for name in PEERS if not why[name]]
        # The graphs that are kept would not fit in memory all at once.
        pairs = [["ours", name] for name in able if name != "ours"]
        groups = pairs if pairs and task == "double backward alone" else [able]
        seconds: dict[str, float] = {}
        for group in groups:
            seconds |= medians({name: self.peers[name].prepare(task, p) for name in group}, seconds=self.seconds)
        about = {"shape": shape, "pass": task, "layout": layout}
        rows = {name: {**about, "peer": name, "seconds": seconds.get(name), "reason": why[name]} for name in PEERS}
        self.rows += rows.values()
        return rows


# --- tables ----------------------------------------------------------------------------------------------------------


def header(title: str, unit: str) -> None:
    print(f"\n{title:<28}{'ours ' + unit:>10}" + "".join(f"{name:>13}" for name in PEERS if name != "ours"))


def line(title: str, rows: dict[str, Row], key: str, scale: float) -> None:
    """Ours in a unit, each peer in times ours or the kind of its reason."""
    ours = rows["ours"][key] or math.nan
    cells = [r["reason"].split(":")[0] if r[key] is None else f"{r[key] / ours:.1f}x" for r in rows.values()]
    print(f"  {title:<26}{scale * ours:>10.3f}" + "".join(f"{cell:>13}" for cell in cells[1:]))


def in_forwards(rows: dict[str, Row], forward: dict[str, Row]) -> None:
    """Each peer's time in units of its own forward."""
    both = [(rows[name]["seconds"], forward[name]["seconds"]) for name in PEERS]
    cells = [f"{seconds / unit:.1f}" if seconds and unit else "" for seconds, unit in both]
    print(f"  {'  in forwards':<26}{cells[0]:>10}" + "".join(f"{cell:>13}" for cell in cells[1:]))


def describe(bench: Bench) -> list[Row]:
    """Version, cores kept busy, and what is left out and why, of each peer."""
    packages = {"ours": "eaml_ext", "loop": "torch", "assoc_scan": "torch"}
    described = []
    print(f"\n{'peer':<14}{'version':<14}{'cores':>6}  passes left out")
    for name in PEERS:
        row: Row = {"peer": name, "version": None, "cores": None, "left out": left_out(bench, name)}
        version, busy = "absent", ""
        if name in bench.peers:
            version = row["version"] = importlib.metadata.version(packages.get(name, name))
            if (name, "forward") not in bench.why:
                row["cores"] = cores(bench.peers[name].prepare("forward", problem(*SHAPES[0])))
                busy = f"{row['cores']:.1f}" + ("!" if row["cores"] > bench.threads + 0.1 else "")
        print(f"{name:<14}{version:<14}{busy:>6}  " + (f"\n{'':<36}".join(row["left out"]) or "none"))
        described.append(row)
    return described


def left_out(bench: Bench, name: str) -> list[str]:
    """The passes of a peer that are left out, by reason."""
    tasks: dict[str, list[str]] = {}
    for (peer, task), reason in bench.why.items():
        if peer == name:
            tasks.setdefault(reason, []).append(task.removeprefix("+"))
    texts = []
    for reason, named in tasks.items():
        kind, text = reason.split(": ", 1)
        texts.append(text if kind == "absent" else f"{'no' if kind == 'none' else kind} {', '.join(named)}: {text}")
    return texts


def limits(threads: int) -> dict[str, float]:
    """Exponentials and multiply-adds per second, and bytes per second of copies within L2 and through memory."""
    found_rates = exp_rates()
    half = l2_bytes() // 2  # source and target fill the cache
    found = {"exp": threads * max(found_rates.values()), "copy L2": copy_rate(half), "copy 64 MiB": copy_rate(2**26)}
    each = ", ".join(f"{name} {rate / 1e9:.2f}e9/s" for name, rate in found_rates.items())
    print(f"\nlimits: {each} (one thread); copy {found['copy L2'] / 1e9:.0f} GB/s in L2, ", end="")
    print(f"{found['copy 64 MiB'] / 1e9:.0f} GB/s of 64 MiB")
    if own := rates():
        found["multiply"] = threads * own.fma_rate()
        print(f"{found['multiply'] / 1e9:.1f}e9 multiply-adds/s")
    else:
        print("absent: exp in registers; torch.exp alone is below what the kernels' own reaches, shares may pass 100 %")
    return {**found, **{f"exp, {name}, one thread": rate for name, rate in found_rates.items()}}


def times(bench: Bench, shape: Shape, limit: dict[str, float]) -> Row:
    """All passes at a shape; returns the share of each limit that our forward reaches, and each pass of multiplying."""
    header(str(shape), "ms")
    forward = {layout: bench.measure("forward", shape, layout) for layout in ("channel-last", "channel-first")}
    for layout, rows in forward.items():
        line(f"forward, {layout}", rows, "seconds", 1e3)
    seconds = {"forward": forward["channel-last"]["ours"]["seconds"]}
    for task in bench.passes[1:]:
        rows = bench.measure(task, shape)
        seconds[task] = rows["ours"]["seconds"]
        line(task, rows, "seconds", 1e3)
        if task == "double backward alone":
            in_forwards(rows, forward["channel-last"])
    last, first = (rows["ours"]["seconds"] for rows in forward.values())
    exp, copy = math.prod(shape) / limit["exp"], sum(held(shape)) / limit["copy 64 MiB"]
    shares = f"{exp / last:.0%} of the exp limit, channel-first {exp / first:.0%}; {copy / last:.0%} of copying"
    print(f"  ours, forward: {shares}")
    busy = {
        f"multiply, {task}": multiplications(task, shape[1]) * math.prod(shape) / limit["multiply"] / seconds[task]
        for task in ("forward", "+backward", "+double backward")
        if task in seconds and "multiply" in limit
    }
    if busy:
        print("  ours, of the time that the multipliers need: " + ", ".join(f"{share:.0%}" for share in busy.values()))
    found = {"exp, channel-last": exp / last, "exp, channel-first": exp / first, "copy": copy / last}
    return {"shape": shape, **found, **busy}


def multiplications(task: str, length: int) -> float:
    """Vector multiplications per state and step with AVX-512, fused with an addition or not.

    A decay takes one and its exponential two. A product of duals takes three, or two for the tangent alone.
    Additions and shuffles run beside them. Before a double backward, duals run forward through all chunks but the last.
    """
    forward, backward, dual_forward, dual_backward = 6, 13, 11, 32
    chunks = math.ceil(length / CHUNK_SIZE)
    again = dual_forward * (chunks - 1) / chunks + dual_backward
    return {"forward": forward, "+backward": forward + backward, "+double backward": forward + backward + again}[task]


def held(shape: Shape) -> tuple[int, int]:
    """Bytes of the arguments, and of y."""
    p = problem(*shape)
    return sum(x.nbytes for x in p.arguments), p.grad.nbytes


# --- memory ----------------------------------------------------------------------------------------------------------


def peaks(peer: str, jobs: list[tuple[str, Shape]], threads: int) -> list[int]:
    """Peak bytes of each job (pass, shape); for a fresh process."""
    torch.set_num_threads(threads)
    loaded = PEERS[peer]()
    return [peak_bytes(loaded.prepare(task, problem(*shape))) for task, shape in jobs]


def memory(bench: Bench, shapes: list[Shape]) -> list[Row]:
    """The largest addition of a pass to resident memory."""
    jobs = [(task, shape) for shape in shapes for task in bench.passes if task in SCRATCH]
    found: dict[tuple[str, str, Shape], Row] = {}
    for name in PEERS:
        why = {job: bench.reason(name, *job) for job in jobs}
        todo = [job for job in jobs if not why[job]]
        try:
            added = dict(zip(todo, in_fresh_process(peaks, name, todo, bench.threads) if todo else [], strict=True))
        except Exception as failure:  # out of memory, no /proc
            added, why = {}, {job: why[job] or f"none: {failure!r}" for job in jobs}
        for job in jobs:
            about = {"shape": job[1], "pass": job[0], "peer": name}
            found[(name, *job)] = {**about, "peak bytes": added.get(job), "reason": why[job]}
    for shape in shapes:
        header(f"{shape}, peak", "MB")
        for task in (task for task, at in jobs if at == shape):
            line(task, {name: found[name, task, shape] for name in PEERS}, "peak bytes", 1e-6)
    return list(found.values())


def bound() -> list[Row]:
    """Our peak over forward and backward, inputs counted in, times inputs + outputs + gradients."""
    if not Path("/proc/self/clear_refs").exists():
        print("\npeak memory: absent: no /proc/self/clear_refs")
        return []
    rows = []
    added = in_fresh_process(peaks, "ours", [("+backward", shape) for shape in BOUNDED], 1)
    print("\nforward + backward, peak memory over inputs + outputs + gradients")
    for shape, extra in zip(BOUNDED, added, strict=True):
        arguments, y = held(shape)
        ratio = (arguments + y + extra) / (2 * arguments + 2 * y)  # each has a gradient
        print(f"  {shape!s:<26}{ratio:>10.2f}")
        rows.append({"shape": shape, "ratio": ratio, "bound": BOUND})
    return rows


# --- the host's part of a call ---------------------------------------------------------------------------------------


def host_times(seconds: float) -> Row:
    """Microseconds of calls on tensors of one number each, in which arithmetic takes no time."""
    one, per_step, per_channel = torch.rand(1, 1, 1), torch.rand(1, 1), torch.rand(1)
    A, A_grad = -torch.rand(1, 1), torch.rand(1, 1).neg().requires_grad_()
    raw = torch.ops.eaml_ext

    def scan(A: torch.Tensor) -> Any:
        return selective_scan(one, one, A, one, one, per_channel, one, per_channel, True, True, initial_state=one)

    def step(A: torch.Tensor) -> Any:
        return selective_scan_step(
            one, per_step, per_step, A, per_step, per_step, per_channel, per_step, per_channel, True
        )

    tail = per_channel, one, per_channel, one, None, True, False, False, False
    step_tail = per_channel, per_step, per_channel, True
    calls = {
        "scan, raw op": lambda: raw.selective_scan(one, one, A, one, one, *tail),
        "scan": lambda: scan(A),
        "scan with gradient": lambda: scan(A_grad),
        "step, raw op": lambda: raw.selective_scan_step(one, per_step, per_step, A, per_step, per_step, *step_tail),
        "step": lambda: step(A),
        "step with gradient": lambda: step(A_grad),
    }
    repeats = 100
    functions = {name: lambda call=call: [call() for _ in range(repeats)] for name, call in calls.items()}
    t = {name: 1e6 * s / repeats for name, s in medians(functions, seconds=seconds).items()}
    print("\nhost time of a call, us: " + ", ".join(f"{name} {value:.1f}" for name, value in t.items()))
    return t


# --- one thread and two, dtypes --------------------------------------------------------------------------------------


def scaling(bench: Bench, shapes: list[Shape]) -> list[Row]:
    """Ours on one thread and on two."""
    rows = []
    print(f"\n{'ours, threads':<46}{'1, ms':>8}{'2, ms':>8}{'speed-up':>10}")
    if cpus() < 2:
        print("  absent: one core")
        return [{"reason": "absent: one core"}]
    for shape in shapes:
        for task in ("forward", "+backward"):
            run = bench.peers["ours"].prepare(task, problem(*shape))

            def switch(threads: str, run: Any = run) -> None:
                torch.set_num_threads(int(threads))
                run()

            t = medians({"1": run, "2": run}, seconds=bench.seconds, before=switch)
            rows.append({"shape": shape, "pass": task, **t, "ratio": t["1"] / t["2"]})
            print(f"  {shape!s:<26}{task:<18}{1e3 * t['1']:>8.2f}{1e3 * t['2']:>8.2f}{t['1'] / t['2']:>9.2f}x")
    torch.set_num_threads(bench.threads)
    return rows


def dtypes(bench: Bench, shape: Shape) -> dict[str, float]:
    """Our forward in other types."""
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    ours = bench.peers["ours"]
    functions = {name: ours.prepare("forward", problem(*shape, dtype=dtype)) for name, dtype in names.items()}
    t = medians(functions, seconds=bench.seconds)
    print(f"\nours, forward at {shape}: ", end="")
    print(", ".join(f"{name} {1e3 * t[name]:.2f} ms ({t[name] / t['float32']:.2f}x)" for name in t))
    return t


def main() -> None:
    arguments = flags(__doc__, ("BATCH", "LENGTH", "DIM", "STATE"), [name for name in PEERS if name != "ours"])
    for name in set(PEERS).difference(arguments.peers or PEERS, ["ours"]):
        del PEERS[name]
    quick, threads = arguments.quick, arguments.threads
    shapes = SHAPES[:1] if quick else [*SHAPES, LONG]
    shapes = [tuple(arguments.shape)] if arguments.shape else shapes
    bench = Bench(threads, quick)
    results: Row = {"threads": threads, "peers": describe(bench), "limits": limits(threads)}
    results["host time"] = host_times(bench.seconds)
    results["share of limits"] = [times(bench, shape, results["limits"]) for shape in shapes]
    if arguments.shape:
        return
    for shape in STEPS:
        header(f"step, batch {shape[0]}, dim {shape[2]}", "ms")
        line("step", bench.measure("step", shape), "seconds", 1e3)
    results["dtypes"] = dtypes(bench, (4, 512, 256, 16))
    results["scaling"] = scaling(bench, SCALING[2:] if quick else SCALING)
    results["bound"] = bound()
    if not quick and not arguments.peers:
        results["memory"] = memory(bench, SHAPES) if results["bound"] else []
    for task in ("forward", "+backward"):
        header(f"{task} by length", "ms")
        for shape in SWEEP[:5] if quick else SWEEP:
            line(str(shape), bench.measure(task, shape), "seconds", 1e3)
    if quick:
        print(plot(bench.rows, brief_path("selective_scan"), SHAPES[0], threads))
    else:
        results["rows"] = bench.rows
        print(write(f"selective_scan-{threads}-thread", results))
        if threads == 1:
            print(plot(bench.rows, result_path("selective_scan", ".png")))
    over = [row for row in results["bound"] if row["ratio"] > BOUND]
    assert not over, f"forward + backward takes more than {BOUND} times inputs + outputs + gradients: {over}"


if __name__ == "__main__":
    main()
