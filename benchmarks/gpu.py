"""Time on a GPU by its own clock, and the rate of copying, a limit measured in the same run."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch


def start(text: str | None, name: str) -> bool:
    """Whether ``--quick`` was given, the one flag of a GPU benchmark; ends where there is no GPU, seeds torch."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, less time, no file written")
    given: bool = parser.parse_args().quick
    if not torch.cuda.is_available():
        raise SystemExit(f"{name}: no GPU here, nothing was measured")
    torch.manual_seed(0)
    return given


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


def copy_rate(size: int = 2**30) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.ones(size // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / min(elapsed(lambda: target.copy_(source), 5) for _ in range(5))
