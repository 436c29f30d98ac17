"""Time on a GPU by its own clock, and limits measured in the same run: the rates of copies and of exponentials."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def start(text: str | None, name: str) -> argparse.Namespace:
    """Parse ``--quick`` and ``--out``, the flags of a GPU benchmark, and seed torch; exit where there is no GPU."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, less time, no file written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"{name}: no GPU here, nothing was measured")
    torch.manual_seed(0)
    return arguments


def elapsed(function: Callable[[], Any], calls: int) -> float:
    """Seconds of one call on the GPU, of `calls` in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def medians(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each function, interleaved round by round."""
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, min(50, int(seconds / 10 / max(elapsed(function, 1), 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    while len(next(iter(samples.values()))) < 3 or time.perf_counter() - start < seconds * len(functions):
        for name, function in functions.items():
            samples[name].append(elapsed(function, calls[name]))
    return {name: sorted(s)[len(s) // 2] for name, s in samples.items()}


def launches(function: Callable[[], Any]) -> tuple[int, int]:
    """The kernel launches and the graph launches of a call."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    kernels = sum(count for name, count in counts.items() if "LaunchKernel" in name)
    return kernels, sum(count for name, count in counts.items() if "GraphLaunch" in name)


def copy_rate(size: int = 2**30) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.ones(size // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / min(elapsed(lambda: target.copy_(source), 5) for _ in range(5))


if triton is not None:

    @triton.jit
    def exp_chain(out, CALLS: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = at.to(tl.float32) * 1e-9
        for _ in range(CALLS):  # x -> 2^-x stays in (0, 1)
            x = tl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1;", "=f,f", [-x], dtype=tl.float32, is_pure=True, pack=1
            )
        tl.store(out + at, x)


def exp_rate(calls: int = 2048, block: int = 1024) -> float | None:
    """float32 exponentials per second in registers, by the instruction that the scan uses; None without Triton."""
    if triton is None:
        return None
    blocks = 16 * torch.cuda.get_device_properties().multi_processor_count
    out = torch.empty(blocks * block, device="cuda")
    return calls * out.numel() / min(elapsed(lambda: exp_chain[(blocks,)](out, calls, block), 5) for _ in range(5))


def gpu_name() -> str:
    """The GPU, as a part of file names."""
    return torch.cuda.get_device_name().replace(" ", "-")
